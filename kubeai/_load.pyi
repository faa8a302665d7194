"""The load table: in-flight counts in memory shared by all processes of one KubeAI replica."""

from typing import Literal, final

from kubeai._shared_table import SharedTable

Kind = Literal["http", "message"]

@final
class LoadTable(SharedTable):
    """Rows × columns of counters in one memfd.

    A row is a model or an endpoint. Each column belongs to one worker process, its only writer;
    the last column belongs to the supervisor and holds the other KubeAI replicas' in-flight counts.
    A load is the sum of a row over all columns.
    """

    peers: int  # number of other KubeAI replicas that pick for the same models
    phase: int  # where this KubeAI replica starts breaking ties; differs between peers

    @staticmethod
    def create(rows: int, workers: int) -> LoadTable:
        """Create a table, all cells 0. ``rows`` ≤ 2^20, ``workers`` ≤ 63."""
    @staticmethod
    def attach(fd: int, column: int) -> LoadTable:
        """Map an existing table; ValueError if its header does not match.

        The caller keeps ownership of the descriptor: ``close`` only unmaps.
        """
    def close(self) -> None:
        """Unmap. Open counts stay in the table; releasing them later has no effect."""

    # -- rows: supervisor only -------------------------------------------------------------
    def open_row(self, row: int) -> int:
        """Reuse a free row: zero its counters and return its new generation."""
    def generation(self, row: int) -> int: ...
    def set_peers(self, row: int, generation: int, in_flight: int, pending: int = 0) -> None:
        """Record the peers' load. No effect for another generation.

        ``in_flight`` counts up to 2^22, and ``pending``, in prompt tokens, up to 2^25.
        """
    def settle(self, steps: int = 4) -> None:
        """Move each settled load towards the local load by 1/``steps`` of the difference."""
    def row_is_zero(self, row: int) -> bool:
        """Whether all gauges (active, held, in-flight) of this row are 0."""
    def clear_column(self, column: int) -> None:
        """Zero all gauges of a column whose worker is dead and reaped. Counters are kept."""

    # -- reads: any process ----------------------------------------------------------------
    def active(self, row: int, kind: Kind | None = None) -> int:
        """A model's requests that are being served or held, over all columns."""
    def held(self, row: int) -> int:
        """A model's requests that are waiting for an endpoint."""
    def in_flight(self, row: int) -> int:
        """Unreleased picks of an endpoint, or of all endpoints of a model."""
    def in_flight_here(self, row: int) -> int:
        """Like ``in_flight``, without the other KubeAI replicas' picks."""
    def pending(self, row: int) -> int:
        """Prompt tokens of unreleased picks that have not led to the first byte of a body."""
    def pending_here(self, row: int) -> int:
        """Like ``pending``, without the other KubeAI replicas' picks."""
    def expected(self, row: int, per_request: int = 1) -> int:
        """A row's work, assuming that peers have made as many unreported picks as we.

        In tokens: the pending ones, and ``per_request`` for each request in flight.
        """
    def s_per_token(self, model_row: int) -> float:
        """The learned time per prompt token of a model's endpoints; 0 if unknown."""
    def slowness(self, row: int) -> float:
        """An endpoint's learned time per prompt token, relative to its model's; 0 if unknown."""
    def ended(self, row: int) -> int:
        """A model's requests that have ended, with any outcome, since the row was opened."""
    def lookups(self, row: int) -> tuple[int, int, int]:
        """Hash lookups in which an endpoint was the (initial, final, default) choice."""
    def outcomes(self, row: int, column: int | None = None) -> dict[str, int]:
        """A model's request counts by outcome (``OUTCOME_NAMES``), for one column or all."""
    def iterations(self) -> tuple[list[int], int]:
        """Histogram of distinct endpoints examined per hashed pick, over all models.

        Returns per-bucket counts for the upper bounds ``ITERATION_BUCKETS`` (+Inf last, not
        cumulative) and the sum of the values.
        """
    def active_total(self) -> int:
        """Active requests of all workers."""

    # -- worker status, in its column's header ---------------------------------------------
    def acknowledge(self, version: int) -> None:
        """Record that this worker has applied ``version`` of the routing table."""
    def acknowledged(self, column: int) -> int: ...

    # -- health: written and read by any worker --------------------------------------------
    def note_failure(self, row: int, generation: int, now_s: float, unreachable: bool) -> int:
        """Count a failed attempt. Returns the failures since the last complete response.

        ``now_s``: CLOCK_MONOTONIC seconds. ``unreachable``: the endpoint sent no response.
        """
    def eject(self, row: int, generation: int, until_s: float) -> None:
        """Eject an endpoint until ``until_s`` (CLOCK_MONOTONIC seconds); then it is half-open.

        A half-open endpoint gets one pick per ``HALF_OPEN_PROBE_S`` until it is restored.
        """
    def half_open(self, row: int, generation: int, now_s: float) -> None:
        """End an ejection early: the endpoint may be probed from ``now_s`` on."""
    def restore(self, row: int, generation: int) -> None:
        """Return an ejected endpoint to service. Its ejection count is kept."""
    def recover(self, row: int, generation: int) -> None:
        """Return an endpoint to service and reset its failure and ejection counts."""
    def ejected_until(self, row: int) -> float:
        """When an endpoint becomes half-open or may be probed again; 0 if it is not ejected."""
    def ejection_count(self, row: int) -> int:
        """Number of ejections since the endpoint last recovered."""
    def failures(self, row: int) -> int:
        """Failed attempts, over all workers, since the endpoint's last complete response."""
    def failed_at(self, row: int) -> float:
        """When an endpoint last failed (CLOCK_MONOTONIC seconds); 0 if never."""
    def unreachable(self, row: int) -> bool:
        """Whether an endpoint's last failure came without a response."""
    def health_events(self) -> int:
        """Total failures and ejections recorded by all workers; never decreases."""

ITERATION_BUCKETS: tuple[int, ...]
OUTCOME_NAMES: tuple[str, ...]  # left, 2xx … 5xx, broken; and retried, which is not an outcome
HALF_OPEN_PROBE_S: float
