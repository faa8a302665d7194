# cython: language_level=3, nonecheck=True
"""One connection to an engine: the requests sent on it, and their responses."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t

from kubeai._clock cimport coarse_now, now
from kubeai.gateway.relay._exchange cimport BODY, DownstreamEnd, Exchange, Pool, UpstreamEnd
from kubeai.gateway.relay._renaming cimport Renaming
from kubeai.gateway.relay._response_body cimport CHUNKED, LENGTH, NOTHING, UNTIL_CLOSE, ResponseBody
from kubeai.gateway.relay._response_head cimport ResponseHead
from kubeai.gateway.relay._socket cimport descriptor, write_at_once, write_now
from kubeai.gateway.relay._text cimport cut, put_bytes
from kubeai.gateway.relay._usage_filter cimport UsageFilter

from kubeai.gateway.relay._exchange import INVALID as _INVALID
from kubeai.gateway.relay._exchange import LOST as _LOST
from kubeai.gateway.relay._exchange import STATUS as _STATUS
from kubeai.gateway.relay._exchange import TIMEOUT as _TIMEOUT

cdef enum:
    BODY_IN_HEAD_WRITE_MAX_BYTES = 65536  # above it, a second buffer is cheaper than a copy
    REFUSAL_MAX_BYTES = 65536  # kept of a response that becomes an error event


cdef class Upstream(UpstreamEnd):
    """One connection to an engine; idle in its pool, or serving one Exchange."""

    def __init__(self, Pool pool not None):
        self.fd = -1
        self.head = ResponseHead.__new__(ResponseHead)
        self.body = ResponseBody.__new__(ResponseBody)
        self.pool = pool
        self.relay = pool.relay
        self.host_line = b"Host: " + pool.host.encode("ascii") + b"\r\n"
        self.first_byte_timeout_s = pool.first_byte_timeout_s
        self.between_bytes_timeout_s = pool.between_bytes_timeout_s

    # called by the pool

    cpdef bint usable(self):
        return not self.ended and self.transport is not None

    cpdef close(self):
        self.idle = False
        self.relay.upstreams.discard(self)
        self._abort()

    # called by the event loop

    def connection_made(self, transport):
        self.transport = transport
        write_at_once(transport)
        self.fd = descriptor(transport)
        self.relay.upstreams.add(self)

    def data_received(self, bytes data):
        if self.exchange is None:
            self._lose()  # data without a request
            return
        try:
            self._take(data)
        except Exception as error:
            self.relay._report("relaying a response failed", error)
            self._broken(_INVALID)

    def eof_received(self):
        self.ended = True
        if self.exchange is not None and self.head_done and self.body.framing == UNTIL_CLOSE:
            self._end_with_connection()
        else:
            self._abort()  # pending writes have no reader
        return False

    def connection_lost(self, error):
        self.relay.upstreams.discard(self)
        self.ended = True
        self.transport = None
        self.fd = -1
        self._lose()
        if self.exchange is None:
            return
        if self.served and not self.touched and not self.head_done and self._replay():
            return
        self._broken(_LOST)

    def pause_writing(self):
        self.write_paused = True
        if self.exchange is not None:
            self.exchange.downstream._set_reading()

    def resume_writing(self):
        self.write_paused = False
        if self.exchange is None:
            return
        if self.exchange.in_pieces:
            self.exchange._hook(self.exchange.on_writable)
        elif self.exchange.streaming:
            if self.exchange.downstream.state == BODY:
                self.exchange.downstream._take_body()
            if self.exchange is not None:
                self.exchange.downstream._set_reading()

    # the request

    cdef int _start(self, Exchange exchange) except -1:
        cdef DownstreamEnd downstream = exchange.downstream
        cdef bytes body = exchange.sending
        self.exchange = exchange
        exchange.upstream = self
        self.idle = False
        self.touched = self.head_done = False
        self.refusal = None
        if exchange.streaming:
            body = downstream._piece()
            if exchange.finished:  # the piece was invalid
                return 0
        self.unsent_bytes = exchange.sending_bytes if exchange.in_pieces else 0
        self._write_request(body)
        self.sent_s = now()
        self.deadline = self.sent_s + self.first_byte_timeout_s if self.first_byte_timeout_s else 0
        if exchange.in_pieces:
            exchange._hook(exchange.on_send)
        elif exchange.begun and downstream.write_paused:
            self._pause()
        return 0

    cdef int _write_request(self, bytes body) except -1:
        cdef Exchange exchange = self.exchange
        cdef DownstreamEnd downstream = exchange.downstream
        cdef int64_t length = downstream.head.length
        cdef bint together = body is None or PyBytes_GET_SIZE(body) <= BODY_IN_HEAD_WRITE_MAX_BYTES
        cdef bytes out
        if exchange.in_pieces:
            length = exchange.sending_bytes
        elif exchange.sending is not None:
            length = PyBytes_GET_SIZE(body)
        out = downstream.head.for_upstream(
            exchange.path, self.host_line, length, body if together else None
        )
        if together:
            write_now(self.fd, self.transport, out)
        else:
            self.transport.writelines((out, body))
        return 0

    cdef int _write(self, bytes data) except -1:
        if self.transport is not None and not self.ended:
            write_now(-1 if self.write_paused else self.fd, self.transport, data)
            self.unsent_bytes -= PyBytes_GET_SIZE(data)
            if self.first_byte_timeout_s and not self.touched:
                self.deadline = coarse_now() + self.first_byte_timeout_s
        return 0

    cdef bint _replay(self) except -1:
        """Send the request again on a new connection to the same upstream.

        Not if the upstream has just failed: then it is resetting all connections, not just closing
        an idle one.
        """
        cdef Exchange exchange = self.exchange
        cdef bint is_sent = exchange.streaming and exchange.downstream.body.received_bytes > 0
        if self.pool.failing or exchange.replayed or is_sent:
            return False
        exchange.replayed = True
        exchange.upstream = None
        self.exchange = None
        exchange.connecting = exchange.pool.connect(exchange)
        return True

    # the response

    cdef int _take(self, bytes data) except -1:
        cdef Py_ssize_t at = 0
        cdef double came_s = 0
        cdef bytes prefix = None
        if not self.head_done:
            self.touched = True
            if self.input is not None:
                data = self.input + data
            else:
                self.head.begin_scan(0)
            came_s = now()
            at = self._take_head(data, came_s)
            if at <= 0:
                return 0
            if self.head.status == 101:
                self.exchange.tunnel.upgraded(cut(data, at, PyBytes_GET_SIZE(data) - at))
                return 0
            if self.exchange.begun:
                self._continue_stream()
            else:
                prefix = self._response_head(data)
            self.exchange.answered_s = came_s
        if self.between_bytes_timeout_s and not self.paused:
            self.deadline = (came_s or coarse_now()) + self.between_bytes_timeout_s
        self._take_response_body(prefix, data, at, came_s)
        return 0

    cdef Py_ssize_t _take_head(self, bytes data, double now_s) except -2:
        """The offset of the response body; 0: the head is incomplete; -1: stop here."""
        cdef ResponseHead head = self.head
        cdef bint has_body
        cdef Py_ssize_t end = head.take(data, self.relay.head_max_bytes)
        if end < 0 or (end and head.status == 101 and self.exchange.tunnel is None):
            self._broken(_INVALID)
            return -1
        if end == 0:
            self.input = data[head.begin:]
            head.shift_scan(head.begin)
            if self.between_bytes_timeout_s:
                self.deadline = coarse_now() + self.between_bytes_timeout_s
            return 0
        self.input = None
        has_body = (
            head.status != 204
            and head.status != 304
            and self.exchange.downstream.head.method != b"HEAD"
        )
        if not has_body and (head.length > 0 or head.chunked):
            head.feed_data = None  # llhttp would wait for a body
        self.body.begin(has_body, head.chunked, head.length)
        self.reusable = head.keep_alive and self.body.framing != UNTIL_CLOSE
        self.pool.note_answer(head.status, now_s)
        if self._may_retry() and self._diverted(data, end):
            return -1
        self.head_done = True
        return end

    cdef bint _may_retry(self):
        """Whether the Exchange may not want to pass the response on: a 5xx, or a body refused."""
        cdef int status = self.head.status
        if self.exchange.streaming or status < 400:
            return False
        return status >= 500 or (
            self.exchange.usage_filter is not None and (status == 400 or status == 422)
        )

    cdef bint _diverted(self, bytes data, Py_ssize_t at) except -1:
        """Ask the Exchange about an error; True if it is not passed on but retried."""
        cdef Exchange exchange = self.exchange
        cdef Py_ssize_t left = PyBytes_GET_SIZE(data) - at
        try:
            if not exchange.wants_retry(_STATUS, self.head.status):
                return False
        except Exception as error:
            exchange.downstream._crashed(exchange, error)
            return True
        exchange.upstream = None
        self.exchange = None
        if self.body.framing == LENGTH and left == self.body.left and self._is_clean():
            if left:
                self.head.skip_body(cut(data, at, left))
            self._release()
        else:
            self._abort()
        exchange._retry()
        return True

    cdef bytes _response_head(self, bytes data):
        """Build the head for the client and decide how the body is framed."""
        cdef DownstreamEnd downstream = self.exchange.downstream
        cdef bint http10 = downstream.head.http10
        cdef bint keep_alive
        cdef bytes extra = self.exchange.extra_headers
        cdef Renaming renaming = self._renaming()
        cdef UsageFilter usage_filter = self._usage_filter()
        if downstream.cors is not None:
            self.head.drop_cors()
            extra = downstream.cors if extra is None else extra + downstream.cors
        if renaming is not None or usage_filter is not None:
            self.head.length = -1
            self.body.send_as(not http10, renaming, usage_filter)
        else:
            self.body.send_as(not http10 and self.body.framing >= CHUNKED, None)
        keep_alive = downstream._settle()
        if http10 and (self.body.framing == UNTIL_CLOSE or self.body.recoded):
            keep_alive = downstream.keep_alive = False
        self.exchange.answered = True
        self.exchange.status = self.head.status
        return self.head.for_client(
            data, downstream.head.request_id, extra, self.body.rechunks, http10, keep_alive
        )

    cdef int _continue_stream(self) except -1:
        """Decide how the body continues the event stream that has begun, if it can."""
        cdef bint http10 = self.exchange.downstream.head.http10
        if (
            self.head.status != 200
            or self.exchange.tunnel is not None
            or self.head.is_compressed()
            or not self.head.content_type().lower().startswith("text/event-stream")
        ):
            self.refusal = b""
            self.body.send_as(False, None)
        else:
            self.body.send_as(not http10, self._renaming(), self._usage_filter())
        return 0

    cdef Renaming _renaming(self):
        """The Exchange's renaming of the model, if the body can be read; or None."""
        cdef Renaming renaming = self.exchange.renaming
        cdef str kind
        cdef bint is_events
        cdef bint is_json
        if renaming is None or self.body.framing == NOTHING or self.head.is_compressed():
            return None
        kind = self.head.content_type().lower()
        is_events = kind.startswith("text/event-stream")
        is_json = kind.startswith("application/json")
        if not (is_events or is_json or kind.startswith("application/x-ndjson")):
            return None
        renaming.begin(is_events, is_json)
        return renaming

    cdef UsageFilter _usage_filter(self):
        """The Exchange's filter of the report of usage, if the body is an event stream; or None."""
        cdef UsageFilter usage_filter = self.exchange.usage_filter
        if (
            usage_filter is None
            or self.head.status != 200
            or self.body.framing == NOTHING
            or self.head.is_compressed()
            or not self.head.content_type().lower().startswith("text/event-stream")
        ):
            return None
        usage_filter.begin()
        return usage_filter

    cdef int _take_response_body(
        self, bytes prefix, bytes data, Py_ssize_t at, double came_s
    ) except -1:
        """Pass on the received part of the response body, after ``prefix``.

        ``came_s``: when it was received; 0: now.
        """
        cdef Exchange exchange = self.exchange
        cdef ResponseBody body = self.body
        cdef bytes piece = None
        cdef Py_ssize_t size = body.take(data, at)
        cdef bint complete = body.ended
        if size < PyBytes_GET_SIZE(data) - at:  # unexpected bytes after the end of the response
            self.reusable = False
        if size:
            if not exchange.body_came:
                exchange.body_came = True
                exchange._body_came(came_s or now())
            piece = cut(data, at, size)
            if body.framing == LENGTH:
                self.head.skip_body(piece)
        if body.recoded:
            piece = body.recode(piece)
        if self.refusal is not None:
            if piece is not None:
                self.refusal += piece
            complete = complete or PyBytes_GET_SIZE(self.refusal) >= REFUSAL_MAX_BYTES
        else:
            if size:
                exchange.answered = True
            if prefix is not None:
                piece = self._after(prefix, piece)
            if piece is not None:
                exchange.downstream._write(piece)
        if body.malformed:
            self._broken(_INVALID)
        elif complete:
            if body.framing == CHUNKED:
                self.head.skip_body(b"0\r\n\r\n")
            self._complete()
        return 0

    cdef bytes _after(self, bytes prefix, bytes piece):
        """What remains to be written of both: a head goes out with the first piece of its body."""
        cdef bytes out
        if piece is None:
            return prefix
        if PyBytes_GET_SIZE(piece) > BODY_IN_HEAD_WRITE_MAX_BYTES:
            self.exchange.downstream._write(prefix)
            return piece
        out = PyBytes_FromStringAndSize(NULL, PyBytes_GET_SIZE(prefix) + PyBytes_GET_SIZE(piece))
        put_bytes(put_bytes(PyBytes_AS_STRING(out), prefix), piece)
        return out

    cdef int _end_with_connection(self) except -1:
        """The response is delimited by the end of the connection, which has come."""
        cdef bytes piece = None
        self.body.ended = True
        if self.body.recoded:
            piece = self.body.recode(None)
        if piece is not None:
            self.exchange.downstream._write(piece)
        return self._complete()

    cdef int _complete(self) except -1:
        """The response is complete."""
        cdef DownstreamEnd downstream = self.exchange.downstream
        self.pool.note_end(self.head.status)
        if self.refusal is not None:
            self._abort()
            return self._refuse(self.exchange)
        if self.body.tail.size:
            self.exchange._body_ended(self.body.end_tail(), self.body.tail.size)
        if self.body.rechunks:
            downstream._write(b"0\r\n\r\n")
        self.exchange.answered = True
        self.exchange.upstream = None
        self.exchange = None
        if self._is_clean() and downstream.state != BODY:
            self._release()
        else:
            self._abort()
        downstream._response_ended()
        return 0

    cdef bint _is_clean(self):
        """Whether the next request can follow: the last one has been sent completely.

        Writing is paused while the transport has data; see ``write_at_once``.
        """
        return (
            self.reusable
            and not self.ended
            and self.unsent_bytes <= 0
            and not self.write_paused
        )

    cdef int _release(self) except -1:
        """Return the connection to the pool."""
        self.served += 1
        self.idle = True
        self.deadline = coarse_now() + self.pool.idle_timeout_s
        self._resume()
        self.pool.give(self)
        return 0

    # ends

    cdef int _broken(self, int failure) except -1:
        """The response cannot be continued: fail the attempt, or cut the client's connection."""
        cdef Exchange exchange = self.exchange
        cdef DownstreamEnd downstream
        self._abort()
        if exchange is None:
            return 0
        self.exchange = None
        exchange.upstream = None
        downstream = exchange.downstream
        if self.refusal is not None:
            self.pool.note_failure(failure)
            self._refuse(exchange)
        elif exchange.answered:
            exchange.broken = True
            self.pool.note_failure(failure)
            downstream._cut(
                downstream.head.http10
                and (self.body.framing != LENGTH or exchange.begun or self.body.recoded)
            )
        else:
            exchange._failed(failure)
        return 0

    cdef int _refuse(self, Exchange exchange) except -1:
        """End an event stream that has begun, because this response cannot continue it."""
        cdef bytes body = self.refusal[:REFUSAL_MAX_BYTES]
        self.exchange = None
        exchange.upstream = None
        try:
            exchange.on_refusal(self.head.status, self.head.content_type(), body)
        except Exception as error:
            exchange.downstream._crashed(exchange, error)
        return 0

    cdef int _lose(self) except -1:
        """Remove the connection from the pool; close it if it serves no Exchange."""
        if self.idle:
            self.idle = False
            self.pool.forget(self)
        if self.exchange is None:
            self._abort()
        return 0

    cdef int _abort(self) except -1:
        self.ended = True
        self.deadline = 0
        if self.transport is not None:
            self.transport.abort()
        return 0

    cdef int _pause(self) except -1:
        if not self.paused and self.transport is not None:
            self.paused = True
            self.deadline = 0  # the client is slow, not the upstream
            self.transport.pause_reading()
        return 0

    cdef int _resume(self) except -1:
        if self.paused:
            self.paused = False
            if self.exchange is not None and self.between_bytes_timeout_s:
                self.deadline = coarse_now() + self.between_bytes_timeout_s
            if self.transport is not None:
                self.transport.resume_reading()
        return 0

    cdef int _expired(self) except -1:
        self.deadline = 0
        if self.exchange is None:
            self._lose()
        else:
            self._broken(_TIMEOUT)
        return 0
