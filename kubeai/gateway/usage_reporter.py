"""Reports what API keys use to the supervisor, at intervals and when the worker ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from kubeai.routing.usage import (
    USAGE_INTERVAL_MAX_S,
    USAGE_INTERVAL_S,
    USAGE_ROWS_PER_S,
    UsageReport,
)

if TYPE_CHECKING:
    from kubeai.gateway._metering import Meter


class UsageReporter:
    """Sends the counts of a worker's Meter. ``meter``: None if there are no keys."""

    def __init__(self, meter: Meter | None, send: Callable[[UsageReport], None]) -> None:
        self._meter = meter
        self._send = send
        self._timer: asyncio.TimerHandle | None = None

    def start(self, rows: int = 0) -> None:
        """Report at intervals from now on. ``rows``: of the last report."""
        if self._meter is not None:
            interval_s = max(USAGE_INTERVAL_S, min(rows / USAGE_ROWS_PER_S, USAGE_INTERVAL_MAX_S))
            self._timer = asyncio.get_running_loop().call_later(interval_s, self._tick)

    def close(self) -> None:
        """Send the last report. No request may end later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._report()

    def _tick(self) -> None:
        self.start(self._report())

    def _report(self) -> int:
        rows = () if self._meter is None else self._meter.take()
        if rows:
            self._send(UsageReport(rows))
        return len(rows)
