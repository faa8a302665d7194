"""Declarations of ``_members.pyx``."""

from libc.stdint cimport int32_t, uint8_t


cdef class Members:
    cdef int32_t *slots
    cdef int32_t *rows  # parallel to slots, so that a scan of loads reads one array
    cdef uint8_t *has  # by slot
    cdef int32_t n
    cdef int32_t capacity
    cdef int32_t has_capacity
    cdef int32_t cursor  # start of the next least-load scan
    cdef inline bint contains(self, int32_t slot) noexcept:
        return slot < self.has_capacity and self.has[slot]

    cdef int add(self, int32_t slot, int32_t row) except -1
    cdef int32_t position(self, int32_t slot) noexcept
    cdef void drop(self, int32_t slot) noexcept
