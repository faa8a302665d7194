"""Declarations of ``_metering.pyx``."""

from libc.stdint cimport int64_t

from kubeai._keys cimport Key
from kubeai.openai._usage cimport Usage


cdef int64_t tokens_in_bytes(int64_t size_bytes, bint streams) noexcept


cdef class Counts:
    cdef Key key  # None while nothing is counted
    cdef str model
    cdef int64_t requests
    cdef int64_t estimated_requests
    cdef int64_t prompt_tokens
    cdef int64_t cached_tokens
    cdef int64_t completion_tokens
    cdef tuple taken(self)


cdef class Meter:
    cdef list counts  # those that are not zero
    cdef dict others  # (Key, name of a Model) -> Counts, of keys that use several Models
    cdef dict bytes_per_token  # of streams, by name of the Model
    cdef int count(self, Key key, str model, const Usage *usage, bint is_estimated) except -1
    cdef Counts counts_of(self, Key key, str model)
    cdef int learn(self, str model, int64_t size_bytes, int64_t tokens) except -1
    cdef int64_t tokens_in(self, str model, int64_t size_bytes, bint streams) except -1
