"""The key table: what API keys have used of their limits, in memory shared by all processes.

It is one memfd, laid out as the load table (``_load.pyx``): a row is a key, a column belongs to one
worker, its only writer, and the last one to the supervisor. There the supervisor records what the
peers have counted. What a key has used is the sum of its row, so counting takes
no lock. Two workers that check a limit at the same instant do not see each other's request.

A cell has the requests in flight, and the requests and tokens of the last minute in slots of
``INTERVAL_S``. A slot is reused once its interval is more than a minute old. The oldest interval is
weighted by the fraction of it that is still within the last minute, so that a client with a steady
rate can use its whole limit. Any six consecutive intervals, and therefore any 50 s, stay within the
limit. A minute that begins within an interval can have more: what was sent at the end of that
interval may be sent again up to 10 s early.

Intervals are numbered on CLOCK_MONOTONIC, which all processes on a machine share; a jump of the
wall clock changes nothing. When a worker is killed, its requests in flight are cleared; what it has
counted stays until it is a minute old.

The supervisor creates the table and opens rows; ``_limits`` counts requests in it, and
``_key_readings`` finds what has changed.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset

from collections import namedtuple
from math import ceil

from kubeai._cache_line cimport prefetch
from kubeai._clock cimport coarse_now
from kubeai._load cimport get_i64, get_u32, get_u64, put_i64, put_u32, put_u64
from kubeai._shared_memory cimport SharedMemory, lines
from kubeai._shared_table cimport SharedTable, TableHeader, check_shape, read_table_header

cdef enum:
    LAYOUT_VERSION = 2
    PREFETCHED_MAX_COLUMNS = 4  # a core has about a dozen loads under way
    HAS_PEERS = 0  # in the header's spare words: a peer has counted something

cdef uint64_t MAGIC = 0x6B75626561694B54  # "kubeaiKT"

Use = namedtuple("Use", "in_flight requests tokens")


cdef struct Layout:
    size_t generations
    size_t stamps
    size_t cells
    size_t end


cdef Layout _layout(size_t rows, size_t columns) noexcept:
    cdef Layout layout
    layout.generations = lines(sizeof(TableHeader))
    layout.stamps = layout.generations + lines(rows * sizeof(uint32_t))
    layout.cells = layout.stamps + lines(columns * rows * sizeof(uint32_t))
    layout.end = layout.cells + rows * columns * sizeof(Cell)
    return layout


cdef double wait_s_for(const Window *window, const Moment *moment, double excess) noexcept:
    """How long it takes until ``excess`` of what is used has left the minute."""
    cdef double left_s = moment.share * INTERVAL_S  # until the interval has left
    cdef double leaving = moment.share * <double> window.counts[INTERVALS]
    cdef double waited_s = 0
    cdef int age = INTERVALS
    while excess > leaving and age > 0:
        excess -= leaving
        waited_s += left_s
        age -= 1
        left_s = INTERVAL_S
        leaving = <double> window.counts[age]
    if excess > 0 and leaving > 0:
        waited_s += left_s * min(1.0, excess / leaving)
    return waited_s


cdef int _fill(Window *window, tuple counts) except -1:
    """Take over counts by age; those that are left out are 0."""
    cdef int age
    if len(counts) > SLOTS:
        raise ValueError(f"a minute has {SLOTS} intervals, not {len(counts)}")
    for age in range(SLOTS):
        window.counts[age] = counts[age] if age < len(counts) else 0
    return 0


@cython.final
cdef class KeyTable(SharedTable):
    """See the module and the stub."""

    def __init__(self):
        raise TypeError("use KeyTable.create or KeyTable.attach")

    def __cinit__(self):
        self.what = "key table"

    @staticmethod
    def create(int rows, int workers):
        """See the stub."""
        check_shape(rows, workers)
        cdef KeyTable table = KeyTable.__new__(KeyTable)
        cdef size_t size = _layout(rows, workers + 1).end
        table._create_table("kubeai-keys", rows, workers, size, MAGIC, LAYOUT_VERSION)
        table._lay_out()
        return table

    @staticmethod
    def attach(int fd, int column):
        """See the stub."""
        cdef KeyTable table = KeyTable.__new__(KeyTable)
        cdef TableHeader header = read_table_header(fd, table.what, MAGIC, LAYOUT_VERSION)
        table._attach_table(fd, column, &header, _layout(header.rows, header.columns).end)
        table._lay_out()
        return table

    cdef void _lay_out(self) noexcept:
        cdef Layout layout = _layout(self.rows, self.columns)
        self.header = <TableHeader *> self.base
        self.generations = <uint32_t *> (self.base + layout.generations)
        self.stamps = <uint32_t *> (self.base + layout.stamps)
        self.cells = <Cell *> (self.base + layout.cells)

    def close(self):
        """See the stub."""
        self.header = NULL
        SharedMemory.close(self)

    cdef double now_s(self) except? -1:
        return coarse_now() if self.clock is None else self.clock()

    cdef bint lives(self, int row, uint32_t generation) noexcept:
        """Whether this is the row's current generation; 0 (never opened) is never current."""
        return (
            self.header != NULL
            and 0 <= row < self.rows
            and generation != 0
            and get_u32(&self.generations[row]) == generation
        )

    cdef void prefetch(self, int row) noexcept:
        """Load what a request reads and writes of its key; it is needed once the body is read."""
        cdef const Cell *cells = &self.cells[<size_t> row * self.columns]
        cdef int column
        prefetch(&self.generations[row])
        prefetch(&self.stamps[<size_t> self._column * self.rows + row])
        for column in range(min(self.columns - 1, PREFETCHED_MAX_COLUMNS)):
            prefetch(&cells[column].in_flight)
            prefetch(&cells[column].refused)

    # -- rows: supervisor only ---------------------------------------------------------------

    def open_row(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        cdef uint32_t generation = get_u32(&self.generations[row]) + 1
        if generation == 0:
            generation = 1
        # The generation first: holders of the old one then stop counting.
        put_u32(&self.generations[row], generation)
        if self.header.rows_used < <uint64_t> row + 1:
            put_u64(&self.header.rows_used, row + 1)
        memset(&self.cells[row * self.columns], 0, self.columns * sizeof(Cell))
        return generation

    def generation(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        return get_u32(&self.generations[row])

    def row_is_zero(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        return self._in_flight(row, self.columns - 1) == 0

    def set_peers(
        self,
        int row,
        uint32_t generation,
        int64_t in_flight,
        uint64_t interval,
        tuple requests not None,
        tuple tokens not None,
    ):
        """See the stub."""
        self._check_row(row)
        if in_flight < 0:
            raise ValueError(f"requests in flight must not be negative, but are {in_flight}")
        cdef Window by_age[2]
        _fill(&by_age[0], requests)
        _fill(&by_age[1], tokens)
        if not self.lives(row, generation):
            return
        cdef Cell *cell = &self.cells[<size_t> row * self.columns + self.columns - 1]
        cdef int age, slot
        if in_flight or requests or tokens:
            put_u64(&self.header.spare[HAS_PEERS], 1)
        put_i64(&cell.in_flight, in_flight)
        # The latest first: counts only move to later intervals, and a reader in between counts too
        # much rather than too little.
        for age in range(SLOTS):
            slot = <int> ((interval % SLOTS + SLOTS - age) % SLOTS)  # intervals begin at 0 at boot
            put_u64(&cell.requests[slot], slot_of(interval - age, by_age[0].counts[age]))
            put_u64(&cell.tokens[slot], slot_of(interval - age, by_age[1].counts[age]))

    def clear_column(self, int column):
        """See the stub."""
        self._check_column(column)
        cdef size_t row
        for row in range(get_u64(&self.header.rows_used)):
            put_i64(&self.cells[row * self.columns + column].in_flight, 0)
            put_u32(
                &self.stamps[<size_t> column * self.rows + row],
                get_u32(&self.stamps[<size_t> column * self.rows + row]) + 1,
            )

    # -- reads: any process ------------------------------------------------------------------

    cdef int counted_columns(self) noexcept:
        """The number of columns that have something: without peers, the workers'."""
        return self.columns if get_u64(&self.header.spare[HAS_PEERS]) else self.columns - 1

    cdef int64_t _in_flight(self, size_t row, int columns) noexcept:
        cdef const Cell *cells = &self.cells[row * self.columns]
        cdef int64_t total = 0
        cdef int column
        for column in range(columns):
            total += get_i64(&cells[column].in_flight)
        return total

    cdef double _used(self, const uint64_t *slots, int columns, const Moment *moment) noexcept:
        """What was counted in the last minute in the first ``columns`` of a row.

        ``slots``: those of the first column.
        """
        cdef uint64_t whole = 0
        cdef uint64_t leaving = 0
        cdef int column
        for column in range(columns):
            add_slots(slots, SLOTS, moment.interval, &whole, &leaving)
            slots += sizeof(Cell) // sizeof(uint64_t)
        return <double> whole + moment.share * <double> leaving

    cdef double used_requests(self, size_t row, int columns, const Moment *moment) noexcept:
        return self._used(self.cells[row * self.columns].requests, columns, moment)

    cdef double used_tokens(self, size_t row, int columns, const Moment *moment) noexcept:
        return self._used(self.cells[row * self.columns].tokens, columns, moment)

    cdef void _read(
        self, const uint64_t *slots, int columns, const Moment *moment, Window *window
    ) noexcept:
        """Sum what was counted in the last minute in the first ``columns`` of a row, by age.

        ``slots``: those of the first column.
        """
        cdef size_t cell = sizeof(Cell) // sizeof(uint64_t)
        cdef int slot = <int> (moment.interval % SLOTS)
        cdef int age, column
        for age in range(SLOTS):
            window.counts[age] = 0
            for column in range(columns):
                window.counts[age] += counted_in(
                    get_u64(&slots[column * cell + slot]), moment.interval - age
                )
            slot = slot - 1 if slot else SLOTS - 1

    cdef void read_requests(
        self, size_t row, int columns, const Moment *moment, Window *window
    ) noexcept:
        self._read(self.cells[row * self.columns].requests, columns, moment, window)

    cdef void read_tokens(
        self, size_t row, int columns, const Moment *moment, Window *window
    ) noexcept:
        self._read(self.cells[row * self.columns].tokens, columns, moment, window)

    def moment(self):
        """See the stub."""
        cdef double now_s = self.now_s()
        cdef uint64_t interval = moment_of(now_s).interval
        return interval, <int> (1000 * (now_s - <double> (interval * INTERVAL_S)))

    def _use(self, Py_ssize_t row, int columns):
        self._check_row(row)
        cdef Moment moment = moment_of(self.now_s())
        return Use(
            self._in_flight(row, columns),
            ceil(self.used_requests(row, columns, &moment)),
            ceil(self.used_tokens(row, columns, &moment)),
        )

    def use(self, Py_ssize_t row):
        """See the stub."""
        return self._use(row, self.columns)

    def use_here(self, Py_ssize_t row):
        """See the stub."""
        return self._use(row, self.columns - 1)

    def window_here(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        cdef Moment moment = moment_of(self.now_s())
        cdef Window window
        self.read_requests(row, self.columns - 1, &moment, &window)
        requests = tuple([window.counts[age] for age in range(SLOTS)])
        self.read_tokens(row, self.columns - 1, &moment, &window)
        return requests, tuple([window.counts[age] for age in range(SLOTS)])

    def is_counted(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        cdef int column, slot
        for column in range(self.columns - 1):
            for slot in range(SLOTS):  # a request leaves its interval there, however old it is
                if get_u64(&self.cells[row * self.columns + column].requests[slot]):
                    return True
        return False

    def refused(self, Py_ssize_t row):
        """See the stub."""
        self._check_row(row)
        cdef uint64_t total = 0
        cdef int column
        for column in range(self.columns):
            total += get_u64(&self.cells[row * self.columns + column].refused)
        return total
