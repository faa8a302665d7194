# cython: language_level=3, nonecheck=True
"""One request and its response, between the two ends of their path.

The ends (``DownstreamEnd``, ``UpstreamEnd`` and the ``Pool`` of upstream connections) are abstract
here, so that this module imports none of those that implement them.
"""

from cpython.bytes cimport PyBytes_GET_SIZE
from libc.stdint cimport int64_t

from kubeai._clock cimport now
from kubeai.gateway.relay._relay cimport Connection, Relay
from kubeai.gateway.relay._request_head cimport RequestHead, id_in

# Why an attempt failed: passed to Exchange.wants_retry and give_up.
CONNECT = 1  # the connection failed or timed out
LOST = 2  # the connection ended before the response head was complete
INVALID = 3  # the response is not valid HTTP
TIMEOUT = 4  # no first byte in time
STATUS = 5  # a response that the Exchange may not want to pass on


# -- the abstract ends -----------------------------------------------------------------------------

cdef class DownstreamEnd(Connection):
    """A client's connection; see ``_downstream.pyx``."""

    cdef int _set_reading(self) except -1:
        """Read only while data can be used, or to notice that the client disconnects."""
        raise NotImplementedError

    cdef int _expect_body(self) except -1:
        """Send 100 Continue if the client expects it."""
        raise NotImplementedError

    cdef int _take_body(self) except -1:
        """Consume the available part of the current request's body."""
        raise NotImplementedError

    cdef bytes _piece(self):
        """Take the next piece of the body; None if there is none or it is invalid.

        It is decoded if the Exchange receives it, and as it came if it is streamed.
        """
        raise NotImplementedError

    cdef int _write(self, bytes data) except -1:
        """Write a part of the response."""
        raise NotImplementedError

    cdef bint _settle(self) except -1:
        """Decide, before a response head is sent, whether to keep the connection alive."""
        raise NotImplementedError

    cdef int _respond(self, int status, bytes body, bytes headers) except -1:
        """Send a JSON response from the Exchange itself, which ends the Exchange."""
        raise NotImplementedError

    cdef int _refuse_length(self) except -1:
        """Respond that the body is longer than its limit, and close the connection."""
        raise NotImplementedError

    cdef int _crashed(self, Exchange exchange, object error) except -1:
        """A hook raised, which is a bug: end this request and no other."""
        raise NotImplementedError

    cdef int _response_ended(self) except -1:
        """The last byte of a response has been written."""
        raise NotImplementedError

    cdef int _cut(self, bint looks_complete) except -1:
        """Abort a broken response so that the client can tell that it is incomplete."""
        raise NotImplementedError


cdef class UpstreamEnd(Connection):
    """A connection to an engine; see ``_upstream.pyx``."""

    cpdef bint usable(self):
        """Whether a request can be written: the connection is not known to be closed."""
        raise NotImplementedError

    cpdef close(self):
        """Close at once, even if it was never established and connection_lost will not come."""
        raise NotImplementedError

    cdef int _start(self, Exchange exchange) except -1:
        """Send an exchange's request."""
        raise NotImplementedError

    cdef int _write(self, bytes data) except -1:
        """Write a piece of a streamed request body."""
        raise NotImplementedError

    cdef int _pause(self) except -1:
        """Stop reading the response, because the client is slow."""
        raise NotImplementedError

    cdef int _resume(self) except -1:
        """Read the response again."""
        raise NotImplementedError


cdef class Pool:
    """The connections to one upstream; see ``_pool.pyx``."""

    cdef UpstreamEnd take(self):
        """An idle connection, or None."""
        raise NotImplementedError

    cdef int give(self, UpstreamEnd upstream) except -1:
        """Keep a connection for the next request if there is room; otherwise close it."""
        raise NotImplementedError

    cdef int note_failure(self, int failure) except -1:
        """Record that an attempt failed or its response broke off."""
        raise NotImplementedError

    cdef int note_answer(self, int status, double now_s) except -1:
        """Record a response head, received at ``now_s`` (CLOCK_MONOTONIC).

        Some statuses count as a failure of the upstream.
        """
        raise NotImplementedError

    cdef int note_end(self, int status) except -1:
        """Record that a response is complete."""
        raise NotImplementedError


# -- the exchange ----------------------------------------------------------------------------------

cdef class Exchange:
    """One request and its response. Subclasses decide how it is handled.

    The relay calls the hooks (``on_…``, ``wants_retry``, ``retry``, ``give_up``). Hooks call the
    actions (``collect``, ``receive``, ``stream``, ``send``, ``answer``), at once or later until the
    exchange is ``finished``. An action after the client has disconnected does nothing.
    """

    def __cinit__(self, DownstreamEnd downstream, *args):
        self.downstream = downstream

    @property
    def method(self):
        return self.downstream.head.method.decode("ascii")

    @property
    def target(self):
        return self.downstream.head.target.decode("latin-1")

    @property
    def peer(self):
        """The client's address, without the port."""
        return self.downstream.peer.decode("ascii")

    @property
    def host(self):
        """See the stub."""
        cdef bytes host = self.downstream.head.host
        return None if host is None else host.decode("latin-1")

    @property
    def is_forwarded(self):
        """See the stub."""
        return self.downstream.head.forwarded_for is not None

    @property
    def request_bytes(self):
        """Size of the request body."""
        if self.body is not None:
            return PyBytes_GET_SIZE(self.body)
        return self.downstream.body.received_bytes

    @property
    def announced_bytes(self):
        """The Content-Length of the request; -1 if it has none."""
        return self.downstream.head.length

    @property
    def request_id(self):
        """The client's X-Request-Id, or a generated one."""
        return id_in(self.downstream.head.request_id)

    @property
    def asks_websocket(self):
        """Whether the client requests a WebSocket upgrade. HTTP/1.0 has no upgrades."""
        return self.downstream.head.asks_websocket and not self.downstream.head.http10

    def set_header(self, bytes name, bytes value):
        """Replace a header in the upstream request; ``name`` in lower case."""
        self.downstream.head.replace(name, value)

    def add_response_header(self, bytes name not None, bytes value not None):
        """Add a header to the upstream's response. Replaces one of this name added before."""
        cdef bytes kept = b"" if self.extra_headers is None else self.extra_headers
        cdef list lines = [line for line in kept.splitlines(True) if not line.startswith(name)]
        self.extra_headers = b"%b%b: %b\r\n" % (b"".join(lines), name, value)

    cdef int _add_common_headers(self, bytes lines) except -1:
        """Add header lines, each ending in CRLF, to all responses. Called once."""
        self.common_headers = lines
        self.extra_headers = lines if self.extra_headers is None else self.extra_headers + lines
        return 0

    def drop_response_header(self, bytes name not None):
        """Remove a header that :meth:`add_response_header` added."""
        if self.extra_headers is not None:
            self.extra_headers = b"".join(
                [line for line in self.extra_headers.splitlines(True) if not line.startswith(name)]
            )

    def drop_header(self, bytes name):
        """Remove a header from the upstream request; ``name`` in lower case."""
        self.downstream.head.drop({name})

    def headers(self, bytes name):
        """The values of a header, in order; ``name`` in lower case. Excludes hop-by-hop ones."""
        return self.downstream.head.values(name)

    # actions

    cpdef collect(self, int64_t max_bytes):
        """Read the whole body, then call ``on_body``."""
        self.collecting = True
        self._accept_body(max_bytes)

    def receive(self, int64_t max_bytes):
        """Read the body in pieces: ``on_piece``, then ``next_piece``, until ``received``."""
        self.receiving = True
        self._accept_body(max_bytes)

    def next_piece(self):
        """Take what has been received of the body, decoded; None if ``on_piece`` will announce it.

        No more than one piece is read from the client ahead of this call.
        """
        cdef bytes piece
        if self.finished:
            return None
        piece = self.downstream._piece()
        if not self.finished:
            self.downstream._set_reading()
        return piece

    def reserve(self, int64_t size_bytes):
        """Count more memory as buffered until the exchange ends; False if there is no room."""
        cdef Relay relay = self.downstream.relay
        cdef bint has_room = relay.buffered_bytes + size_bytes <= relay.buffer_max_bytes
        if has_room and not self.finished:
            relay.buffered_bytes += size_bytes
            self.downstream.buffered_bytes += size_bytes
        return has_room

    @property
    def received(self):
        """Whether the last piece of the body has been taken."""
        return self.downstream.state != BODY

    def stream(self, Pool pool not None, bytes path not None, int64_t max_bytes):
        """Stream the request to an upstream and its response back. No retries."""
        cdef UpstreamEnd upstream = None
        self.streaming = True
        if not self._accept_body(max_bytes):
            return
        self.pool = pool
        self.path = path
        self.sending = None
        if self.downstream.state == BUSY:  # a body that is still arriving cannot be replayed
            upstream = pool.take()
        if upstream is None:
            self.connecting = pool.connect(self)
        else:
            upstream._start(self)

    cpdef send(self, Pool pool, bytes path, bytes body):
        """Start an attempt: send the request and relay the response. ``body``: None for none."""
        self.sending = body
        self._attempt_at(pool, path)

    def send_in_pieces(self, Pool pool not None, bytes path not None, int64_t size_bytes):
        """Start an attempt with a body of ``size_bytes``: ``on_send``, then ``write`` it.

        ``on_send`` is called again if the attempt needs a new connection. The body then begins
        again.
        """
        self.in_pieces = True
        self.sending_bytes = size_bytes
        self._attempt_at(pool, path)

    def write(self, bytes piece not None):
        """Write the next piece of the body. False: wait for ``on_writable`` before the next."""
        cdef UpstreamEnd upstream = self.upstream
        if upstream is None:  # the attempt is over
            return False
        upstream._write(piece)
        return not upstream.write_paused

    cdef bint _accept_body(self, int64_t max_bytes) except -1:
        """Have the client send the body.

        False: its Content-Length exceeds the limit, and the request has been rejected.
        """
        self.decided = True
        self.downstream.body.max_bytes = max_bytes
        if self.downstream.head.length > max_bytes:
            self.downstream._refuse_length()
            return False
        self.downstream._expect_body()
        return True

    cdef int _attempt_at(self, Pool pool, bytes path) except -1:
        cdef UpstreamEnd upstream
        if self.finished:
            return 0
        self.decided = True
        self.pool = pool
        self.path = path
        self.replayed = False
        upstream = pool.take()
        if upstream is None:
            self.connecting = pool.connect(self)
        else:
            upstream._start(self)
        return 0

    def answer(self, int status, bytes body, bytes headers=b""):
        """Respond with JSON, without an upstream. ``headers``: extra lines, each ending in CRLF."""
        cdef DownstreamEnd downstream = self.downstream
        if self.finished or self.answered:
            return
        self.decided = self.answered = True
        self.status = status
        self.answered_s = now()
        self._detach()
        if self.common_headers is not None:
            headers += self.common_headers
        downstream._respond(status, body, headers)

    def fail(self, error):
        """End the request because of a bug or a local fault: 500, or a broken response."""
        if not self.finished:
            self.downstream._crashed(self, error)

    # called by pools

    def connected(self, UpstreamEnd upstream):
        """The connection requested with ``pool.connect`` is established."""
        if self.connecting is None:
            upstream._abort()
            return
        self.connecting = None
        if not upstream.usable():  # already closed again
            self._failed(LOST)
            return
        upstream._start(self)
        if not self.finished:
            self.downstream._set_reading()

    def connect_failed(self):
        if self.connecting is not None:
            self.connecting = None
            self._failed(CONNECT)

    # hooks

    def on_head(self):
        """The head is complete: call ``collect``, ``stream`` or ``answer``."""

    def on_body(self):
        """``body`` is complete: call ``send`` or ``answer``, now or later."""

    def on_piece(self):
        """A piece of the body has been received: call ``next_piece``, now or later."""

    def on_send(self):
        """The head of an upstream request is written: ``write`` its body, now or later."""

    def on_writable(self):
        """The next piece of the upstream request's body can be written."""

    def wants_retry(self, int failure, int status):
        """Whether to make another attempt: True calls ``retry``, False ``give_up``.

        Nothing has reached the client. ``status``: of the response, if ``failure`` is STATUS;
        False then passes that response on.
        """
        return False

    def retry(self):
        """Call ``send`` again or ``answer``, now or later."""

    def give_up(self, int failure):
        """Respond with an error."""

    def on_refusal(self, int status, str content_type, bytes body):
        """The response cannot continue the event stream that has begun: end it with an error.

        ``body``: up to 64 KiB of the response's.
        """

    def attempt_elsewhere(self):
        """The upstream is not expected to respond: make another attempt if possible."""

    def on_end(self):
        """The exchange is over, answered or not: release its resources. Called once."""

    # entry points from the relay, which a compiled subclass may override

    cdef int _begun(self) except -1:
        self.on_head()
        return 0

    cdef int _collected(self) except -1:
        self.on_body()
        return 0

    cdef int _body_came(self, double now_s) except -1:
        """The first byte of the response's body has been received."""
        return 0

    cdef int _body_ended(self, const char *tail, Py_ssize_t size) except -1:
        """The response is complete. ``tail``: the last bytes of its body, up to NUL."""
        return 0

    cdef int _ended(self) except -1:
        self.on_end()
        return 0

    # internal

    cdef int _failed(self, int failure) except -1:
        """An attempt failed and its upstream connection is gone; nothing has reached the client."""
        try:
            if self.replayed and failure == LOST:
                # The first connection was therefore not merely closed while idle: count that
                # failure as well. Not as LOST, which counts the requests that a crashing engine had
                # in flight, because this request would count twice.
                self.pool.note_failure(INVALID)
            self.pool.note_failure(failure)
            if not self.streaming and self.wants_retry(failure, 0):
                self.retry()
            else:
                self.give_up(failure)
        except Exception as error:
            self.downstream._crashed(self, error)
        return 0

    cdef int _retry(self) except -1:
        return self._hook(self.retry)

    cdef int _hook(self, hook) except -1:
        try:
            hook()
        except Exception as error:
            self.downstream._crashed(self, error)
        return 0

    cpdef detach(self):
        """Abandon the current attempt, if any, and close its upstream connection.

        ``send`` or ``answer`` must follow.
        """
        self._detach()

    cdef int _detach(self) except -1:
        """Drop the upstream, if any, which stops a response that is no longer wanted."""
        cdef UpstreamEnd upstream = self.upstream
        cdef object connecting = self.connecting
        self.upstream = None
        self.connecting = None
        if connecting is not None:
            connecting.cancel()
        if upstream is not None:
            upstream.exchange = None
            upstream._abort()
        return 0
