"""What API keys have used of their limits, between KubeAI replicas.

:class:`KeyFeed` finds what this KubeAI replica's workers have counted, for the peers, and
:class:`PeerUses` records what those report in the supervisor's column of the key table. Both know
keys by name, because each peer assigns rows of its own. A report is a state, not an increment:
the requests in flight, and the requests and tokens of the last minute, by the intervals of the key
table in which they were counted. So a lost report leaves nothing behind.

Intervals begin at other times at each KubeAI replica, because the clocks of machines differ. What a
peer has counted in an interval is recorded in the receiver's interval in which that one ends. It
therefore counts for at most 10 s longer than at the peer, and never for a shorter time. Recorded
counts age by themselves, so those of a peer that has left or restarted still count until they are a
minute old, and limits hold during a rolling update. Used by peers.py and feed.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, islice
from typing import NamedTuple, Protocol

import msgspec

from kubeai._key_readings import KeyReadings
from kubeai._key_table import KeyTable
from kubeai.supervisor.peers import wire

UNUSED = (0, 0, 0)
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

    def key_changed(self, name: str, frame: int) -> bool:
        """A key was added, changed or removed: report it in a frame, as unused if it has no row.

        False: it was never reported.
        """
        if name not in self._changed:
            return False
        self._changed[name] = frame
        self._changed.move_to_end(name)
        return True

    def since(self, frame: int) -> tuple[dict[str, wire.KeyUse], wire.KeyWindows | None]:
        """The uses that have changed since a frame, and their windows; since frame 0, all."""
        uses: dict[str, wire.KeyUse] = {}
        windows: list[wire.KeyWindow] = []
        _, past_ms = self._table.moment()
        for name in reversed(self._changed):
            if self._changed[name] <= frame:
                break
            use, window = self._use(name)
            if frame or use != UNUSED:
                uses[name] = use
                windows.append(window)
        return uses, wire.KeyWindows(past_ms, windows) if uses else None

    def _use(self, name: str) -> tuple[wire.KeyUse, wire.KeyWindow]:
        lease = self._keys.rows.get(name)
        if lease is None:
            return UNUSED, ((), ())
        use = self._table.use_here(lease[0])
        summed = (
            min(use.in_flight, wire.COUNT_MAX),
            min(use.requests, wire.USE_MAX),
            min(use.tokens, wire.USE_MAX),
        )
        requests, tokens = self._table.window_here(lease[0])
        return summed, (_bounded(requests), _bounded(tokens))


def _bounded(counts: Sequence[int]) -> tuple[int, ...]:
    """Counts as they are reported: within bounds, and without zeros at the end."""
    last = max((age for age, count in enumerate(counts) if count), default=-1)
    return tuple(min(count, wire.USE_MAX) for count in counts[: last + 1])


class _Use(NamedTuple):
    """A key's use at one peer. Counts are by age in intervals; the first are of ``interval``."""

    in_flight: int
    interval: int  # of this replica's key table
    requests: tuple[int, ...]
    tokens: tuple[int, ...]

    def is_over(self, interval: int) -> bool:
        """Whether it counts nothing in an interval."""
        return not self.in_flight and interval - self.interval >= wire.INTERVALS_MAX


class _Peer(msgspec.Struct):
    """What was counted by the processes that have served at one address."""

    process: str  # the latest one; empty: its version does not say
    uses: dict[str, _Use] = {}  # of the latest one, by key
    earlier: dict[str, _Use] = {}  # of those before it, together
    is_gone: bool = False  # it has left, or is silent


class PeerUses:
    """The peers' last reported uses. Writes their sums to the key table."""

    def __init__(self, table: KeyTable, keys: KeyRows) -> None:
        self._table = table
        self._keys = keys
        self._peers: dict[str, _Peer] = {}  # by address
        self._aged = 0  # the interval in which `age` last looked

    def take(
        self, address: str, loads: wire.Loads, *, whole: bool = False, process: str = ""
    ) -> None:
        """Apply a peer's report. ``whole``: it is complete; keys missing from it are not used.

        ``process``: identifies the peer's process; empty: its version does not say. Another one
        than before does not know what the one before has counted. BadFrame if it is invalid.
        """
        uses = self._uses_in(loads)
        peer = self._peers.setdefault(address, _Peer(process))
        peer.is_gone = False
        touched = set(loads.keys)
        if whole:
            touched |= peer.uses.keys()
            if not process or process != peer.process:
                self._retire(peer)
            peer.process, peer.uses = process, {}
        for name, use in uses.items():
            if use.in_flight or use.requests or use.tokens:
                peer.uses[name] = use
            else:
                peer.uses.pop(name, None)
        interval, _ = self._table.moment()
        for name in touched:
            self._write(name, interval)
        if len(peer.uses) > wire.KEYS_MAX:
            raise wire.BadFrame(f"more than {wire.KEYS_MAX} keys")

    def _uses_in(self, loads: wire.Loads) -> dict[str, _Use]:
        """The uses that a peer reports, in intervals of this replica."""
        interval, past_ms = self._table.moment()
        windows = loads.key_windows
        if windows is None:  # when its requests were counted is not known
            return {
                name: _Use(in_flight, interval, _one(requests), _one(tokens))
                for name, (in_flight, requests, tokens) in loads.keys.items()
            }
        if len(windows.counts) != len(loads.keys):
            raise wire.BadFrame(f"{len(loads.keys)} keys, but {len(windows.counts)} windows")
        # Otherwise the peer's previous interval ended in our current one.
        is_aligned = windows.past_ms >= past_ms
        return {
            name: _Use(in_flight, interval, *(counts if is_aligned else map(_joined, counts)))
            for (name, (in_flight, *_)), counts in zip(
                loads.keys.items(), windows.counts, strict=True
            )
        }

    def leave(self, address: str) -> None:
        """A peer has left, or is silent for too long: it has nothing in flight any more."""
        peer = self._peers.get(address)
        if peer is None or peer.is_gone:
            return
        peer.is_gone = True
        interval, _ = self._table.moment()
        for name, use in peer.uses.items():
            peer.uses[name] = use._replace(in_flight=0)
            self._write(name, interval)

    def age(self) -> None:
        """Drop what is more than a minute old, once in each interval."""
        interval, _ = self._table.moment()
        if interval == self._aged:
            return
        self._aged = interval
        for address, peer in list(self._peers.items()):
            for uses in (peer.uses, peer.earlier):
                for name in [name for name, use in uses.items() if use.is_over(interval)]:
                    del uses[name]
            if peer.is_gone and not peer.uses and not peer.earlier:
                del self._peers[address]

    def key_changed(self, name: str) -> None:
        """A key was added, changed or removed.

        Nothing is kept of a removed one, so that another key with its name begins at 0.
        """
        if name in self._keys.rows:
            self._write(name, self._table.moment()[0])
            return
        for peer in self._peers.values():
            peer.uses.pop(name, None)
            peer.earlier.pop(name, None)

    def _retire(self, peer: _Peer) -> None:
        """A peer's process may be over: keep what it and those before it have counted."""
        interval, _ = self._table.moment()
        names = dict.fromkeys(chain(peer.uses, peer.earlier))
        kept = {}
        for name in islice(names, wire.KEYS_MAX):
            requests, tokens = self._counts(peer, name, interval)
            kept[name] = _Use(0, interval, requests, tokens)
        peer.earlier = kept

    def _counts(self, peer: _Peer, name: str, interval: int) -> list[tuple[int, ...]]:
        """The requests and tokens that the processes of a peer have counted, by age.

        If it is not known whether the latest one has only lost the connection, what it reports may
        include what was reported before. The larger one then counts.
        """
        if name not in peer.earlier:  # as most
            use = peer.uses[name]
            past = interval - use.interval
            return [_at(use.requests, past), _at(use.tokens, past)]
        uses = [uses[name] for uses in (peer.earlier, peer.uses) if name in uses]
        merge = _sum if peer.process else _largest
        return [
            merge([_at(use.requests, interval - use.interval) for use in uses]),
            merge([_at(use.tokens, interval - use.interval) for use in uses]),
        ]

    def _write(self, name: str, interval: int) -> None:
        """Write the sums of a key, if it has a row. ``interval``: the current one."""
        lease = self._keys.rows.get(name)
        if lease is None:
            return
        peers = [p for p in self._peers.values() if name in p.uses or name in p.earlier]
        counts = [self._counts(peer, name, interval) for peer in peers]
        in_flight = sum(peer.uses[name].in_flight for peer in peers if name in peer.uses)
        if len(counts) == 1:
            requests, tokens = counts[0]
        else:
            requests = _sum([requests for requests, _ in counts])
            tokens = _sum([tokens for _, tokens in counts])
        self._table.set_peers(*lease, in_flight, interval, requests, tokens)


def _one(count: int) -> tuple[int, ...]:
    return (count,) if count else ()


def _joined(counts: Sequence[int]) -> tuple[int, ...]:
    """Counts by age, with the two latest intervals as one."""
    return (sum(counts[:2]), *counts[2:]) if counts else ()


def _at(counts: tuple[int, ...], intervals: int) -> tuple[int, ...]:
    """Counts by age some intervals later; those that are more than a minute old are left out."""
    if not intervals or not counts:
        return counts
    size = wire.INTERVALS_MAX
    return ((0,) * min(intervals, size) + counts)[:size]


def _sum(each: Collection[tuple[int, ...]]) -> tuple[int, ...]:
    if len(each) == 1:
        return next(iter(each))
    length = max(map(len, each), default=0)
    return tuple(sum(counts[age] for counts in each if age < len(counts)) for age in range(length))


def _largest(each: Collection[tuple[int, ...]]) -> tuple[int, ...]:
    return max(each, key=sum, default=())
