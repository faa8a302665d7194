"""Declarations of ``_chunked.pyx``."""

from libc.stdint cimport uint64_t

from kubeai.gateway.relay._text cimport Text


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
cdef bytes one_chunk(bytes data)
cdef Py_ssize_t whole_chunk(const char *data, Py_ssize_t size) noexcept
