"""Declarations of the load table for other compiled modules; see ``_load.pyx`` for its guarantees.

All atomics are declared here. All are relaxed: a cell has one writer, and readers need a recent
value but no ordering. On x86-64 and arm64 they compile to plain aligned moves.
"""

from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t

from kubeai._shared_memory cimport SharedMemory

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
    static inline void kb_count(uint64_t *cell, uint64_t by) { kb_put(cell, kb_get(cell) + by); }

    /* The sum of a row, two cells per load: rows have an even number of cells, those after the
       last column are 0, and neither half of the sum can reach 2^32. */
    typedef uint64_t __attribute__((may_alias)) kb_pair;
    static inline int64_t kb_sum(const int32_t *cells, int columns) {
        const kb_pair *pairs = (const kb_pair *) cells;
        uint64_t sum = kb_get(pairs);
        for (int pair = 1; pair < (columns + 1) / 2; pair++) sum += kb_get(pairs + pair);
        return (int64_t) ((sum & 0xFFFFFFFF) + (sum >> 32));
    }

    /* The first of rows[from:to] with the smallest sum below *least, or -1. Specialised for
       common numbers of columns: a thousand rows take well under a microsecond. */
    static inline __attribute__((always_inline)) int kb_least_of(
        const int32_t *cells, size_t stride, int columns,
        const int32_t *rows, int from, int to, int64_t *least)
    {
        int64_t smallest = *least;
        int at = -1;
        #pragma GCC unroll 4
        for (int i = from; i < to; i++) {
            int64_t sum = kb_sum(cells + (size_t) rows[i] * stride, columns);
            if (__builtin_expect(sum < smallest, 0)) { smallest = sum; at = i; }
        }
        *least = smallest;
        return at;
    }
    static inline int kb_least(
        const int32_t *cells, int stride, int columns,
        const int32_t *rows, int from, int to, int64_t *least)
    {
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
    void up "kb_up"(int32_t *cell) nogil
    void down "kb_down"(int32_t *cell) nogil
    void count "kb_count"(uint64_t *cell, uint64_t by) nogil
    int64_t sum_row "kb_sum"(const int32_t *cells, int columns) nogil
    int least_row "kb_least"(
        const int32_t *cells, int stride, int columns,
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
    uint64_t phase  # where this replica starts breaking ties between endpoints
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


cdef class LoadTable(SharedMemory):
    cdef readonly int rows
    cdef readonly int columns
    cdef int _column
    cdef int stride  # cells per row of in_flight
    cdef Header *header  # NULL once closed
    cdef Column *column_headers
    cdef uint32_t *generations
    cdef Health *health
    cdef int32_t *in_flight_cells  # [rows][stride]: a pick reads whole rows
    cdef int32_t *settled_cells  # per row: 2^SETTLED_BITS × the local count that peers know of
    cdef int32_t *active_cells  # [2 kinds][columns][rows]: a worker's cells are contiguous
    cdef int32_t *held_cells  # [columns][rows]
    cdef uint64_t *lookup_cells  # [columns][rows][3]
    cdef uint64_t *outcome_cells  # [columns][rows][OUTCOMES]

    cdef void _lay_out(self, int rows, int columns) noexcept
    cdef int _check_row(self, Py_ssize_t row) except -1
    cdef int _check_writer(self) except -1
    cdef int _check_column(self, int column) except -1
    cdef int64_t _sum_columns(self, const int32_t *cells, Py_ssize_t row) noexcept
    cdef int64_t _here(self, size_t row) noexcept
    cdef inline int64_t _expected(self, size_t row) noexcept:
        """A row's load, assuming that peers have made as many unreported picks as this replica."""
        cdef int32_t *cells = self.in_flight_cells + row * self.stride
        cdef int64_t load = sum_row(cells, self.columns)
        cdef int64_t here = load - get_i32(&cells[self.columns - 1])
        cdef int64_t untold = (here << SETTLED_BITS) - get_i32(&self.settled_cells[row])
        return load + (<int64_t> get_u64(&self.header.peers) * untold >> SETTLED_BITS)

    cdef uint64_t _ended(self, size_t row) noexcept
    cdef inline bint lives(self, size_t row, uint32_t generation) noexcept:
        """Whether this is the row's current generation; 0 (never opened) is never current."""
        return generation != 0 and get_u32(&self.generations[row]) == generation

    cdef uint64_t _health_events(self) noexcept
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
