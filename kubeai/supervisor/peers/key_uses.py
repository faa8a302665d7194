"""What API keys have used of their limits, between KubeAI replicas.

:class:`KeyFeed` finds what this KubeAI replica's workers have counted, for the peers, and
:class:`PeerUses` records what those report in the supervisor's column of the key table. Both know
keys by name, because each peer assigns rows of its own. A report is a state, not an increment:
the requests in flight, and the requests and tokens of the last minute. So a lost report or a
peer that restarts leaves nothing behind; and as what was counted becomes older, it is reported
again with each interval of the key table. What a peer has counted before it left counts for
another minute, so that limits hold during a rolling update. Used by peers.py and feed.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Set
from typing import Protocol

from kubeai._key_readings import KeyReadings
from kubeai._key_table import KeyTable
from kubeai.supervisor.peers import wire

UNUSED = (0, 0, 0)
LEFT_S = 60.0  # how long a report counts after its peer has left
GONE_MAX_KEYS = 10_000  # deleted keys that are kept, so that listeners learn of them


class KeyRows(Protocol):
    """The rows of keys in the key table; implemented by the publisher of keys."""

    @property
    def rows(self) -> Mapping[str, tuple[int, int]]:
        """Row and generation of each key, by name."""

    @property
    def owners(self) -> Mapping[int, str]:
        """The name of each row's key, until the row is free."""


class KeyFeed:
    """This KubeAI replica's uses by key name, and in which frame each last changed."""

    def __init__(self, table: KeyTable, keys: KeyRows) -> None:
        self._table = table
        self._keys = keys
        self._readings = KeyReadings(table)
        self._changed: OrderedDict[str, int] = OrderedDict()  # name → frame, oldest first

    def read(self, frame: int) -> bool:
        """Read the table. ``frame``: the number of the frame that is to have the changes.

        Whether there are any.
        """
        owners = self._keys.owners
        changed = [owners[row] for row in self._readings.changed() if row in owners]
        for name in changed:
            self._changed[name] = frame
            self._changed.move_to_end(name)
        if len(self._changed) - len(self._keys.rows) > GONE_MAX_KEYS:
            for name in self._changed.keys() - self._keys.rows.keys():
                del self._changed[name]
        return bool(changed)

    def since(self, frame: int) -> dict[str, wire.KeyUse]:
        """The uses that have changed since a frame; since frame 0, all."""
        uses: dict[str, wire.KeyUse] = {}
        for name in reversed(self._changed):
            if self._changed[name] <= frame:
                break
            use = self._use(name)
            if frame or use != UNUSED:
                uses[name] = use
        return uses

    def _use(self, name: str) -> wire.KeyUse:
        lease = self._keys.rows.get(name)
        if lease is None:
            return UNUSED
        use = self._table.use_here(lease[0])
        return (
            min(use.in_flight, wire.COUNT_MAX),
            min(use.requests, wire.USE_MAX),
            min(use.tokens, wire.USE_MAX),
        )


class PeerUses:
    """The peers' last reported uses. Writes their sums to the key table."""

    def __init__(self, table: KeyTable, keys: KeyRows) -> None:
        self._table = table
        self._keys = keys
        self._reported: dict[str, dict[str, wire.KeyUse]] = {}  # by the peer's address, by name
        # The same of peers that have left or started again, without what was in flight, and when.
        self._left: dict[str, tuple[float, dict[str, wire.KeyUse]]] = {}

    def take(
        self, address: str, uses: Mapping[str, wire.KeyUse], now_s: float, *, whole: bool = False
    ) -> None:
        """Apply a peer's report. ``whole``: it is complete; keys missing from it are not used.

        A complete report may come from a peer that has started again at the address, and knows
        nothing of what it has counted before. BadFrame if there are too many keys.
        """
        touched = set(uses)
        if whole:
            touched |= self._retire(address, now_s)
        reported = self._reported.setdefault(address, {})
        for name, use in uses.items():
            if use == UNUSED:
                reported.pop(name, None)
            else:
                reported[name] = use
        self._put(touched)
        if len(reported) > wire.KEYS_MAX:
            raise wire.BadFrame(f"more than {wire.KEYS_MAX} keys")

    def leave(self, address: str, now_s: float) -> None:
        """A peer has left, or is silent for too long: it has nothing in flight any more."""
        self._put(self._retire(address, now_s))

    def _retire(self, address: str, now_s: float) -> Set[str]:
        """Keep what a peer has counted for another minute. Returns the names of the keys."""
        reported = self._reported.pop(address, {})
        if reported:
            left = {name: (0, requests, tokens) for name, (_, requests, tokens) in reported.items()}
            self._left[address] = now_s, left
        return reported.keys()

    def age(self, now_s: float) -> None:
        """Drop what was reported by peers that left a minute ago."""
        for address, (left_s, left) in list(self._left.items()):
            if now_s - left_s >= LEFT_S:
                del self._left[address]
                self._put(left)

    def put(self, name: str) -> None:
        """Write the sum of a key, for example because it has a row now."""
        lease = self._keys.rows.get(name)
        if lease is None:
            return
        uses = [self._use(address, name) for address in self._reported.keys() | self._left.keys()]
        in_flight, requests, tokens = map(sum, zip(UNUSED, *uses, strict=True))
        self._table.set_peers(*lease, in_flight, requests, tokens)

    def _use(self, address: str, name: str) -> wire.KeyUse:
        """What a peer has used of a key.

        If it has only lost the connection, what it reports includes what it has reported before.
        """
        in_flight, requests, tokens = self._reported.get(address, {}).get(name, UNUSED)
        _, requests_left, tokens_left = self._left.get(address, (0.0, {}))[1].get(name, UNUSED)
        return in_flight, max(requests, requests_left), max(tokens, tokens_left)

    def _put(self, names: Iterable[str]) -> None:
        for name in names:
            self.put(name)
