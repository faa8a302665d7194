"""Declarations of the relay for other compiled modules; see ``_relay.pyx`` for its guarantees."""

from libc.stdint cimport int64_t, uint64_t


cdef struct Text:
    char *at
    Py_ssize_t size
    Py_ssize_t room


cdef struct Bytes:  # borrowed: the memory belongs to someone else
    const char *at
    Py_ssize_t size


cdef enum HeaderKind:
    PLAIN
    HOST
    CONNECTION
    CONTENT_LENGTH
    TRANSFER_ENCODING
    EXPECT
    FORWARDED_FOR
    FORWARDED_HOST
    FORWARDED_PROTO
    REQUEST_ID
    DROPPED  # hop-by-hop


cdef struct Scan:
    Py_ssize_t at  # scanned up to here
    Py_ssize_t line  # start of the current line
    Py_ssize_t first_end  # the first line's CR
    int lines


cdef class Head:
    cdef Text text  # the headers to forward, each as "name: value\r\n"
    cdef Scan scan
    cdef object parser
    cdef int64_t length  # Content-Length, or -1
    cdef bint chunked
    cdef bint says_close  # Connection: close
    cdef bint says_keep  # Connection: keep-alive
    cdef bytes named  # other tokens of Connection, lower case
    cdef str fault
    cdef void _clear(self) noexcept
    cdef int _take_lines(self, const char *at, const char *end) except -1
    cdef int _header(self, HeaderKind kind, Bytes name, Bytes value) except -1
    cdef int _framing(self, HeaderKind kind, Bytes value) except -1
    cdef int _take_tokens(self, bytes value) except -1
    cdef int _drop(self, set names) except -1


cdef enum ChunkState:
    CHUNK_SIZE_FIRST  # at least one digit
    CHUNK_SIZE
    EXTENSION_NAME_FIRST
    EXTENSION_NAME
    EXTENSION_VALUE_FIRST
    EXTENSION_VALUE
    CHUNK_SIZE_LF
    CHUNK_DATA
    CHUNK_DATA_CR
    CHUNK_DATA_LF
    TRAILER_START
    TRAILER_NAME
    TRAILER
    TRAILER_LF
    LAST_LF
    CHUNKS_END
    CHUNKS_BAD


cdef struct Chunks:
    ChunkState state
    uint64_t left  # bytes left of the chunk's data
    int line  # bytes of the size line, or of all trailers, so far


cdef class Relay:
    cdef readonly object owner
    cdef readonly set downstreams
    cdef readonly set upstreams
    cdef readonly Py_ssize_t exchanges
    cdef readonly uint64_t requests  # since the start
    cdef public bint draining  # responses carry Connection: close
    cdef object exchange
    cdef object refusal
    cdef object loop
    cdef object timer
    cdef double tick_s
    cdef Py_ssize_t head_max_bytes
    cdef int head_max_count
    cdef double head_timeout_s
    cdef double body_timeout_s
    cdef double keep_alive_timeout_s
    cdef double stall_timeout_s
    cdef Py_ssize_t connections_max
    cdef int64_t buffer_max_bytes
    cdef readonly int64_t buffered_bytes  # by request bodies that are collected or being collected
    cdef uint64_t id_high  # random; prefix of generated request ids
    cdef void _report(self, str what, object error) noexcept


cdef enum State:
    IDLE  # no request, or an incomplete head
    BODY  # the head is complete, its body is not
    BUSY  # the request is complete, its response is not
    LEAVING  # flushing what is written; received data is discarded
    CLOSED


cdef class Downstream(Head):
    cdef Relay relay
    cdef object transport
    cdef State state
    cdef double deadline
    cdef Exchange exchange
    cdef bytes input  # received data; not yet consumed from ``used`` on
    cdef Py_ssize_t used
    cdef bint head_started  # a head is incomplete and its timeout is running
    cdef bint reading
    cdef bint write_paused
    cdef bint pumping
    # of the request
    cdef bytes method
    cdef bytes target
    cdef bytes host
    cdef bytes forwarded  # X-Forwarded-For, -Host and -Proto header lines
    cdef bytes forwarded_for
    cdef bint has_host
    cdef bint has_proto
    cdef bytes request_id  # the X-Request-Id header line
    cdef bint expects
    cdef bint asks_websocket
    cdef bint keep_alive
    cdef bint old  # HTTP/1.0
    # of its body
    cdef Chunks chunks
    cdef int64_t left
    cdef int64_t body_bytes  # consumed so far, of a streamed or a large chunked body
    cdef int64_t body_max_bytes
    cdef bytes collected  # of known length, being filled; sized by what has been received
    cdef Text grown  # of unknown length
    cdef int64_t buffered_bytes  # this body's share of the relay's
    # of the connection
    cdef bytes peer
    cdef bytes usual_host
    cdef bytes usual_forwarded  # ``forwarded`` for ``usual_host``
    cdef int _append(self, bytes data) except -1
    cdef void _use(self, Py_ssize_t until) noexcept
    cdef int _set_reading(self) except -1
    cdef int _pump(self) except -1
    cdef bint _take_head(self) except -1
    cdef bint _parse_head(self, Py_ssize_t end) except -1
    cdef int _judge_line(self, const char *end) except -1
    cdef bint _begin(self, Py_ssize_t end) except -1
    cdef bytes _forwarded(self)
    cdef bint _buffer(self, int64_t size) except -1
    cdef int _take_body(self) except -1
    cdef int _expect_body(self) except -1
    cdef int _collect(self) except -1
    cdef bytes _fill(self, const char *data, Py_ssize_t size)
    cdef int _resize(self, Py_ssize_t room) except -1
    cdef int _gather(self) except -1
    cdef bytes _take_grown(self)
    cdef int _body_whole(self, bytes body) except -1
    cdef bytes _piece(self)
    cdef int _write(self, bytes data) except -1
    cdef bint _settle(self) except -1
    cdef bytes _own_answer(self, int status, bytes body, bytes headers, bint keep_alive)
    cdef bint _refuse(self, int status, str message) except -1
    cdef bytes _target_so_far(self)
    cdef int _crashed(self, Exchange exchange, object error) except -1
    cdef int _finish(self) except -1
    cdef int _answer_ended(self) except -1
    cdef int _close(self) except -1
    cdef int _linger(self) except -1
    cdef int _abort(self) except -1
    cdef int _cut(self, bint looks_complete) except -1
    cdef int _expired(self) except -1


cdef class Connections:
    cdef readonly Relay relay
    cdef readonly str host  # for the Host header
    cdef readonly double first_byte_timeout_s  # 0: no limit
    cdef readonly double between_bytes_timeout_s  # 0: no limit
    cdef readonly double idle_timeout_s
    cdef Py_ssize_t max_idle
    cdef public bint failing  # the upstream has failed since its last complete response
    cdef public bint trial  # the upstream is ejected; requests to it are probes
    cdef readonly double answered_s  # start of the last good response (CLOCK_MONOTONIC); 0: never
    cdef readonly uint64_t answers  # good responses that have begun
    cdef list resting
    cdef bint closed
    cpdef Upstream take(self)
    cpdef give(self, Upstream upstream)
    cpdef note_failure(self, int failure)
    cpdef note_answer(self, int status)
    cpdef note_end(self, int status)


cdef class Exchange:
    cdef Downstream downstream
    cdef Upstream upstream
    cdef object connecting  # a pending connection; cancel() aborts it
    cdef Connections pool
    cdef bytes path
    cdef bytes sending
    cdef bint decided
    cdef bint collecting
    cdef bint streaming
    cdef bint replayed
    cdef readonly bint answered  # a response head has been written
    cdef readonly int status  # of that response
    cdef readonly double answered_s  # when its head was written (CLOCK_MONOTONIC); 0: not yet
    cdef readonly int64_t answer_bytes  # written to the client, including heads and framing
    cdef readonly bint broken  # the response was cut short
    cdef readonly bint whole  # the response has been written completely
    cdef readonly bint finished
    cdef readonly bytes body  # once collected
    cdef int _begun(self) except -1
    cdef int _collected(self) except -1
    cdef int _ended(self) except -1
    cdef bint _has(self, bytes name) except -1
    cpdef collect(self, int64_t max_bytes)
    cpdef send(self, Connections pool, bytes path, bytes body)
    cdef int _failed(self, int failure) except -1
    cdef int _retry(self) except -1
    cpdef detach(self)
    cdef int _detach(self) except -1


cdef enum Framing:
    NOTHING
    LENGTH
    CHUNKED
    UNTIL_CLOSE


cdef class Upstream(Head):
    cdef Relay relay
    cdef Connections pool
    cdef object transport
    cdef Exchange exchange
    cdef bytes host_line
    cdef double first_byte_timeout_s
    cdef double between_bytes_timeout_s
    cdef double deadline
    cdef double sent_s  # when the request was written (CLOCK_MONOTONIC)
    cdef bint ended  # closed by either side
    cdef bint idle
    cdef bint write_paused
    cdef bint paused
    cdef Py_ssize_t served
    # of the response
    cdef bytes input  # an incomplete head
    cdef bint touched  # a byte of a response has been received
    cdef bint head_done
    cdef bint reusable
    cdef int status
    cdef Framing framing
    cdef bint unchunk  # for an HTTP/1.0 client, which does not support chunked encoding
    cdef bint rechunk  # for a response that is delimited by the end of its connection
    cdef int64_t left
    cdef Chunks chunks
    cdef Text grown
    cpdef bint usable(self)
    cdef int _start(self, Exchange exchange) except -1
    cdef int _write_request(self, Exchange exchange, Downstream downstream, bytes body) except -1
    cdef int _write(self, bytes data) except -1
    cdef bint _replay(self) except -1
    cdef int _take(self, bytes data) except -1
    cdef Py_ssize_t _take_head(self, bytes data) except -2
    cdef bint _parse_head(self, bytes head, const char *line, const char *line_end) except -1
    cdef bint _diverted(self, bytes data, Py_ssize_t at) except -1
    cdef bytes _answer_head(self, bytes data)
    cdef int _pass(self, bytes prefix, bytes data, Py_ssize_t at) except -1
    cdef int _pass_on(self, Downstream downstream, bytes prefix, bytes piece) except -1
    cdef int _complete(self) except -1
    cdef int _rest(self) except -1
    cdef int _broken(self, int failure) except -1
    cdef int _lose(self) except -1
    cdef int _abort(self) except -1
    cdef int _pause(self) except -1
    cdef int _resume(self) except -1
    cdef int _expired(self) except -1
