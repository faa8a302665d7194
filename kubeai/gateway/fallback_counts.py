"""Counts the requests of a worker that fall back, for the supervisor's metrics."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from kubeai.routing.channel import FallbackCount, FallbackReason, FallbackReport

INTERVAL_S = 1.0


class FallbackCounter:
    """See the module. ``send``: sends a report to the supervisor."""

    def __init__(self, send: Callable[[FallbackReport], None] = lambda _: None) -> None:
        self._send = send
        self._counts: Counter[tuple[str, str, FallbackReason]] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, model: str, fallback: str, reason: FallbackReason) -> None:
        """Count a request that leaves a Model. Sent within ``INTERVAL_S``."""
        self._counts[model, fallback, reason] += 1
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(INTERVAL_S, self.flush)

    def flush(self) -> None:
        """Send what has not been sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._counts:
            counts = (FallbackCount(*names, count) for names, count in self._counts.items())
            self._send(FallbackReport(tuple(counts)))
            self._counts.clear()
