"""The memory that the supervisor shares with its worker processes.

Each process writes to its own column. The supervisor creates all of it and passes its descriptors
on; :class:`WorkerProcess` clears the column of a process that has exited.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from kubeai._journal import Journal
from kubeai._key_table import KeyTable
from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai._queue_table import QueueTable

# 1,000 Models and 10,000 pods, each replaced twice before its rows are freed. Memory is only
# allocated once a row is touched.
TABLE_ROWS = 32_768
INDEX_ENTRIES = 1 << 20  # 8 MiB
KEY_ROWS = 16_384  # API keys, those included whose last requests have not ended yet


class Memory(NamedTuple):
    """``keys``: None: requests need no key."""

    loads: LoadTable
    prefixes: PrefixIndex
    queues: QueueTable
    keys: KeyTable | None
    journal: Journal

    @classmethod
    def create(cls, columns: int, *, keys: bool) -> Memory:
        """``columns``: one for each process. ``keys``: requests need a key."""
        loads = LoadTable.create(TABLE_ROWS, columns)
        loads.phase = random.getrandbits(32)
        return cls(
            loads,
            PrefixIndex.create(TABLE_ROWS, INDEX_ENTRIES, columns),
            QueueTable.create(TABLE_ROWS, columns),
            KeyTable.create(KEY_ROWS, columns) if keys else None,
            Journal.create(columns),
        )

    def clear_column(self, column: int) -> None:
        """Remove what an exited process had in flight, held or queued."""
        self.loads.clear_column(column)
        if self.keys is not None:
            self.keys.clear_column(column)
        self.queues.clear_column(column)

    def close(self) -> None:
        """Close the tables."""
        self.loads.close()
        self.queues.close()
        if self.keys is not None:
            self.keys.close()
