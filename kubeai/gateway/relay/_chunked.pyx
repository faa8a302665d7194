# cython: language_level=3, nonecheck=True
"""Chunked framing of HTTP/1.1; sans I/O.

``chunks_scan`` checks the framing, which httptools does not report. It is stricter than llhttp: no
bare LF, limited extensions and trailers.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memchr

from kubeai.gateway.relay._text cimport Text, put, text_add, text_free

cdef enum:
    CHUNK_LINE_MAX_BYTES = 256
    TRAILERS_MAX_BYTES = 8192


cdef inline int hex_digit(char c) noexcept:
    if c"0" <= c <= c"9":
        return c - c"0"
    c |= 0x20
    if c"a" <= c <= c"f":
        return c - c"a" + 10
    return -1


cdef inline bint is_token(char c) noexcept:
    return (
        c"a" <= c <= c"z"
        or c"A" <= c <= c"Z"
        or c"0" <= c <= c"9"
        or (c > 32 and c != 127 and memchr(b"!#$%&'*+-.^_`|~", c, 15) is not NULL)
    )


cdef Py_ssize_t chunks_scan(
    Chunks *chunks, const char *data, Py_ssize_t size, Text *into
) except -1:
    """Parse chunked framing. Returns the bytes consumed: all, unless it ended or is malformed.

    ``into``: collects the chunks' data, or NULL to discard it.
    """
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t take
    cdef int digit
    cdef char c
    while at < size and chunks.state < CHUNKS_END:
        if chunks.state == CHUNK_DATA:
            take = size - at
            if <uint64_t> take > chunks.left:
                take = <Py_ssize_t> chunks.left
            if into is not NULL:
                text_add(into, data + at, take)
            at += take
            chunks.left -= <uint64_t> take
            if chunks.left == 0:
                chunks.state = CHUNK_DATA_CR
            continue
        c = data[at]
        at += 1
        if chunks.state < CHUNK_SIZE_LF or TRAILER_START <= chunks.state <= TRAILER:
            chunks.line += 1
        if chunks.state <= CHUNK_SIZE:
            digit = hex_digit(c)
            if digit >= 0:
                if chunks.left >> 56:
                    chunks.state = CHUNKS_BAD
                else:
                    chunks.left = (chunks.left << 4) | <uint64_t> digit
                    chunks.state = CHUNK_SIZE
            elif chunks.state == CHUNK_SIZE_FIRST:
                chunks.state = CHUNKS_BAD
            elif c == c"\r":
                chunks.state = CHUNK_SIZE_LF
            elif c == c";":
                chunks.state = EXTENSION_NAME_FIRST
            else:
                chunks.state = CHUNKS_BAD
        elif chunks.state < CHUNK_SIZE_LF:
            if is_token(c):
                if chunks.state == EXTENSION_NAME_FIRST or chunks.state == EXTENSION_VALUE_FIRST:
                    chunks.state = <ChunkState> (chunks.state + 1)
            elif chunks.state == EXTENSION_NAME_FIRST or chunks.state == EXTENSION_VALUE_FIRST:
                chunks.state = CHUNKS_BAD
            elif c == c"\r":
                chunks.state = CHUNK_SIZE_LF
            elif c == c";":
                chunks.state = EXTENSION_NAME_FIRST
            elif c == c"=" and chunks.state == EXTENSION_NAME:
                chunks.state = EXTENSION_VALUE_FIRST
            else:  # including quoted values, which are not used in practice
                chunks.state = CHUNKS_BAD
        elif chunks.state == CHUNK_SIZE_LF:
            if c != c"\n":
                chunks.state = CHUNKS_BAD
            else:
                chunks.line = 0
                chunks.state = CHUNK_DATA if chunks.left else TRAILER_START
        elif chunks.state == CHUNK_DATA_CR:
            chunks.state = CHUNK_DATA_LF if c == c"\r" else CHUNKS_BAD
        elif chunks.state == CHUNK_DATA_LF:
            chunks.state = CHUNK_SIZE_FIRST if c == c"\n" else CHUNKS_BAD
        elif chunks.state == TRAILER_START:
            if c == c"\r":
                chunks.state = LAST_LF
            else:
                chunks.state = TRAILER_NAME if is_token(c) else CHUNKS_BAD
        elif chunks.state == TRAILER_NAME:
            if c == c":":
                chunks.state = TRAILER
            elif not is_token(c):
                chunks.state = CHUNKS_BAD
        elif chunks.state == TRAILER:
            if c == c"\r":
                chunks.state = TRAILER_LF
            elif <unsigned char> c < 32 and c != c"\t" or c == 127:
                chunks.state = CHUNKS_BAD
        elif chunks.state == TRAILER_LF:
            chunks.state = TRAILER_START if c == c"\n" else CHUNKS_BAD
        else:
            chunks.state = CHUNKS_END if c == c"\n" else CHUNKS_BAD
        if chunks.line > CHUNK_LINE_MAX_BYTES and (
            chunks.state < CHUNK_SIZE_LF or chunks.line > TRAILERS_MAX_BYTES
        ):
            chunks.state = CHUNKS_BAD
    return at


cdef void chunks_reset(Chunks *chunks) noexcept:
    chunks.state = CHUNK_SIZE_FIRST
    chunks.left = 0
    chunks.line = 0


cdef bytes one_chunk(bytes data):
    """Frame ``data``, at least one byte, as one chunk."""
    cdef char line[24]
    cdef Py_ssize_t size = PyBytes_GET_SIZE(data)
    cdef int line_size = snprintf(line, sizeof(line), b"%zx\r\n", size)
    cdef bytes out = PyBytes_FromStringAndSize(NULL, line_size + size + 2)
    cdef char *to = put(PyBytes_AS_STRING(out), line, line_size)
    to = put(to, PyBytes_AS_STRING(data), size)
    put(to, b"\r\n", 2)
    return out


cdef Py_ssize_t whole_chunk(const char *data, Py_ssize_t size) noexcept:
    """The bytes before the chunk's data, if ``data`` is exactly one chunk; otherwise 0.

    For use between two chunks. The last chunk and a chunk with extensions return 0.
    """
    cdef Py_ssize_t at = 0
    cdef Py_ssize_t length = 0
    cdef int digit
    while at < size and at < 8:
        digit = hex_digit(data[at])
        if digit < 0:
            break
        length = length << 4 | digit
        at += 1
    if length == 0 or at + 2 + length + 2 != size:
        return 0
    if data[at] != c"\r" or data[at + 1] != c"\n":
        return 0
    return at + 2 if data[size - 2] == c"\r" and data[size - 1] == c"\n" else 0


# -- for tests -------------------------------------------------------------------------------------


def unchunk(*pieces):
    """Parse a chunked body given in pieces. Returns the data, the bytes used, and if it ended.

    ValueError if it is malformed. For tests only: the relay itself never joins pieces.
    """
    cdef Chunks chunks
    cdef Text into
    cdef bytes piece
    cdef Py_ssize_t used = 0
    cdef bytes data
    into.at = NULL
    into.size = into.room = 0
    chunks_reset(&chunks)
    try:
        for piece in pieces:
            used += chunks_scan(&chunks, PyBytes_AS_STRING(piece), PyBytes_GET_SIZE(piece), &into)
            if chunks.state == CHUNKS_BAD:
                raise ValueError(f"bad chunked framing before byte {used}")
            if chunks.state == CHUNKS_END:
                break
        data = into.at[:into.size] if into.size else b""
        return data, used, chunks.state == CHUNKS_END
    finally:
        text_free(&into)
