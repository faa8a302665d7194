"""Declarations of the key table for other compiled modules; see ``_key_table.pyx``."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from kubeai._shared_table cimport SharedTable, TableHeader

cdef extern from *:
    """
    #include <stdint.h>
    /* A slot has the number of its interval in the high bits, and what was counted in it below. It
       is one word, so that no reader takes the count of one interval for that of another. */
    #define KB_SLOT_BITS 40
    #define KB_SLOT_MAX (((uint64_t) 1 << KB_SLOT_BITS) - 1)
    static inline uint64_t kb_slot(uint64_t interval, uint64_t count) {
        return interval << KB_SLOT_BITS | (count < KB_SLOT_MAX ? count : KB_SLOT_MAX);
    }
    static inline uint64_t kb_counted(uint64_t slot, uint64_t interval) {
        return (slot ^ interval << KB_SLOT_BITS) >> KB_SLOT_BITS ? 0 : slot & KB_SLOT_MAX;
    }
    /* Add what was counted in the last minute: in its whole intervals, and in the one that is
       leaving it. Each slot has its interval, so their order does not matter. */
    static inline void kb_add_slots(
        const uint64_t *slots, int count, uint64_t interval, uint64_t *whole, uint64_t *leaving
    ) {
        const uint64_t oldest = count - 1, mask = UINT64_MAX >> KB_SLOT_BITS;
        for (int i = 0; i < count; i++) {
            uint64_t slot = __atomic_load_n(&slots[i], __ATOMIC_RELAXED);
            uint64_t age = (interval - (slot >> KB_SLOT_BITS)) & mask;
            if (age < oldest)
                *whole += slot & KB_SLOT_MAX;
            else if (age == oldest)
                *leaving += slot & KB_SLOT_MAX;
        }
    }
    """
    uint64_t slot_of "kb_slot"(uint64_t interval, uint64_t count) nogil
    uint64_t counted_in "kb_counted"(uint64_t slot, uint64_t interval) nogil
    void add_slots "kb_add_slots"(
        const uint64_t *slots, int count, uint64_t interval, uint64_t *whole, uint64_t *leaving
    ) nogil
    enum: SLOT_MAX "KB_SLOT_MAX"


cdef enum:
    INTERVAL_S = 10
    INTERVALS = 6  # a minute
    SLOTS = 7  # a minute and the interval that is leaving it


cdef struct Cell:  # two cache lines: limits of tokens are rarer than the others
    int64_t in_flight
    uint64_t requests[SLOTS]  # by interval % SLOTS
    uint64_t refused  # requests that exceeded a limit
    uint64_t tokens[SLOTS]


cdef struct Window:  # what was counted, by age in intervals; the oldest is leaving the minute
    uint64_t counts[SLOTS]


cdef struct Moment:
    uint64_t interval
    double share  # of the oldest interval that is still within the last minute


cdef inline Moment moment_of(double now_s) noexcept:
    cdef Moment moment
    moment.interval = <uint64_t> now_s // INTERVAL_S
    moment.share = 1 - (now_s - <double> (moment.interval * INTERVAL_S)) / INTERVAL_S
    return moment


cdef double wait_s_for(const Window *window, const Moment *moment, double excess) noexcept


cdef class KeyTable(SharedTable):
    cdef public object clock
    cdef TableHeader *header  # NULL once closed
    cdef uint32_t *generations
    cdef uint32_t *stamps  # [columns][rows]: changes whenever a cell does
    cdef Cell *cells  # [rows][columns]

    cdef void _lay_out(self) noexcept
    cdef double now_s(self) except? -1
    cdef bint lives(self, int row, uint32_t generation) noexcept
    cdef void prefetch(self, int row) noexcept
    cdef int counted_columns(self) noexcept
    cdef int64_t _in_flight(self, size_t row, int columns) noexcept
    cdef void _read(
        self, const uint64_t *slots, int columns, const Moment *moment, Window *window
    ) noexcept
    cdef void read_requests(
        self, size_t row, int columns, const Moment *moment, Window *window
    ) noexcept
    cdef void read_tokens(
        self, size_t row, int columns, const Moment *moment, Window *window
    ) noexcept
    cdef double _used(self, const uint64_t *slots, int columns, const Moment *moment) noexcept
    cdef double used_requests(self, size_t row, int columns, const Moment *moment) noexcept
    cdef double used_tokens(self, size_t row, int columns, const Moment *moment) noexcept
