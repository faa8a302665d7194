"""Declarations of ``_queue_table.pyx``."""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kubeai._load cimport get_u64
from kubeai._shared_table cimport WORKERS_MAX, SharedTable


cdef enum:
    CLASSES = 3  # of priorities: below 0, 0, above 0
    WAIT_BUCKETS = 5
    TAG_BITS = 48


cdef struct Waits:  # of one model in one worker; three cache lines
    uint64_t round  # the latest start that this worker has served
    uint32_t waiting[4]  # by class; one is spare
    uint64_t sums_us[CLASSES]
    uint64_t counts[CLASSES * WAIT_BUCKETS]
    uint64_t spare[3]


cdef class QueueTable(SharedTable):
    cdef int stride  # cells per row of heads and accounts
    cdef uint64_t *head_cells  # [rows][stride]
    cdef uint64_t *account_cells  # [ACCOUNTS][stride]
    cdef Waits *waits  # [columns][rows]
    cdef int[WORKERS_MAX] wake_fd_of
    cdef bint _owns_wake_fds

    cdef void _lay_out(self) noexcept
    cdef Waits *_own(self, Py_ssize_t row) noexcept
    cdef uint64_t _round(self, Py_ssize_t row) noexcept
    cdef uint64_t _account_of(
        self, Py_ssize_t row, uint32_t generation, str tenant
    ) except? 0
    cdef uint64_t _paid(self, Py_ssize_t row, uint64_t account) noexcept
    cdef uint64_t _charge(
        self, Py_ssize_t row, uint64_t account, uint64_t start, uint64_t work
    ) noexcept
    cdef int _best(self, Py_ssize_t row, int columns, uint64_t skip) noexcept
    cdef inline bint is_peer_waiting(self, Py_ssize_t row) noexcept:
        return get_u64(&self.head_cells[row * self.stride + self.columns - 1]) != 0

    cdef bint is_any_waiting(self, Py_ssize_t row, bint blocked_too) noexcept
    cdef int charge_now(
        self, Py_ssize_t row, uint32_t generation, str tenant, uint64_t work
    ) except -1
    cdef int charge_more(
        self, Py_ssize_t row, uint32_t generation, str tenant, uint64_t work
    ) except -1
    cdef void freed(self, Py_ssize_t row) noexcept
    cdef bint _wake(self, int column) noexcept
