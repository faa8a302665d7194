"""Reports what API keys use to the supervisor, each second and when the worker ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from kubeai.routing.usage import USAGE_INTERVAL_S, UsageReport

if TYPE_CHECKING:
    from kubeai.gateway._metering import Meter


class UsageReporter:
    """Sends the counts of a worker's Meter. ``meter``: None if there are no keys."""

    def __init__(self, meter: Meter | None, send: Callable[[UsageReport], None]) -> None:
        self._meter = meter
        self._send = send
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Report each USAGE_INTERVAL_S from now on."""
        if self._meter is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(USAGE_INTERVAL_S, self._tick)

    def close(self) -> None:
        """Send the last report. No request may end later."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._report()

    def _tick(self) -> None:
        self._report()
        self.start()

    def _report(self) -> None:
        rows = () if self._meter is None else self._meter.take()
        if rows:
            self._send(UsageReport(rows))
