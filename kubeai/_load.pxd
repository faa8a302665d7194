"""Declarations of the load table for other compiled modules; see ``_load.pyx`` for its guarantees.

All atomics are declared here. All are relaxed: a cell has one writer, and readers need a recent
value but no ordering. On x86-64 and arm64 they compile to plain aligned moves, except ``swap``,
which changes another writer's cell, but only if that has not been written meanwhile.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kubeai._shared_table cimport SharedTable

cdef extern from *:
    """
    #include <stdint.h>
    #define kb_get(cell) __atomic_load_n((cell), __ATOMIC_RELAXED)
    #define kb_put(cell, value) __atomic_store_n((cell), (value), __ATOMIC_RELAXED)

    static inline double kb_get_time(const double *cell) {
        double value;
        __atomic_load(cell, &value, __ATOMIC_RELAXED);
        return value;
    }
    static inline void kb_put_time(double *cell, double value) {
        __atomic_store(cell, &value, __ATOMIC_RELAXED);
    }
    /* A gauge changes by one and never falls below 0: releasing a pick that was counted before a
       dead worker's column was cleared, or before the row was reopened, has no effect. */
    static inline void kb_up(int32_t *cell) { kb_put(cell, kb_get(cell) + 1); }
    static inline void kb_down(int32_t *cell) {
        int32_t value = kb_get(cell);
        if (value > 0) kb_put(cell, value - 1);
    }
    static inline int kb_swap(uint64_t *cell, uint64_t from, uint64_t to) {
        return __atomic_compare_exchange_n(
            cell, &from, to, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    }
    static inline void kb_count(uint64_t *cell, uint64_t by) { kb_put(cell, kb_get(cell) + by); }

    /* What a request in flight counts as, in prompt tokens, besides those that it has pending.
       Between 64 and 1,024 the simulated times to the first token hardly depend on it. */
    #define KB_REQUEST_TOKENS 256
    /* A load: requests in flight in the low half of a cell, and their work in the high half: their
       pending prompt tokens, and KB_REQUEST_TOKENS for each. Cells are added as they are: no half
       of the sum of a row reaches 2^32. */
    #define KB_PENDING_MAX ((1u << 25) - 1)  /* of a worker; of the peers, as the next one */
    #define KB_IN_FLIGHT_MAX ((1u << 22) - 1)
    static inline uint32_t kb_in_flight(uint64_t load) { return (uint32_t) load; }
    static inline uint32_t kb_pending(uint64_t load) {
        return (uint32_t) (load >> 32) - KB_REQUEST_TOKENS * (uint32_t) load;
    }
    static inline uint64_t kb_load(uint32_t in_flight, uint32_t pending) {
        return (uint64_t) (pending + KB_REQUEST_TOKENS * in_flight) << 32 | in_flight;
    }
    static inline uint64_t kb_sum(const uint64_t *cells, int columns) {
        uint64_t sum = kb_get(cells);
        for (int column = 1; column < columns; column++) sum += kb_get(cells + column);
        return sum;
    }
    static inline void kb_add(uint64_t *cell, uint64_t load) { kb_put(cell, kb_get(cell) + load); }
    static inline void kb_subtract(uint64_t *cell, uint64_t load) {
        uint64_t now = kb_get(cell);
        uint32_t in_flight = kb_in_flight(now), pending = kb_pending(now);
        in_flight -= in_flight < kb_in_flight(load) ? in_flight : kb_in_flight(load);
        pending -= pending < kb_pending(load) ? pending : kb_pending(load);
        kb_put(cell, kb_load(in_flight, pending));
    }

    /* A load in tokens of work, if a request counts as much as ``per_request`` pending tokens. */
    static inline int64_t kb_work(uint64_t load, int64_t per_request) {
        int64_t more = per_request - KB_REQUEST_TOKENS;
        return (int64_t) (load >> 32) + more * (int64_t) kb_in_flight(load);
    }
    /* The first of rows[from:to] with the least work below *least, or -1. Specialised for common
       numbers of columns: a thousand rows take about a microsecond, unless one has no work. */
    static inline __attribute__((always_inline)) int kb_least_of(
        const uint64_t *cells, size_t stride, int columns,
        const int32_t *rows, int from, int to, int64_t *least)
    {
        int64_t smallest = *least;
        int at = -1;
        #pragma GCC unroll 4
        for (int i = from; i < to; i++) {
            uint64_t load = kb_sum(cells + (size_t) rows[i] * stride, columns);
            int64_t work = kb_work(load, KB_REQUEST_TOKENS);
            if (__builtin_expect(work < smallest, 0)) {
                smallest = work;
                at = i;
                if (work == 0) break;
            }
        }
        *least = smallest;
        return at;
    }
    static inline int kb_least(
        const uint64_t *cells, int stride, int columns,
        const int32_t *rows, int from, int to, int64_t *least)
    {
        if (*least == 0) return -1;
        switch (columns) {
            case 2: return kb_least_of(cells, 2, 2, rows, from, to, least);
            case 3: return kb_least_of(cells, 4, 3, rows, from, to, least);
            case 5: return kb_least_of(cells, 8, 5, rows, from, to, least);
            case 9: return kb_least_of(cells, 16, 9, rows, from, to, least);
            default: return kb_least_of(cells, (size_t) stride, columns, rows, from, to, least);
        }
    }
    """
    int32_t get_i32 "kb_get"(const int32_t *cell) nogil
    uint32_t get_u32 "kb_get"(const uint32_t *cell) nogil
    int64_t get_i64 "kb_get"(const int64_t *cell) nogil
    uint64_t get_u64 "kb_get"(const uint64_t *cell) nogil
    void put_i32 "kb_put"(int32_t *cell, int32_t value) nogil
    void put_u32 "kb_put"(uint32_t *cell, uint32_t value) nogil
    void put_i64 "kb_put"(int64_t *cell, int64_t value) nogil
    void put_u64 "kb_put"(uint64_t *cell, uint64_t value) nogil
    double get_time "kb_get_time"(const double *cell) nogil
    void put_time "kb_put_time"(double *cell, double value) nogil
    bint swap "kb_swap"(uint64_t *cell, uint64_t expected, uint64_t value) nogil
    void up "kb_up"(int32_t *cell) nogil
    void down "kb_down"(int32_t *cell) nogil
    void count "kb_count"(uint64_t *cell, uint64_t by) nogil
    enum: PENDING_MAX "KB_PENDING_MAX"
    enum: IN_FLIGHT_MAX "KB_IN_FLIGHT_MAX"
    enum: REQUEST_TOKENS "KB_REQUEST_TOKENS"
    uint32_t in_flight_of "kb_in_flight"(uint64_t load) nogil
    uint32_t pending_of "kb_pending"(uint64_t load) nogil
    uint64_t load_of "kb_load"(uint32_t in_flight, uint32_t pending) nogil
    int64_t work_of "kb_work"(uint64_t load, int64_t per_request) nogil
    void add_load "kb_add"(uint64_t *cell, uint64_t load) nogil
    void subtract_load "kb_subtract"(uint64_t *cell, uint64_t load) nogil
    uint64_t sum_row "kb_sum"(const uint64_t *cells, int columns) nogil
    int least_row "kb_least"(
        const uint64_t *cells, int stride, int columns,
        const int32_t *rows, int start, int end, int64_t *least
    ) nogil


cdef int kind_index(object kind) except -1


cdef enum:
    SETTLED_BITS = 8
    BUCKETS = 12  # 1, 2, 4 … 1024, +Inf
    OUTCOMES = 8  # a cache line


cdef struct Header:
    uint64_t magic
    uint64_t version
    uint64_t rows
    uint64_t columns
    uint64_t rows_used  # rows from this index on were never opened
    uint64_t peers  # number of other KubeAI replicas that pick for the same models
    uint64_t phase  # where this KubeAI replica starts breaking ties between endpoints
    uint64_t spare[1]


cdef struct Column:
    uint64_t acknowledged
    int64_t active
    uint64_t health_events  # failures and ejections recorded by this column's worker
    uint64_t iterations_sum
    uint64_t iterations[BUCKETS]


cdef struct Health:  # of one endpoint; any worker writes: a lost update loses one count
    double ejected_until_s  # CLOCK_MONOTONIC; 0: not ejected. After it, the endpoint is half-open
    double failed_s  # when it last failed; 0: never
    uint32_t failures  # since its last complete response
    uint32_t ejection_count  # since it last recovered
    uint32_t unreachable  # whether its last failure came without a response
    uint32_t spare


cdef struct Settled:  # the local load that peers know of, in 2^-SETTLED_BITS
    int64_t in_flight
    int64_t pending


cdef struct Speed:  # of an endpoint, or of a model's endpoints together; any worker writes
    double took_s  # recent times to the first byte
    double expected  # of a model, the tokens ahead of those bytes; of an endpoint, their time in s
    double n  # weighted number of samples; older ones weigh less
    double slowness  # took_s / expected: a model's time per token; an endpoint's, relative to it
    uint64_t samples  # the model's number of samples, as of the last one here


cdef enum:  # what a worker counts of a model's tokens and picks; same order as PICK_NAMES
    PROMPT_TOKENS  # of all prompts
    CACHED_TOKENS  # those that the picked endpoints were believed to have
    PICKED_CACHED  # no endpoint was believed to have more of the prompt
    PICKED_AWAY  # another had more, but there the request would have cost more
    PICKED_NEW  # none had any of it
    REPORTED_PROMPT_TOKENS  # by engines, of responses with any strategy
    REPORTED_CACHED_TOKENS
    REPORTED_OUTPUT_TOKENS
    PICKS = 8  # a cache line


cdef class LoadTable(SharedTable):
    cdef int stride  # cells per row of loads
    cdef Header *header  # NULL once closed
    cdef Column *column_headers
    cdef uint32_t *generations
    cdef Health *health
    cdef uint64_t *load_cells  # [rows][stride]: a pick reads whole rows
    cdef Settled *settled  # per row
    cdef Speed *speeds  # per row
    cdef int32_t *active_cells  # [2 kinds][columns][rows]: a worker's cells are contiguous
    cdef int32_t *held_cells  # [columns][rows]
    cdef uint64_t *lookup_cells  # [columns][rows][3]
    cdef uint64_t *outcome_cells  # [columns][rows][OUTCOMES]
    cdef uint64_t *pick_cells  # [columns][rows of models][PICKS]

    cdef void _lay_out(self) noexcept
    cdef int64_t _sum_columns(self, const int32_t *cells, Py_ssize_t row) noexcept
    cdef inline uint64_t _load(self, size_t row) noexcept:
        """A row's load over all columns."""
        return sum_row(self.load_cells + row * self.stride, self.columns)

    cdef inline uint64_t _here(self, size_t row) noexcept:
        """A row's load without that of the peers."""
        return sum_row(self.load_cells + row * self.stride, self.columns - 1)

    cdef inline int64_t _expected_work(self, size_t row, int64_t per_request) noexcept:
        """A row's work, assuming that peers have made as many unreported picks as we."""
        cdef int64_t here = work_of(self._here(row), per_request) << SETTLED_BITS
        cdef int64_t reported = get_i64(&self.settled[row].pending)
        reported += per_request * get_i64(&self.settled[row].in_flight)
        cdef int64_t unreported = <int64_t> get_u64(&self.header.peers) * (here - reported)
        return work_of(self._load(row), per_request) + (unreported >> SETTLED_BITS)

    cdef uint64_t _counted(
        self, const uint64_t *cells, size_t width, size_t row, int which
    ) noexcept
    cdef uint64_t _ended(self, size_t row) noexcept
    cdef inline bint lives(self, size_t row, uint32_t generation) noexcept:
        """Whether this is the row's current generation; 0 (never opened) is never current."""
        return generation != 0 and get_u32(&self.generations[row]) == generation

    cdef uint64_t _health_events(self) noexcept
    cdef void learn(self, int row, int model_row, double took_s, double tokens) noexcept
    cdef void count_lookup(
        self, int initial, int chosen, bint defaulted, int iterations
    ) noexcept


cdef enum:  # how a request ends; same order as OUTCOME_NAMES
    LEFT  # the client disconnected before the end of the response
    ANSWERED_2XX
    ANSWERED_3XX
    ANSWERED_4XX
    ANSWERED_5XX
    BROKEN  # the engine's response was cut short
    RETRIED  # not an outcome: another attempt was made
