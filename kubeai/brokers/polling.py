"""Receives by polls, for brokers whose client loses or locks messages when a poll is cancelled.

A poll therefore outlives the ``receive`` that has begun it, and the next ``receive`` gets its
messages. If there is none within ``UNCLAIMED_S``, they are released.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from kubeai.brokers.base import BrokerUnavailable, Delivery

UNCLAIMED_S = 1.0

Poll = Callable[[int], Awaitable[Sequence[Delivery]]]


class Poller:
    """At most one poll at a time. ``poll`` returns up to the given number of messages, or none."""

    def __init__(self, poll: Poll) -> None:
        self._poll = poll
        self._polling: asyncio.Task[None] | None = None
        self._ready: list[Delivery] = []
        self._error: Exception | None = None
        self._is_receiving = False
        self._timer: asyncio.TimerHandle | None = None
        self._releasing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def receive(self, count_max: int) -> list[Delivery]:
        """Wait for 1 to ``count_max`` messages. Cancelling it loses none."""
        self._is_receiving = True
        try:
            while not self._ready:
                if self._is_closed:
                    raise BrokerUnavailable("the subscription is closed")
                if self._error is not None:
                    raise self._error
                if self._polling is None:
                    self._polling = asyncio.create_task(self._run(count_max))
                await asyncio.wait({self._polling})
            received, self._ready = self._ready[:count_max], self._ready[count_max:]
        finally:
            self._is_receiving = False
            self._watch()
        return received

    async def _run(self, count: int) -> None:
        try:
            self._ready = list(await self._poll(count))
        except Exception as error:  # whatever it is, `receive` raises it
            self._error = error
        except asyncio.CancelledError:  # by the library, unless `close` has done it
            self._error = BrokerUnavailable("the broker's library has cancelled the receive")
        self._polling = None
        self._watch()

    def _watch(self) -> None:
        """Release the messages that are ready, unless somebody receives them soon."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._ready and not self._is_receiving and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(UNCLAIMED_S, self._return)

    def _return(self) -> None:
        if self._is_receiving:
            return
        unclaimed, self._ready = self._ready, []
        for delivery in unclaimed:
            task = asyncio.create_task(_release(delivery))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def close(self) -> None:
        """Cancel the poll, and release the messages that nobody has received."""
        self._is_closed = True
        self._is_receiving = False
        self._watch()
        if self._polling is not None:
            self._polling.cancel()
            await asyncio.wait({self._polling})
        self._return()
        if self._releasing:
            await asyncio.wait(self._releasing)


async def _release(delivery: Delivery) -> None:
    with contextlib.suppress(BrokerUnavailable):
        await delivery.release()
