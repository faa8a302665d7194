"""Messages that have arrived for a ``receive`` and that none has taken yet.

What a broker was asked for may arrive after the ``receive`` that has asked was cancelled. The next
one gets it; if there is none within ``UNCLAIMED_S``, it is released, for other KubeAI replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Iterator

from kubeai.brokers.base import Delivery

UNCLAIMED_S = 1.0


class Inbox:
    """Bounded by what its owner asks the broker for."""

    def __init__(self) -> None:
        self._messages: list[Delivery] = []
        self._is_receiving = False
        self._timer: asyncio.TimerHandle | None = None
        self._releasing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._messages)

    def add(self, messages: Iterable[Delivery]) -> None:
        """Add messages that have arrived."""
        self._messages += messages
        self._watch()

    def take(self, count_max: int) -> list[Delivery]:
        """Remove and return the first messages."""
        taken, self._messages = self._messages[:count_max], self._messages[count_max:]
        return taken

    @contextlib.contextmanager
    def receiving(self) -> Iterator[None]:
        """Release nothing: somebody waits for messages."""
        self._is_receiving = True
        self._watch()
        try:
            yield
        finally:
            self._is_receiving = False
            self._watch()

    def _watch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._messages and not self._is_receiving and not self._is_closed:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(UNCLAIMED_S, self._release_all)

    def _release_all(self) -> None:
        for delivery in self.take(len(self)):
            task = asyncio.create_task(_release(delivery))
            self._releasing.add(task)
            task.add_done_callback(self._releasing.discard)

    async def close(self) -> None:
        """Release all messages."""
        self._is_closed = True
        self._watch()
        self._release_all()
        if self._releasing:
            await asyncio.wait(self._releasing)


async def _release(delivery: Delivery) -> None:
    with contextlib.suppress(Exception):  # then the broker redelivers it by itself
        await delivery.release()
