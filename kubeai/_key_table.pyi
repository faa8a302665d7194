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
        self,
        row: int,
        generation: int,
        in_flight: int,
        interval: int,
        requests: tuple[int, ...],
        tokens: tuple[int, ...],
    ) -> None:
        """Record what the peers have counted, in place of what was recorded before.

        ``requests``, ``tokens``: by age in intervals; the first were counted in ``interval``, and
        those that are left out are 0. They age like everything else. No effect for another
        generation.
        """
    def clear_column(self, column: int) -> None:
        """Zero the requests in flight of a column whose worker is dead and reaped.

        What it has counted within the last minute is kept.
        """

    # -- reads: any process ----------------------------------------------------------------
    def moment(self) -> tuple[int, int]:
        """The number of the current interval of 10 s, and the milliseconds since it began."""
    def use(self, row: int) -> Use:
        """What a key has used, at all KubeAI replicas."""
    def use_here(self, row: int) -> Use:
        """Like ``use``, without the peers."""
    def window_here(self, row: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The requests and tokens of ``use_here``, by age in intervals, the latest first.

        The last of the seven intervals is leaving the minute; here it counts in full.
        """
    def is_counted(self, row: int) -> bool:
        """Whether a worker of this KubeAI replica has ever counted a request of a key."""
    def refused(self, row: int) -> int:
        """A key's requests that this KubeAI replica has limited, since the row was opened."""
