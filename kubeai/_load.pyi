"""The load table: in-flight counts in memory that all processes of one KubeAI share."""

from typing import Literal, final

Kind = Literal["http", "message"]

@final
class LoadTable:
    """Rows × columns of counters in one memfd.

    A row is a model or an endpoint. A column belongs to one worker process, which alone writes
    it; one more column (the last) is the supervisor's, for what other replicas of KubeAI serve.
    A load is the sum of a row over all columns.
    """

    fd: int  # the memfd, inheritable; hand it to a worker with pass_fds
    rows: int
    columns: int  # workers + 1
    column: int  # the column that this process writes; -1 in the supervisor until set
    peers: int  # other replicas of KubeAI that pick as we do
    phase: int  # where ties among endpoints are broken first: elsewhere in each replica

    @staticmethod
    def create(rows: int, workers: int) -> LoadTable:
        """A new table, all cells 0. ``rows`` ≤ 2^20, ``workers`` ≤ 63."""
    @staticmethod
    def attach(fd: int, column: int) -> LoadTable:
        """Map a table made elsewhere; ValueError when its header does not fit.

        The descriptor stays the caller's: ``close`` only unmaps.
        """
    def close(self) -> None:
        """Unmap; what is still counted stays counted, and is released into nothing."""

    # -- rows: the supervisor's --------------------------------------------------------------
    def open_row(self, row: int) -> int:
        """Begin a new life of a free row: counters zeroed, a new generation, which is returned."""
    def generation(self, row: int) -> int: ...
    def set_peers(self, row: int, generation: int, in_flight: int) -> None:
        """Other replicas have so many picks of the row in flight; nothing in its other lives."""
    def settle(self, steps: int = 4) -> None:
        """Let what is settled follow by a ``steps``-th of the difference; all of it at 1."""
    def row_is_zero(self, row: int) -> bool:
        """Whether no column holds a gauge (active, held, in-flight) in this row."""
    def clear_column(self, column: int) -> None:
        """Zero all gauges of a column whose worker is dead and reaped (counters stay)."""

    # -- reads: anyone -----------------------------------------------------------------------
    def active(self, row: int, kind: Kind | None = None) -> int:
        """Requests of a model that are being served or held: sum over the columns."""
    def held(self, row: int) -> int:
        """Requests of a model that wait for an endpoint."""
    def in_flight(self, row: int) -> int:
        """Picks not yet released: of an endpoint, or of a model (all its endpoints)."""
    def in_flight_here(self, row: int) -> int:
        """The same without those of other replicas of KubeAI."""
    def expected(self, row: int) -> int:
        """The load of a row, if peers have picked since they last told as we have."""
    def ended(self, row: int) -> int:
        """Requests of a model that are over, however they ended, since the row was opened."""
    def lookups(self, row: int) -> tuple[int, int, int]:
        """Of an endpoint: hash lookups in which it was (initial, final, default) choice."""
    def outcomes(self, row: int, column: int | None = None) -> dict[str, int]:
        """Of a model: how its requests ended, by name (``OUTCOME_NAMES``); of a column, or all."""
    def iterations(self) -> tuple[list[int], int]:
        """Histogram of distinct endpoints looked at by a hashed pick, all models.

        Returns per-bucket counts for the upper bounds ``ITERATION_BUCKETS`` (+Inf last, not
        cumulative) and the sum of the values.
        """
    def active_total(self) -> int:
        """Requests active in all columns that workers write."""

    # -- what a worker says of itself: its column's header -------------------------------------
    def acknowledge(self, version: int) -> None:
        """This worker has applied the routing table's ``version``."""
    def acknowledged(self, column: int) -> int: ...

    # -- health: any worker writes, all read ---------------------------------------------------
    def note_failure(self, row: int, generation: int, now_s: float, unreachable: bool) -> int:
        """Count a failed attempt; returns the endpoint's failures since its last complete answer.

        ``now_s``: CLOCK_MONOTONIC seconds. ``unreachable``: there was no answer.
        """
    def eject(self, row: int, generation: int, until_s: float) -> None:
        """Eject an endpoint until ``until_s`` (CLOCK_MONOTONIC seconds); then it is half-open.

        A half-open endpoint gets one pick every ``TRIAL_S``, until it is restored.
        """
    def half_open(self, row: int, generation: int, now_s: float) -> None:
        """End an ejection early: the endpoint may be probed from ``now_s`` on."""
    def restore(self, row: int, generation: int) -> None:
        """Return an ejected endpoint to service. Its ejection count is kept."""
    def recover(self, row: int, generation: int) -> None:
        """Return an endpoint to service with no failures and no ejections counted."""
    def ejected_until(self, row: int) -> float:
        """When an endpoint becomes half-open, or may be probed again; 0: it is not ejected."""
    def ejection_count(self, row: int) -> int:
        """How often an endpoint was ejected since it last recovered."""
    def failures(self, row: int) -> int:
        """An endpoint's failed attempts, by all workers, since its last complete answer."""
    def failed_at(self, row: int) -> float:
        """When an endpoint last failed (CLOCK_MONOTONIC seconds); 0: never."""
    def unreachable(self, row: int) -> bool:
        """Whether an endpoint's last failure was without an answer."""
    def health_events(self) -> int:
        """Changes with every failure and ejection that any worker records; never falls."""

    # -- counting a request: a worker ----------------------------------------------------------
    def admit(self, row: int, generation: int, kind: Kind = "http") -> Admission: ...

@final
class Readings:
    """What each row counted, in this replica, when it was last looked at. The supervisor's."""

    def __init__(self, table: LoadTable) -> None: ...
    def changed(self) -> list[tuple[int, int, int, int]]:
        """Rows that count something else than at the last call, or live anew, with their counts.

        A list of (row, in flight, active, ended).
        """

@final
class Admission:
    """One request counted as active for a model, once, until closed."""

    def hold(self) -> None:
        """Count it as held too (idempotent; nothing once closed)."""
    def unhold(self) -> None: ...
    def count(self, outcome: str) -> None:
        """Count how it ended, or that it was retried: one of ``OUTCOME_NAMES``."""
    def close(self) -> None:
        """Count it no more (idempotent; also when garbage-collected)."""

@final
class Reservation:
    """One pick of an endpoint, counted in its row and its model's row until released."""

    name: str  # the endpoint's (its pod's) name
    target: object  # what Ring.set was given for it
    trial: bool  # the endpoint is ejected: a good answer restores it
    failing: bool  # the endpoint has failed since its last complete answer
    iterations: int  # distinct endpoints looked at (0 for LeastLoad)
    first: str  # the name of the ring's first endpoint that can serve; == name when not moved
    first_load: int  # its load when it was passed over (or taken), before this pick
    bound: int  # the load that no endpoint may exceed by this pick (0, none, for LeastLoad)

    @property
    def released(self) -> bool: ...
    def release(self) -> None:
        """Count it no more (idempotent; also when garbage-collected)."""

ITERATION_BUCKETS: tuple[int, ...]
OUTCOME_NAMES: tuple[str, ...]  # left, 2xx … 5xx, broken; and retried, which is no end
TRIAL_S: float

def live() -> tuple[int, int]:
    """(Admissions, Reservations) of this process that are not closed: leak check for tests."""
