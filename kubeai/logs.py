"""Logging of every process of KubeAI: structured, on stderr, set up once at its start."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Any

from kubeai.errors import KubeAIError
from kubeai.imports import without

with without("rich"):  # or structlog imports it for tracebacks that are not asked of it, 90 ms
    import structlog

__all__ = ["Sparingly", "get_logger", "setup_logging"]

get_logger = structlog.get_logger


class Sparingly:
    """Which of many alike events are logged: ``burst_max`` at once, then ``per_s`` a second."""

    def __init__(self, burst_max: int, per_s: float) -> None:
        self._burst_max = burst_max
        self._per_s = per_s
        self._left = float(burst_max)
        self._at_s = 0.0
        self._left_out = 0

    def take(self, now_s: float) -> int | None:
        """None: count this one only. Else: log it, with how many were left out before it."""
        if self._left < 1 or now_s > self._at_s + 1:
            self._left = min(self._burst_max, self._left + (now_s - self._at_s) * self._per_s)
            self._at_s = now_s
            if self._left < 1:
                self._left_out += 1
                return None
        self._left -= 1
        left_out, self._left_out = self._left_out, 0
        return left_out


class _Lines(structlog.WriteLogger):
    """A line that cannot be written (a full disk, a reader that left) must not stop the work."""

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def setup_logging() -> None:
    """JSON lines on stderr, or coloured ones when a person looks; level from $LOG_LEVEL."""
    level = os.environ.get("LOG_LEVEL", "info").upper()
    number = logging.getLevelNamesMapping().get(level)
    if number is None:
        raise KubeAIError(f"LOG_LEVEL: {level!r} is not a level (debug, info, warning, error)")
    logging.basicConfig(level=max(number, logging.WARNING), stream=sys.stderr)
    renderer: Any = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        # One write a line, with PYTHONUNBUFFERED too: the workers share the pipe.
        logger_factory=lambda *_: _Lines(sys.stderr),
        cache_logger_on_first_use=True,
    )
