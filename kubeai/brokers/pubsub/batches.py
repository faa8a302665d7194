"""Calls that take many items, for callers that have one."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from kubeai.brokers.base import BrokerUnavailable

BATCH_MAX_COUNT = 1000  # of messages or acknowledgements in a call
BATCH_MAX_BYTES = 9_000_000  # of messages in a call; the limit is 10 MB with everything around them

T = TypeVar("T")


class Batches(Generic[T]):
    """Sends items in batches, one batch at a time. The next one fills while one is on the way."""

    def __init__(
        self,
        send: Callable[[list[T]], Awaitable[None]],
        count_max: int = BATCH_MAX_COUNT,
        size_of: Callable[[T], int] = lambda item: 0,
    ) -> None:
        self._send = send
        self._count_max = count_max
        self._size_of = size_of
        self._waiting: deque[tuple[T, asyncio.Future[None]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def add(self, item: T) -> None:
        """Send an item. Raises what its batch has raised."""
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, sent))
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        await sent

    async def wait(self) -> None:
        """Wait until nothing is on the way; after the connection has been closed."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while self._waiting:
            batch = self._next()
            try:
                await self._send([item for item, _ in batch])
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError):  # of a library; the callers wait
                    error = BrokerUnavailable("the broker's library has cancelled the call")
                for _, sent in batch:
                    if not sent.done():
                        sent.set_exception(error)
            else:
                for _, sent in batch:
                    if not sent.done():
                        sent.set_result(None)

    def _next(self) -> list[tuple[T, asyncio.Future[None]]]:
        batch = [self._waiting.popleft()]
        size = self._size_of(batch[0][0])
        while self._waiting and len(batch) < self._count_max:
            size += self._size_of(self._waiting[0][0])
            if size > BATCH_MAX_BYTES:
                break
            batch.append(self._waiting.popleft())
        return batch
