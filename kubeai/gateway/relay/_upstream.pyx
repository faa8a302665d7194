# cython: language_level=3, nonecheck=True
"""One connection to an engine: the requests sent on it, and their responses."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t
from libc.string cimport memcmp

from kubeai._clock cimport now
from kubeai.gateway.relay._exchange cimport (
    BODY,
    DownstreamEnd,
    Exchange,
    Pool,
    UpstreamEnd,
    write_at_once,
)
from kubeai.gateway.relay._http1 cimport (
    CHUNKS_BAD, CHUNKS_END, CONNECTION, CONTENT_LENGTH, DROPPED, REQUEST_ID, TRANSFER_ENCODING,
    Bytes, HeaderKind, chunks_reset, chunks_scan, cut, find_head_end, is_line, one_chunk, put,
    put_bytes, put_length, response_head, scan_reset, text_add_header, text_free, text_values,
)
from kubeai.gateway.relay._socket cimport descriptor, write_now

from httptools import HttpParserUpgrade, HttpResponseParser

from kubeai.gateway.relay._exchange import INVALID as _INVALID
from kubeai.gateway.relay._exchange import LOST as _LOST
from kubeai.gateway.relay._exchange import STATUS as _STATUS
from kubeai.gateway.relay._exchange import TIMEOUT as _TIMEOUT

cdef enum:
    BODY_IN_HEAD_WRITE_MAX_BYTES = 65536  # above it, a second buffer is cheaper than a copy
    REFUSAL_MAX_BYTES = 65536  # kept of a response that becomes an error event
    # The end of a stream ("data: [DONE]", an empty chunk) often comes in buffers of its own.
    SHORT_BYTES = 96


cdef class Upstream(UpstreamEnd):
    """One connection to an engine; idle in its pool, or serving one Exchange."""

    def __init__(self, Pool pool not None):
        self.fd = -1
        self.pool = pool
        self.relay = pool.relay
        self.host_line = b"Host: " + pool.host.encode("ascii") + b"\r\n"
        self.first_byte_timeout_s = pool.first_byte_timeout_s
        self.between_bytes_timeout_s = pool.between_bytes_timeout_s

    def __dealloc__(self):
        text_free(&self.grown)

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
        if self.exchange is not None and self.head_done and self.framing == UNTIL_CLOSE:
            if self.unchunk:
                self._forward(self.exchange.downstream, None, self._recoded(None, True))
            self._complete()
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

    cdef int _header(self, HeaderKind kind, Bytes name, Bytes value) except -1:
        if kind == CONTENT_LENGTH or kind == TRANSFER_ENCODING or kind == CONNECTION:
            self._framing(kind, value)
        elif kind != DROPPED and kind != REQUEST_ID:  # the client gets the id that was forwarded
            text_add_header(&self.text, name, value)
        return 0

    # the request

    cdef int _start(self, Exchange exchange) except -1:
        cdef DownstreamEnd downstream = exchange.downstream
        cdef bytes body = exchange.sending
        self.exchange = exchange
        exchange.upstream = self
        self.idle = False
        self.touched = self.head_done = False
        self.refusal = self.tail = None
        if exchange.streaming:
            body = downstream._piece()
            if exchange.finished:  # the piece was invalid
                return 0
        self.unsent_bytes = exchange.sending_bytes if exchange.in_pieces else 0
        self._write_request(exchange, downstream, body)
        self.sent_s = now()
        self.deadline = self.sent_s + self.first_byte_timeout_s if self.first_byte_timeout_s else 0
        if exchange.in_pieces:
            exchange._hook(exchange.on_send)
        elif exchange.begun and downstream.write_paused:
            self._pause()
        return 0

    cdef int _write_request(self, Exchange exchange, DownstreamEnd downstream, bytes body) except -1:
        cdef char framing[64]
        cdef char *end = framing
        cdef Py_ssize_t framing_size
        cdef Py_ssize_t body_size = 0 if body is None else PyBytes_GET_SIZE(body)
        cdef bint together = body_size <= BODY_IN_HEAD_WRITE_MAX_BYTES
        cdef bytes out
        cdef char *to
        if exchange.in_pieces:
            end = put_length(end, exchange.sending_bytes)
        elif exchange.sending is not None:
            end = put_length(end, body_size)
        elif downstream.chunked:
            end = put(end, b"Transfer-Encoding: chunked\r\n", 28)
        elif downstream.length >= 0:
            end = put_length(end, downstream.length)
        framing_size = put(end, b"\r\n", 2) - framing
        out = PyBytes_FromStringAndSize(
            NULL,
            PyBytes_GET_SIZE(downstream.method)
            + PyBytes_GET_SIZE(exchange.path)
            + 12
            + PyBytes_GET_SIZE(self.host_line)
            + downstream.text.size
            + PyBytes_GET_SIZE(downstream.forwarded)
            + PyBytes_GET_SIZE(downstream.request_id)
            + framing_size
            + (body_size if together else 0),
        )
        to = put_bytes(PyBytes_AS_STRING(out), downstream.method)
        to = put(to, b" ", 1)
        to = put_bytes(to, exchange.path)
        to = put(to, b" HTTP/1.1\r\n", 11)
        to = put_bytes(to, self.host_line)
        to = put(to, downstream.text.at, downstream.text.size)
        to = put_bytes(to, downstream.forwarded)
        to = put_bytes(to, downstream.request_id)
        to = put(to, framing, framing_size)
        if body_size and together:
            put_bytes(to, body)
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
                self.deadline = now() + self.first_byte_timeout_s
        return 0

    cdef bint _replay(self) except -1:
        """Send the request again on a new connection to the same upstream.

        Not if the upstream has just failed: then it is resetting all connections, not just closing
        an idle one.
        """
        cdef Exchange exchange = self.exchange
        if self.pool.failing or exchange.replayed or (exchange.streaming and exchange.downstream.body.received_bytes):
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
                scan_reset(&self.scan, 0)
            at = self._take_head(data)
            if at <= 0:
                return 0
            if self.status == 101:
                self.exchange.tunnel.upgraded(cut(data, at, PyBytes_GET_SIZE(data) - at))
                return 0
            if self.exchange.begun:
                self._continue_stream()
            else:
                prefix = self._response_head(data)
            came_s = self.exchange.answered_s = now()
        if self.between_bytes_timeout_s and not self.paused:
            self.deadline = (came_s or now()) + self.between_bytes_timeout_s
        self._take_response_body(prefix, data, at)
        return 0

    cdef Py_ssize_t _take_head(self, bytes data) except -2:
        """The offset of the response body; 0: the head is incomplete; -1: stop here."""
        cdef const char *text = PyBytes_AS_STRING(data)
        cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
        cdef Py_ssize_t begin = 0
        cdef Py_ssize_t end
        while True:
            end = find_head_end(&self.scan, text, size)
            if end < 0 or (end if end else size) - begin > self.relay.head_max_bytes or (
                size > begin and text[begin] != c"H"
            ):
                self._broken(_INVALID)
                return -1
            if end == 0:
                self.input = data[begin:]
                self.scan.at -= begin
                self.scan.line -= begin
                self.scan.first_end -= begin
                if self.between_bytes_timeout_s:
                    self.deadline = now() + self.between_bytes_timeout_s
                return 0
            if not self._parse_head(
                cut(data, begin, end - begin), text + begin, text + self.scan.first_end
            ):
                self._broken(_INVALID)
                return -1
            if self.status >= 200 or self.status == 101:
                break
            begin = end  # an interim (1xx) response: skipped
            scan_reset(&self.scan, begin)
        self.input = None
        self.pool.note_answer(self.status)
        if self.status >= 500 and not self.exchange.streaming and self._diverted(data, end):
            return -1
        self.head_done = True
        self.scan.line = begin  # offset of the status line, for _response_head
        return end

    cdef bint _parse_head(self, bytes head, const char *line, const char *line_end) except -1:
        self._clear()
        if self.parser is None:
            self.parser = HttpResponseParser(None)
        try:
            self.parser.feed_data(head)
        except HttpParserUpgrade:
            self.parser = None
        except Exception:
            return False
        if memcmp(line, b"HTTP/1.", 7) != 0 or not is_line(line):
            return False
        self._take_lines(line_end + 2, line + PyBytes_GET_SIZE(head) - 2)
        if self.fault is not None:
            return False
        self.status = (line[9] - c"0") * 100 + (line[10] - c"0") * 10 + line[11] - c"0"
        self.reusable = not self.says_close and (self.says_keep or line[7] == c"1")
        if self.named is not None:
            self._drop(set(self.named.split(b",")))  # hop-by-hop
        if self.exchange.downstream.method == b"HEAD" or self.status == 204 or self.status == 304:
            self.framing = NOTHING
            if self.length > 0 or self.chunked:
                self.parser = None  # llhttp would wait for a body
        elif self.chunked:
            self.framing = CHUNKED
            chunks_reset(&self.chunks)
        elif self.length >= 0:
            self.framing = LENGTH
            self.left = self.length
        else:
            self.framing = UNTIL_CLOSE
            self.reusable = False
        return self.status >= 100 and (self.status != 101 or self.exchange.tunnel is not None)

    cdef bint _diverted(self, bytes data, Py_ssize_t at) except -1:
        """Ask the Exchange about a 5xx; True if it is not passed on but retried."""
        cdef Exchange exchange = self.exchange
        cdef Py_ssize_t left = PyBytes_GET_SIZE(data) - at
        try:
            if not exchange.wants_retry(_STATUS, self.status):
                return False
        except Exception as error:
            exchange.downstream._crashed(exchange, error)
            return True
        exchange.upstream = None
        self.exchange = None
        if self.framing == LENGTH and left == self.left and self._is_clean():
            if left:
                self.parser.feed_data(cut(data, at, left))
            self._release()
        else:
            self._abort()
        exchange._retry()
        return True

    cdef bytes _response_head(self, bytes data):
        """Build the head for the client and decide how the body is framed."""
        cdef DownstreamEnd downstream = self.exchange.downstream
        cdef Bytes line  # after the version
        cdef char framing[96]
        cdef char *end = framing
        cdef bint keep_alive
        cdef bytes extra = self.exchange.extra_headers
        line.at = PyBytes_AS_STRING(data) + self.scan.line + 8
        line.size = PyBytes_AS_STRING(data) + self.scan.first_end - line.at
        if downstream.cors is not None:
            self._drop_cors()
            extra = downstream.cors if extra is None else extra + downstream.cors
        self.rechunk = self.framing == UNTIL_CLOSE and not downstream.http10
        self.unchunk = self.framing == CHUNKED and downstream.http10
        if self.exchange.renaming is not None:
            self._rename()
        keep_alive = downstream._settle()
        if downstream.http10 and (self.framing == UNTIL_CLOSE or self.unchunk):
            keep_alive = downstream.keep_alive = False
        if self.length >= 0 and self.status != 204:
            end = put_length(end, self.length)
        elif (self.chunked or self.rechunk) and not downstream.http10 and self.status != 204:
            end = put(end, b"Transfer-Encoding: chunked\r\n", 28)
        if not keep_alive:
            end = put(end, b"Connection: close\r\n", 19)
        elif downstream.http10:
            end = put(end, b"Connection: keep-alive\r\n", 24)
        end = put(end, b"\r\n", 2)
        self.exchange.answered = True
        self.exchange.status = self.status
        return response_head(line, &self.text, downstream.request_id, extra, framing, end - framing)

    cdef int _continue_stream(self) except -1:
        """Decide how the body continues the event stream that has begun, if it can."""
        cdef bint http10 = self.exchange.downstream.http10
        if self.status != 200 or self.exchange.tunnel is not None or self._is_compressed() or not (
            self._content_type().lower().startswith("text/event-stream")
        ):
            self.refusal = b""
        self.unchunk = self.framing == CHUNKED and (http10 or self.refusal is not None)
        self.rechunk = self.framing != CHUNKED and not http10 and self.refusal is None
        if self.exchange.renaming is not None:
            self._rename()
        return 0

    cdef int _rename(self) except -1:
        """Replace the model's name in the body if it can be read: decode it, and frame it again."""
        cdef str kind = self._content_type().lower()
        cdef bint is_events = kind.startswith("text/event-stream")
        cdef bint is_json = kind.startswith("application/json")
        self.renames = self.refusal is None and self.framing != NOTHING and (
            is_events or is_json or kind.startswith("application/x-ndjson")
        ) and not self._is_compressed()
        if self.renames:
            self.exchange.renaming.begin(is_events, is_json)
            self.unchunk = True
            self.rechunk = not self.exchange.downstream.http10
            self.length = -1
        return 0

    cdef bytes _recoded(self, bytes piece, bint complete):
        """The next part of a body that is decoded, or None."""
        if self.framing == CHUNKED:
            piece = PyBytes_FromStringAndSize(self.grown.at, self.grown.size)
            self.grown.size = 0
        if self.exchange.renaming is not None and self.renames:
            piece = self.exchange.renaming.feed(piece or b"", complete)
            if piece and self.rechunk:
                piece = one_chunk(None, piece, 0, PyBytes_GET_SIZE(piece))
        return piece or None

    cdef int _take_response_body(self, bytes prefix, bytes data, Py_ssize_t at) except -1:
        """Pass on the received part of the response body, after ``prefix``."""
        cdef DownstreamEnd downstream = self.exchange.downstream
        cdef Py_ssize_t came = PyBytes_GET_SIZE(data) - at
        cdef Py_ssize_t size = came
        cdef bint complete = False
        cdef bytes piece = None
        if self.framing == LENGTH:
            if size > self.left:
                size = <Py_ssize_t> self.left
            self.left -= size
            complete = self.left == 0
        elif self.framing == CHUNKED:
            size = chunks_scan(
                &self.chunks,
                PyBytes_AS_STRING(data) + at,
                came,
                &self.grown if self.unchunk else NULL,
            )
            complete = self.chunks.state == CHUNKS_END
        elif self.framing == NOTHING:
            size = 0
            complete = True
        if size < came:  # unexpected bytes after the end of the response
            self.reusable = False
        if size:
            if not self.exchange.body_came:
                self.exchange.body_came = True
                self.exchange._body_came()
            if size >= SHORT_BYTES or self.tail is None:
                self.tail = data
                self.tail_at = at
                self.tail_size = size
            piece = cut(data, at, size)
            if self.framing == LENGTH and self.parser is not None:
                self.parser.feed_data(piece)
        if self.unchunk:
            piece = self._recoded(piece, complete)
        elif self.rechunk and size:
            piece = one_chunk(prefix, piece, 0, size)
            prefix = None
        if self.refusal is not None:
            if piece is not None:
                self.refusal += piece
            complete = complete or PyBytes_GET_SIZE(self.refusal) >= REFUSAL_MAX_BYTES
        else:
            if size:
                self.exchange.answered = True
            self._forward(downstream, prefix, piece)
        if self.framing == CHUNKED and self.chunks.state == CHUNKS_BAD:
            self._broken(_INVALID)
        elif complete:
            if self.framing == CHUNKED and self.parser is not None:
                self.parser.feed_data(b"0\r\n\r\n")
            self._complete()
        return 0

    cdef int _forward(self, DownstreamEnd downstream, bytes prefix, bytes piece) except -1:
        cdef bytes out
        if prefix is not None:
            if piece is None or PyBytes_GET_SIZE(piece) > BODY_IN_HEAD_WRITE_MAX_BYTES:
                downstream._write(prefix)
            else:
                out = PyBytes_FromStringAndSize(
                    NULL, PyBytes_GET_SIZE(prefix) + PyBytes_GET_SIZE(piece)
                )
                put_bytes(put_bytes(PyBytes_AS_STRING(out), prefix), piece)
                piece = out
        if piece is not None:
            downstream._write(piece)
        return 0

    cdef int _complete(self) except -1:
        """The response is complete."""
        cdef DownstreamEnd downstream = self.exchange.downstream
        self.pool.note_end(self.status)
        if self.refusal is not None:
            self._abort()
            return self._refuse(self.exchange)
        if self.tail is not None:
            self.exchange._body_ended(self.tail, self.tail_at, self.tail_size)
            self.tail = None
        if self.rechunk:
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
        """Whether the next request can follow: the last one has been sent completely."""
        return (
            self.reusable
            and not self.ended
            and self.unsent_bytes <= 0
            and self.transport.get_write_buffer_size() == 0
        )

    cdef int _release(self) except -1:
        """Return the connection to the pool."""
        self.served += 1
        self.idle = True
        self.deadline = now() + self.pool.idle_timeout_s
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
                downstream.http10 and (self.framing != LENGTH or exchange.begun or self.unchunk)
            )
        else:
            exchange._failed(failure)
        return 0

    cdef int _refuse(self, Exchange exchange) except -1:
        """End an event stream that has begun, because this response cannot continue it."""
        cdef bytes body = self.refusal
        self.exchange = None
        exchange.upstream = None
        try:
            exchange.on_refusal(self.status, self._content_type(), body[:REFUSAL_MAX_BYTES])
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
                self.deadline = now() + self.between_bytes_timeout_s
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
