"""The peers' last reported loads, and their sums. Pure.

A peer's last report is kept until the peer has been silent for ``HOLD_S``. From ``STALE_S`` of
silence on the view counts as incomplete. Time is passed in (seconds of a monotonic clock).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec

from kubeai.supervisor.peers import wire

STALE_S = 3.0
HOLD_S = 30.0
NAMES_MAX = 65_536  # per peer; 1,000 Models with 10,000 endpoints are 11,000


class Peer(msgspec.Struct):
    """One peer."""

    known_s: float  # when we started to follow it
    reported_s: float | None = None  # when its last report arrived
    is_self: bool = False  # an address that turned out to be our own
    models: dict[str, tuple[int, int]] = {}
    endpoints: dict[str, int] = {}
    pending: dict[str, int] = {}
    queues: dict[str, wire.Head] = {}  # by model
    reports_prompts: bool = False  # its frames list the prompts that it sends

    def silent_s(self, now_s: float) -> float:
        """Time since the last frame, or since the peer was discovered."""
        return now_s - (self.known_s if self.reported_s is None else self.reported_s)


class View:
    """All peers together.

    Calls ``changed`` with the endpoints whose sums have changed, and ``queue_changed`` with each
    model whose first waiting request has changed or may have, and whether its peer reported that.
    """

    def __init__(
        self,
        changed: Callable[[set[str]], None],
        queue_changed: Callable[[str, bool], None] = lambda model, is_live: None,
    ) -> None:
        self._changed = changed
        self._queue_changed = queue_changed
        self._touched: set[str] = set()
        self.peers: dict[str, Peer] = {}  # by address
        self._in_flight: Counter[str] = Counter()
        self._pending: Counter[str] = Counter()
        self._active: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()

    # -- reading ---------------------------------------------------------------------------------

    def in_flight(self, endpoint: str) -> int:
        """The peers' in-flight requests at an endpoint."""
        return self._in_flight[endpoint]

    def pending(self, endpoint: str) -> int:
        """The peers' pending prompt tokens at an endpoint."""
        return self._pending[endpoint]

    def active(self, model: str) -> int:
        """A model's requests that the peers have in flight or hold."""
        return self._active[model]

    def ended(self, model: str) -> int:
        """A model's requests that the peers have reported as ended. Never falls."""
        return self._ended[model]

    def queue(self, model: str) -> wire.Head | None:
        """A model's first waiting request at the peers, and their latest virtual time."""
        heads = [peer.queues[model] for peer in self.peers.values() if model in peer.queues]
        if not heads:
            return None
        priority, start, _ = max(heads, key=lambda head: (head[0], -head[1]))
        return priority, start, max(head[2] for head in heads)

    @property
    def speaking(self) -> int:
        """The number of peers that have reported endpoints."""
        return sum(bool(peer.endpoints) for peer in self.peers.values())

    @property
    def silent(self) -> int:
        """The number of peers that have reported endpoints but not the prompts that they send."""
        peers = self.peers.values()
        return sum(bool(peer.endpoints) and not peer.reports_prompts for peer in peers)

    def routes(self, endpoint: str) -> bool:
        """Whether any peer may still send requests to the endpoint or has some there."""
        return any(endpoint in peer.endpoints for peer in self.peers.values())

    def complete(self, now_s: float) -> bool:
        """Whether every peer has reported recently. Peers silent for ``HOLD_S`` are ignored."""
        return not any(
            (peer.reported_s is None or peer.silent_s(now_s) > STALE_S)
            and peer.silent_s(now_s) <= HOLD_S
            and not peer.is_self
            for peer in self.peers.values()
        )

    # -- updates ---------------------------------------------------------------------------------

    def join(self, address: str, now_s: float) -> Peer:
        """Add a discovered peer."""
        peer = self.peers[address] = Peer(now_s)
        return peer

    def leave(self, address: str) -> None:
        """Remove a peer and everything it reported."""
        peer = self.peers.pop(address, None)
        if peer is not None:
            self._forget(peer)
            self._tell()

    def age(self, now_s: float) -> list[str]:
        """Drop the reports of peers silent for too long. Returns their addresses."""
        silent = [
            address
            for address, peer in self.peers.items()
            if peer.silent_s(now_s) > HOLD_S and (peer.models or peer.endpoints)
        ]
        for address in silent:
            self._forget(self.peers[address])
        self._tell()
        return silent

    def take(self, peer: Peer, loads: wire.Loads, now_s: float, whole: bool = False) -> None:
        """Apply a peer's report. ``whole``: it is complete, so names missing from it are gone."""
        peer.reported_s = now_s
        models, endpoints = loads.models, loads.endpoints
        if whole:
            models = dict.fromkeys(peer.models) | models
            endpoints = dict.fromkeys(peer.endpoints, wire.GONE) | endpoints
        for model, counts in models.items():
            self._take_model(peer, model, counts)
            self._take_queue(peer, model, loads.queues.get(model))
        for endpoint, in_flight in endpoints.items():
            self._take_endpoint(peer, endpoint, in_flight, loads.pending.get(endpoint, 0))
        peer.reports_prompts = loads.prompts is not None
        self._tell()
        if len(peer.models) + len(peer.endpoints) > NAMES_MAX:
            raise wire.BadFrame(f"more than {NAMES_MAX} names")

    def _take_model(self, peer: Peer, model: str, counts: tuple[int, int] | None) -> None:
        was_active, had_ended = peer.models.pop(model, None) or (0, None)
        active, ended = counts or (0, 0)
        if counts is not None:
            peer.models[model] = counts
            # Requests that ended before the first report are not counted.
            _shift(self._ended, model, max(0, ended - had_ended) if had_ended is not None else 0)
        _shift(self._active, model, active - was_active)
        if not any(model in other.models for other in self.peers.values()):
            del self._ended[model]

    def _take_queue(self, peer: Peer, model: str, head: wire.Head | None) -> None:
        before = peer.queues.pop(model, None)
        if head is not None:
            peer.queues[model] = head
        if head is not None or before is not None:
            first = self.queue(model)
            is_live = head is not None and first is not None and first[:2] == head[:2]
            if head != before or is_live:
                self._queue_changed(model, is_live)

    def _take_endpoint(self, peer: Peer, endpoint: str, in_flight: int, pending: int = 0) -> None:
        before = peer.endpoints.get(endpoint, 0)
        pending_before = peer.pending.pop(endpoint, 0)
        if pending:
            peer.pending[endpoint] = pending
        if pending != pending_before:
            _shift(self._pending, endpoint, pending - pending_before)
            self._touched.add(endpoint)
        if in_flight == wire.GONE:
            peer.endpoints.pop(endpoint, None)
        else:
            peer.endpoints[endpoint] = in_flight
        difference = max(0, in_flight) - before
        if difference:
            _shift(self._in_flight, endpoint, difference)
            self._touched.add(endpoint)

    def _tell(self) -> None:
        touched, self._touched = self._touched, set()
        if touched:
            self._changed(touched)

    def _forget(self, peer: Peer) -> None:
        for model in list(peer.models):
            self._take_model(peer, model, None)
            self._take_queue(peer, model, None)
        for endpoint in list(peer.endpoints):
            self._take_endpoint(peer, endpoint, wire.GONE)


def _shift(sums: Counter[str], name: str, by: int) -> None:
    total = sums[name] + by
    if total:
        sums[name] = total
    else:
        del sums[name]
