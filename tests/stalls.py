"""When this process stood still, because the machine did or others had its CPU.

What a test notes then is late: an arrival that it reads after a stall may have come before it.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

TICK_S = 0.05
STALL_MIN_S = 0.2  # that a tick must be late


class Stalls:
    """The intervals in which the event loop did not run, in time.monotonic()'s seconds."""

    def __init__(self) -> None:
        self._found: list[tuple[float, float]] = []

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            due_s = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            if now_s - due_s > STALL_MIN_S:
                self._found.append((due_s - TICK_S, now_s))

    def within_s(self, begin_s: float, end_s: float) -> float:
        """How many seconds of an interval were stalls."""
        return sum(max(0.0, min(e, end_s) - max(b, begin_s)) for b, e in self._found)
