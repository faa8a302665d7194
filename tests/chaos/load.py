"""Publishes messages and reads the responses, whatever becomes of the broker; keeps the account.

A message may be published several times, because a publication that was not confirmed is repeated.
Each publication is a message of its own for the broker. All responses to one message have the same
``request_message_id``, so there are at most as many of these as publications.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
from chaos.site import NAMES, Ask, ask, problem

from kubeai.brokers.base import (
    REQUEST_MESSAGE_ID,
    Broker,
    BrokerUnavailable,
    Delivery,
    Subscription,
    Topic,
)

ID = "chaos_id"
PUBLISHERS = 16
RECEIVE_MAX_MESSAGES = 100
RECONNECT_PAUSE_S = 0.2
PROBLEMS_MAX_SHOWN = 10


class Sent(NamedTuple):
    """A request. ``asked`` knows its only right response."""

    asked: Ask
    first_s: float


class Account:
    """What was sent and what came back."""

    def __init__(self) -> None:
        self.sent: dict[int, Sent] = {}
        self.publications: Counter[int] = Counter()  # attempts, by message
        self.latencies_s: dict[int, float] = {}  # of the first response, by message
        self.duplicates = 0
        self.redelivered = 0  # the same response again, because the reader lost its connection
        self.problems: list[str] = []
        self._request_ids: dict[int, set[str]] = {}
        self._response_ids: set[str] = set()

    @property
    def missing(self) -> list[int]:
        """The messages without a response."""
        return [number for number in self.sent if number not in self.latencies_s]

    def note(self, delivery: Delivery) -> None:
        """Account for a response."""
        if delivery.id in self._response_ids:
            self.redelivered += 1
            return
        self._response_ids.add(delivery.id)
        try:
            response = msgspec.json.decode(delivery.body)
            number = response["metadata"][ID]
            sent = self.sent[number]
            status, body = response["status_code"], response["body"]
        except (msgspec.DecodeError, KeyError, TypeError) as error:
            self.problems.append(f"not a response to a message: {delivery.body!r:.200} ({error!r})")
            return
        if wrong := problem(sent.asked, status, body):
            self.problems.append(f"message {number}: {wrong}: {delivery.body!r:.200}")
        request_ids = self._request_ids.setdefault(number, set())
        request_ids.add(delivery.attributes.get(REQUEST_MESSAGE_ID, ""))
        if "" in request_ids or len(request_ids) > self.publications[number]:
            self.problems.append(
                f"message {number}: published {self.publications[number]} times, but its responses "
                f"have the request ids {sorted(request_ids)}"
            )
        if number in self.latencies_s:
            self.duplicates += 1
        else:
            self.latencies_s[number] = time.monotonic() - sent.first_s

    def rows(self) -> Iterator[tuple[str, Any]]:
        """The account for a table."""
        latencies_s = sorted(self.latencies_s.values()) or [float("nan")]
        yield "messages", len(self.sent)
        yield "publications, repeated ones included", self.publications.total()
        yield "messages without a response", len(self.missing)
        yield "wrong responses", len(self.problems)
        yield "duplicate responses", self.duplicates
        yield "responses read again by the reader", self.redelivered
        yield "latency p50, s", round(statistics.median(latencies_s), 3)
        yield "latency p99, s", round(latencies_s[int(0.99 * (len(latencies_s) - 1))], 3)
        yield "latency, the longest, s", round(latencies_s[-1], 3)


class Publisher:
    """Publishes each message until the broker has confirmed it."""

    def __init__(self, broker: Broker, account: Account) -> None:
        self._broker, self._account = broker, account
        self._topic: Topic | None = None
        self._opening = asyncio.Lock()

    async def run(self, count: int, per_s: float, source: random.Random) -> None:
        """Publish at this rate, or more slowly while the broker is away."""
        names = source.choices(list(NAMES), list(NAMES.values()), k=count)
        numbers = iter(enumerate(names))
        begin_s = time.monotonic()

        async def work() -> None:
            for number, name in numbers:
                await asyncio.sleep(begin_s + number / per_s - time.monotonic())
                await self._publish(number, name)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(PUBLISHERS):
                    group.create_task(work())
        finally:
            if self._topic is not None:
                await self._topic.close()

    async def _publish(self, number: int, name: str) -> None:
        asked = ask(name, f"message {number}")
        self._account.sent[number] = Sent(asked, time.monotonic())
        message = {"metadata": {ID: number}, "path": "/v1/chat/completions", "body": asked.body}
        encoded = msgspec.json.encode(message)
        while True:
            topic = await self._open()
            self._account.publications[number] += 1
            try:
                await topic.publish(encoded, {})
            except BrokerUnavailable:
                await self._drop(topic)
            else:
                return

    async def _open(self) -> Topic:
        async with self._opening:
            while self._topic is None:
                try:
                    self._topic = await self._broker.open_topic()
                except BrokerUnavailable:
                    await asyncio.sleep(RECONNECT_PAUSE_S)
            return self._topic

    async def _drop(self, topic: Topic) -> None:
        if self._topic is topic:
            self._topic = None
            await topic.close()


async def read(broker: Broker, account: Account, subscribed: asyncio.Event) -> None:
    """Read responses until cancelled. They are acknowledged after they are accounted for.

    ``subscribed``: set before the first one is read. Kafka delivers no earlier ones.
    """
    while True:
        try:
            subscription = await broker.subscribe()
        except BrokerUnavailable:
            await asyncio.sleep(RECONNECT_PAUSE_S)
            continue
        subscribed.set()
        try:
            await _read(subscription, account)
        except BrokerUnavailable:
            await asyncio.sleep(RECONNECT_PAUSE_S)
        finally:
            await subscription.close()


async def _read(subscription: Subscription, account: Account) -> None:
    while True:
        for delivery in await subscription.receive(RECEIVE_MAX_MESSAGES):
            account.note(delivery)
            await delivery.acknowledge()
