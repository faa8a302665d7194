"""Which conversation the next request belongs to, when the load is a rate of requests.

Used in real time by ``kubeai.loadtest.executor`` and in virtual time by ``cluster``.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class WaitingTurns(Generic[T]):
    """Conversations whose next turn waits for a request. Times in seconds, with any origin.

    ``begin`` starts a new conversation; None if there are no more.
    """

    def __init__(self, begin: Callable[[], T | None]) -> None:
        self._begin = begin
        self._heap: list[tuple[float, int, T]] = []
        self._order = itertools.count()

    def add(self, conversation: T, ready_s: float) -> None:
        """A conversation's next turn may be sent from this time on."""
        heapq.heappush(self._heap, (ready_s, next(self._order), conversation))

    def take(self, now_s: float) -> T | None:
        """The conversation that has been ready longest, else a new one, else None."""
        if self._heap and self._heap[0][0] <= now_s:
            return heapq.heappop(self._heap)[2]
        return self._begin()

    @property
    def next_s(self) -> float | None:
        """When the next conversation is ready; None if none waits."""
        return self._heap[0][0] if self._heap else None
