"""The load table: in-flight counts in memory that all processes of one KubeAI share.

One memfd, handed on by descriptor. A row is a model or an endpoint; a column belongs to one
worker, which alone writes it (the last is the supervisor's), so there is no atomic
read-modify-write and nothing to repair after a SIGKILL but one column. Rows are opened by the
supervisor; each life of a row has a generation, and what was counted in an earlier life is
released into nothing. A gauge never falls below 0.

In its own column the supervisor puts down what other replicas of KubeAI have in flight, so that a
pick sees the load that all of them make. Everything else in the table is of this replica alone.

What others have picked in the last moments is not told yet. All that go by least load would then
take the same endpoint. So they expect of each other what they do themselves: ``settled`` follows a
row's own picks with a delay, about that of telling, and what is not settled counts once more for
each peer (:meth:`LoadTable.expected`).

An endpoint's health is shared as well: consecutive failures, and until when it is ejected. Past that
time it is half-open: one probe every ``TRIAL_S`` until a worker restores it.

What a pick reads (in-flight) lies row by row; what one worker counts and only a scrape reads
(active, held, lookups) lies column by column, so that workers do not share its cache lines.

The supervisor creates the table; workers attach. ``_ring`` picks through :func:`reserve`.
"""

cimport cython
from libc.stdlib cimport calloc, free
from libc.string cimport memset

import fcntl
import os

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *address, size_t size)
    int PROT_READ
    int PROT_WRITE
    int MAP_SHARED
    void *MAP_FAILED

cdef enum:
    ROWS_MAX = 1 << 20
    WORKERS_MAX = 63
    LAYOUT_VERSION = 5
    LINE_BYTES = 64

cdef uint64_t MAGIC = 0x6B75626561694C54  # "kubeaiLT"

ITERATION_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
TRIAL_S = 5.0
# How a request may end, in the order of its cells; the last of them is no end.
OUTCOME_NAMES = ("left", "2xx", "3xx", "4xx", "5xx", "broken", "retried")

cdef int64_t live_admissions = 0
cdef int64_t live_reservations = 0


def live():
    """(Admissions, Reservations) of this process that are not closed: leak check for tests."""
    return live_admissions, live_reservations


cdef struct Layout:
    size_t column_headers
    size_t generations
    size_t health
    size_t in_flight
    size_t settled
    size_t active
    size_t held
    size_t lookups
    size_t outcomes
    size_t end
    int stride


cdef size_t _lines(size_t size) noexcept:
    return (size + LINE_BYTES - 1) // LINE_BYTES * LINE_BYTES


cdef Layout _layout(size_t rows, size_t columns) noexcept:
    cdef Layout layout
    cdef size_t stride = 1
    # A power of two: a row of up to 16 columns never straddles two cache lines.
    while stride < columns:
        stride *= 2
    layout.stride = <int> stride
    layout.column_headers = _lines(sizeof(Header))
    layout.generations = layout.column_headers + _lines(columns * sizeof(Column))
    layout.health = layout.generations + _lines(rows * sizeof(uint32_t))
    layout.in_flight = layout.health + _lines(rows * sizeof(Health))
    layout.settled = layout.in_flight + _lines(rows * stride * sizeof(int32_t))
    layout.active = layout.settled + _lines(rows * sizeof(int32_t))
    layout.held = layout.active + _lines(2 * columns * rows * sizeof(int32_t))
    layout.lookups = layout.held + _lines(columns * rows * sizeof(int32_t))
    layout.outcomes = layout.lookups + _lines(columns * rows * 3 * sizeof(uint64_t))
    layout.end = layout.outcomes + columns * rows * OUTCOMES * sizeof(uint64_t)
    return layout


cdef int _kind(object kind) except -1:
    if kind == "http":
        return 0
    if kind == "message":
        return 1
    raise ValueError(f"kind must be 'http' or 'message', not {kind!r}")


@cython.final
cdef class LoadTable:
    """Rows × columns of counters in one memfd; see the module."""

    def __init__(self):
        raise TypeError("use LoadTable.create or LoadTable.attach")

    def __cinit__(self):
        self.fd = -1
        self._column = -1

    @staticmethod
    def create(int rows, int workers):
        """A new table, all cells 0. ``rows`` ≤ 2^20, ``workers`` ≤ 63."""
        if not 1 <= rows <= ROWS_MAX:
            raise ValueError(f"rows must be 1 to {ROWS_MAX}, not {rows}")
        if not 1 <= workers <= WORKERS_MAX:
            raise ValueError(f"workers must be 1 to {WORKERS_MAX}, not {workers}")
        cdef LoadTable table = LoadTable.__new__(LoadTable)
        cdef size_t size = _layout(rows, workers + 1).end
        table.fd = os.memfd_create("kubeai-load", os.MFD_ALLOW_SEALING)
        table._owns_fd = True
        os.ftruncate(table.fd, size)
        # Nobody who holds the descriptor can shrink the file under a process that maps it.
        fcntl.fcntl(
            table.fd,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        )
        table._map(table.fd, size, rows, workers + 1)
        table.header.version = LAYOUT_VERSION
        table.header.rows = rows
        table.header.columns = workers + 1
        table.header.magic = MAGIC
        return table

    @staticmethod
    def attach(int fd, int column):
        """Map a table made elsewhere; ValueError when its header does not fit.

        The descriptor stays the caller's: ``close`` only unmaps.
        """
        cdef LoadTable table = LoadTable.__new__(LoadTable)
        cdef size_t size = os.fstat(fd).st_size
        cdef Header header
        cdef bytes start = os.pread(fd, sizeof(Header), 0)
        if len(start) < <Py_ssize_t> sizeof(Header):
            raise ValueError("not a load table: too short")
        header = (<Header *> <const char *> start)[0]
        if header.magic != MAGIC:
            raise ValueError("not a load table: wrong magic")
        if header.version != LAYOUT_VERSION:
            raise ValueError(
                f"load table has layout {header.version}, this program has {LAYOUT_VERSION}"
            )
        if not (1 <= header.rows <= ROWS_MAX and 2 <= header.columns <= WORKERS_MAX + 1):
            raise ValueError(f"load table of {header.rows} rows × {header.columns} columns")
        if size != _layout(header.rows, header.columns).end:
            raise ValueError(f"load table has {size} bytes, its header wants another size")
        if not 0 <= column < <int> header.columns:
            raise ValueError(f"column must be 0 to {header.columns - 1}, not {column}")
        table._map(fd, size, <int> header.rows, <int> header.columns)
        table._column = column
        return table

    cdef void _map(self, int fd, size_t size, int rows, int columns) except *:
        cdef Layout layout = _layout(rows, columns)
        cdef char *base = <char *> mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
        if base == <char *> MAP_FAILED:
            raise OSError(f"mapping a load table of {size} bytes failed")
        self.fd = fd
        self.rows = rows
        self.columns = columns
        self.stride = layout.stride
        self._size = size
        self.header = <Header *> base
        self.column_headers = <Column *> (base + layout.column_headers)
        self.generations = <uint32_t *> (base + layout.generations)
        self.health = <Health *> (base + layout.health)
        self.in_flight_cells = <int32_t *> (base + layout.in_flight)
        self.settled_cells = <int32_t *> (base + layout.settled)
        self.active_cells = <int32_t *> (base + layout.active)
        self.held_cells = <int32_t *> (base + layout.held)
        self.lookup_cells = <uint64_t *> (base + layout.lookups)
        self.outcome_cells = <uint64_t *> (base + layout.outcomes)

    def close(self):
        """Unmap; what is still counted stays counted, and is released into nothing."""
        if self.header != NULL:
            munmap(self.header, self._size)
            self.header = NULL
        if self._owns_fd:
            self._owns_fd = False
            os.close(self.fd)
        self.fd = -1

    def __dealloc__(self):
        if self.header != NULL:
            munmap(self.header, self._size)
        if self._owns_fd:
            os.close(self.fd)

    @property
    def column(self):
        """The column that this process writes; -1 in the supervisor until set."""
        return self._column

    @column.setter
    def column(self, int column):
        if not -1 <= column < self.columns:
            raise ValueError(f"column must be -1 to {self.columns - 1}, not {column}")
        self._column = column

    cdef int _check_row(self, Py_ssize_t row) except -1:
        if self.header == NULL:
            raise ValueError("the load table is closed")
        if not 0 <= row < self.rows:
            raise IndexError(f"row must be 0 to {self.rows - 1}, not {row}")
        return 0

    cdef int _check_writer(self) except -1:
        if self._column < 0:
            raise ValueError("this process has no column of the load table")
        return 0

    cdef int _check_column(self, int column) except -1:
        if self.header == NULL:
            raise ValueError("the load table is closed")
        if not 0 <= column < self.columns:
            raise IndexError(f"column must be 0 to {self.columns - 1}, not {column}")
        return 0

    # -- rows: the supervisor's ----------------------------------------------------------------

    def open_row(self, Py_ssize_t row):
        """Begin a new life of a free row: all its cells zeroed, a new generation returned."""
        self._check_row(row)
        cdef int column
        cdef size_t cell
        cdef uint32_t generation = get_u32(&self.generations[row]) + 1
        # The generation first: whoever still counts in the old life then stops.
        put_u32(&self.generations[row], generation)
        if self.header.rows_used < <uint64_t> row + 1:
            put_u64(&self.header.rows_used, row + 1)
        memset(&self.health[row], 0, sizeof(Health))
        put_i32(&self.settled_cells[row], 0)
        for column in range(self.columns):
            cell = <size_t> column * self.rows + row
            put_i32(&self.in_flight_cells[row * self.stride + column], 0)
            put_i32(&self.active_cells[cell], 0)
            put_i32(&self.active_cells[cell + <size_t> self.columns * self.rows], 0)
            put_i32(&self.held_cells[cell], 0)
            put_u64(&self.lookup_cells[3 * cell], 0)
            put_u64(&self.lookup_cells[3 * cell + 1], 0)
            put_u64(&self.lookup_cells[3 * cell + 2], 0)
            memset(&self.outcome_cells[OUTCOMES * cell], 0, OUTCOMES * sizeof(uint64_t))
        return generation

    def generation(self, Py_ssize_t row):
        """The current life of a row; 0 when it was never opened."""
        self._check_row(row)
        return get_u32(&self.generations[row])

    def set_peers(self, Py_ssize_t row, uint32_t generation, int32_t in_flight):
        """Other replicas have so many picks of the row in flight; nothing in its other lives."""
        self._check_row(row)
        if in_flight < 0:
            raise ValueError(f"in_flight must not be negative, but is {in_flight}")
        if self.lives(row, generation):
            put_i32(&self.in_flight_cells[row * self.stride + self.columns - 1], in_flight)

    @property
    def peers(self):
        """How many other replicas of KubeAI pick as we do."""
        self._check_row(0)
        return get_u64(&self.header.peers)

    @peers.setter
    def peers(self, uint64_t count):
        self._check_row(0)
        put_u64(&self.header.peers, count)

    @property
    def phase(self):
        """Where ties among endpoints are broken first: another place in each replica of KubeAI."""
        self._check_row(0)
        return get_u64(&self.header.phase)

    @phase.setter
    def phase(self, uint64_t phase):
        self._check_row(0)
        put_u64(&self.header.phase, phase)

    def settle(self, int steps=4):
        """Let what is settled follow by a ``steps``-th of the difference; all of it at 1."""
        self._check_row(0)
        cdef size_t row
        cdef int64_t here, settled, step
        for row in range(get_u64(&self.header.rows_used)):
            here = self._here(row) << SETTLED_BITS
            settled = get_i32(&self.settled_cells[row])
            if here == settled:
                continue
            step = (here - settled) // steps
            put_i32(&self.settled_cells[row], <int32_t> (settled + step if step else here))

    def row_is_zero(self, Py_ssize_t row):
        """Whether no column holds a gauge (active, held, in-flight) in this row."""
        return self.in_flight(row) == 0 and self.active(row) == 0 and self.held(row) == 0

    def clear_column(self, int column):
        """Zero all gauges of a column whose worker is dead and reaped (counters stay)."""
        self._check_column(column)
        cdef size_t row
        cdef size_t used = get_u64(&self.header.rows_used)
        cdef size_t cell = <size_t> column * self.rows
        for row in range(used):
            put_i32(&self.in_flight_cells[row * self.stride + column], 0)
        memset(&self.active_cells[cell], 0, used * sizeof(int32_t))
        cell += <size_t> self.columns * self.rows
        memset(&self.active_cells[cell], 0, used * sizeof(int32_t))
        memset(&self.held_cells[<size_t> column * self.rows], 0, used * sizeof(int32_t))
        put_i64(&self.column_headers[column].active, 0)

    # -- reads: anyone -------------------------------------------------------------------------

    cdef int64_t _sum_columns(self, const int32_t *cells, Py_ssize_t row) noexcept:
        cdef int64_t total = 0
        cdef int column
        for column in range(self.columns):
            total += get_i32(&cells[<size_t> column * self.rows + row])
        return total

    def active(self, Py_ssize_t row, kind=None):
        """Requests of a model that are being served or held: sum over the columns."""
        self._check_row(row)
        cdef size_t kind_cells = <size_t> self.columns * self.rows
        if kind is not None:
            return self._sum_columns(self.active_cells + kind_cells * _kind(kind), row)
        return self._sum_columns(self.active_cells, row) + self._sum_columns(
            self.active_cells + kind_cells, row
        )

    def held(self, Py_ssize_t row):
        """Requests of a model that wait for an endpoint."""
        self._check_row(row)
        return self._sum_columns(self.held_cells, row)

    def in_flight(self, Py_ssize_t row):
        """Picks not yet released: of an endpoint, or of a model (all its endpoints)."""
        self._check_row(row)
        return sum_row(self.in_flight_cells + row * self.stride, self.columns)

    def in_flight_here(self, Py_ssize_t row):
        """The same without those of other replicas of KubeAI."""
        self._check_row(row)
        return self._here(row)

    def expected(self, Py_ssize_t row):
        """The load of a row, if peers have picked since they last told as we have."""
        self._check_row(row)
        return self._expected(row)

    cdef int64_t _here(self, size_t row) noexcept:
        cdef int32_t *cells = self.in_flight_cells + row * self.stride
        return sum_row(cells, self.columns) - get_i32(&cells[self.columns - 1])

    cdef uint64_t _ended(self, size_t row) noexcept:
        """Requests of a model that are over, however they ended."""
        cdef uint64_t total = 0
        cdef int column, outcome
        for column in range(self.columns - 1):
            for outcome in range(RETRIED):
                total += get_u64(
                    &self.outcome_cells[OUTCOMES * (<size_t> column * self.rows + row) + outcome]
                )
        return total

    def ended(self, Py_ssize_t row):
        """Requests of a model that are over, however they ended, since the row was opened."""
        self._check_row(row)
        return self._ended(row)

    def lookups(self, Py_ssize_t row):
        """Of an endpoint: hash lookups in which it was (initial, final, default) choice."""
        self._check_row(row)
        cdef uint64_t initial = 0, chosen = 0, default = 0
        cdef uint64_t *cell
        cdef int column
        for column in range(self.columns):
            cell = &self.lookup_cells[3 * (<size_t> column * self.rows + row)]
            initial += get_u64(&cell[0])
            chosen += get_u64(&cell[1])
            default += get_u64(&cell[2])
        return initial, chosen, default

    def outcomes(self, Py_ssize_t row, column=None):
        """Of a model: how its requests ended, by name (``OUTCOME_NAMES``); of one column, or all."""
        self._check_row(row)
        cdef int outcome, at
        cdef uint64_t total
        cdef dict outcomes = {}
        for outcome in range(RETRIED + 1):
            total = 0
            for at in range(self.columns):
                if column is None or column == at:
                    total += get_u64(
                        &self.outcome_cells[OUTCOMES * (<size_t> at * self.rows + row) + outcome]
                    )
            outcomes[OUTCOME_NAMES[outcome]] = total
        return outcomes

    def iterations(self):
        """Histogram of distinct endpoints looked at by a hashed pick, all models.

        Returns per-bucket counts for the upper bounds ``ITERATION_BUCKETS`` (+Inf last, not
        cumulative) and the sum of the values.
        """
        self._check_row(0)
        cdef uint64_t counts[BUCKETS]
        cdef uint64_t total = 0
        cdef int column, bucket
        memset(counts, 0, sizeof(counts))
        for column in range(self.columns):
            total += get_u64(&self.column_headers[column].iterations_sum)
            for bucket in range(BUCKETS):
                counts[bucket] += get_u64(&self.column_headers[column].iterations[bucket])
        return [counts[bucket] for bucket in range(BUCKETS)], total

    def active_total(self):
        """Requests active in all columns that workers write."""
        self._check_row(0)
        cdef int64_t total = 0
        cdef int column
        for column in range(self.columns - 1):
            total += get_i64(&self.column_headers[column].active)
        return total

    # -- what a worker says of itself ------------------------------------------------------------

    def acknowledge(self, uint64_t version):
        """This worker has applied the routing table's ``version``."""
        self._check_row(0)
        self._check_writer()
        put_u64(&self.column_headers[self._column].acknowledged, version)

    def acknowledged(self, int column):
        self._check_column(column)
        return get_u64(&self.column_headers[column].acknowledged)

    # -- health: any worker writes, all read -----------------------------------------------------

    def note_failure(self, Py_ssize_t row, uint32_t generation, double now_s, bint unreachable):
        """Count a failed attempt; returns the endpoint's failures since its last complete answer.

        ``now_s``: CLOCK_MONOTONIC seconds. ``unreachable``: there was no answer.
        """
        self._check_row(row)
        self._check_writer()
        cdef Health *health = &self.health[row]
        if not self.lives(row, generation):
            return 0
        put_time(&health.failed_s, now_s)
        put_u32(&health.unreachable, unreachable)
        put_u32(&health.failures, get_u32(&health.failures) + 1)
        count(&self.column_headers[self._column].health_events, 1)
        return get_u32(&health.failures)

    def eject(self, Py_ssize_t row, uint32_t generation, double until_s):
        """Eject an endpoint until ``until_s`` (CLOCK_MONOTONIC seconds); then it is half-open."""
        self._check_row(row)
        self._check_writer()
        if self.lives(row, generation):
            put_time(&self.health[row].ejected_until_s, until_s)
            put_u32(
                &self.health[row].ejection_count, get_u32(&self.health[row].ejection_count) + 1
            )
            count(&self.column_headers[self._column].health_events, 1)

    def half_open(self, Py_ssize_t row, uint32_t generation, double now_s):
        """End an ejection early: the endpoint may be probed from ``now_s`` on."""
        self._check_row(row)
        self._check_writer()
        if self.lives(row, generation) and get_time(&self.health[row].ejected_until_s) > now_s:
            put_time(&self.health[row].ejected_until_s, now_s)

    def restore(self, Py_ssize_t row, uint32_t generation):
        """Return an ejected endpoint to service. Its ejection count is kept."""
        self._check_row(row)
        self._check_writer()
        if self.lives(row, generation):
            put_time(&self.health[row].ejected_until_s, 0)

    def recover(self, Py_ssize_t row, uint32_t generation):
        """Return an endpoint to service with no failures and no ejections counted."""
        self.restore(row, generation)
        if self.lives(row, generation):
            put_u32(&self.health[row].failures, 0)
            put_u32(&self.health[row].ejection_count, 0)

    def ejected_until(self, Py_ssize_t row):
        """When an endpoint becomes half-open, or may be probed again; 0: it is not ejected."""
        self._check_row(row)
        return get_time(&self.health[row].ejected_until_s)

    def ejection_count(self, Py_ssize_t row):
        """How often an endpoint was ejected since it last recovered."""
        self._check_row(row)
        return get_u32(&self.health[row].ejection_count)

    def failures(self, Py_ssize_t row):
        """An endpoint's failed attempts, by all workers, since its last complete answer."""
        self._check_row(row)
        return get_u32(&self.health[row].failures)

    def failed_at(self, Py_ssize_t row):
        """When an endpoint last failed (CLOCK_MONOTONIC seconds); 0: never."""
        self._check_row(row)
        return get_time(&self.health[row].failed_s)

    def unreachable(self, Py_ssize_t row):
        """Whether an endpoint's last failure was without an answer."""
        self._check_row(row)
        return get_u32(&self.health[row].unreachable) != 0

    def health_events(self):
        """Changes with every failure and ejection that any worker records; never falls."""
        self._check_row(0)
        return self._health_events()

    cdef uint64_t _health_events(self) noexcept:
        cdef uint64_t total = 0
        cdef int column
        for column in range(self.columns):
            total += get_u64(&self.column_headers[column].health_events)
        return total

    # -- counting a request: a worker --------------------------------------------------------------

    def admit(self, Py_ssize_t row, uint32_t generation, kind="http"):
        """Count one request as active for the model in ``row``, until the Admission is closed."""
        global live_admissions
        self._check_row(row)
        self._check_writer()
        cdef size_t cell = <size_t> self._column * self.rows + row
        cdef int kind_index = _kind(kind)
        cdef Admission admission = Admission.__new__(Admission)
        admission.table = self
        admission.row = <int> row
        admission.generation = generation
        admission.active_cell = (
            &self.active_cells[kind_index * <size_t> self.columns * self.rows + cell]
        )
        admission.held_cell = &self.held_cells[cell]
        admission.column_active = &self.column_headers[self._column].active
        admission.outcome_cells = &self.outcome_cells[OUTCOMES * cell]
        admission._open = True
        live_admissions += 1
        put_i64(admission.column_active, get_i64(admission.column_active) + 1)
        if self.lives(row, generation):
            up(admission.active_cell)
        return admission

    cdef void count_lookup(
        self, int initial, int chosen, bint defaulted, int iterations
    ) noexcept:
        """One hashed pick: rows of the ring's first endpoint and of the chosen one (-1: none)."""
        cdef uint64_t *cells = &self.lookup_cells[3 * <size_t> self._column * self.rows]
        cdef Column *column = &self.column_headers[self._column]
        cdef int bucket = 0
        count(&cells[3 * <size_t> initial], 1)
        if chosen < 0:
            return
        count(&cells[3 * <size_t> chosen + 1], 1)
        if defaulted:
            count(&cells[3 * <size_t> chosen + 2], 1)
        while bucket < BUCKETS - 1 and iterations > 1 << bucket:
            bucket += 1
        count(&column.iterations[bucket], 1)
        count(&column.iterations_sum, iterations)


cdef struct Reading:
    uint32_t generation
    int64_t in_flight
    int64_t active
    uint64_t ended


@cython.final
cdef class Readings:
    """What each row counted, in this replica, when it was last looked at. The supervisor's."""

    cdef LoadTable table
    cdef Reading *last

    def __init__(self, LoadTable table not None):
        self.table = table
        self.last = <Reading *> calloc(table.rows, sizeof(Reading))
        if self.last == NULL:
            raise MemoryError(f"readings of {table.rows} rows")

    def __dealloc__(self):
        free(self.last)

    def changed(self):
        """Rows that count something else than at the last call, or live anew, with their counts.

        A list of (row, in flight, active, ended).
        """
        cdef LoadTable table = self.table
        table._check_row(0)
        cdef size_t row
        cdef size_t used = get_u64(&table.header.rows_used)
        cdef size_t kind_cells = <size_t> table.columns * table.rows
        cdef Reading now
        cdef Reading *last
        cdef list changed = []
        for row in range(used):
            now.generation = get_u32(&table.generations[row])
            now.in_flight = table._here(row)
            now.active = table._sum_columns(table.active_cells, row)
            now.active += table._sum_columns(table.active_cells + kind_cells, row)
            now.ended = table._ended(row)
            last = &self.last[row]
            if (
                now.generation != last.generation
                or now.in_flight != last.in_flight
                or now.active != last.active
                or now.ended != last.ended
            ):
                last[0] = now
                changed.append((row, now.in_flight, now.active, now.ended))
        return changed


@cython.final
@cython.freelist(256)
@cython.no_gc
cdef class Admission:
    """One request counted as active for a model, once, until closed."""

    def __init__(self):
        raise TypeError("use LoadTable.admit")

    cdef bint _counts(self) noexcept:
        return self.table.header != NULL and self.table.lives(self.row, self.generation)

    def hold(self):
        """Count it as held too (idempotent; nothing once closed)."""
        if self._open and not self._held:
            self._held = True
            if self._counts():
                up(self.held_cell)

    def unhold(self):
        if self._held:
            self._held = False
            if self._counts():
                down(self.held_cell)

    def close(self):
        """Count it no more (idempotent; also when garbage-collected)."""
        if self._open:
            self._close()

    def count(self, outcome):
        """Count how it ended, or that it was retried: one of ``OUTCOME_NAMES``."""
        self._count(OUTCOME_NAMES.index(outcome))

    cdef void _close(self) noexcept:
        global live_admissions
        if self._held:
            self.unhold()
        self._open = False
        live_admissions -= 1
        if self.table.header == NULL:
            return
        cdef int64_t total = get_i64(self.column_active)
        if total > 0:
            put_i64(self.column_active, total - 1)
        if self._counts():
            down(self.active_cell)

    cdef void _count(self, int outcome) noexcept:
        if self._counts():
            count(&self.outcome_cells[outcome], 1)

    def __dealloc__(self):
        if self._open:
            self._close()


@cython.final
@cython.freelist(1024)
@cython.no_gc_clear  # released in __dealloc__, which needs the table then
cdef class Reservation:
    """One pick of an endpoint, counted in its row and its model's row until released."""

    def __init__(self):
        raise TypeError("use Ring.pick_hashed or Ring.pick_least")

    @property
    def released(self):
        return self._released

    cdef void _release(self) noexcept:
        global live_reservations
        self._released = True
        live_reservations -= 1
        cdef LoadTable table = self.table
        if table.header == NULL:
            return
        if table.lives(self.row, self.generation):
            down(self.cell)
        if table.lives(self.model_row, self.model_generation):
            down(self.model_cell)

    def release(self):
        """Count it no more (idempotent; also when garbage-collected)."""
        if not self._released:
            self._release()

    def __dealloc__(self):
        if self.table is not None and not self._released:
            self._release()


cdef Reservation reserve(
    LoadTable table, int row, uint32_t generation, int model_row, uint32_t model_generation
):
    """Count one pick of ``row`` for ``model_row``; the caller has checked the rows and a writer."""
    global live_reservations
    cdef Reservation reservation = Reservation.__new__(Reservation)
    reservation.table = table
    reservation.row = row
    reservation.generation = generation
    reservation.model_row = model_row
    reservation.model_generation = model_generation
    reservation.cell = &table.in_flight_cells[<size_t> row * table.stride + table._column]
    reservation.model_cell = (
        &table.in_flight_cells[<size_t> model_row * table.stride + table._column]
    )
    live_reservations += 1
    if table.lives(row, generation):
        up(reservation.cell)
    if table.lives(model_row, model_generation):
        up(reservation.model_cell)
    return reservation
