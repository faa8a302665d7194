"""What Kafka's consumer and producer share: limits, errors, and how they are closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import InconsistentGroupProtocolError, KafkaError

from kubeai.brokers.base import TIMEOUT_S, BrokerUnavailable

REQUEST_TIMEOUT_S = 20.0  # longer than a rebalance, which waits for members that have vanished
CLOSE_TIMEOUT_S = 3.0  # of each step

# It logs every failed attempt. What does not succeed in the end is an error here.
logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def reason_of(error: BaseException, timeout_s: float = TIMEOUT_S) -> str:
    """An error for people. ``timeout_s``: the limit, if the error is that it has passed."""
    if isinstance(error, TimeoutError):
        return f"no answer within {timeout_s:g} s"
    if isinstance(error, InconsistentGroupProtocolError):
        return "the group has members that are not KubeAI's (they do not use sticky assignment)"
    return str(error) or type(error).__name__


async def attempt(step: Awaitable[Any]) -> bool:
    """Do a step of closing, and ignore its errors; whether it has ended within its time."""
    try:
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await step
    except TimeoutError:
        return False
    except (KafkaError, OSError):
        pass
    return True


async def check_topics(admin: AIOKafkaAdminClient, topics: Iterable[str]) -> None:
    """BrokerUnavailable if one does not exist. To ask for it by its name could create it."""
    missing = set(topics) - set(await admin.list_topics())
    if missing:
        names = ", ".join(sorted(missing))
        raise BrokerUnavailable(f"Kafka has no topic {names}, or it must not be described")


def milliseconds(seconds: float) -> int:
    """As the library takes durations."""
    return int(seconds * 1000)


# The library's `stop` waits for a broker that does not answer, and it has no public way to end its
# tasks.


async def close_consumer(consumer: AIOKafkaConsumer) -> None:
    """Leave the group and close a consumer."""
    if await attempt(consumer.stop()):
        return
    tasks: list[asyncio.Task[Any] | None] = []
    if coordinator := consumer._coordinator:
        tasks += coordinator._coordination_task, coordinator._heartbeat_task
        tasks.append(coordinator._commit_refresh_task)
    if fetcher := consumer._fetcher:
        tasks += fetcher._fetch_task, *fetcher._pending_tasks
    await _cancel(tasks)
    await attempt(consumer._client.close())


async def close_producer(producer: AIOKafkaProducer) -> None:
    """Close a producer without sending what is pending, for which `stop` would wait."""
    await _cancel([producer._sender.sender_task])  # ends after the requests that are on the way
    await attempt(producer.client.close())
    producer._closed = True


async def _cancel(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    left = {task for task in tasks if task is not None and not task.done()}
    while left:  # some of the library's tasks wait for others when they are cancelled
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=CLOSE_TIMEOUT_S)
