"""What Kafka's consumer and producer share: limits, errors, and how they are closed."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Iterable
from contextvars import ContextVar
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import InconsistentGroupProtocolError, KafkaConnectionError

from kubeai.brokers.base import BrokerUnavailable

REQUEST_TIMEOUT_S = 20.0  # longer than a rebalance, which waits for members that have vanished
CLOSE_TIMEOUT_S = 3.0  # of each step

# The last failure that the library has logged, in the tasks of one connection.
_logged: ContextVar[deque[str]] = ContextVar("_logged")


class _Failures(logging.Handler):
    """Collects what the library logs about every attempt, instead of writing it.

    It repeats attempts by itself. When it gives up, its exception often lacks the cause.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if (messages := _logged.get(None)) is not None:
            messages.append(record.getMessage())


_log = logging.getLogger("aiokafka")
_log.addHandler(_Failures(logging.WARNING))
_log.propagate = False


def collect_failures() -> None:
    """Let :func:`reason_of` know about this task, and the tasks that it creates from now on."""
    _logged.set(deque(maxlen=1))


def reason_of(error: BaseException | str) -> str:
    """An error for people, with the library's last failure if that says more."""
    if isinstance(error, InconsistentGroupProtocolError):
        return "the group has members that are not KubeAI's (they do not use sticky assignment)"
    reason = str(error) or type(error).__name__
    if isinstance(error, (str, KafkaConnectionError)) and (failures := _logged.get(None)):
        return f"{reason} ({failures[-1]})"
    return reason


async def attempt(step: Coroutine[Any, Any, None]) -> bool:
    """Do a step of closing; whether it has succeeded within CLOSE_TIMEOUT_S.

    It has a task of its own, because of what :func:`.is_library_cancellation` describes.
    """
    task = asyncio.create_task(step)
    try:
        await asyncio.wait({task}, timeout=CLOSE_TIMEOUT_S)
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task}, timeout=CLOSE_TIMEOUT_S)
    return task.done() and not task.cancelled() and task.exception() is None


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


def is_running(consumer: AIOKafkaConsumer) -> bool:
    """Whether the tasks of a started consumer run. It does not report that one has failed."""
    return not (
        consumer._fetcher.error_future.done() or consumer._coordinator._coordination_task.done()
    )


async def close_producer(producer: AIOKafkaProducer) -> None:
    """Close a producer without sending what is pending, for which `stop` would wait."""
    await _cancel([producer._sender.sender_task])  # ends after the requests that are on the way
    await attempt(producer.client.close())
    producer._closed = True


async def _cancel(tasks: Iterable[asyncio.Task[Any] | None]) -> None:
    left = {task for task in tasks if task is not None and not task.done()}
    for _ in range(2):  # a task that waits for others when it is cancelled is cancelled again
        for task in left:
            task.cancel()
        if left:
            _, left = await asyncio.wait(left, timeout=CLOSE_TIMEOUT_S)
