"""The queue table: what the workers' queues of waiting requests must know of each other.

Each worker has its own queue for each model (``routing/queueing.py``). Free capacity must
go to the request that is first in all of them, so the queues share three things in one memfd:

- *Heads*: the priority and the start tag of the request that is first in a worker's queue of a
  model, in one cell; 0 if the queue is empty. A row of cells is a model's heads in all workers.
- *Accounts*: until when, in the model's virtual time, each tenant has been served. The time
  advances by one for each token of work that one tenant has been served (start-time fair queueing;
  Goyal, Vin and Cheng 1996). A tenant's next request starts where its last one ended, or now, if
  that is later.
- *Waits*: the requests in the queues and how long requests waited, by class of priority.

Like in the load table, each cell has one writer: the worker of its column, or for the last column
the supervisor, which records the first of the peers' heads and their latest time. The only
exception: any worker may block a head that is not served, until its writer publishes it again. The
virtual time and a tenant's account are the maxima over the columns, so no lock is needed, and two
workers that serve a tenant at the same instant lose the charge for one request. Accounts are
hashed: tenants whose hashes agree in 48 bits share an account. A tenant whose account is evicted by
another's starts again at the current virtual time. Neither makes an account wrong by more than
``LEAD_MAX`` tokens.

A worker that frees capacity wakes the worker whose head is first, through its eventfd. When a
worker has been killed, the supervisor clears the heads and gauges of its column; times and accounts
stay.
"""

from posix.unistd cimport close as close_fd
from posix.unistd cimport read as read_fd
from posix.unistd cimport write as write_fd

cimport cython
from cpython.unicode cimport PyUnicode_AsUTF8AndSize
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.string cimport memset

import os

from kubeai._load cimport count, get_u32, get_u64, put_u32, put_u64, swap
from kubeai._shared_memory cimport SharedMemory, lines
from kubeai._shared_table cimport (
    WORKERS_MAX,
    SharedTable,
    TableHeader,
    check_shape,
    read_table_header,
    stride_of,
)

cdef enum:
    LAYOUT_VERSION = 1
    ACCOUNTS = 4096
    _LEAD_MAX_TOKENS = 1 << 21
    _PRIORITY_MAX = 1000  # and at least -1000

cdef uint64_t MAGIC = 0x6B75626561695154  # "kubeaiQT"
cdef uint64_t TAG_MASK = (<uint64_t> 1 << TAG_BITS) - 1
cdef uint64_t BLOCKED = <uint64_t> 1 << 62
cdef double *WAIT_BOUNDS_S = [0.1, 1.0, 10.0, 60.0]

WAIT_BUCKETS_S = (0.1, 1.0, 10.0, 60.0)
CLASS_NAMES = ("low", "normal", "high")
WORK_MAX_TOKENS = _LEAD_MAX_TOKENS // 2
PRIORITY_MAX = _PRIORITY_MAX


cdef struct Layout:
    size_t heads
    size_t accounts
    size_t waits
    size_t end
    int stride


cdef Layout _layout(size_t rows, size_t columns) noexcept:
    cdef Layout layout
    cdef size_t stride = stride_of(columns)
    layout.stride = <int> stride
    layout.heads = lines(sizeof(TableHeader))
    layout.accounts = layout.heads + lines(rows * stride * sizeof(uint64_t))
    layout.waits = layout.accounts + lines(ACCOUNTS * stride * sizeof(uint64_t))
    layout.end = layout.waits + lines(columns * rows * sizeof(Waits))
    return layout


cdef inline int class_of(int priority) noexcept:
    return 1 + (priority > 0) - (priority < 0)


cdef inline uint64_t head_of(int priority, uint64_t start) noexcept:
    """A head's cell. The greater of two comes first; BLOCKED apart, it is below 2^60."""
    priority = max(-_PRIORITY_MAX, min(priority, _PRIORITY_MAX))
    return <uint64_t> (priority + _PRIORITY_MAX + 1) << TAG_BITS | (TAG_MASK - (start & TAG_MASK))


@cython.final
cdef class QueueTable(SharedTable):
    """See the module docstring."""

    def __init__(self):
        raise TypeError("use QueueTable.create or QueueTable.attach")

    def __cinit__(self):
        cdef int column
        self.what = "queue table"
        self.shared_columns = 1  # the peers'
        for column in range(WORKERS_MAX):
            self.wake_fd_of[column] = -1

    @staticmethod
    def create(int rows, int workers):
        """See the stub."""
        cdef int column
        check_shape(rows, workers)
        cdef QueueTable table = QueueTable.__new__(QueueTable)
        cdef size_t size = _layout(rows, workers + 1).end
        table._create_table("kubeai-queues", rows, workers, size, MAGIC, LAYOUT_VERSION)
        table._lay_out()
        table._owns_wake_fds = True
        for column in range(workers):
            table.wake_fd_of[column] = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        return table

    @staticmethod
    def attach(int fd, int column, wake_fds=()):
        """See the stub."""
        cdef QueueTable table = QueueTable.__new__(QueueTable)
        cdef TableHeader header = read_table_header(fd, table.what, MAGIC, LAYOUT_VERSION)
        if wake_fds and len(wake_fds) != <int> header.columns - 1:
            raise ValueError(f"{len(wake_fds)} wake descriptors for {header.columns - 1} workers")
        table._attach_table(fd, column, &header, _layout(header.rows, header.columns).end)
        table._lay_out()
        for at, wake_fd in enumerate(wake_fds):
            table.wake_fd_of[<int> at] = wake_fd
        return table

    cdef void _lay_out(self) noexcept:
        cdef Layout layout = _layout(self.rows, self.columns)
        self.stride = layout.stride
        self.head_cells = <uint64_t *> (self.base + layout.heads)
        self.account_cells = <uint64_t *> (self.base + layout.accounts)
        self.waits = <Waits *> (self.base + layout.waits)

    def close(self):
        """See the stub."""
        cdef int column
        if self._owns_wake_fds:
            self._owns_wake_fds = False
            for column in range(self.columns - 1):
                close_fd(self.wake_fd_of[column])
        for column in range(WORKERS_MAX):
            self.wake_fd_of[column] = -1
        SharedMemory.close(self)

    def __dealloc__(self):
        cdef int column
        if self._owns_wake_fds:
            for column in range(WORKERS_MAX):
                if self.wake_fd_of[column] >= 0:
                    close_fd(self.wake_fd_of[column])

    @property
    def wake_fds(self):
        """See the stub."""
        return tuple([self.wake_fd_of[column] for column in range(self.columns - 1)])

    # -- supervisor only ---------------------------------------------------------------------

    def open_row(self, Py_ssize_t row):
        """See the stub."""
        cdef size_t column
        cdef TableHeader *header = <TableHeader *> self.base
        self._check_row(row)
        if header.rows_used < <uint64_t> row + 1:  # never opened: its cells are 0
            header.rows_used = row + 1
            return
        memset(&self.head_cells[row * self.stride], 0, self.stride * sizeof(uint64_t))
        for column in range(<size_t> self.columns):
            memset(&self.waits[column * self.rows + row], 0, sizeof(Waits))

    def clear_column(self, int column):
        """See the stub."""
        cdef Py_ssize_t row
        cdef Waits *waits
        self._check_column(column)
        for row in range(<Py_ssize_t> (<TableHeader *> self.base).rows_used):
            put_u64(&self.head_cells[row * self.stride + column], 0)
            waits = &self.waits[<size_t> column * self.rows + row]
            memset(waits.waiting, 0, sizeof(waits.waiting))
        for column in range(self.columns - 1):
            self._wake(column)

    def set_peers(self, Py_ssize_t row, int priority, uint64_t start, bint is_live=False):
        """See the stub."""
        cdef uint64_t head = head_of(priority, start)
        cdef uint64_t *cell
        self._check_row(row)
        cell = &self.head_cells[row * self.stride + self.columns - 1]
        if is_live or get_u64(cell) & ~BLOCKED != head:
            put_u64(cell, head)

    def clear_peers(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        put_u64(&self.head_cells[row * self.stride + self.columns - 1], 0)

    def advance(self, Py_ssize_t row, uint64_t now):
        """See the stub."""
        cdef Waits *peers
        self._check_row(row)
        peers = &self.waits[<size_t> (self.columns - 1) * self.rows + row]
        if get_u64(&peers.round) < now:
            put_u64(&peers.round, min(now, TAG_MASK >> 1))

    def firsts(self):
        """See the stub."""
        cdef Py_ssize_t row
        cdef int best
        cdef uint64_t head
        cdef dict firsts = {}
        self._check_row(0)
        for row in range(<Py_ssize_t> (<TableHeader *> self.base).rows_used):
            best = self._best(row, self.columns - 1, 0)
            if best >= 0:
                head = get_u64(&self.head_cells[row * self.stride + best])
                firsts[row] = (
                    <int> (head >> TAG_BITS) - _PRIORITY_MAX - 1,
                    TAG_MASK - (head & TAG_MASK),
                    self._round(row),
                )
        return firsts

    # -- virtual time and accounts -----------------------------------------------------------

    cdef Waits *_own(self, Py_ssize_t row) noexcept:
        return &self.waits[<size_t> self._column * self.rows + row]

    cdef uint64_t _round(self, Py_ssize_t row) noexcept:
        cdef uint64_t latest = 0
        cdef size_t column
        for column in range(<size_t> self.columns):
            latest = max(latest, get_u64(&self.waits[column * self.rows + row].round))
        return latest

    def round(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        return self._round(row)

    cdef uint64_t _account_of(
        self, Py_ssize_t row, uint32_t generation, str tenant
    ) except? 0:
        """FNV-1a and the finalizer of splitmix64; the same in all processes."""
        cdef Py_ssize_t size, at
        cdef const char *text = PyUnicode_AsUTF8AndSize(tenant, &size)
        cdef uint64_t account = 0xCBF29CE484222325
        account ^= (<uint64_t> generation << 32) + <uint64_t> row
        for at in range(size):
            account = (account ^ <unsigned char> text[at]) * <uint64_t> 0x100000001B3
        account = (account ^ account >> 30) * <uint64_t> 0xBF58476D1CE4E5B9
        account = (account ^ account >> 27) * <uint64_t> 0x94D049BB133111EB
        return account ^ account >> 31

    def account(self, Py_ssize_t row, uint32_t generation, str tenant not None):
        """See the stub."""
        self._check_row(row)
        return self._account_of(row, generation, tenant)

    cdef uint64_t _paid(self, Py_ssize_t row, uint64_t account) noexcept:
        """When a tenant's next request may start; 0 if nothing is known of it."""
        cdef const uint64_t *cells = &self.account_cells[(account % ACCOUNTS) * self.stride]
        cdef uint64_t own = account & ~TAG_MASK, cell, latest = 0
        cdef int column
        for column in range(self.columns):
            cell = get_u64(&cells[column])
            if (cell & ~TAG_MASK) == own:
                latest = max(latest, cell & TAG_MASK)
        return min(latest, self._round(row) + _LEAD_MAX_TOKENS)

    def start(self, Py_ssize_t row, uint64_t account, uint64_t floor):
        """See the stub."""
        self._check_row(row)
        return max(floor, self._paid(row, account))

    cdef uint64_t _charge(
        self, Py_ssize_t row, uint64_t account, uint64_t start, uint64_t work
    ) noexcept:
        cdef uint64_t *cells = &self.account_cells[(account % ACCOUNTS) * self.stride]
        cdef uint64_t ends = (start + min(work, <uint64_t> _LEAD_MAX_TOKENS // 2)) & TAG_MASK
        cdef Waits *own = self._own(row)
        put_u64(&cells[self._column], (account & ~TAG_MASK) | ends)
        if get_u64(&own.round) < start:
            put_u64(&own.round, start)
        return ends

    def charge(self, Py_ssize_t row, uint64_t account, uint64_t start, uint64_t work):
        """See the stub."""
        self._check_row(row)
        self._check_writer()
        return self._charge(row, account, max(start, self._paid(row, account)), work)

    cdef int charge_now(
        self, Py_ssize_t row, uint32_t generation, str tenant, uint64_t work
    ) except -1:
        """Charge a tenant for a request that has not waited."""
        cdef uint64_t account = self._account_of(row, generation, tenant)
        self._charge(row, account, max(self._round(row), self._paid(row, account)), work)
        return 0

    cdef int charge_more(
        self, Py_ssize_t row, uint32_t generation, str tenant, uint64_t work
    ) except -1:
        """Charge a tenant for work that a request has turned out to be, besides what was known.

        An account that lies in the past is not brought forward: its tenant was idle meanwhile.
        """
        cdef uint64_t account = self._account_of(row, generation, tenant)
        cdef uint64_t ends = self._paid(row, account) + min(work, <uint64_t> _LEAD_MAX_TOKENS // 2)
        cdef uint64_t *cells = &self.account_cells[(account % ACCOUNTS) * self.stride]
        if self._column >= 0:
            put_u64(&cells[self._column], (account & ~TAG_MASK) | (ends & TAG_MASK))
        return 0

    # -- heads -------------------------------------------------------------------------------

    def publish(self, Py_ssize_t row, int priority, uint64_t start, bint blocked=False):
        """See the stub."""
        self._check_row(row)
        self._check_writer()
        put_u64(
            &self.head_cells[row * self.stride + self._column],
            head_of(priority, start) | (BLOCKED if blocked else 0),
        )

    def withdraw(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        self._check_writer()
        put_u64(&self.head_cells[row * self.stride + self._column], 0)

    def head(self, Py_ssize_t row, int column):
        """See the stub."""
        self._check_row(row)
        if not 0 <= column < self.columns:
            raise IndexError(f"column must be 0 to {self.columns - 1}, not {column}")
        return get_u64(&self.head_cells[row * self.stride + column])

    def block(self, Py_ssize_t row, int column, uint64_t head):
        """See the stub."""
        self._check_row(row)
        if not 0 <= column < self.columns:
            raise IndexError(f"column must be 0 to {self.columns - 1}, not {column}")
        if head:
            swap(&self.head_cells[row * self.stride + column], head, head | BLOCKED)

    cdef int _best(self, Py_ssize_t row, int columns, uint64_t skip) noexcept:
        """The column of the first head among the first ``columns``; ``skip``: bits of columns."""
        cdef uint64_t head, first = 0
        cdef int column, best = -1
        for column in range(columns):
            head = get_u64(&self.head_cells[row * self.stride + column])
            if head > first and not head & BLOCKED and not skip >> column & 1:
                first = head
                best = column
        return best

    def best(self, Py_ssize_t row, uint64_t skip=0):
        """See the stub."""
        self._check_row(row)
        return self._best(row, self.columns, skip)

    def earliest(self, Py_ssize_t row, int priority):
        """See the stub."""
        cdef uint64_t level = head_of(priority, 0) >> TAG_BITS
        cdef uint64_t head, start
        cdef int column
        cdef object first = None
        self._check_row(row)
        for column in range(self.columns):
            head = get_u64(&self.head_cells[row * self.stride + column]) & ~BLOCKED
            if head >> TAG_BITS == level:  # a head is priority << TAG_BITS | (TAG_MASK - start)
                start = TAG_MASK - (head & TAG_MASK)
                if first is None or start < <uint64_t> first:
                    first = start
        return first

    cdef bint is_any_waiting(self, Py_ssize_t row, bint blocked_too) noexcept:
        """Whether a request waits in this KubeAI replica."""
        cdef uint64_t head
        cdef int column
        for column in range(self.columns - 1):
            head = get_u64(&self.head_cells[row * self.stride + column])
            if head and (blocked_too or not head & BLOCKED):
                return True
        return False

    def is_waiting(self, Py_ssize_t row, bint blocked_too=True):
        """See the stub."""
        self._check_row(row)
        return self.is_any_waiting(row, blocked_too)

    # -- wake-ups ----------------------------------------------------------------------------

    cdef void freed(self, Py_ssize_t row) noexcept:
        """One of a model's endpoints has free capacity: wake the workers that can use it."""
        cdef int column, best
        if self.base == NULL or not self.is_any_waiting(row, True):
            return
        best = self._best(row, self.columns - 1, 0)
        for column in range(self.columns - 1):
            if column == best or get_u64(&self.head_cells[row * self.stride + column]) & BLOCKED:
                self._wake(column)

    def notify(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        self.freed(row)

    cdef bint _wake(self, int column) noexcept:
        cdef uint64_t one = 1
        if self.wake_fd_of[column] < 0:
            return False
        return write_fd(self.wake_fd_of[column], &one, sizeof(one)) == sizeof(one)

    def wake(self, int column):
        """See the stub."""
        if 0 <= column < self.columns - 1:
            self._wake(column)

    def take_wakes(self):
        """See the stub."""
        cdef uint64_t wakes = 0
        if self._column >= 0 and self.wake_fd_of[self._column] >= 0:
            if read_fd(self.wake_fd_of[self._column], &wakes, sizeof(wakes)) < 0:
                return 0
        return wakes

    # -- waits -------------------------------------------------------------------------------

    def enter(self, Py_ssize_t row, int priority):
        """See the stub."""
        cdef uint32_t *cell
        self._check_row(row)
        self._check_writer()
        cell = &self._own(row).waiting[class_of(priority)]
        put_u32(cell, get_u32(cell) + 1)

    def leave(self, Py_ssize_t row, int priority, double waited_s=-1.0):
        """See the stub."""
        cdef int which = class_of(priority), bucket = 0
        cdef uint32_t *cell
        cdef Waits *own
        self._check_row(row)
        self._check_writer()
        own = self._own(row)
        cell = &own.waiting[which]
        if get_u32(cell):
            put_u32(cell, get_u32(cell) - 1)
        if waited_s < 0:
            return
        while bucket < WAIT_BUCKETS - 1 and waited_s > WAIT_BOUNDS_S[bucket]:
            bucket += 1
        count(&own.counts[which * WAIT_BUCKETS + bucket], 1)
        count(&own.sums_us[which], <uint64_t> (waited_s * 1e6))

    def waiting(self, Py_ssize_t row):
        """See the stub."""
        cdef size_t column
        cdef int which
        cdef uint64_t[CLASSES] totals
        self._check_row(row)
        memset(totals, 0, sizeof(totals))
        for column in range(<size_t> self.columns):
            for which in range(CLASSES):
                totals[which] += get_u32(&self.waits[column * self.rows + row].waiting[which])
        return tuple([totals[which] for which in range(CLASSES)])

    def waited(self, Py_ssize_t row):
        """See the stub."""
        cdef size_t column
        cdef int which, bucket
        cdef uint64_t sum_us
        cdef uint64_t[WAIT_BUCKETS] totals
        cdef list classes = []
        self._check_row(row)
        for which in range(CLASSES):
            memset(totals, 0, sizeof(totals))
            sum_us = 0
            for column in range(<size_t> self.columns):
                sum_us += get_u64(&self.waits[column * self.rows + row].sums_us[which])
                for bucket in range(WAIT_BUCKETS):
                    totals[bucket] += get_u64(
                        &self.waits[column * self.rows + row].counts[which * WAIT_BUCKETS + bucket]
                    )
            counts = [totals[bucket] for bucket in range(WAIT_BUCKETS)]
            classes.append((counts, <double> sum_us / 1e6))
        return classes
