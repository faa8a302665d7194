"""Declarations of ``_http1.pyx``. Small helpers are inline: calls across modules are not inlined."""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memcpy


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


cdef bint is_name(const char *name, const char *lower, Py_ssize_t size) noexcept
cdef int text_grow(Text *text, Py_ssize_t size) except -1
cdef int text_add(Text *text, const char *data, Py_ssize_t size) except -1
cdef int text_add_header(Text *text, Bytes name, Bytes value) except -1
cdef list text_values(const Text *text, bytes name)
cdef void text_free(Text *text) noexcept


cdef inline char *put(char *at, const char *data, Py_ssize_t size) noexcept:
    memcpy(at, data, size)
    return at + size


cdef inline char *put_bytes(char *at, bytes data) noexcept:
    return put(at, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))


cdef inline bint is_same(bytes known, Bytes value) noexcept:
    return (
        known is not None
        and PyBytes_GET_SIZE(known) == value.size
        and memcmp(PyBytes_AS_STRING(known), value.at, value.size) == 0
    )


cdef inline bint is_value(Bytes value, const char *lower, Py_ssize_t size) noexcept:
    """Like ``is_name``, for header values. llhttp already rejects control characters."""
    return value.size == size and is_name(value.at, lower, size)


cdef inline Bytes view(bytes data) noexcept:
    cdef Bytes seen
    seen.at = PyBytes_AS_STRING(data)
    seen.size = PyBytes_GET_SIZE(data)
    return seen


cdef inline bytes cut(bytes data, Py_ssize_t at, Py_ssize_t size):
    """``data[at:at + size]``, without a copy if that is all of it."""
    if at == 0 and size == PyBytes_GET_SIZE(data):
        return data
    return PyBytes_FromStringAndSize(PyBytes_AS_STRING(data) + at, size)


cdef bint is_request_id(Bytes value) noexcept
cdef char *put_length(char *to, int64_t length) noexcept
cdef bytes new_request_id(uint64_t high, uint64_t low)
cdef str id_in(bytes line)
cdef bytes forwarded_lines(bytes forwarded_for, bytes peer, bytes host, bint has_proto)
cdef bytes target_in(bytes line)
cdef bytes json_response(int status, bytes headers, bytes body, bint is_head)
cdef bytes response_head(
    Bytes line,
    const Text *text,
    bytes request_id,
    bytes extra,
    const char *framing,
    Py_ssize_t framing_size,
)
cdef bytes event_stream_head(bytes headers, bint is_chunked, bint keep_alive)
cdef Py_ssize_t find_head_end(Scan *scan, const char *data, Py_ssize_t size) noexcept
cdef bint is_line(const char *at) noexcept
cdef void scan_reset(Scan *scan, Py_ssize_t at) noexcept


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
    cdef int _drop_cors(self) except -1
    cdef str _content_type(self)
    cdef bint _is_compressed(self)


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


cdef Py_ssize_t chunks_scan(
    Chunks *chunks, const char *data, Py_ssize_t size, Text *into
) except -1
cdef void chunks_reset(Chunks *chunks) noexcept
cdef bytes one_chunk(bytes prefix, bytes data, Py_ssize_t at, Py_ssize_t size)
