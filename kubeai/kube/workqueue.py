"""A rate-limited work queue of names: many names in parallel, each name serially.

Promises: ``work(name)`` never runs concurrently for the same name; a name added while it is being
processed is processed once more; after an error the name backs off, with jitter, even if it is
added meanwhile. Used by the operator's controller and by the Job
controller of ``kubeai local``.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from kubeai.kube.backoff import Backoff
from kubeai.kube.errors import ApiError
from kubeai.logs import get_logger

log = get_logger(__name__)
# Jitter at most halves the first back-off: at most two attempts per second.
ERROR_BACKOFF_FIRST_S, ERROR_BACKOFF_MAX_S = 1.0, 30.0
DELAY_MIN_S = 0.001  # so that rounding errors cannot cause a busy loop


class Queue:
    """``work`` returns the seconds after which to process the name again, or None."""

    def __init__(self, work: Callable[[str], Awaitable[float | None]], parallel_max: int) -> None:
        self._work = work
        self._parallel_max = parallel_max
        self._waiting: deque[str] = deque()
        self._queued: set[str] = set()
        self._running: set[str] = set()
        self._dirty: set[str] = set()  # added while running
        self._backing_off: set[str] = set()  # in back-off after an error, until their timer fires
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._backoffs: dict[str, Backoff] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False

    def add(self, name: str) -> None:
        """Enqueue the name, unless it is queued or backing off.

        A name that is being processed is processed once more afterwards.
        """
        if self._stopped or name in self._queued or name in self._backing_off:
            return
        if name in self._running:
            self._dirty.add(name)
            return
        self._queued.add(name)
        self._waiting.append(name)
        if len(self._tasks) < self._parallel_max:
            task = asyncio.get_running_loop().create_task(self._drain())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def add_later(self, name: str, delay_s: float) -> None:
        """Enqueue the name after ``delay_s``, or earlier if it is added or due earlier."""
        loop = asyncio.get_running_loop()
        delay_s = max(delay_s, DELAY_MIN_S)
        timer = self._timers.get(name)
        if self._stopped or (timer is not None and timer.when() <= loop.time() + delay_s):
            return
        if timer is not None:
            timer.cancel()
        self._timers[name] = loop.call_later(delay_s, self._timer_fired, name)

    async def stop(self) -> None:
        """Start nothing more, and cancel running work."""
        self._stopped = True
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._waiting.clear()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _timer_fired(self, name: str) -> None:
        self._timers.pop(name, None)
        self._backing_off.discard(name)
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
            if name in self._dirty:
                self._dirty.discard(name)
                self.add(name)

    async def _once(self, name: str) -> None:
        try:
            delay_s = await self._work(name)
        except ApiError as error:
            self._back_off(name, error.retry_after_s or 0.0)
            log.info("reconcile failed", name=name, status=error.status, error=str(error))
        except Exception:
            self._back_off(name, 0.0)
            log.exception("reconcile failed", name=name)
        else:
            self._backoffs.pop(name, None)
            if delay_s is not None and delay_s > 0:
                self.add_later(name, delay_s)
            elif delay_s is not None:
                self._dirty.add(name)

    def _back_off(self, name: str, at_least_s: float) -> None:
        backoff = self._backoffs.setdefault(
            name, Backoff(ERROR_BACKOFF_FIRST_S, ERROR_BACKOFF_MAX_S)
        )
        self._dirty.discard(name)
        self._backing_off.add(name)
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()
        self.add_later(name, max(backoff.next_s(), min(at_least_s, ERROR_BACKOFF_MAX_S)))
