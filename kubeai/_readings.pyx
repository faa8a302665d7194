"""Readings of the load table by the supervisor.

:class:`Readings` finds the changes since the last reading, which the supervisor reports to its
peers; :func:`picks` what has been counted of a model's picks.
"""

cimport cython
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from kubeai._load cimport PICKS, LoadTable, get_u32, get_u64, in_flight_of


PICK_NAMES = (
    "prompt_tokens",
    "cached_tokens",
    "cached",
    "away",
    "new",
    "reported_prompt_tokens",
    "reported_cached_tokens",
    "reported_output_tokens",
)


def picks(LoadTable table not None, Py_ssize_t row):
    """See the stub."""
    table._check_row(row)
    cdef int which
    cdef dict counts = {}
    for which in range(PICKS):
        counts[PICK_NAMES[which]] = table._counted(table.pick_cells, PICKS, row, which)
    return counts


cdef struct Reading:
    uint32_t generation
    uint64_t load
    int64_t active
    uint64_t ended


@cython.final
cdef class Readings:
    """This KubeAI replica's counts per row as of the last ``changed``. Used by the supervisor."""

    cdef LoadTable table
    cdef Reading *last

    def __init__(self, LoadTable table not None):
        self.table = table
        self.last = <Reading *> calloc(table.rows, sizeof(Reading))
        if self.last == NULL:
            raise MemoryError(f"cannot allocate readings for {table.rows} rows")

    def __dealloc__(self):
        free(self.last)

    def changed(self):
        """See the stub."""
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
            now.load = table._here(row)
            now.active = table._sum_columns(table.active_cells, row)
            now.active += table._sum_columns(table.active_cells + kind_cells, row)
            now.ended = table._ended(row)
            last = &self.last[row]
            if (
                now.generation != last.generation
                or now.load != last.load
                or now.active != last.active
                or now.ended != last.ended
            ):
                last[0] = now
                changed.append((row, in_flight_of(now.load), now.active, now.ended))
        return changed
