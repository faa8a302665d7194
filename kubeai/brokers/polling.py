"""Receives by polls, for brokers whose client loses or locks messages when a poll is cancelled.

A poll therefore outlives the ``receive`` that has begun it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from kubeai.brokers.base import BrokerUnavailable, Delivery
from kubeai.brokers.inbox import Inbox

Poll = Callable[[int], Awaitable[Sequence[Delivery]]]


class Poller:
    """At most one poll at a time. ``poll`` returns up to the given number of messages, or none."""

    def __init__(self, poll: Poll) -> None:
        self._poll = poll
        self._polling: asyncio.Task[None] | None = None
        self._inbox = Inbox()
        self._error: Exception | None = None
        self._is_closed = False

    async def receive(self, count_max: int) -> list[Delivery]:
        """Wait for 1 to ``count_max`` messages. Cancelling it loses none."""
        with self._inbox.receiving():
            while not self._inbox:
                if self._is_closed:
                    raise BrokerUnavailable("the subscription is closed")
                if self._error is not None:
                    raise self._error
                if self._polling is None:
                    self._polling = asyncio.create_task(self._run(count_max))
                await asyncio.wait({self._polling})
            return self._inbox.take(count_max)

    async def _run(self, count: int) -> None:
        try:
            self._inbox.add(await self._poll(count))
        except Exception as error:  # whatever it is, `receive` raises it
            self._error = error
        except asyncio.CancelledError:  # by the library, unless `close` has done it
            self._error = BrokerUnavailable("the broker's library has cancelled the receive")
        self._polling = None

    async def close(self) -> None:
        """Cancel the poll, and release the messages that nobody has received."""
        self._is_closed = True
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait({self._polling})
        await self._inbox.close()
