"""Structured logging to stderr, set up once at the start of every KubeAI process.

Two formats: JSON lines, and on a terminal lines for people (``console``). Names of events and
fields are the same in both. A field ``message`` is a sentence for people.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from kubeai.errors import KubeAIError


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """Make imports of a module that is not loaded yet fail, as if it were not installed."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


# structlog imports rich for tracebacks that are not used here: 65 of the 90 ms that it takes.
with _hidden("rich"):
    import structlog

__all__ = [
    "FORMATS",
    "FORMAT_VARIABLE",
    "colours_wanted",
    "console_line",
    "get_logger",
    "is_console",
    "printable",
    "setup_logging",
]

get_logger = structlog.get_logger

FORMAT_VARIABLE = "KUBEAI_LOG_FORMAT"
FORMATS = ("auto", "console", "json")
_STYLES = {"warning": "33", "error": "31", "critical": "31", "debug": "2"}  # ECMA-48's SGR codes
_BOLD, _FAINT = "1", "2"
# Events of which each field gets a line of its own, because people copy from them.
_BLOCKS = {"serving", "engines found", "first request"}
_KNOWN = {"timestamp", "level", "event", "message", "exception"}


class _Lines(structlog.WriteLogger):
    """Ignores write errors: a full disk or a closed pipe must not stop the process."""

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def is_console() -> bool:
    """Whether logs are lines for people: $KUBEAI_LOG_FORMAT, by default if stderr is a terminal.

    KubeAIError for an unknown format.
    """
    chosen = os.environ.get(FORMAT_VARIABLE) or "auto"
    if chosen not in FORMATS:
        raise KubeAIError(
            f"{FORMAT_VARIABLE}: {chosen!r} is not a log format ({', '.join(FORMATS)})"
        )
    return chosen == "console" or (chosen == "auto" and sys.stderr.isatty())


def colours_wanted() -> bool:
    """Whether text on a terminal may have colours: see no-color.org, and $TERM."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def setup_logging() -> None:
    """Log to stderr in the format of :func:`is_console`. $LOG_LEVEL sets the level."""
    level = os.environ.get("LOG_LEVEL", "info").upper()
    number = logging.getLevelNamesMapping().get(level)
    if number is None:
        raise KubeAIError(f"LOG_LEVEL: {level!r} is not a log level (debug, info, warning, error)")
    logging.basicConfig(level=max(number, logging.WARNING), stream=sys.stderr)
    colours = colours_wanted() and sys.stderr.isatty()
    renderer: Any = (
        (lambda _, __, event: console_line(event, colours))
        if is_console()
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


def console_line(event: dict[str, Any], colours: bool) -> str:
    """A log event as a line for people, or several, without a line feed at the end.

    Control characters are escaped: names and messages come from manifests and from engines.
    """

    def styled(text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colours and code and text else text

    level = str(event.get("level", "info"))
    name = printable(str(event.get("event", "")))
    parts = [styled(_clock_time(event.get("timestamp")), _FAINT)]
    if level != "info":
        parts.append(styled(level, _STYLES.get(level, "")))
    message = printable(str(event.get("message", "")))
    parts.append(styled(name, _BOLD) + (f": {message}" if message else ""))
    fields = {
        key: _value(value)
        for key, value in event.items()
        if key not in _KNOWN and value is not None
    }
    if name in _BLOCKS:
        lines = [" ".join(parts)]
        lines += [f"  {key.replace('_', ' '):16}{value}" for key, value in fields.items() if value]
    else:
        parts += [styled(_field(key, value), _FAINT) for key, value in fields.items()]
        lines = [" ".join(part for part in parts if part)]
    exception = str(event.get("exception", ""))
    lines += [f"  {printable(line)}" for line in exception.splitlines()]
    return "\n".join(lines)


def printable(text: str) -> str:
    """The text with its control characters escaped, so that a terminal does not obey them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _clock_time(timestamp: object) -> str:
    try:
        return f"{datetime.fromisoformat(str(timestamp)).astimezone():%H:%M:%S}"
    except ValueError:
        return ""


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return printable(str(value))


def _field(key: str, value: str) -> str:
    return f'{key}="{value}"' if " " in value else f"{key}={value}"
