"""A set of a ring's endpoints, by slot."""

cimport cython
from libc.stdint cimport int32_t, uint8_t
from libc.stdlib cimport free
from libc.string cimport memset

from kubeai._nodes cimport grown


@cython.final
@cython.no_gc
cdef class Members:
    """The slots that have one adapter (or all slots), as a dense array and as a map."""

    def __cinit__(self):
        self.cursor = -1  # no pick yet

    def __dealloc__(self):
        free(self.slots)
        free(self.rows)
        free(self.has)

    cdef int add(self, int32_t slot, int32_t row) except -1:
        cdef int32_t capacity
        if slot >= self.has_capacity:
            capacity = max(2 * self.has_capacity, slot + 16)
            self.has = <uint8_t *> grown(self.has, capacity)
            memset(self.has + self.has_capacity, 0, capacity - self.has_capacity)
            self.has_capacity = capacity
        if self.n == self.capacity:
            capacity = 2 * self.capacity + 16
            self.slots = <int32_t *> grown(self.slots, capacity * sizeof(int32_t))
            self.rows = <int32_t *> grown(self.rows, capacity * sizeof(int32_t))
            self.capacity = capacity
        self.slots[self.n] = slot
        self.rows[self.n] = row
        self.has[slot] = 1
        self.n += 1
        return 0

    cdef int32_t position(self, int32_t slot) noexcept:
        cdef int32_t at = 0
        while self.slots[at] != slot:
            at += 1
        return at

    cdef void drop(self, int32_t slot) noexcept:
        cdef int32_t at = self.position(slot)
        self.n -= 1
        self.slots[at] = self.slots[self.n]
        self.rows[at] = self.rows[self.n]
        self.has[slot] = 0
        if self.cursor >= self.n:
            self.cursor = 0
