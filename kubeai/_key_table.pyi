"""The key table: what API keys have used of their limits, in shared memory."""

from collections.abc import Callable
from typing import NamedTuple, final

from kubeai._shared_table import SharedTable

class Use(NamedTuple):
    """What a key has in flight, and has used within the last minute, rounded up."""

    in_flight: int
    requests: int
    tokens: int

@final
class KeyTable(SharedTable):
    """Rows × columns of counters in one memfd.

    A row is a key. Each column belongs to one worker process, its only writer; the last column
    belongs to the supervisor and holds what the other KubeAI replicas have counted.
    """

    clock: Callable[[], float] | None  # for tests; None: CLOCK_MONOTONIC

    @staticmethod
    def create(rows: int, workers: int) -> KeyTable:
        """Create a table, all cells 0. ``rows`` ≤ 2^20, ``workers`` ≤ 63."""
    @staticmethod
    def attach(fd: int, column: int) -> KeyTable:
        """Map an existing table; ValueError if its header does not match.

        The caller keeps ownership of the descriptor: ``close`` only unmaps.
        """
    def close(self) -> None:
        """Unmap. What is still in flight stays counted; ending it later has no effect."""

    # -- rows: supervisor only -------------------------------------------------------------
    def open_row(self, row: int) -> int:
        """Reuse a free row: zero its cells and return its new generation."""
    def generation(self, row: int) -> int:
        """The current generation of a row; 0 if it was never opened."""
    def row_is_zero(self, row: int) -> bool:
        """Whether the key has nothing in flight at this KubeAI replica."""
    def set_peers(
        self, row: int, generation: int, in_flight: int, requests: int, tokens: int
    ) -> None:
        """Record what the peers have counted within the last minute.

        It ages like everything else: unless it is recorded again, it is gone 70 s later at the
        latest. No effect for another generation.
        """
    def clear_column(self, column: int) -> None:
        """Zero the requests in flight of a column whose worker is dead and reaped.

        What it has counted within the last minute is kept.
        """

    # -- reads: any process ----------------------------------------------------------------
    def use(self, row: int) -> Use:
        """What a key has used, at all KubeAI replicas."""
    def use_here(self, row: int) -> Use:
        """Like ``use``, without the peers."""
    def is_counted(self, row: int) -> bool:
        """Whether a worker of this KubeAI replica has ever counted a request of a key."""
    def refused(self, row: int) -> int:
        """A key's requests that this KubeAI replica has limited, since the row was opened."""
