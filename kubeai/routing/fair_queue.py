"""A queue of waiting requests that is fair to tenants. Pure: no I/O, no clock.

Requests are ordered by priority, the higher first, then fairly by tenant, then in order of arrival.
Fair means: of the tenants that wait with the same priority, the one that has been served the least
work is next (start-time fair queueing). It is the limit of deficit round robin for a small quantum.
Work differs a thousandfold between requests, so a quantum that covers the largest request would let
a tenant have a thousand small ones served per round, before another tenant's first.

A tenant's first request starts at the current virtual time of its priority. A tenant therefore
accumulates no credit while it is idle, or while it waits at a low priority.

The :class:`Accounts` may be shared by several queues: ``queueing`` shares those of a worker's
queues with the other workers in the queue table. Each operation takes O(log tenants), except
``places``, and ``push`` of a request that others have passed meanwhile.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from itertools import count, islice, takewhile
from typing import Generic, Protocol, TypeVar

_STALE_MAX = 64  # outdated entries of a heap before it is rebuilt, besides one for each flow
_next_number = count(1).__next__  # in all queues of the process


class Entry(Protocol):
    """A request that waits."""

    priority: int
    tenant: str
    work: int  # in tokens, at least 1
    adapter: str | None  # requests of the same tenant may pass those that wait for an adapter
    number: int  # in the order of arrival, set by the queue; 0: it has not waited yet


class Accounts(Protocol):
    """The work that tenants have been served, as the time until which it lasts, in tokens."""

    def floor(self, priority: int) -> int:
        """The start of a tenant that begins to wait with this priority and has no account."""

    def start(self, tenant: str, floor: int) -> int:
        """When the tenant's next request may start, at least ``floor``."""

    def charge(self, tenant: str, start: int, work: int) -> int:
        """Serve a request with this start tag. Returns when the tenant's next one may start."""


class LocalAccounts:
    """Accounts of one queue alone, for simulations. They are not bounded."""

    def __init__(self) -> None:
        self._round = 0
        self._ends: dict[str, int] = {}

    def floor(self, priority: int) -> int:
        """See :class:`Accounts`."""
        return self._round

    def start(self, tenant: str, floor: int) -> int:
        """See :class:`Accounts`."""
        return max(floor, self._ends.get(tenant, 0))

    def charge(self, tenant: str, start: int, work: int) -> int:
        """See :class:`Accounts`."""
        start = self.start(tenant, start)
        self._round = max(self._round, start)
        self._ends[tenant] = start + work
        return start + work


E = TypeVar("E", bound=Entry)


class _Flow(Generic[E]):
    """A tenant's requests of one priority."""

    __slots__ = ("number", "queues", "start", "tenant")

    def __init__(self, tenant: str, start: int, number: int) -> None:
        self.tenant = tenant
        self.start = start  # of the first request
        self.number = number  # of the request that it began with
        self.queues: dict[str | None, OrderedDict[E, None]] = {}  # by adapter

    def first(self, blocked: Collection[str | None]) -> E | None:
        """The first request whose adapter is not blocked."""
        heads = [
            next(iter(queue)) for adapter, queue in self.queues.items() if adapter not in blocked
        ]
        return min(heads, key=_number_of, default=None)

    def __len__(self) -> int:
        return sum(map(len, self.queues.values()))

    def newest(self) -> E:
        return max((next(reversed(queue)) for queue in self.queues.values()), key=_number_of)

    def __iter__(self) -> Iterator[E]:
        """The requests in their order."""
        return heapq.merge(*self.queues.values(), key=_number_of)


class _Item(Generic[E]):
    """A flow in a heap; outdated if it has another start by now, or has ended."""

    __slots__ = ("flow", "start")

    def __init__(self, flow: _Flow[E]) -> None:
        self.flow = flow
        self.start = flow.start

    def __lt__(self, other: _Item[E]) -> bool:
        return (self.start, self.flow.number) < (other.start, other.flow.number)


class _Level(Generic[E]):
    """The requests of one priority."""

    __slots__ = ("adapters", "flows", "heap", "order")

    def __init__(self) -> None:
        self.adapters: Counter[str | None] = Counter()  # of the requests
        self.flows: dict[str, _Flow[E]] = {}
        self.heap: list[_Item[E]] = []
        self.order: OrderedDict[E, None] = OrderedDict()  # of arrival

    def schedule(self, flow: _Flow[E]) -> None:
        if len(self.heap) > 2 * len(self.flows) + _STALE_MAX:
            self.heap = [_Item(each) for each in self.flows.values()]
            heapq.heapify(self.heap)
        else:
            heapq.heappush(self.heap, _Item(flow))

    def is_current(self, item: _Item[E]) -> bool:
        return item.start == item.flow.start and self.flows.get(item.flow.tenant) is item.flow


class FairQueue(Generic[E]):
    """See the module. The caller limits how many requests wait."""

    def __init__(self, accounts: Accounts) -> None:
        self._accounts = accounts
        self._levels: dict[int, _Level[E]] = {}
        self._priorities: list[int] = []  # of levels with requests, ascending

    def __len__(self) -> int:
        return sum(len(level.order) for level in self._levels.values())

    def __bool__(self) -> bool:
        return bool(self._priorities)

    def __iter__(self) -> Iterator[E]:
        """All requests, by priority, then in the order of arrival."""
        for priority in reversed(self._priorities):
            yield from self._levels[priority].order

    def __contains__(self, entry: E) -> bool:
        level = self._levels.get(entry.priority)
        return level is not None and entry in level.order

    def push(self, entry: E) -> None:
        """Add a request. One that has waited before keeps its place in the order of arrival."""
        entry.number = entry.number or _next_number()
        level = self._levels.get(entry.priority)
        if level is None:
            level = self._levels[entry.priority] = _Level()
            insort(self._priorities, entry.priority)
        flow = level.flows.get(entry.tenant)
        if flow is None:
            start = self._accounts.start(entry.tenant, self._floor(entry.priority))
            flow = level.flows[entry.tenant] = _Flow(entry.tenant, start, entry.number)
            level.schedule(flow)
        _insert(flow.queues.setdefault(entry.adapter, OrderedDict()), entry)
        _insert(level.order, entry)
        level.adapters[entry.adapter] += 1

    def remove(self, entry: E) -> None:
        """Remove a request that is not served; its tenant is not charged."""
        level = self._levels.get(entry.priority)
        if level is None or entry not in level.order:
            return
        del level.order[entry]
        level.adapters[entry.adapter] -= 1
        if not level.adapters[entry.adapter]:
            del level.adapters[entry.adapter]
        flow = level.flows[entry.tenant]
        queue = flow.queues[entry.adapter]
        del queue[entry]
        if not queue:
            del flow.queues[entry.adapter]
        if not flow.queues:
            del level.flows[entry.tenant]
        if not level.order:
            del self._levels[entry.priority]
            self._priorities.remove(entry.priority)

    def head(self, blocked: Collection[str | None] = ()) -> tuple[E, int] | None:
        """The request that is next, and its start tag; None if there is none.

        ``blocked``: adapters (None: the model itself) whose requests cannot be served now.
        """
        for priority in reversed(self._priorities):
            found = self._head_of(self._levels[priority], blocked)
            if found is not None:
                return found
        return None

    def _head_of(self, level: _Level[E], blocked: Collection[str | None]) -> tuple[E, int] | None:
        if all(adapter in blocked for adapter in level.adapters):
            return None
        skipped = []
        found = None
        while level.heap and found is None:
            item = level.heap[0]
            flow = item.flow
            if not level.is_current(item):
                heapq.heappop(level.heap)
                continue
            # Other queues may have served the tenant meanwhile.
            start = self._accounts.start(flow.tenant, flow.start)
            if start > flow.start:
                flow.start = start
                heapq.heapreplace(level.heap, _Item(flow))
                continue
            entry = flow.first(blocked)
            if entry is None:
                skipped.append(heapq.heappop(level.heap))
            else:
                found = entry, start
        for item in skipped:
            heapq.heappush(level.heap, item)
        return found

    def take(self, entry: E) -> None:
        """Remove a request that is served, and charge its tenant."""
        level = self._levels[entry.priority]
        flow = level.flows[entry.tenant]
        flow.start = self._accounts.charge(entry.tenant, flow.start, entry.work)
        self.remove(entry)
        if level.flows.get(entry.tenant) is flow:
            level.schedule(flow)

    def refusable(self, priority: int, tenant: str) -> E | None:
        """The request to displace for a new one of this priority and tenant; None if there is none.

        The newest request of the lowest priority, if that is below the new one's. If it is equal,
        the newest request of the tenant with the most requests, if it has at least two more than
        this tenant.
        """
        if not self._priorities or self._priorities[0] > priority:
            return None
        level = self._levels[self._priorities[0]]
        if self._priorities[0] < priority:
            return next(reversed(level.order))
        own = level.flows.get(tenant)
        most = max(level.flows.values(), key=len)
        return most.newest() if len(most) > (0 if own is None else len(own)) + 1 else None

    def places(self) -> dict[E, int]:
        """The place of each request in the order in which they are served if no other one comes.

        From 1. Takes O(n log n).
        """
        places: dict[E, int] = {}
        for priority in reversed(self._priorities):
            tagged = [
                (start, flow.number, number, entry)
                for flow in self._levels[priority].flows.values()
                for number, (entry, start) in enumerate(self._tagged(flow))
            ]
            tagged.sort(key=lambda tag: tag[:3])
            for *_, entry in tagged:
                places[entry] = len(places) + 1
        return places

    def _tagged(self, flow: _Flow[E]) -> Iterator[tuple[E, int]]:
        start = flow.start
        for entry in flow:
            yield entry, start
            start += entry.work

    def _floor(self, priority: int) -> int:
        floor = self._accounts.floor(priority)
        level = self._levels[priority]
        while level.heap and not level.is_current(level.heap[0]):
            heapq.heappop(level.heap)
        return min(floor, level.heap[0].start) if level.heap else floor


def _number_of(entry: Entry) -> int:
    return entry.number


def _insert(queue: OrderedDict[E, None], entry: E) -> None:
    """Add a request to a queue in the order of arrival. O(1) if it is the newest."""
    queue[entry] = None
    others = islice(reversed(queue), 1, None)
    for newer in reversed(list(takewhile(lambda other: other.number > entry.number, others))):
        queue.move_to_end(newer)
