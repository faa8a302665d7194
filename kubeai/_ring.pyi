"""Consistent hashing with bounded loads, and least load, over one model's endpoints."""

from collections.abc import Callable, Iterable
from typing import final

from kubeai._load import LoadTable, Reservation

LOAD_FLOOR: int  # no endpoint is passed over for a load, this pick included, up to this
REPLICATION_MAX: int  # virtual nodes an endpoint; more are not made

@final
class Ring:
    """One model's endpoints. One thread; reads loads that other processes write."""

    def __init__(
        self,
        table: LoadTable,
        row: int,
        generation: int,
        *,
        replication: int = 20,
        mean_load_factor: int = 125,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """``row``, ``generation``: the model's. ``mean_load_factor`` in percent, ≥ 100.

        ``clock``: the time in seconds that ejections end by; None: CLOCK_MONOTONIC.
        """
    def configure(self, *, replication: int, mean_load_factor: int) -> None:
        """Change the parameters; a new replication rebuilds the ring, once.

        ``replication`` counts as 1 when it is less and as ``REPLICATION_MAX`` when it is more.
        """
    def set(
        self,
        name: str,
        row: int,
        generation: int,
        adapters: Iterable[str] = (),
        target: object = None,
    ) -> None:
        """Add an endpoint, or replace what is known of it. Merges; does not rebuild."""
    def remove(self, name: str) -> None:
        """Forget an endpoint; unknown names are ignored. Open Reservations stay valid."""
    def __len__(self) -> int: ...
    def __contains__(self, name: object) -> bool: ...
    def names(self) -> list[str]: ...
    def ejected_count(self) -> int:
        """How many endpoints are ejected or half-open."""
    def can_serve(self, adapter: str | None = None) -> bool:
        """Whether any endpoint has the adapter (None: whether there is any endpoint)."""
    def pick_hashed(
        self, key: int, adapter: str | None = None, exclude: Iterable[str] = ()
    ) -> Reservation | None:
        """Bounded-load pick for a 64-bit key; None when nobody can serve.

        Clockwise from the key, each distinct endpoint once; the first that can serve and whose
        load with this pick stays within max(floor, ceil(factor × (total + 1) / n)). Nobody
        within: the first that can serve. ``exclude``: endpoint names already tried. Ejected
        endpoints are passed over unless no other can serve; a half-open one gets one pick every
        ``TRIAL_S``.
        """
    def pick_least(
        self, adapter: str | None = None, exclude: Iterable[str] = ()
    ) -> Reservation | None:
        """The endpoint with the fewest in flight; ties go round, not always to the first."""
    def lookup(self, key: int, adapter: str | None = None) -> str | None:
        """Pure: where the key lives when nobody has any load."""
