"""Counts the requests that a worker moves to fallbacks, for the supervisor's metrics."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from kubeai.routing.channel import Move, MoveReason
from kubeai.routing.channel import Moves as MovesMessage

INTERVAL_S = 1.0


class Moves:
    """Counts the requests that a worker moves, and sends the counts to the supervisor."""

    def __init__(self, send: Callable[[MovesMessage], None] = lambda _: None) -> None:
        self._send = send
        self._counts: Counter[tuple[str, str, MoveReason]] = Counter()
        self._timer: asyncio.TimerHandle | None = None

    def add(self, model: str, fallback: str, reason: MoveReason) -> None:
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
            moves = (Move(*names, count) for names, count in self._counts.items())
            self._send(MovesMessage(tuple(moves)))
            self._counts.clear()
