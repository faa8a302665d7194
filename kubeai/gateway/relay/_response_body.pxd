"""Declarations of ``_response_body.pyx``."""

cimport cython
from libc.stdint cimport int64_t

from kubeai.gateway.relay._chunked cimport Chunks
from kubeai.gateway.relay._renaming cimport Renaming
from kubeai.gateway.relay._text cimport Text
from kubeai.gateway.relay._usage_filter cimport UsageFilter


cdef enum Framing:
    NOTHING
    LENGTH
    CHUNKED
    UNTIL_CLOSE


@cython.final
cdef class ResponseBody:
    cdef Framing framing  # the engine's
    cdef bint ended
    cdef bint malformed  # its chunked framing
    cdef bint recoded  # what is sent differs from what is received: see ``recode``
    cdef bint rechunks  # what is sent is chunked, and what is received is not or is decoded
    cdef Text tail  # the last bytes of the body as received, from ``oldest`` on
    cdef Py_ssize_t oldest  # where they begin; what is before follows at the end
    cdef int64_t left  # of a body of known length
    cdef bint decodes  # its chunked framing
    cdef Chunks chunks
    cdef Text grown  # the data of the chunks in the last input
    cdef bint is_unchanged  # the last input is sent as it came
    cdef Renaming renaming  # None: nothing is renamed
    cdef UsageFilter usage_filter  # None: nothing is removed
    cdef void begin(self, bint has_body, bint chunked, int64_t length) noexcept
    cdef int send_as(
        self, bint chunked, Renaming renaming, UsageFilter usage_filter=*
    ) except -1
    cdef Py_ssize_t take(self, bytes data, Py_ssize_t at) except -1
    cdef int _replace_oldest(self, const char *data, Py_ssize_t size) except -1
    cdef int _make_room(self, Py_ssize_t size) except -1
    cdef const char *end_tail(self) noexcept
    cdef void _unroll(self) noexcept
    cdef bytes recode(self, bytes piece)
    cdef bint _passes_filter(self, const char *data, Py_ssize_t size) noexcept
