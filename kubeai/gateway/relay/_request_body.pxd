"""Declarations of ``_request_body.pyx``."""

from libc.stdint cimport int64_t

from kubeai.gateway.relay._chunked cimport Chunks
from kubeai.gateway.relay._text cimport Text


cdef enum:
    EXACT_BODY_MAX_BYTES = 1 << 20  # larger buffers grow with the data: a length is only a claim
    RECEIVE_MIN_BYTES = 1 << 15  # less is not worth a system call of its own
    RECEIVE_MAX_BYTES = 1 << 22  # at a time, so that other connections get their turn


cdef enum BodyState:
    INCOMPLETE
    COMPLETE
    MALFORMED  # its chunked encoding
    TOO_LONG


cdef class RequestBody:
    cdef BodyState state
    cdef int64_t max_bytes
    cdef int64_t received_bytes  # so far, of a streamed or a large chunked body
    cdef int64_t left  # of a body of known length
    cdef int64_t length  # -1: unknown
    cdef bint chunked
    cdef Chunks chunks
    cdef bytes collected  # of known length, being filled; sized by what has been received
    cdef Text grown  # of unknown length
    cdef void begin(self, int64_t length, bint chunked) noexcept
    cdef void clear(self) noexcept
    cdef Py_ssize_t collect(self, bytes data, Py_ssize_t at) except -1
    cdef int receive(self, int fd) except -1
    cdef bytes take(self)
    cdef int64_t buffered_bytes(self) noexcept
    cdef bytes next_piece(self, bytes data, Py_ssize_t at, Py_ssize_t *size, bint decode)
    cdef Py_ssize_t _collect_chunks(self, const char *data, Py_ssize_t size) except -1
    cdef int _fill(self, const char *data, Py_ssize_t size) except -1
    cdef int _make_room(self, Py_ssize_t size) except -1
    cdef int _resize(self, Py_ssize_t room) except -1
    cdef int _gather(self) except -1
    cdef int _finish_chunks(self) except -1
