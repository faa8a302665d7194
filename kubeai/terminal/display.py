"""Draws log lines and, below them, a block of lines that stays at the bottom of the terminal."""

from __future__ import annotations

import contextlib
import math
import os
import select
import termios
from collections.abc import Callable, Sequence
from io import StringIO
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from kubeai.logs import colours_wanted, console_line, printable
from kubeai.terminal.models import Shown, models_table

TABLE_MAX_SHARE = 0.5  # of the terminal's rows
DEFAULT_SIZE = os.terminal_size((80, 24))
_HIDE_CURSOR, _SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
_ERASE_BELOW = "\r\x1b[J"
# Terminals that know it show everything between the two at once; others ignore it.
_BEGIN_UPDATE, _END_UPDATE = "\x1b[?2026h", "\x1b[?2026l"


class Display:
    """The block is erased before lines are printed, and drawn again below them."""

    def __init__(
        self,
        terminal: int,
        size: Callable[[int], os.terminal_size] = os.get_terminal_size,
    ) -> None:
        """``terminal``: its descriptor. ``size``: returns its columns and rows."""
        self._terminal = terminal
        self._get_size = size
        self._size = self._current_size()
        self._colours = colours_wanted()
        self._had_echo = set_echo(terminal, None)
        self._shown: Shown | None = None
        self._drawn: list[int] = []  # the widths of the block's rows on the terminal, in columns

    def print(self, lines: Sequence[bytes]) -> None:
        """Print the lines of a log above the block."""
        if lines:
            text = "".join(self._rendered(line) + "\n" for line in lines)
            self._write(self._erased() + text + self._block())

    def show(self, shown: Shown | None) -> None:
        """Replace the block by a table of these Models; None removes it."""
        if shown == self._shown:
            return
        # Keys that are typed, such as Enter, would move the block.
        set_echo(self._terminal, shown is None and self._had_echo)
        self._shown = shown
        self._write(self._erased() + self._block() + (_SHOW_CURSOR if shown is None else ""))

    def check_size(self) -> None:
        """Draw the block again if the terminal has been resized."""
        if self._current_size() != self._size:
            self._write(self._erased() + self._block())

    def _current_size(self) -> os.terminal_size:
        try:
            size = self._get_size(self._terminal)
        except OSError:
            return DEFAULT_SIZE
        # A pseudo-terminal may have no size.
        return size if size.columns and size.lines else DEFAULT_SIZE

    def _rendered(self, line: bytes) -> str:
        try:
            event = msgspec.json.decode(line)
        except msgspec.DecodeError:
            event = None
        if isinstance(event, dict) and "event" in event:
            return console_line(event, self._colours)
        if isinstance(event, dict) and "request_id" in event:
            return _access_line(event)
        text = line.decode(errors="replace").rstrip("\r")
        return "    ".join(printable(part) for part in text.split("\t"))

    def _erased(self) -> str:
        """Erase the block. If the terminal has become narrower, it has wrapped the block's rows."""
        self._size = self._current_size()
        if not self._drawn:
            return ""
        columns = self._size.columns
        above = sum(max(1, math.ceil(width / columns)) for width in self._drawn[:-1])
        self._drawn = []
        return (f"\x1b[{above}A" if above else "") + _ERASE_BELOW

    def _block(self) -> str:
        if self._shown is None or not self._shown.models:
            return ""
        height = max(2, int(self._size.lines * TABLE_MAX_SHARE))
        # A row as wide as the terminal would leave the cursor on the row below in some terminals.
        width = max(1, self._size.columns - 1)
        console = Console(
            file=StringIO(),
            width=width,
            height=height,
            force_terminal=True,
            color_system="standard" if self._colours else None,
            legacy_windows=False,
        )
        with console.capture() as captured:
            console.print(models_table(self._shown.models, height - 1, self._shown.count))
        rows = [row.rstrip() for row in captured.get().splitlines()][:height]
        self._drawn = [Text.from_ansi(row).cell_len for row in rows]
        # The cursor is at the margin: what is typed before echo is off does not wrap.
        return _HIDE_CURSOR + "\n".join(rows) + "\r"

    def _write(self, text: str) -> None:
        data = f"{_BEGIN_UPDATE}{text}{_END_UPDATE}".encode(errors="replace")
        with contextlib.suppress(OSError):  # the terminal is gone; keep the pipe empty
            while data:
                try:
                    data = data[os.write(self._terminal, data) :]
                except BlockingIOError:  # another program has made it non-blocking
                    select.select([], [self._terminal], [])


def set_echo(terminal: int, on: bool | None) -> bool:
    """Set whether a terminal shows what is typed; returns whether it did. None: leave it."""
    try:
        attributes = termios.tcgetattr(terminal)
        before = bool(attributes[3] & termios.ECHO)
        if on is not None and on != before and os.tcgetpgrp(terminal) == os.getpgrp():
            attributes[3] ^= termios.ECHO
            termios.tcsetattr(terminal, termios.TCSANOW, attributes)
    except (OSError, termios.error):  # no terminal, or not the one that controls this process
        return False
    return before


def _access_line(line: dict[str, Any]) -> str:
    """A line of the access log, shorter."""
    model = line.get("model") or "-"
    text = (
        f"{line.get('method')} {line.get('path')} {line.get('status')} "
        f"{line.get('duration_s', 0):.3f} s model={model} end={line.get('end')}"
    )
    return printable(text)
