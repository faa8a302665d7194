# cython: language_level=3, nonecheck=True
"""One client's connection: its requests, one at a time, and the responses written to it."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t

from kubeai._clock cimport coarse_now
from kubeai.gateway.relay._exchange cimport (
    BODY,
    BUSY,
    CLOSED,
    IDLE,
    LEAVING,
    DownstreamEnd,
    Exchange,
    UpstreamEnd,
)
from kubeai.gateway.relay._head cimport find_head_end
from kubeai.gateway.relay._relay cimport Relay
from kubeai.gateway.relay._request_body cimport COMPLETE, TOO_LONG, RequestBody
from kubeai.gateway.relay._request_head cimport RequestHead, id_in
from kubeai.gateway.relay._response_head cimport json_response
from kubeai.gateway.relay._socket cimport descriptor, write_at_once, write_now
from kubeai.gateway.relay._text cimport cut

from kubeai.gateway.relay._relay import RETRY_AFTER_S as _RETRY_AFTER_S

cdef extern from *:
    """
    #include <sys/socket.h>
    /* Closing the socket then sends RST: for responses delimited by the end of the connection, the
       only way to signal that the response is incomplete. */
    static void kb_reset_on_close(int fd) {
        struct linger linger = {1, 0};
        (void)setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    }
    """
    void kb_reset_on_close(int fd) nogil

cdef enum:
    LINGER_MAX_S = 2  # after responding to a request that was not read completely


cdef class Downstream(DownstreamEnd):
    """One client connection."""

    def __cinit__(self, Relay relay):
        self.relay = relay
        self.state = IDLE
        self.fd = -1
        self.reading = True
        self.head = RequestHead.__new__(RequestHead)
        self.body = RequestBody.__new__(RequestBody)

    # called by the event loop

    def connection_made(self, transport):
        self.transport = transport
        write_at_once(transport)
        self.fd = descriptor(transport)
        address = transport.get_extra_info("peername")
        self.peer = address[0].encode() if isinstance(address, tuple) else b"unknown"
        self.relay.downstreams.add(self)
        self.deadline = coarse_now() + self.relay.keep_alive_timeout_s
        if len(self.relay.downstreams) > self.relay.connections_max:
            self._refuse(503, "Too many connections are open.")

    def data_received(self, bytes data):
        if self.state >= LEAVING:
            return
        if self.input is None:
            self.input = data
            self.used = 0
        else:
            self._append(data)
        if self.state == BODY:
            self._take_body()
        if self.state == IDLE:
            self._pump()
        self._set_reading()

    def eof_received(self):
        """A client that half-closes counts as disconnected, as in nginx and Go."""
        if self.exchange is not None:
            self._abort()
        return False

    def connection_lost(self, error):
        self.relay.downstreams.discard(self)
        self.state = CLOSED
        self.transport = None
        self.fd = -1
        self.input = None
        self.body.clear()
        if self.exchange is not None:
            self._finish()

    def pause_writing(self):
        self.write_paused = True
        self.deadline = coarse_now() + self.relay.stall_timeout_s
        if self.exchange is not None and self.exchange.upstream is not None:
            self.exchange.upstream._pause()

    def resume_writing(self):
        self.write_paused = False
        if self.state == IDLE:
            self.deadline = coarse_now() + self.relay.keep_alive_timeout_s
        elif self.state < LEAVING:
            self.deadline = 0
        if self.exchange is not None and self.exchange.upstream is not None:
            self.exchange.upstream._resume()
        if self.state == IDLE:
            self._pump()
        self._set_reading()

    # the input

    cdef int _append(self, bytes data) except -1:
        if self.used:
            self.input = self.input[self.used:]
            self.head.shift_scan(self.used)
            self.used = 0
        self.input += data
        return 0

    cdef void _use(self, Py_ssize_t until) noexcept:
        """Mark the input as consumed up to an offset."""
        if until == PyBytes_GET_SIZE(self.input):
            self.input = None
            self.used = 0
        else:
            self.used = until

    cdef int _set_reading(self) except -1:
        cdef bint reading
        cdef bint in_pieces
        if self.state >= LEAVING:
            return 0
        in_pieces = self.state == BODY and not self.exchange.collecting
        if in_pieces and self.exchange.receiving:
            reading = self.input is None
        elif in_pieces:
            reading = (
                self.exchange.upstream is not None and not self.exchange.upstream.write_paused
            )
        elif self.state == IDLE:
            reading = self.input is None or not self.write_paused
        else:
            reading = self.state == BODY or self.input is None
        if reading != self.reading:
            self.reading = reading
            if reading:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()
        if in_pieces and not self.write_paused:
            self.deadline = coarse_now() + self.relay.body_timeout_s if reading else 0
        return 0

    # heads

    cdef int _pump(self) except -1:
        """Take pipelined requests from the input for as long as each is answered immediately."""
        if self.pumping:
            return 0
        self.pumping = True
        try:
            while (
                self.state == IDLE
                and self.input is not None
                and not self.write_paused
                and self._take_head()
            ):
                pass
        finally:
            self.pumping = False
        return 0

    cdef bint _take_head(self) except -1:
        """Take a request head and begin the request; False if it is incomplete or bad."""
        cdef const char *data = PyBytes_AS_STRING(self.input)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(self.input)
        cdef Py_ssize_t end
        cdef RequestHead head = self.head
        if not self.head_started:
            head.begin_scan(self.used)
            if not (c"A" <= data[self.used] <= c"Z" or data[self.used] == c"\r"):
                return self._refuse(400, "This is not an HTTP request.")
        end = find_head_end(&head.scan, data, size)
        if end < 0:
            return self._refuse(
                400, "A line of the request head does not end in CRLF, or is folded."
            )
        if (end if end else size) - self.used > self.relay.head_max_bytes:
            return self._refuse(
                431, f"The request head is longer than {self.relay.head_max_bytes} bytes."
            )
        if head.scan.lines - 1 > self.relay.head_max_count:
            return self._refuse(
                431, f"The request has more than {self.relay.head_max_count} headers."
            )
        if end == 0:
            if head.scan.lines == 0 and head.scan.line == size:
                self._use(size)  # only empty lines, which some old clients send after a body
            elif not self.head_started:
                self.head_started = True
                self.deadline = coarse_now() + self.relay.head_timeout_s
            return False
        self.head_started = False
        if not head.parse(self.input, self.used, end):
            return self._refuse(417 if head.fault.startswith("Expect") else 400, head.fault)
        return self._begin(end)

    cdef bint _begin(self, Py_ssize_t end) except -1:
        """The head is complete and valid: create the Exchange, which decides what to do next."""
        cdef Exchange exchange
        self.relay.requests += 1
        self.head.complete(self.peer, self.relay.id_prefix, self.relay.requests)
        self.keep_alive = self.head.keep_alive
        self._use(end)
        self.deadline = 0
        self.body.begin(self.head.length, self.head.chunked)
        self.state = BUSY if self.body.state == COMPLETE else BODY
        exchange = self.relay.exchange(self)
        self.exchange = exchange
        self.relay.exchanges += 1
        try:
            exchange._begun()
            if self.exchange is exchange and not exchange.decided:
                raise RuntimeError("on_head called no action")
        except Exception as error:
            self._crashed(exchange, error)
        if self.exchange is exchange and exchange.collecting:
            if self.state == BODY:
                self._take_body()
            elif exchange.body is None:
                self._body_whole(b"")
        return True

    # bodies

    cdef bint _buffer(self, int64_t size) except -1:
        """Account for ``size`` buffered bytes; False: over the limit, the request is rejected."""
        self.relay.buffered_bytes += size - self.buffered_bytes
        self.buffered_bytes = size
        if self.relay.buffered_bytes <= self.relay.buffer_max_bytes:
            return True
        return self._refuse(503, "The buffer for request bodies is full.")

    cdef int _take_body(self) except -1:
        cdef UpstreamEnd upstream
        cdef bytes piece
        if self.exchange.collecting:
            if self.input is not None:
                self._collect()
            if self.state == BODY and self.deadline == 0:
                self.deadline = coarse_now() + self.relay.body_timeout_s
        elif self.input is not None and self.exchange.receiving:
            self.exchange._hook(self.exchange.on_piece)
        elif self.input is not None:
            upstream = self.exchange.upstream
            if upstream is not None and not upstream.write_paused:
                piece = self._piece()
                if piece is not None:
                    upstream._write(piece)
        return 0

    cdef int _expect_body(self) except -1:
        if self.head.expects and self.state == BODY and self.input is None and not self.head.http10:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        return 0

    cdef int _collect(self) except -1:
        cdef Py_ssize_t size = self.body.collect(self.input, self.used)
        cdef bytes body
        if self.body.state > COMPLETE:
            return self._refuse_body()
        self._use(self.used + size)
        if self.body.state != COMPLETE and not self.head.chunked and self.fd >= 0:
            self.body.receive(self.fd)
        if self._buffer(self.body.buffered_bytes()) and self.body.state == COMPLETE:
            body = self.body.take()
            self._body_whole(body)
        return 0

    cdef int _body_whole(self, bytes body) except -1:
        cdef Exchange exchange = self.exchange
        self.state = BUSY
        self.deadline = 0
        if body or self.head.chunked:
            self.head.skip_body(b"0\r\n\r\n" if self.head.chunked else body)
        exchange.body = body
        try:
            exchange._collected()
        except Exception as error:
            self._crashed(exchange, error)
        return 0

    cdef bytes _piece(self):
        cdef Py_ssize_t size = 0
        cdef bytes piece
        if self.state != BODY or self.input is None:
            return None
        piece = self.body.next_piece(self.input, self.used, &size, self.exchange.receiving)
        if self.body.state > COMPLETE:
            self._refuse_body()
            return None
        self._use(self.used + size)
        if not self.head.chunked:
            self.head.skip_body(piece)
        elif self.body.state == COMPLETE:
            self.head.skip_body(b"0\r\n\r\n")
        if self.body.state == COMPLETE:
            self.state = BUSY
            if not self.write_paused:
                self.deadline = 0
        return piece

    cdef int _refuse_body(self) except -1:
        if self.body.state == TOO_LONG:
            return self._refuse_length()
        self._refuse(400, "The chunked encoding of the request body is malformed.")
        return 0

    cdef int _refuse_length(self) except -1:
        self._refuse(413, f"The body is longer than {self.body.max_bytes} bytes.")
        return 0

    # responses

    cdef int _write(self, bytes data) except -1:
        if self.state < LEAVING and self.transport is not None:
            if self.exchange is not None:
                self.exchange.answer_bytes += PyBytes_GET_SIZE(data)
            write_now(-1 if self.write_paused else self.fd, self.transport, data)
        return 0

    cdef bint _settle(self) except -1:
        if (
            self.state == BODY
            and self.input is not None
            and not self.head.chunked
            and self.head.feed_data is not None
            and PyBytes_GET_SIZE(self.input) - self.used >= self.body.left
        ):  # the body is not needed, but has been received
            self.head.skip_body(cut(self.input, self.used, <Py_ssize_t> self.body.left))
            self._use(self.used + <Py_ssize_t> self.body.left)
            self.state = BUSY
        if self.relay.draining or self.state == BODY:
            self.keep_alive = False
        return self.keep_alive

    cdef int _respond(self, int status, bytes body, bytes headers) except -1:
        self._write(self._own_response(status, body, headers, self._settle()))
        return self._response_ended()

    cdef bytes _own_response(self, int status, bytes body, bytes headers, bint keep_alive):
        """A JSON response from the relay or the Exchange itself."""
        if self.head.request_id is not None:
            headers += self.head.request_id
        if self.cors is not None:
            headers += self.cors
        if not keep_alive:
            headers += b"Connection: close\r\n"
        elif self.head.http10:
            headers += b"Connection: keep-alive\r\n"
        return json_response(status, headers, body, self.head.method == b"HEAD")

    cdef bint _refuse(self, int status, str message) except -1:
        """Respond with an error and close the connection. Returns False."""
        cdef bint answered = self.exchange is not None and (
            self.exchange.answered or self.exchange.begun
        )
        if self.exchange is not None:
            if not answered:
                self.exchange.status = status
                self.exchange.whole = True
            self._finish()
        if self.state >= LEAVING:
            return False
        if answered:
            self._cut(self.head.http10)
            return False
        if self.state == IDLE:
            self.head.abandon(self.input, self.used)
            self.cors = None
        body, headers = self.relay.refusal(
            status, message, self.head.target, id_in(self.head.request_id)
        )
        if status == 503:
            headers += b"Retry-After: %d\r\n" % _RETRY_AFTER_S
        self._write(self._own_response(status, body, headers, False))
        self._linger()
        return False

    cdef int _crashed(self, Exchange exchange, object error) except -1:
        self.relay._report("an exchange failed", error)
        if self.exchange is exchange:
            self._refuse(500, "Internal error in the gateway.")
        return 0

    cdef int _finish(self) except -1:
        """Finish the current Exchange."""
        cdef Exchange exchange = self.exchange
        self.exchange = None
        self.body.clear()
        self.relay.buffered_bytes -= self.buffered_bytes
        self.buffered_bytes = 0
        self.relay.exchanges -= 1
        exchange._detach()
        exchange.finished = True
        try:
            exchange._ended()
        except Exception as error:
            self.relay._report("an exchange's cleanup failed", error)
        return 0

    cdef int _response_ended(self) except -1:
        self.exchange.whole = True
        self._finish()
        if self.state >= LEAVING:
            return 0
        if self.state == BODY:
            self._linger()
        elif not self.keep_alive:
            self._close()
        else:
            self.state = IDLE
            if not self.write_paused:
                self.deadline = coarse_now() + self.relay.keep_alive_timeout_s
            if self.input is not None:
                self._pump()
            self._set_reading()
        return 0

    cdef int _close(self) except -1:
        """Flush pending writes, then close."""
        if self.input is not None:  # closing now would send RST and could discard the response
            return self._linger()
        self.state = LEAVING
        self.deadline = coarse_now() + self.relay.stall_timeout_s
        self.transport.close()
        return 0

    cdef int _linger(self) except -1:
        """Flush, shut down the write side, and wait briefly for the client to close."""
        self.state = LEAVING
        self.deadline = coarse_now() + LINGER_MAX_S
        self.input = None
        if not self.reading:
            self.reading = True
            self.transport.resume_reading()
        self.transport.write_eof()
        return 0

    cdef int _abort(self) except -1:
        if self.state == CLOSED:
            return 0
        self.state = CLOSED
        if self.exchange is not None:
            self._finish()
        if self.transport is not None:
            self.transport.abort()
        return 0

    cdef int _cut(self, bint looks_complete) except -1:
        if looks_complete and self.transport is not None:
            kb_reset_on_close(self.transport.get_extra_info("socket").fileno())
        return self._abort()

    cdef int _drain(self, double sooner_s) except -1:
        if self.state == IDLE and self.input is None and not self.write_paused:
            self.deadline -= sooner_s
            if self.deadline <= coarse_now():
                self._close()
        return 0

    cdef int _expired(self) except -1:
        self.deadline = 0
        if self.state == LEAVING or self.write_paused or self.state == BUSY:
            self._abort()
        elif self.state == BODY:
            self._refuse(408, "The request body was not received in time.")
        elif self.input is not None:
            self._refuse(408, "The request head was not received in time.")
        else:
            self._close()
        return 0
