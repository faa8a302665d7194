"""What tests do with a broker's subscriptions and topics."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import TypeVar

import pytest

from kubeai.brokers.base import BrokerUnavailable, Delivery, Subscription, Topic
from kubeai.brokers.urls import open_broker

T = TypeVar("T")

CONFIG_PATH = "messaging.streams[0].requestsURL"
WAIT_S = 45.0  # for something that must happen; a busy machine is slow
AVAILABLE_S = 120.0  # for a broker that has been killed and started again


@contextlib.asynccontextmanager
async def subscribed(url: str, environment: Mapping[str, str]) -> AsyncIterator[Subscription]:
    """A subscription, closed at the end."""
    subscription = await open_broker(url, CONFIG_PATH, environment).subscribe()
    try:
        yield subscription
    finally:
        await subscription.close()


@contextlib.asynccontextmanager
async def topic_of(url: str, environment: Mapping[str, str]) -> AsyncIterator[Topic]:
    """A topic, closed at the end."""
    topic = await open_broker(url, CONFIG_PATH, environment).open_topic()
    try:
        yield topic
    finally:
        await topic.close()


async def until_available(operation: Callable[[], Awaitable[T]]) -> T:
    """Repeat an operation while the broker is unavailable, as the messenger does."""
    async with asyncio.timeout(AVAILABLE_S):
        while True:
            with contextlib.suppress(BrokerUnavailable):
                return await operation()
            await asyncio.sleep(0.1)


async def receive(subscription: Subscription, count: int) -> list[Delivery]:
    """Receive exactly ``count`` messages, in as many calls as that takes."""
    deliveries: list[Delivery] = []
    async with asyncio.timeout(WAIT_S):
        while len(deliveries) < count:
            got = await subscription.receive(count - len(deliveries))
            assert 1 <= len(got) <= count - len(deliveries)
            deliveries += got
    return deliveries


async def receive_one(subscription: Subscription) -> Delivery:
    return (await receive(subscription, 1))[0]


async def assert_nothing_arrives(subscription: Subscription, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            got = await subscription.receive(10)
            pytest.fail(f"received {[delivery.body[:80] for delivery in got]}")
