# cython: language_level=3, nonecheck=True
"""A request that turns its connections into a WebSocket: a handshake, and then bytes both ways.

The handshake is a request like any other: attempts are made and retried, and any response but 101
is passed on as it is. After 101, the two connections get the protocols :class:`ClientSide` and
:class:`EngineSide`, which pass on what they receive and parse no frames; neither is used for
another request. The exchange lasts until one side ends:

- the other side is closed at once, after what was written to it has been flushed;
- a slow reader pauses the other side. A side that does not read for the relay's
  ``stall_timeout_s``, or on which both are silent for ``idle_timeout_s``, ends the exchange;
- when the relay stops, both are aborted.

A connection that is lost without a FIN counts as left by the client, or as broken by the engine.

If only a message of the client says where the request goes, :meth:`Tunnel.accept` accepts the
handshake before there is an engine. As for an event stream that begins early, attempts then remain
possible until an engine accepts the handshake.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE

from kubeai._clock cimport coarse_now, now
from kubeai.gateway.relay._exchange cimport DownstreamEnd, Exchange, UpstreamEnd
from kubeai.gateway.relay._response_head cimport response_head
from kubeai.gateway.relay._text cimport Bytes, view

from kubeai.gateway.relay._exchange import LOST as _LOST

cdef enum:
    SWITCHING = 101
    LINGER_MAX_S = 2  # to flush to the engine what a client sent before it closed
    EARLY_MAX_BYTES = 1 << 20  # buffered before there is an engine; then the client is paused
    GREETING_MAX_BYTES = 4096  # a longer first frame of an engine is always passed on

cdef bytes LINE = b" 101 Switching Protocols"
cdef bytes UPGRADE = b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n"


cdef Py_ssize_t frame_end(bytes data) noexcept:
    """Size of the server frame at the start of ``data``; 0: incomplete; -1: too long."""
    cdef const unsigned char *at = <const unsigned char *> PyBytes_AS_STRING(data)
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    cdef Py_ssize_t end
    if size < 2:
        return 0
    end = 2 + at[1]
    if at[1] == 126:
        if size < 4:
            return 0
        end = 4 + (at[2] << 8 | at[3])
    if at[1] > 126 or end > GREETING_MAX_BYTES:
        return -1
    return end if size >= end else 0


cdef class Tunnel:
    """The two connections of an Exchange whose request is a WebSocket handshake."""

    def __init__(self, Exchange exchange not None, double idle_timeout_s):
        self.exchange = exchange
        self.downstream = exchange.downstream
        self.idle_timeout_s = idle_timeout_s
        exchange.tunnel = self
        exchange.decided = True
        exchange.set_header(b"upgrade", b"websocket")
        exchange.set_header(b"connection", b"Upgrade")

    def accept(self, session, bytes headers not None, bytes greeting not None):
        """See the stub."""
        cdef Exchange exchange = self.exchange
        if exchange.finished or exchange.answered or exchange.begun:
            return
        exchange.begun = exchange.decided = True
        exchange.status = SWITCHING
        self.session = session
        self.greeting = b""
        self.early = bytearray()
        headers += self.downstream.head.request_id
        self._open(b"HTTP/1.1" + LINE + b"\r\n" + headers + UPGRADE)
        self.downstream._write(greeting)
        self._take_input()

    def write(self, bytes frame not None):
        """See the stub."""
        if not (self.exchange.finished or self.exchange.answered):
            self.downstream._write(frame)

    def upgraded(self, bytes data not None):
        """The engine has accepted the handshake; ``data`` follows its response."""
        cdef Exchange exchange = self.exchange
        cdef Bytes line = view(LINE)
        cdef Bytes framing = view(UPGRADE)
        cdef bytes early = bytes(self.early) if self.early else None
        exchange.answered = True
        exchange.status = SWITCHING
        exchange.answered_s = now()
        exchange.pool.note_end(SWITCHING)
        if self.client is None:
            self._open(
                response_head(
                    line,
                    &exchange.upstream.head.text,
                    self.downstream.head.request_id,
                    exchange.extra_headers,
                    framing.at,
                    framing.size,
                )
            )
        self._connect(exchange.upstream)
        exchange.body_came = True
        exchange._body_came(now())
        self.early = None
        if self.reserved:
            self._reserve(0)
        if early:
            self._from_client(early)
        self._take_input()
        if data:
            self._from_engine(data)

    cdef int _open(self, bytes head) except -1:
        """Send the client's 101, and take its connection over."""
        self.client = self.downstream.transport
        self.client.set_protocol(ClientSide(self))
        self.downstream.keep_alive = False
        self.downstream._write(head)
        return 0

    cdef int _take_input(self) except -1:
        """Take what the client has sent without waiting for the response."""
        cdef DownstreamEnd downstream = self.downstream
        cdef bytes input = downstream.input
        downstream.input = None
        downstream._set_reading()  # first: an engine that stalls on the input pauses the client
        if input is not None:
            self._from_client(input[downstream.used:])
        return 0

    cdef int _connect(self, UpstreamEnd upstream) except -1:
        self.upstream = upstream
        self.engine = upstream.transport
        self.engine.set_protocol(EngineSide(self))
        upstream.deadline = 0
        set_reading(self.engine, not self.downstream.write_paused)
        set_reading(self.client, True)
        return self._set_deadline()

    cdef int _touch(self) except -1:
        """A side has received data: begin the idle timeout again."""
        if not self._stalls():
            self.downstream.deadline = coarse_now() + self.idle_timeout_s
        return 0

    cdef bint _stalls(self) noexcept:
        """Whether a side does not read what is written to it."""
        return self.downstream.write_paused or (
            self.upstream is not None and self.upstream.write_paused
        )

    cdef int _from_client(self, bytes data) except -1:
        if self.exchange.finished:
            return 0
        if self.upstream is not None:
            self.downstream.body.received_bytes += PyBytes_GET_SIZE(data)
            self._touch()
            self.upstream._write(data)
            return 0
        self.early += data
        if not self._reserve(len(self.early)):
            set_reading(self.client, False)
        return self.exchange._hook(self.session.wake)

    cdef bint _reserve(self, Py_ssize_t size) except -1:
        """Count ``early`` with this size as buffered; False if it must not grow further."""
        if not self.exchange.reserve(size - self.reserved):
            return False
        self.reserved = size
        return size <= EARLY_MAX_BYTES

    cdef int _from_engine(self, bytes data) except -1:
        cdef Py_ssize_t end
        if self.exchange.finished:
            return 0
        self._touch()
        if self.greeting is not None:
            data = self.greeting + data
            end = frame_end(data)
            self.greeting = None if end else data
            if end > 0 and b'"session.created"' in data[:end]:  # the client has had one
                data = data[end:]
        if data and self.greeting is None:
            self.downstream._write(data)
        return 0

    cdef int _client_left(self, bint is_reset) except -1:
        """End the exchange: the client sent a FIN, or its connection was lost (``is_reset``)."""
        cdef UpstreamEnd upstream = self.upstream
        if self.exchange.finished:
            return 0
        self.exchange.whole = not is_reset
        if upstream is not None:
            self.exchange.upstream = None  # `_abort` would abort it; `close` flushes it first
            upstream.exchange = None
            upstream.deadline = coarse_now() + LINGER_MAX_S
            self.engine.close()
        self.downstream._abort()
        return 0

    cdef int _engine_left(self, bint is_reset) except -1:
        """End the exchange: the engine sent a FIN, or its connection was lost (``is_reset``)."""
        cdef DownstreamEnd downstream = self.downstream
        if self.exchange.finished:
            return 0
        if is_reset:
            self.exchange.broken = True
            self.exchange.pool.note_failure(_LOST)
        set_reading(self.client, True)  # unread input would cause a RST, which discards output
        downstream.input = b""  # so that the connection lingers
        downstream._response_ended()
        return 0

    cdef int _client_stalls(self, bint stalls) except -1:
        """The client's write buffer has become full (``stalls``), or has drained."""
        self.downstream.write_paused = stalls
        if self.exchange.finished:
            return 0
        if self.upstream is not None:
            set_reading(self.engine, not stalls)
        elif self.exchange.upstream is not None and not stalls:
            self.exchange.upstream._resume()
        return self._set_deadline()

    cdef int _engine_stalls(self, bint stalls) except -1:
        """The engine's write buffer has become full (``stalls``), or has drained."""
        self.upstream.write_paused = stalls
        if self.exchange.finished:
            return 0
        set_reading(self.client, not stalls)
        return self._set_deadline()

    cdef int _set_deadline(self) except -1:
        if self._stalls():
            self.downstream.deadline = coarse_now() + self.downstream.relay.stall_timeout_s
        elif self.upstream is not None:
            self._touch()
        else:
            self.downstream.deadline = 0  # the Exchange limits the wait for an engine
        return 0


cdef int set_reading(object transport, bint reading) except -1:
    if not transport.is_closing():
        if reading:
            transport.resume_reading()
        else:
            transport.pause_reading()
    return 0


cdef class ClientSide:
    """The protocol of a client's connection after the handshake."""

    cdef Tunnel tunnel

    def __init__(self, Tunnel tunnel not None):
        self.tunnel = tunnel

    def data_received(self, bytes data):
        self.tunnel._from_client(data)

    def eof_received(self):
        self.tunnel._client_left(False)
        return False

    def connection_lost(self, error):
        self.tunnel._client_left(True)
        (<object> self.tunnel.downstream).connection_lost(error)

    def pause_writing(self):
        self.tunnel._client_stalls(True)

    def resume_writing(self):
        self.tunnel._client_stalls(False)


cdef class EngineSide:
    """The protocol of an engine's connection after the handshake."""

    cdef Tunnel tunnel

    def __init__(self, Tunnel tunnel not None):
        self.tunnel = tunnel

    def data_received(self, bytes data):
        self.tunnel._from_engine(data)

    def eof_received(self):
        self.tunnel._engine_left(False)
        return False

    def connection_lost(self, error):
        self.tunnel._engine_left(True)
        (<object> self.tunnel.upstream).connection_lost(error)

    def pause_writing(self):
        self.tunnel._engine_stalls(True)

    def resume_writing(self):
        self.tunnel._engine_stalls(False)
