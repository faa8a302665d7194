"""The rows of a table in shared memory: which are free, and when one may be reused. Pure.

Used by the publishers of routes and of keys.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import Protocol


class RowTable(Protocol):
    """What is needed of the table."""

    @property
    def rows(self) -> int:
        """The number of rows."""
        ...

    def open_row(self, row: int) -> int:
        """Give a row to another owner, and return its new generation."""
        ...

    def row_is_zero(self, row: int) -> bool:
        """Whether no request is counted in a row."""
        ...


class Rows:
    """Assigns rows to owners, one at a time.

    A dropped row is reused only once every live worker has acknowledged the version that dropped
    it, and no request is counted in it.
    """

    def __init__(self, table: RowTable) -> None:
        self._table = table
        self._unused = 0  # the first row that never had an owner
        self._free: list[int] = []  # a heap: low rows first, so that sweeps stay short
        self._dropped: list[tuple[int, int]] = []  # (row, version that dropped it)

    @property
    def room(self) -> int:
        """How many rows can be opened."""
        return len(self._free) + self._table.rows - self._unused

    @property
    def dropped(self) -> int:
        """How many rows wait to be reused."""
        return len(self._dropped)

    def open(self) -> tuple[int, int]:
        """Open a row; return the row and its generation. There must be room."""
        if self._free:
            row = heapq.heappop(self._free)
        else:
            row = self._unused
            self._unused += 1
        return row, self._table.open_row(row)

    def drop(self, row: int, version: int) -> None:
        """A row has no owner any more, from a version on."""
        self._dropped.append((row, version))

    def reclaim(self, acknowledged: Iterable[int], version: int) -> list[int]:
        """Free dropped rows that are no longer used, and return them.

        ``acknowledged``: the version that each live worker has applied; ``version``: the last one
        assigned.
        """
        if not self._dropped:
            return []
        safe = min(acknowledged, default=version)
        waiting, freed = [], []
        for row, dropped in self._dropped:
            if dropped <= safe and self._table.row_is_zero(row):
                heapq.heappush(self._free, row)
                freed.append(row)
            else:
                waiting.append((row, dropped))
        self._dropped = waiting
        return freed
