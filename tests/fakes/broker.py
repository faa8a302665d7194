"""A message broker in memory, with faults: at least once, like the real ones.

:class:`MemoryBroker` is the server and its queues. :meth:`MemoryBroker.client` is a
:class:`kubeai.brokers.base.Broker` for one of them. Time is the event loop's.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from typing_extensions import override

from kubeai.brokers.base import (
    Broker,
    BrokerUnavailable,
    Delivery,
    MessageTooLarge,
    Subscription,
    Topic,
)


@dataclass(eq=False)
class Stored:
    """A message in a queue."""

    id: str
    body: bytes
    attributes: dict[str, str]
    deliveries: int = 0
    owner: MemorySubscription | None = None  # that has it unacknowledged
    deadline: asyncio.TimerHandle | None = None

    def free(self) -> None:
        self.owner = None
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None


@dataclass
class Queue:
    """Messages that wait, and those that were delivered but not acknowledged."""

    waiting: deque[Stored] = field(default_factory=deque)
    unacknowledged: list[Stored] = field(default_factory=list)
    published: list[Stored] = field(default_factory=list)  # all of them ever
    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class MemoryBroker:
    """See the module.

    ``fault(operation)``: called at the start of subscribe, open_topic, receive, publish, confirm,
    acknowledge, acknowledged, release and extend; what it raises, the operation raises, and its
    connection ends. "confirm" comes after a message was stored, "acknowledged" after one was
    removed.
    """

    def __init__(
        self, *, ack_deadline_s: float | None = None, counts: bool = True, unique_ids: bool = True
    ) -> None:
        self.queues: dict[str, Queue] = {}
        self.ack_deadline_s = ack_deadline_s
        self.counts = counts
        self.unique_ids = unique_ids
        self.size_max_bytes = 1 << 20
        self.lag: int | None = None
        self.fault: Callable[[str], None] = lambda _: None
        self.connections: set[MemorySubscription | MemoryTopic] = set()
        self.received_max: list[int] = []  # the count_max of each receive
        self._ids = itertools.count()

    def queue(self, name: str) -> Queue:
        return self.queues.setdefault(name, Queue())

    def client(self, name: str) -> MemoryClient:
        return MemoryClient(self, name)

    def put(
        self, name: str, body: bytes, attributes: Mapping[str, str] | None = None, id: str = ""
    ) -> str:
        """Publish a message; returns its ID."""
        stored = Stored(id or f"{name}-{next(self._ids)}", body, dict(attributes or {}))
        queue = self.queue(name)
        queue.waiting.append(stored)
        queue.published.append(stored)
        queue.arrived.set()
        return stored.id

    def cut(self) -> None:
        """End all connections."""
        for connection in list(self.connections):
            connection.end()

    def give_back(self, name: str, stored: Stored) -> None:
        queue = self.queue(name)
        if stored in queue.unacknowledged:
            queue.unacknowledged.remove(stored)
            stored.free()
            queue.waiting.append(stored)
            queue.arrived.set()

    def is_empty(self, name: str) -> bool:
        """Whether every message was acknowledged."""
        queue = self.queue(name)
        return not queue.waiting and not queue.unacknowledged


class Connection:
    """What both kinds of connection share."""

    def __init__(self, broker: MemoryBroker, name: str) -> None:
        self.broker, self.name = broker, name
        self.closed = asyncio.Event()
        broker.connections.add(self)

    def check(self, operation: str) -> None:
        if self.closed.is_set():
            raise BrokerUnavailable("the connection has ended")
        try:
            self.broker.fault(operation)
        except BrokerUnavailable:
            self.end()
            raise

    def end(self) -> None:
        self.closed.set()
        self.broker.connections.discard(self)

    async def close(self) -> None:
        self.end()


class MemoryDelivery(Delivery):
    def __init__(self, subscription: MemorySubscription, stored: Stored) -> None:
        self._subscription, self._stored = subscription, stored
        self.id, self.body, self.attributes = stored.id, stored.body, stored.attributes
        self.id_is_unique = subscription.broker.unique_ids
        self.deliveries = stored.deliveries if subscription.broker.counts else 0

    @override
    async def acknowledge(self) -> None:
        await asyncio.sleep(0)
        subscription, stored = self._subscription, self._stored
        subscription.check("acknowledge")
        unacknowledged = subscription.queue.unacknowledged
        if stored in unacknowledged and stored.owner is subscription:
            unacknowledged.remove(stored)
            stored.free()
        subscription.check("acknowledged")

    @override
    async def release(self) -> None:
        self._subscription.check("release")
        if self._stored.owner is self._subscription:
            self._subscription.broker.give_back(self._subscription.name, self._stored)

    @override
    async def extend(self) -> None:
        self._subscription.check("extend")
        if self._stored.owner is self._subscription:
            self._subscription.start_deadline(self._stored)


class MemorySubscription(Connection, Subscription):
    def __init__(self, broker: MemoryBroker, name: str) -> None:
        super().__init__(broker, name)
        self.ack_deadline_s = broker.ack_deadline_s

    @property
    def queue(self) -> Queue:
        return self.broker.queue(self.name)

    @override
    async def receive(self, count_max: int) -> list[Delivery]:
        self.broker.received_max.append(count_max)
        self.check("receive")
        while not self.queue.waiting:
            self.queue.arrived.clear()
            waits = [asyncio.ensure_future(e.wait()) for e in (self.queue.arrived, self.closed)]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
            self.check("receive")
        taken = [
            self.queue.waiting.popleft() for _ in range(min(count_max, len(self.queue.waiting)))
        ]
        for stored in taken:
            stored.deliveries += 1
            stored.owner = self
            self.queue.unacknowledged.append(stored)
            self.start_deadline(stored)
        return [MemoryDelivery(self, stored) for stored in taken]

    def start_deadline(self, stored: Stored) -> None:
        if stored.deadline is not None:
            stored.deadline.cancel()
        if self.ack_deadline_s is not None:
            loop = asyncio.get_running_loop()
            stored.deadline = loop.call_later(
                self.ack_deadline_s, self.broker.give_back, self.name, stored
            )

    @override
    async def lag(self) -> int | None:
        self.check("lag")
        return self.broker.lag

    @override
    def end(self) -> None:
        super().end()
        for stored in [s for s in self.queue.unacknowledged if s.owner is self]:
            self.broker.give_back(self.name, stored)


class MemoryTopic(Connection, Topic):
    @override
    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        await asyncio.sleep(0)
        self.check("publish")
        if len(body) > self.broker.size_max_bytes:
            raise MessageTooLarge(f"at most {self.broker.size_max_bytes} bytes are allowed")
        self.broker.put(self.name, body, attributes)
        self.check("confirm")


class MemoryClient(Broker):
    """A client of one queue."""

    def __init__(self, broker: MemoryBroker, name: str) -> None:
        self._broker, self._name = broker, name

    @override
    async def subscribe(self) -> Subscription:
        self._broker.fault("subscribe")
        return MemorySubscription(self._broker, self._name)

    @override
    async def open_topic(self) -> Topic:
        self._broker.fault("open_topic")
        return MemoryTopic(self._broker, self._name)


def faults(*operations: str) -> Callable[[str], None]:
    """A fault for each of these operations, once, in this order."""
    left = list(operations)

    def fault(operation: str) -> None:
        if left and operation == left[0]:
            left.pop(0)
            raise BrokerUnavailable(f"{operation} failed")

    return fault
