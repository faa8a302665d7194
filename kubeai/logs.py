"""Logging of every process of KubeAI: structured, on stderr, set up once at its start."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import structlog

from kubeai.errors import KubeAIError


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
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
