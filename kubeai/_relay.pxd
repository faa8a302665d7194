"""The relay's classes as other compiled modules see them; ``_relay.pyx`` says what they promise."""

from libc.stdint cimport int64_t, uint64_t


cdef struct Text:
    char *at
    Py_ssize_t size
    Py_ssize_t room


cdef struct Bytes:  # of somebody else's
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
    DROPPED  # hop by hop


cdef struct Scan:
    Py_ssize_t at  # looked at so far
    Py_ssize_t line  # where the current line begins
    Py_ssize_t first_end  # where the first line's CR is
    int lines


cdef class Head:
    cdef Text text  # the headers that travel on, as "name: value\r\n" each
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
    uint64_t left  # of the chunk's data
    int line  # bytes of the size line, or of all trailers, so far


cdef class Relay:
    cdef readonly object owner
    cdef readonly set downstreams
    cdef readonly set upstreams
    cdef readonly Py_ssize_t exchanges
    cdef readonly uint64_t requests  # since the start
    cdef public bint draining  # answers say Connection: close
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
    cdef readonly int64_t buffered_bytes  # by bodies that are being read or have been
    cdef uint64_t id_high  # random; with the number of a request, the id of one without
    cdef void _report(self, str what, object error) noexcept


cdef enum State:
    IDLE  # no request, or part of a head
    BODY  # a head is taken, its body is not whole
    BUSY  # a request is whole, its answer is not
    LEAVING  # what is written is being flushed; what comes is thrown away
    CLOSED


cdef class Downstream(Head):
    cdef Relay relay
    cdef object transport
    cdef State state
    cdef double deadline
    cdef Exchange exchange
    cdef bytes input  # received; from ``used`` on it waits to be taken
    cdef Py_ssize_t used
    cdef bint head_started  # the clock of a head that is not whole runs
    cdef bint reading
    cdef bint write_paused
    cdef bint pumping
    # of the request
    cdef bytes method
    cdef bytes target
    cdef bytes host
    cdef bytes forwarded  # X-Forwarded-For, -Host and -Proto, as lines
    cdef bytes forwarded_for
    cdef bint has_host
    cdef bint has_proto
    cdef bytes request_id  # X-Request-Id, as a line
    cdef bint expects
    cdef bint asks_websocket
    cdef bint keep_alive
    cdef bint old  # HTTP/1.0
    # of its body
    cdef Chunks chunks
    cdef int64_t left
    cdef int64_t body_bytes  # taken so far, of a body that streams or is large and in chunks
    cdef int64_t body_max_bytes
    cdef bytes collected  # of known length, being filled; no larger than what has come warrants
    cdef Text grown  # of unknown length
    cdef int64_t buffered_bytes  # of the relay's
    # of the connection
    cdef bytes peer
    cdef bytes usual_host
    cdef bytes usual_forwarded  # ``forwarded`` for that host
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
    cdef public bint failing  # it has failed since its last complete answer
    cdef public bint trial  # it is ejected; requests there are probes
    cdef readonly double answered_s  # when a good answer last began (CLOCK_MONOTONIC); 0: never
    cdef readonly uint64_t answers  # good answers that have begun
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
    cdef object connecting  # a connection being made: cancel() ends it
    cdef Connections pool
    cdef bytes path
    cdef bytes sending
    cdef bint decided
    cdef bint collecting
    cdef bint streaming
    cdef bint replayed
    cdef readonly bint answered  # the head of an answer has been written
    cdef readonly int status  # of that answer
    cdef readonly double answered_s  # when its head was written, by CLOCK_MONOTONIC; 0: not yet
    cdef readonly int64_t answer_bytes  # written to the client, heads and framing included
    cdef readonly bint broken  # the answer ended before its end
    cdef readonly bint whole  # the answer has been written to its end
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
    cdef bint ended  # closed, or the other end has closed
    cdef bint idle
    cdef bint write_paused
    cdef bint paused
    cdef Py_ssize_t served
    # of the answer
    cdef bytes input  # of a head that is not whole
    cdef bint touched  # a byte of an answer has come
    cdef bint head_done
    cdef bint reusable
    cdef int status
    cdef Framing framing
    cdef bint unchunk  # for a client that knows no chunks
    cdef bint rechunk  # for an answer that would end with its connection
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
