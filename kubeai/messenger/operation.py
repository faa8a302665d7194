"""Calls of a broker's client library: each has a time limit, and ends in a result or an error."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TypeVar

from kubeai.brokers.base import (
    TIMEOUT_S,
    BrokerUnavailable,
    Subscription,
    Topic,
    is_library_cancellation,
)

# Brokers limit each operation to TIMEOUT_S themselves; this is for an implementation that hangs.
OPERATION_MAX_S = 2 * TIMEOUT_S
T = TypeVar("T")


async def operate(operation: Awaitable[T], timeout_s: float | None = OPERATION_MAX_S) -> T:
    """Await an operation of a broker. TimeoutError after ``timeout_s``; None: no limit.

    A CancelledError that the library raises by itself becomes BrokerUnavailable.
    """
    try:
        async with asyncio.timeout(timeout_s):
            return await operation
    except asyncio.CancelledError as error:
        if not is_library_cancellation(error):
            raise
        raise BrokerUnavailable("the client library cancelled the operation") from None


async def close_quietly(connection: Topic | Subscription) -> None:
    """Close a connection, and wait for at most OPERATION_MAX_S."""
    with contextlib.suppress(Exception):
        await operate(connection.close())
