"""Waits between retries."""

from __future__ import annotations

import random
from collections.abc import Callable

BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.1, 10.0


class Backoff:
    """Exponential back-off with jitter, so that many clients of one server spread out.

    The n-th wait is random between half and all of ``first_s × 2ⁿ``, at most ``max_s``.
    """

    def __init__(
        self,
        first_s: float = BACKOFF_FIRST_S,
        max_s: float = BACKOFF_MAX_S,
        rand: Callable[[], float] = random.random,
    ) -> None:
        self._first_s, self._max_s, self._random = first_s, max_s, rand
        self.failures = 0

    def reset(self) -> None:
        """Forget the failures, after a success."""
        self.failures = 0

    def next_s(self) -> float:
        """Count a failure and return the next wait in seconds."""
        wait_s = min(self._max_s, self._first_s * 2.0 ** min(self.failures, 32))
        self.failures += 1
        return wait_s * (0.5 + 0.5 * self._random())


class RestartBackoff:
    """When to restart a process that has exited: at once, then after a growing back-off.

    A process that ran for ``settled_s`` counts as the first one again.
    """

    def __init__(self, first_s: float, max_s: float, settled_s: float) -> None:
        self._backoff = Backoff(first_s, max_s)
        self._settled_s = settled_s

    def next_s(self, ran_s: float) -> float:
        """Return the wait in seconds. ``ran_s``: how long the process ran."""
        if ran_s >= self._settled_s:
            self._backoff.reset()
        at_once = self._backoff.failures == 0
        wait_s = self._backoff.next_s()
        return 0.0 if at_once else wait_s
