"""What a worker counts for the limits of API keys: one :class:`Charge` for each request.

:func:`take` compares what a key has used, at all KubeAI replicas, with its limits, and counts
the request if it is within them. The request then counts as in flight until it ends, and its tokens
are reserved from an estimate. :meth:`Charge.end` replaces the estimate by what was used. Reserved
tokens that were not used are returned to the interval in which they were reserved; tokens beyond
the estimate are charged to the interval in which they became known. A Charge ends once, however
often ``end`` is called.

Checking and counting are two steps. Of N workers that do both at the same instant, each sees the
same use, so that a limit can be exceeded by N - 1 requests.
"""

cimport cython
from libc.math cimport floor
from libc.stdint cimport int64_t, uint32_t, uint64_t

from kubeai._key_table cimport (
    INTERVAL_S,
    INTERVALS,
    SLOTS,
    Cell,
    KeyTable,
    Moment,
    Window,
    counted_in,
    moment_of,
    slot_of,
    wait_s_for,
)
from kubeai._load cimport get_i64, get_u32, get_u64, put_i64, put_u32, put_u64

cdef enum:
    REQUEST_TOKENS_MAX = 1 << 30  # of one request
    # Requests in flight end at any time.
    IN_FLIGHT_RETRY_S = 1

TOKENS_MAX = REQUEST_TOKENS_MAX

cdef double LESS = 1e-6  # a request fits once what is used is less than the limit, not equal to it
cdef tuple EXCESSES = (None, "requests", "tokens", "in flight", "too large")
cdef int64_t live_charges = 0


def live():
    """See the stub."""
    return live_charges


cdef inline void add_to_interval(uint64_t *slots, uint64_t interval, int64_t by) noexcept:
    """Add to what was counted in an interval; never below 0.

    Starts the slot at 0 if it holds an older interval. A negative ``by`` for an interval that has
    been overwritten has no effect.
    """
    cdef uint64_t *slot = &slots[interval % SLOTS]
    cdef uint64_t value = get_u64(slot)
    cdef int64_t counted = <int64_t> counted_in(value, interval)
    if by < 0 and value != slot_of(interval, counted):
        return
    put_u64(slot, slot_of(interval, <uint64_t> max(<int64_t> 0, counted + by)))


cdef void exceed(Charge charge, Excess excess, double retry_after_s) noexcept:
    """Note an exceeded limit; of several, the one that allows the request last."""
    if charge._excess == WITHIN or excess == TOO_LARGE or retry_after_s > charge.retry_after_s:
        charge._excess = excess
        charge.retry_after_s = retry_after_s


cdef Charge take(
    KeyTable table, int row, uint32_t generation, const Quota *quota, int64_t tokens
):
    """See the stub of ``charge``. The caller has checked the table, its column and the row."""
    global live_charges
    cdef size_t at = row
    cdef Moment moment = moment_of(table.now_s())
    cdef Window window
    cdef double used, wait_s
    cdef int64_t left, needed
    cdef int columns = table.counted_columns()
    cdef Charge charge = Charge.__new__(Charge)
    tokens = max(<int64_t> 0, min(tokens, <int64_t> REQUEST_TOKENS_MAX))
    charge.table = table
    charge.row = row
    charge.generation = generation
    charge.interval = moment.interval
    charge.cell = &table.cells[at * table.columns + table._column]
    charge.stamp = &table.stamps[<size_t> table._column * table.rows + at]
    charge.tokens = tokens
    charge.reset_s = (moment.share + INTERVALS) * INTERVAL_S
    if quota.in_flight and table._in_flight(at, columns) >= quota.in_flight:
        exceed(charge, IN_FLIGHT, IN_FLIGHT_RETRY_S)
    if quota.requests:
        used = table.used_requests(at, columns, &moment)
        left = quota.requests - <int64_t> floor(used)
        if left < 1:
            table.read_requests(at, columns, &moment, &window)
            wait_s = wait_s_for(&window, &moment, used - quota.requests + LESS)
            exceed(charge, REQUESTS, wait_s)
        charge.requests_left = max(<int64_t> 0, left)
    if quota.tokens:
        used = table.used_tokens(at, columns, &moment)
        left = quota.tokens - <int64_t> floor(used)
        needed = max(<int64_t> 1, tokens)
        if tokens > quota.tokens:
            exceed(charge, TOO_LARGE, 0)
        elif left < needed:
            table.read_tokens(at, columns, &moment, &window)
            wait_s = wait_s_for(&window, &moment, used - (quota.tokens - needed + 1) + LESS)
            exceed(charge, TOKENS, wait_s)
        charge.tokens_left = max(<int64_t> 0, left)
    if charge._excess != WITHIN:
        put_u64(&charge.cell.refused, get_u64(&charge.cell.refused) + 1)
        return charge
    charge._open = True
    live_charges += 1
    charge.requests_left = max(<int64_t> 0, charge.requests_left - 1)
    charge.tokens_left = max(<int64_t> 0, charge.tokens_left - tokens)
    if table.lives(row, generation):
        charge._begin()
    return charge


def charge(
    KeyTable table not None,
    int row,
    uint32_t generation,
    *,
    int64_t requests=0,
    int64_t tokens=0,
    int64_t in_flight=0,
    int64_t reserve=0,
):
    """See the stub."""
    table._check_row(row)
    table._check_writer()
    cdef Quota quota
    quota.requests = requests
    quota.tokens = tokens
    quota.in_flight = in_flight
    return take(table, row, generation, &quota, reserve)


@cython.final
@cython.freelist(256)
@cython.no_gc_clear  # __dealloc__ ends it and still needs the table
cdef class Charge:
    """See the module and the stub."""

    def __init__(self):
        raise TypeError("use charge()")

    @property
    def excess(self):
        """See the stub."""
        return EXCESSES[<int> self._excess]

    cdef void _begin(self) noexcept:
        cdef Cell *cell = self.cell
        put_i64(&cell.in_flight, get_i64(&cell.in_flight) + 1)
        add_to_interval(cell.requests, self.interval, 1)
        if self.tokens:
            add_to_interval(cell.tokens, self.interval, self.tokens)
        put_u32(self.stamp, get_u32(self.stamp) + 1)

    cdef void _end(self, int64_t tokens) noexcept:
        """See ``end`` in the stub."""
        global live_charges
        cdef Cell *cell = self.cell
        cdef int64_t in_flight
        self._open = False
        live_charges -= 1
        if not self.table.lives(self.row, self.generation):
            return
        in_flight = get_i64(&cell.in_flight)
        if in_flight > 0:  # not cleared meanwhile
            put_i64(&cell.in_flight, in_flight - 1)
        tokens = min(tokens, <int64_t> REQUEST_TOKENS_MAX)
        if tokens > self.tokens:
            add_to_interval(
                cell.tokens, moment_of(self.table.now_s()).interval, tokens - self.tokens
            )
        elif 0 <= tokens < self.tokens:
            add_to_interval(cell.tokens, self.interval, tokens - self.tokens)
        put_u32(self.stamp, get_u32(self.stamp) + 1)

    def end(self, int64_t tokens=-1):
        """See the stub."""
        if self._open:
            self._end(tokens)

    def __dealloc__(self):
        if self._open:
            self._end(-1)
