"""Structured logging to stderr, set up once at the start of every KubeAI process."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Any

import structlog

from kubeai.errors import KubeAIError

__all__ = ["RateLimit", "get_logger", "setup_logging"]

get_logger = structlog.get_logger


class RateLimit:
    """A rate limit for a log event: a burst of ``burst_max``, then ``per_s`` per second."""

    def __init__(self, burst_max: int, per_s: float) -> None:
        self._burst_max = burst_max
        self._per_s = per_s
        self._left = float(burst_max)
        self._at_s = 0.0
        self._suppressed = 0

    def take(self, now_s: float) -> int | None:
        """How many events were suppressed before this one; None if this one is suppressed too."""
        if self._left < 1 or now_s > self._at_s + 1:
            self._left = min(self._burst_max, self._left + (now_s - self._at_s) * self._per_s)
            self._at_s = now_s
            if self._left < 1:
                self._suppressed += 1
                return None
        self._left -= 1
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed


class _Lines(structlog.WriteLogger):
    """Ignores write errors: a full disk or a closed pipe must not stop the process."""

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def setup_logging() -> None:
    """Log JSON lines to stderr, or coloured text to a terminal. $LOG_LEVEL sets the level."""
    level = os.environ.get("LOG_LEVEL", "info").upper()
    number = logging.getLevelNamesMapping().get(level)
    if number is None:
        raise KubeAIError(f"LOG_LEVEL: {level!r} is not a log level (debug, info, warning, error)")
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
        # One write per line, even with PYTHONUNBUFFERED, because the workers share the pipe.
        logger_factory=lambda *_: _Lines(sys.stderr),
        cache_logger_on_first_use=True,
    )
