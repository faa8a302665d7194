"""Consistent hashing with bounded loads, and least load, over one model's endpoints."""

from collections.abc import Callable, Iterable
from typing import final

from kubeai._counts import Reservation
from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai._prompt import Prompt

LOAD_FLOOR: int  # endpoints are never skipped for a load, including this pick, up to this
REPLICATION_MAX: int  # maximum virtual nodes per endpoint

@final
class Ring:
    """One model's endpoints. Single-threaded; reads loads that other processes write."""

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

        ``clock``: the clock, in seconds, for ejections; default CLOCK_MONOTONIC.
        """
    def configure(self, *, replication: int, mean_load_factor: int) -> None:
        """Change the parameters. A new replication rebuilds the ring at the next pick.

        ``replication`` is clamped to 1 … ``REPLICATION_MAX``.
        """
    def set(
        self,
        name: str,
        row: int,
        generation: int,
        adapters: Iterable[str] = (),
        target: object = None,
    ) -> None:
        """Add or update an endpoint. Merges it into the ring; does not rebuild."""
    def remove(self, name: str) -> None:
        """Remove an endpoint; unknown names are ignored. Open Reservations stay valid."""
    def __len__(self) -> int: ...
    def __contains__(self, name: object, /) -> bool: ...
    def names(self) -> list[str]: ...
    def shares(self) -> dict[str, float]:
        """By endpoint, the share of all keys that map to it when there is no load."""
    def ejected_count(self) -> int:
        """Number of endpoints that are ejected or half-open."""
    def can_serve(self, adapter: str | None = None) -> bool:
        """Whether any endpoint has the adapter (None: whether there are any endpoints)."""
    def pick_hashed(
        self,
        key: int,
        adapter: str | None = None,
        exclude: Iterable[str] = (),
        prompt: Prompt = ...,
        index: PrefixIndex | None = None,
    ) -> Reservation | None:
        """Bounded-load pick for a 64-bit key; None if no endpoint can serve.

        Clockwise from the key, takes the first endpoint that can serve and whose load, including
        this pick, is at most max(floor, ceil(factor × (total + own) / n)). If there is none, takes
        the first that can serve. Loads are counted in requests of ``REQUEST_TOKENS``, to which
        pending tokens add; ``own`` includes the tokens of ``prompt`` that the index does not know
        at the endpoint. The pick is recorded in the index.

        ``exclude``: names of endpoints already tried. Ejected endpoints are skipped unless no other
        can serve; a half-open one gets one pick per ``HALF_OPEN_PROBE_S``.
        """
    def pick_least(
        self, adapter: str | None = None, exclude: Iterable[str] = (), tokens: int = 0
    ) -> Reservation | None:
        """Pick the endpoint with the least load; ties are broken round-robin.

        A load is the pending tokens and ``REQUEST_TOKENS`` for each request in flight. ``tokens``:
        of this prompt. If there are other KubeAI replicas, compares expected loads
        (``LoadTable.expected``).
        """
    def lookup(self, key: int, adapter: str | None = None) -> str | None:
        """The endpoint that a key maps to when there is no load. Pure: counts nothing."""
