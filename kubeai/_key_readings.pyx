"""Readings of the key table by the supervisor, for the peers.

Each worker has a stamp for each row, which changes whenever it counts something there. The stamps
of a worker are contiguous, so that a reading of 10,000 keys compares 40 KB. What was counted also
ages: when an interval ends, all rows with something in the last minute have changed.
"""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp

from kubeai._key_table cimport KeyTable, Moment, moment_of
from kubeai._load cimport get_u32, get_u64

cdef enum:
    BLOCK_ROWS = 64


@cython.final
cdef class KeyReadings:
    """See the stub."""

    cdef KeyTable table
    cdef uint32_t *last  # [columns][rows]: the stamps of the last reading
    cdef uint64_t interval
    cdef set recent  # rows that have changed since the last minute, or have not been read since

    def __init__(self, KeyTable table not None):
        self.table = table
        self.recent = set()
        self.last = <uint32_t *> calloc(<size_t> table.columns * table.rows, sizeof(uint32_t))
        if self.last == NULL:
            raise MemoryError(f"cannot allocate readings for {table.rows} keys")

    def __dealloc__(self):
        free(self.last)

    def changed(self):
        """See the stub."""
        cdef KeyTable table = self.table
        table._check_row(0)
        cdef size_t used = get_u64(&table.header.rows_used)
        cdef size_t row, at, end
        cdef int column
        cdef uint64_t interval = moment_of(table.now_s()).interval
        cdef set found = set()
        for column in range(table.columns - 1):
            at = <size_t> column * table.rows
            for row in range(0, used, BLOCK_ROWS):
                end = min(row + BLOCK_ROWS, used)
                if memcmp(
                    &table.stamps[at + row], &self.last[at + row], (end - row) * sizeof(uint32_t)
                ):
                    self._compare(at, row, end, found)
        self.recent |= found
        if interval != self.interval:
            self.interval = interval
            found |= self.recent
            self.recent = {row for row in self.recent if not self._is_idle(row)}
        return sorted(found)

    cdef int _compare(self, size_t at, size_t row, size_t end, set found) except -1:
        cdef uint32_t stamp
        while row < end:
            stamp = get_u32(&self.table.stamps[at + row])
            if stamp != self.last[at + row]:
                self.last[at + row] = stamp
                found.add(row)
            row += 1
        return 0

    cdef bint _is_idle(self, size_t row) noexcept:
        """Whether nothing was counted here within the last minute."""
        cdef KeyTable table = self.table
        cdef Moment moment = moment_of(table.now_s())
        cdef int columns = table.columns - 1
        return (
            table.used_requests(row, columns, &moment) == 0
            and table.used_tokens(row, columns, &moment) == 0
        )
