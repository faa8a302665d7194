"""The queue table: what the workers' queues of waiting requests must know of each other."""

from collections.abc import Sequence
from typing import final

from kubeai._shared_table import SharedTable

WAIT_BUCKETS_S: tuple[float, ...]  # upper bounds of the buckets of waits; one more is unbounded
CLASS_NAMES: tuple[str, ...]  # of priorities: below 0, 0, above 0
WORK_MAX_TOKENS: int  # a request counts as at most this much work
PRIORITY_MAX: int  # priorities are -PRIORITY_MAX to PRIORITY_MAX

@final
class QueueTable(SharedTable):
    """Rows are those of the load table's models.

    There is one column for each worker, and a last one for the peers.
    """


    @staticmethod
    def create(rows: int, workers: int) -> QueueTable:
        """Create a table, all cells 0, with an eventfd for each worker.

        ``rows`` ≤ 2^20, ``workers`` ≤ 63.
        """
    @staticmethod
    def attach(fd: int, column: int, wake_fds: Sequence[int] = ()) -> QueueTable:
        """Map an existing table; ValueError if its header does not match.

        The caller keeps ownership of the descriptors. ``wake_fds``: those of the creator; without
        them this process wakes no other.
        """
    @property
    def wake_fds(self) -> tuple[int, ...]:
        """The eventfd of each worker, by column; -1: none."""
    def open_row(self, row: int) -> None:
        """Zero a row's cells. Called by the supervisor when it reuses the load table's row."""
    def clear_column(self, column: int) -> None:
        """Zero the heads and gauges of a worker that is dead and reaped, and wake all others.

        Times, accounts and counters are kept.
        """
    def set_peers(self, row: int, priority: int, start: int, is_live: bool = False) -> None:
        """Record the first request in the peers' queues. Called by the supervisor.

        If it has not changed, it stays blocked, unless ``is_live``: the peer that has it serves.
        """
    def clear_peers(self, row: int) -> None:
        """No request waits at a peer."""
    def advance(self, row: int, now: int) -> None:
        """Record that a peer's virtual time is ``now``."""
    def firsts(self) -> dict[int, tuple[int, int, int]]:
        """By row, the priority and the start of this KubeAI replica's first request, and the time.

        Only rows for which a request waits.
        """
    def round(self, row: int) -> int:
        """A model's virtual time: the latest start that any worker has served, in tokens."""
    def account(self, row: int, generation: int, tenant: str) -> int:
        """The number of a tenant's account at a model."""
    def start(self, row: int, account: int, floor: int) -> int:
        """When a tenant's next request may start, in virtual time; at least ``floor``."""
    def charge(self, row: int, account: int, start: int, work: int) -> int:
        """Serve a tenant's request of this work, in tokens. Returns when its next one may start.

        ``start``: the request's start tag.
        """
    def publish(self, row: int, priority: int, start: int, blocked: bool = False) -> None:
        """Set the head of this worker's queue of a model.

        ``blocked``: all of its requests are for adapters whose endpoints are full, so that others
        may pass.
        """
    def withdraw(self, row: int) -> None:
        """This worker's queue of a model is empty."""
    def head(self, row: int, column: int) -> int:
        """The head in a column, to tell whether it has changed; 0: no request waits there."""
    def block(self, row: int, column: int, head: int) -> None:
        """Block the head of a worker or replica that does not serve it, unless it has changed.

        It stays blocked until it is published again.
        """
    def best(self, row: int, skip: int = 0) -> int:
        """The column of the head that is served first, or -1; the last column: a peer's.

        Blocked heads are ignored, and those of the columns whose bits are set in ``skip``. The
        lowest of equal ones is best.
        """
    def earliest(self, row: int, priority: int) -> int | None:
        """The earliest start among the heads with this priority; None if there is none."""
    def is_waiting(self, row: int, blocked_too: bool = True) -> bool:
        """Whether a request waits for a model in any worker of this KubeAI replica."""
    def notify(self, row: int) -> None:
        """Wake the workers that can use free capacity at one of a model's endpoints."""
    def wake(self, column: int) -> None:
        """Wake a worker; columns out of range are ignored."""
    def take_wakes(self) -> int:
        """Reset this worker's eventfd. Returns how often it was woken since the last call."""
    def enter(self, row: int, priority: int) -> None:
        """Count a request as waiting."""
    def leave(self, row: int, priority: int, waited_s: float = -1.0) -> None:
        """Stop counting a request as waiting. ``waited_s``: of a request that is served."""
    def waiting(self, row: int) -> tuple[int, ...]:
        """The number of requests that wait for a model in all workers, by class of priority."""
    def waited(self, row: int) -> list[tuple[list[int], float]]:
        """Of the requests that have been served after a wait, by class of priority.

        Counts by bucket, not cumulative, and the sum of their waits in seconds.
        """
