"""Declarations of ``_counts.pyx``."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kubeai._load cimport LoadTable
from kubeai._queue_table cimport QueueTable


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


cpdef Admission admit(LoadTable table, Py_ssize_t row, uint32_t generation, str kind=*)


cdef class Reservation:
    cdef LoadTable table
    cdef QueueTable queues  # of requests that wait for its capacity; None: none does
    cdef uint64_t *cell
    cdef uint64_t *model_cell
    cdef int row
    cdef int model_row
    cdef uint32_t generation
    cdef uint32_t model_generation
    cdef bint _released
    cdef readonly uint32_t pending  # tokens of the prompt that are still to be computed
    cdef double picked_s
    cdef double ahead_tokens  # what its first byte waits for; 0: nothing is learned from it
    cdef readonly int iterations
    cdef readonly bint is_probe  # a probe of an ejected endpoint
    cdef readonly int reason  # why it was picked: PICKED_CACHED to PICKED_NEW; 0: by least load
    cdef readonly bint failing  # the endpoint has failed since its last complete response
    cdef readonly uint32_t cached  # tokens of the prompt that the endpoint was believed to have
    cdef readonly uint32_t first_cached  # tokens that ``first`` was believed to have
    cdef readonly double cost  # PrefixCache: of this pick, in tokens
    cdef readonly double first_cost
    cdef readonly double first_load
    cdef readonly double own_load
    cdef readonly int64_t bound
    cdef readonly str name
    cdef readonly str first
    cdef readonly object target
    cdef void _subtract(self, uint64_t load) noexcept
    cdef void _computed(self) noexcept
    cdef void _prefilled(self, double now_s) noexcept
    cdef void _count_reported(self, uint64_t prompt, uint64_t cached, uint64_t output) noexcept
    cdef void _release(self) noexcept


cdef Reservation reserve(
    LoadTable table,
    int row,
    uint32_t generation,
    int model_row,
    uint32_t model_generation,
    uint32_t pending,
)
