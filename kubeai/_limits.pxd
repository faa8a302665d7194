"""Declarations of ``_limits.pyx``."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from kubeai._key_table cimport Cell, KeyTable


cdef enum Excess:  # which limit a request exceeds; same order as EXCESSES
    WITHIN
    REQUESTS
    TOKENS
    IN_FLIGHT
    TOO_LARGE  # the request alone has more tokens than a minute


cdef struct Quota:  # 0: no limit
    int64_t requests
    int64_t tokens
    int64_t in_flight


cdef class Charge:
    cdef KeyTable table
    cdef Cell *cell
    cdef uint32_t *stamp
    cdef int row
    cdef uint32_t generation
    cdef uint64_t interval  # in which it was counted
    cdef bint _open
    cdef readonly int64_t tokens
    cdef Excess _excess
    cdef readonly double retry_after_s
    cdef readonly int64_t requests_left
    cdef readonly int64_t tokens_left
    cdef readonly double reset_s
    cdef void _begin(self) noexcept
    cdef void _end(self, int64_t tokens) noexcept


cdef Charge take(
    KeyTable table, int row, uint32_t generation, const Quota *quota, int64_t tokens
)
