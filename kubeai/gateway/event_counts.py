"""Counts events of a worker for the supervisor's metrics: requests that fall back, and denials."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from kubeai.routing.channel import CountedEvent, EventCount, EventReport

INTERVAL_S = 1.0


class EventCounter:
    """See the module. ``send``: sends a report to the supervisor."""

    def __init__(self, send: Callable[[EventReport], None] = lambda _: None) -> None:
        self.send = send
        self._counts: Counter[tuple[CountedEvent, tuple[str, ...]]] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, event: CountedEvent, *labels: str) -> None:
        """Count an event. Sent within ``INTERVAL_S``. ``labels``: those of the event's metric."""
        self._counts[event, labels] += 1
        if self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(INTERVAL_S, self.flush)

    def flush(self) -> None:
        """Send what has not been sent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._counts:
            counts = (EventCount(*event, count) for event, count in self._counts.items())
            self.send(EventReport(tuple(counts)))
            self._counts.clear()
