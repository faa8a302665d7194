"""The load table: in-flight counts in memory shared by all processes of one KubeAI replica.

The table is one memfd, passed on by descriptor. A row is a model or an endpoint. Each column
belongs to one worker, its only writer (the last column belongs to the supervisor), so no atomic
read-modify-write is needed, and after a SIGKILL only one column has to be cleared. The supervisor
opens rows. Each time a row is reused it gets a new generation, and releasing a count of an earlier
generation has no effect. A gauge never falls below 0.

In its own column the supervisor records the peers' in-flight counts, so that a pick sees the
total load. Everything else in the table belongs to this KubeAI replica alone.

Peers report their counts with a delay, during which all KubeAI replicas that pick by least load
would choose the same endpoint. Each therefore assumes that its peers pick as it does itself:
``settled`` follows a row's local in-flight count with about the reporting delay, and the difference
between the two is counted once more per peer (:meth:`LoadTable.expected`).

An endpoint's health is shared as well: its consecutive failures and the end of its ejection. After
that time it is half-open: one probe per ``HALF_OPEN_PROBE_S`` until a worker restores it.

Counts that picks read (in-flight) are stored by row. Counts that one worker writes and only scrapes
read (active, held, lookups) are stored by column, so that workers do not share cache lines.

The supervisor creates the table; workers attach. ``_counts`` counts requests and picks in it.
"""

cimport cython
from libc.string cimport memset

from kubeai._shared_memory cimport SharedMemory, lines
from kubeai._shared_table cimport (
    SharedTable,
    TableHeader,
    check_shape,
    read_table_header,
    stride_of,
)

cdef enum:
    LAYOUT_VERSION = 8

cdef uint64_t MAGIC = 0x6B75626561694C54  # "kubeaiLT"

ITERATION_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
HALF_OPEN_PROBE_S = 5.0
# How a request may end, in the order of the cells; the last, retried, is not an outcome.
OUTCOME_NAMES = ("left", "2xx", "3xx", "4xx", "5xx", "broken", "retried")

# Older samples count less: an endpoint's mean is of about 50, its model's of about 200.
cdef double ENDPOINT_DECAY = 0.98
cdef double MODEL_DECAY = 0.995
# A first byte that comes later than this many times what is usual counts as if it came then: among
# few samples, one of a stalled process or network would outweigh all others.
cdef double LATE_MAX = 4.0

cdef struct Layout:
    size_t column_headers
    size_t generations
    size_t health
    size_t loads
    size_t settled
    size_t speeds
    size_t active
    size_t held
    size_t lookups
    size_t outcomes
    size_t picks
    size_t end
    int stride


cdef Layout _layout(size_t rows, size_t columns) noexcept:
    cdef Layout layout
    cdef size_t stride = stride_of(columns)
    layout.stride = <int> stride
    layout.column_headers = lines(sizeof(Header))
    layout.generations = layout.column_headers + lines(columns * sizeof(Column))
    layout.health = layout.generations + lines(rows * sizeof(uint32_t))
    layout.loads = layout.health + lines(rows * sizeof(Health))
    layout.settled = layout.loads + lines(rows * stride * sizeof(uint64_t))
    layout.speeds = layout.settled + lines(rows * sizeof(Settled))
    layout.active = layout.speeds + lines(rows * sizeof(Speed))
    layout.held = layout.active + lines(2 * columns * rows * sizeof(int32_t))
    layout.lookups = layout.held + lines(columns * rows * sizeof(int32_t))
    layout.outcomes = layout.lookups + lines(columns * rows * 3 * sizeof(uint64_t))
    layout.picks = layout.outcomes + columns * rows * OUTCOMES * sizeof(uint64_t)
    layout.end = layout.picks + columns * rows * PICKS * sizeof(uint64_t)
    return layout


cdef int kind_index(object kind) except -1:
    if kind == "http":
        return 0
    if kind == "message":
        return 1
    raise ValueError(f"kind must be 'http' or 'message', not {kind!r}")


cdef void learn_one(
    Speed *speed, double decay, double took_s, double expected, uint64_t samples
) noexcept:
    cdef double all_took_s = get_time(&speed.took_s) * decay + took_s
    cdef double all_expected = get_time(&speed.expected) * decay + expected
    put_time(&speed.n, get_time(&speed.n) * decay + 1)
    put_time(&speed.took_s, all_took_s)
    put_time(&speed.expected, all_expected)
    put_time(&speed.slowness, all_took_s / all_expected)
    put_u64(&speed.samples, samples)


cdef void approach(int64_t *settled, int64_t here, int steps) noexcept:
    """Move a settled value by 1/``steps`` of its difference from the local one."""
    cdef int64_t before = get_i64(settled)
    here <<= SETTLED_BITS
    cdef int64_t step = (here - before) // steps
    if here != before:
        put_i64(settled, before + step if step else here)


@cython.final
cdef class LoadTable(SharedTable):
    """Rows × columns of counters in one memfd; see the module docstring."""

    def __init__(self):
        raise TypeError("use LoadTable.create or LoadTable.attach")

    def __cinit__(self):
        self.what = "load table"

    @staticmethod
    def create(int rows, int workers):
        """Create a table, all cells 0. ``rows`` ≤ 2^20, ``workers`` ≤ 63."""
        check_shape(rows, workers)
        cdef LoadTable table = LoadTable.__new__(LoadTable)
        cdef size_t size = _layout(rows, workers + 1).end
        table._create_table("kubeai-load", rows, workers, size, MAGIC, LAYOUT_VERSION)
        table._lay_out()
        return table

    @staticmethod
    def attach(int fd, int column):
        """Map an existing table; ValueError if its header does not match.

        The caller keeps ownership of the descriptor: ``close`` only unmaps.
        """
        cdef LoadTable table = LoadTable.__new__(LoadTable)
        cdef TableHeader header = read_table_header(fd, table.what, MAGIC, LAYOUT_VERSION)
        table._attach_table(fd, column, &header, _layout(header.rows, header.columns).end)
        table._lay_out()
        return table

    cdef void _lay_out(self) noexcept:
        cdef Layout layout = _layout(self.rows, self.columns)
        cdef char *base = self.base
        self.stride = layout.stride
        self.header = <Header *> base
        self.column_headers = <Column *> (base + layout.column_headers)
        self.generations = <uint32_t *> (base + layout.generations)
        self.health = <Health *> (base + layout.health)
        self.load_cells = <uint64_t *> (base + layout.loads)
        self.settled = <Settled *> (base + layout.settled)
        self.speeds = <Speed *> (base + layout.speeds)
        self.active_cells = <int32_t *> (base + layout.active)
        self.held_cells = <int32_t *> (base + layout.held)
        self.lookup_cells = <uint64_t *> (base + layout.lookups)
        self.outcome_cells = <uint64_t *> (base + layout.outcomes)
        self.pick_cells = <uint64_t *> (base + layout.picks)

    def close(self):
        """Unmap. Open counts stay in the table; releasing them later has no effect."""
        self.header = NULL
        SharedMemory.close(self)

    # -- rows: supervisor only ---------------------------------------------------------------

    def open_row(self, Py_ssize_t row):
        """Reuse a free row: zero all its cells and return its new generation."""
        self._check_row(row)
        cdef int column
        cdef size_t cell
        cdef uint32_t generation = get_u32(&self.generations[row]) + 1
        # The generation first: holders of the old one then stop counting.
        put_u32(&self.generations[row], generation)
        if self.header.rows_used < <uint64_t> row + 1:
            put_u64(&self.header.rows_used, row + 1)
        memset(&self.health[row], 0, sizeof(Health))
        memset(&self.settled[row], 0, sizeof(Settled))
        memset(&self.speeds[row], 0, sizeof(Speed))
        for column in range(self.columns):
            cell = <size_t> column * self.rows + row
            put_u64(&self.load_cells[row * self.stride + column], 0)
            put_i32(&self.active_cells[cell], 0)
            put_i32(&self.active_cells[cell + <size_t> self.columns * self.rows], 0)
            put_i32(&self.held_cells[cell], 0)
            put_u64(&self.lookup_cells[3 * cell], 0)
            put_u64(&self.lookup_cells[3 * cell + 1], 0)
            put_u64(&self.lookup_cells[3 * cell + 2], 0)
            memset(&self.outcome_cells[OUTCOMES * cell], 0, OUTCOMES * sizeof(uint64_t))
            memset(&self.pick_cells[PICKS * cell], 0, PICKS * sizeof(uint64_t))
        return generation

    def generation(self, Py_ssize_t row):
        """The current generation of a row; 0 if it was never opened."""
        self._check_row(row)
        return get_u32(&self.generations[row])

    def set_peers(
        self, Py_ssize_t row, uint32_t generation, int64_t in_flight, int64_t pending=0
    ):
        """Record the peers' load. No effect for another generation.

        ``in_flight`` counts up to 2^22, and ``pending``, in tokens, up to 2^25.
        """
        self._check_row(row)
        if in_flight < 0 or pending < 0:
            raise ValueError(f"a load must not be negative, but is {in_flight}, {pending} tokens")
        if self.lives(row, generation):
            put_u64(
                &self.load_cells[row * self.stride + self.columns - 1],
                load_of(
                    <uint32_t> min(in_flight, <int64_t> IN_FLIGHT_MAX),
                    <uint32_t> min(pending, <int64_t> PENDING_MAX),
                ),
            )

    @property
    def peers(self):
        """Number of other KubeAI replicas that pick for the same models."""
        self._check_row(0)
        return get_u64(&self.header.peers)

    @peers.setter
    def peers(self, uint64_t count):
        self._check_row(0)
        put_u64(&self.header.peers, count)

    @property
    def phase(self):
        """Where this KubeAI replica starts breaking ties between endpoints; peers differ."""
        self._check_row(0)
        return get_u64(&self.header.phase)

    @phase.setter
    def phase(self, uint64_t phase):
        self._check_row(0)
        put_u64(&self.header.phase, phase)

    def settle(self, int steps=4):
        """Move each settled load towards the local load by 1/``steps`` of the difference."""
        self._check_row(0)
        cdef size_t row
        cdef uint64_t here
        for row in range(get_u64(&self.header.rows_used)):
            here = self._here(row)
            approach(&self.settled[row].in_flight, in_flight_of(here), steps)
            approach(&self.settled[row].pending, pending_of(here), steps)

    def row_is_zero(self, Py_ssize_t row):
        """Whether all gauges (active, held, in-flight) of this row are 0."""
        return self.in_flight(row) == 0 and self.active(row) == 0 and self.held(row) == 0

    def clear_column(self, int column):
        """Zero all gauges of a column whose worker is dead and reaped. Counters are kept."""
        self._check_column(column)
        cdef size_t row
        cdef size_t used = get_u64(&self.header.rows_used)
        cdef size_t cell = <size_t> column * self.rows
        for row in range(used):
            put_u64(&self.load_cells[row * self.stride + column], 0)
        memset(&self.active_cells[cell], 0, used * sizeof(int32_t))
        cell += <size_t> self.columns * self.rows
        memset(&self.active_cells[cell], 0, used * sizeof(int32_t))
        memset(&self.held_cells[<size_t> column * self.rows], 0, used * sizeof(int32_t))
        put_i64(&self.column_headers[column].active, 0)

    # -- reads: any process ------------------------------------------------------------------

    cdef int64_t _sum_columns(self, const int32_t *cells, Py_ssize_t row) noexcept:
        cdef int64_t total = 0
        cdef int column
        for column in range(self.columns):
            total += get_i32(&cells[<size_t> column * self.rows + row])
        return total

    def active(self, Py_ssize_t row, kind=None):
        """A model's requests that are being served or held, over all columns."""
        self._check_row(row)
        cdef size_t kind_cells = <size_t> self.columns * self.rows
        if kind is not None:
            return self._sum_columns(self.active_cells + kind_cells * kind_index(kind), row)
        return self._sum_columns(self.active_cells, row) + self._sum_columns(
            self.active_cells + kind_cells, row
        )

    def held(self, Py_ssize_t row):
        """A model's requests that are waiting for an endpoint."""
        self._check_row(row)
        return self._sum_columns(self.held_cells, row)

    def in_flight(self, Py_ssize_t row):
        """Unreleased picks of an endpoint, or of all endpoints of a model."""
        self._check_row(row)
        return in_flight_of(self._load(row))

    def in_flight_here(self, Py_ssize_t row):
        """Like ``in_flight``, without the other KubeAI replicas' picks."""
        self._check_row(row)
        return in_flight_of(self._here(row))

    def pending(self, Py_ssize_t row):
        """Prompt tokens of unreleased picks that have not led to the first byte of a response."""
        self._check_row(row)
        return pending_of(self._load(row))

    def pending_here(self, Py_ssize_t row):
        """Like ``pending``, without the other KubeAI replicas' picks."""
        self._check_row(row)
        return pending_of(self._here(row))

    def expected(self, Py_ssize_t row, int64_t per_request=1):
        """See the stub."""
        self._check_row(row)
        return self._expected_work(row, per_request)

    cdef uint64_t _counted(
        self, const uint64_t *cells, size_t width, size_t row, int which
    ) noexcept:
        """The sum over all columns of one of the ``width`` counters that a row has in ``cells``."""
        cdef uint64_t total = 0
        cdef int column
        for column in range(self.columns):
            total += get_u64(&cells[width * (<size_t> column * self.rows + row) + which])
        return total

    cdef uint64_t _ended(self, size_t row) noexcept:
        """A model's requests that have ended, with any outcome."""
        cdef uint64_t total = 0
        cdef int outcome
        for outcome in range(RETRIED):
            total += self._counted(self.outcome_cells, OUTCOMES, row, outcome)
        return total

    def ended(self, Py_ssize_t row):
        """A model's requests that have ended, with any outcome, since the row was opened."""
        self._check_row(row)
        return self._ended(row)

    def lookups(self, Py_ssize_t row):
        """Hash lookups in which an endpoint was the (initial, final, default) choice."""
        self._check_row(row)
        return tuple([self._counted(self.lookup_cells, 3, row, which) for which in range(3)])

    def outcomes(self, Py_ssize_t row, column=None):
        """A model's request counts by outcome (``OUTCOME_NAMES``), for one column or all."""
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
        """Histogram of distinct endpoints examined per hashed pick, over all models.

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
        """Active requests of all workers."""
        self._check_row(0)
        cdef int64_t total = 0
        cdef int column
        for column in range(self.columns - 1):
            total += get_i64(&self.column_headers[column].active)
        return total

    # -- worker status -----------------------------------------------------------------------

    def acknowledge(self, uint64_t version):
        """Record that this worker has applied ``version`` of the routing table."""
        self._check_row(0)
        self._check_writer()
        put_u64(&self.column_headers[self._column].acknowledged, version)

    def acknowledged(self, int column):
        self._check_column(column)
        return get_u64(&self.column_headers[column].acknowledged)

    # -- health: written and read by any worker ----------------------------------------------

    def note_failure(self, Py_ssize_t row, uint32_t generation, double now_s, bint unreachable):
        """Count a failed attempt. Returns the failures since the last complete response.

        ``now_s``: CLOCK_MONOTONIC seconds. ``unreachable``: the endpoint sent no response.
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
        """Return an endpoint to service and reset its failure and ejection counts."""
        self.restore(row, generation)
        if self.lives(row, generation):
            put_u32(&self.health[row].failures, 0)
            put_u32(&self.health[row].ejection_count, 0)

    def ejected_until(self, Py_ssize_t row):
        """When an endpoint becomes half-open or may be probed again; 0 if it is not ejected."""
        self._check_row(row)
        return get_time(&self.health[row].ejected_until_s)

    def ejection_count(self, Py_ssize_t row):
        """Number of ejections since the endpoint last recovered."""
        self._check_row(row)
        return get_u32(&self.health[row].ejection_count)

    def failures(self, Py_ssize_t row):
        """Failed attempts, over all workers, since the endpoint's last complete response."""
        self._check_row(row)
        return get_u32(&self.health[row].failures)

    def failed_at(self, Py_ssize_t row):
        """When an endpoint last failed (CLOCK_MONOTONIC seconds); 0 if never."""
        self._check_row(row)
        return get_time(&self.health[row].failed_s)

    def unreachable(self, Py_ssize_t row):
        """Whether an endpoint's last failure came without a response."""
        self._check_row(row)
        return get_u32(&self.health[row].unreachable) != 0

    def health_events(self):
        """Total failures and ejections recorded by all workers; never decreases."""
        self._check_row(0)
        return self._health_events()

    cdef uint64_t _health_events(self) noexcept:
        cdef uint64_t total = 0
        cdef int column
        for column in range(self.columns):
            total += get_u64(&self.column_headers[column].health_events)
        return total

    # -- learned times: written and read by any worker ---------------------------------------

    cdef void learn(self, int row, int model_row, double took_s, double tokens) noexcept:
        """Learn from a first byte that came after ``took_s``, with ``tokens`` of work ahead of it.

        Workers that write at the same instant lose a sample.
        """
        cdef Speed *model = &self.speeds[model_row]
        cdef uint64_t samples = get_u64(&model.samples) + 1
        if samples > 1:
            took_s = min(took_s, LATE_MAX * get_time(&model.slowness) * tokens)
        learn_one(model, MODEL_DECAY, took_s, tokens, samples)
        # Relative to the model's time at this moment: in a burst all its endpoints become slower.
        cdef double expected_s = get_time(&model.slowness) * tokens
        learn_one(&self.speeds[row], ENDPOINT_DECAY, took_s, max(expected_s, 1e-6), samples)

    def s_per_token(self, Py_ssize_t model_row):
        """The learned time per prompt token of a model's endpoints; 0 if unknown."""
        self._check_row(model_row)
        return get_time(&self.speeds[model_row].slowness)

    def slowness(self, Py_ssize_t row):
        """An endpoint's learned time per prompt token, relative to its model's; 0 if unknown."""
        self._check_row(row)
        return get_time(&self.speeds[row].slowness)

    # -- counting a pick: workers only ------------------------------------------------------

    cdef void count_lookup(
        self, int initial, int chosen, bint defaulted, int iterations
    ) noexcept:
        """Count a hashed pick: rows of the ring's first endpoint and the chosen one (-1: none)."""
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
