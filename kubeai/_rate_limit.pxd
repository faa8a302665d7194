"""Declarations of ``_rate_limit.pyx``."""

from libc.stdint cimport int64_t


cdef class RateLimit:
    cdef double _burst_max
    cdef double _per_s
    cdef double _left
    cdef double _at_s
    cdef int64_t _suppressed
    cdef int64_t _take(self, double now_s) noexcept
