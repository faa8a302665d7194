"""Declarations of ``_counts.pyx``."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kubeai._load cimport LoadTable


cdef class Admission:
    cdef LoadTable table
    cdef int32_t *active_cell
    cdef int32_t *held_cell
    cdef int64_t *column_active
    cdef uint64_t *outcome_cells
    cdef int row
    cdef uint32_t generation
    cdef bint _open
    cdef bint _held
    cdef bint _counts(self) noexcept
    cdef void _close(self) noexcept
    cdef void _count(self, int outcome) noexcept


cdef class Reservation:
    cdef LoadTable table
    cdef int32_t *cell
    cdef int32_t *model_cell
    cdef int row
    cdef int model_row
    cdef uint32_t generation
    cdef uint32_t model_generation
    cdef bint _released
    cdef readonly int iterations
    cdef readonly bint is_probe  # a probe of an ejected endpoint
    cdef readonly bint failing  # the endpoint has failed since its last complete response
    cdef readonly int64_t first_load
    cdef readonly int64_t bound
    cdef readonly str name
    cdef readonly str first
    cdef readonly object target
    cdef void _release(self) noexcept


cdef Reservation reserve(
    LoadTable table, int row, uint32_t generation, int model_row, uint32_t model_generation
)
