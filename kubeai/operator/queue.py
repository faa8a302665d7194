"""Work on names: one at a time for each name, several names at once, and not too often.

Owns who is worked on and when. Promises: ``work(name)`` never runs twice at the same time for one
name; a name added while it is worked on is worked on once more; after an error the name rests,
with back-off and jitter, whatever is added meanwhile. Used by the controller.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from kubeai.kube import ApiError, Backoff
from kubeai.logs import get_logger

log = get_logger(__name__)
# The shortest rest is half of it: at most two attempts a second.
REST_FIRST_S, REST_MAX_S = 1.0, 30.0
DELAY_MIN_S = 0.001  # a sliver left by rounding must not become a busy loop


class Queue:
    """``work`` returns after how many seconds it wants the name again, or None."""

    def __init__(self, work: Callable[[str], Awaitable[float | None]], parallel_max: int) -> None:
        self._work = work
        self._parallel_max = parallel_max
        self._waiting: deque[str] = deque()
        self._queued: set[str] = set()
        self._running: set[str] = set()
        self._again: set[str] = set()  # added while running
        self._resting: set[str] = set()  # after an error, until their timer rings
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._backoffs: dict[str, Backoff] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def add(self, name: str) -> None:
        """Work on the name soon."""
        if self._stopped or name in self._queued or name in self._resting:
            return
        if name in self._running:
            self._again.add(name)
            return
        self._queued.add(name)
        self._waiting.append(name)
        if len(self._tasks) < self._parallel_max:
            task = asyncio.get_running_loop().create_task(self._drain())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def add_later(self, name: str, delay_s: float) -> None:
        """Work on the name in ``delay_s``, or earlier when it is added or due earlier."""
        loop = asyncio.get_running_loop()
        delay_s = max(delay_s, DELAY_MIN_S)
        timer = self._timers.get(name)
        if self._stopped or (timer is not None and timer.when() <= loop.time() + delay_s):
            return
        if timer is not None:
            timer.cancel()
        self._timers[name] = loop.call_later(delay_s, self._ring, name)

    async def stop(self) -> None:
        """Begin nothing more, and cancel what is running."""
        self._stopped = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._waiting.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ring(self, name: str) -> None:
        self._timers.pop(name, None)
        self._resting.discard(name)
        self.add(name)

    async def _drain(self) -> None:
        while self._waiting:
            name = self._waiting.popleft()
            self._queued.discard(name)
            self._running.add(name)
            try:
                await self._once(name)
            finally:
                self._running.discard(name)
            if name in self._again:
                self._again.discard(name)
                self.add(name)

    async def _once(self, name: str) -> None:
        try:
            delay_s = await self._work(name)
        except ApiError as error:
            self._rest(name, error.retry_after_s or 0.0)
            log.info("attempt failed", name=name, status=error.status, error=str(error))
        except Exception:
            self._rest(name, 0.0)
            log.exception("attempt failed", name=name)
        else:
            self._backoffs.pop(name, None)
            if delay_s is not None and delay_s > 0:
                self.add_later(name, delay_s)
            elif delay_s is not None:
                self._again.add(name)

    def _rest(self, name: str, at_least_s: float) -> None:
        backoff = self._backoffs.setdefault(name, Backoff(REST_FIRST_S, REST_MAX_S))
        self._again.discard(name)
        self._resting.add(name)
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
        self.add_later(name, max(backoff.next_s(), min(at_least_s, REST_MAX_S)))
