"""Calls of a broker's client library: each has a time limit, and ends in a result or an error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TypeVar

from kubeai.brokers.base import TIMEOUT_S, BrokerUnavailable, Subscription, Topic

# Brokers limit each operation to TIMEOUT_S themselves; this is for an implementation that hangs.
OPERATION_MAX_S = 2 * TIMEOUT_S
T = TypeVar("T")


async def operate(operation: Awaitable[T], timeout_s: float | None = OPERATION_MAX_S) -> T:
    """Await an operation of a broker. TimeoutError after ``timeout_s``; None: no limit.

    A library may raise CancelledError by itself, for example because it waits for a task that it
    has cancelled. Passed on, that would end the caller's task without a trace. It is a
    BrokerUnavailable unless the caller's task is being cancelled.
    """
    task = asyncio.current_task()
    assert task is not None, "called in a task"
    try:
        async with asyncio.timeout(timeout_s):
            return await operation
    except asyncio.CancelledError:
        if task.cancelling():
            raise
        raise BrokerUnavailable("the client library cancelled the operation") from None


async def close_quietly(connection: Topic | Subscription) -> None:
    """Close a connection, and wait for at most OPERATION_MAX_S."""
    with contextlib.suppress(Exception):
        await operate(connection.close())
