"""A terminal: a process on a pseudo-terminal, and what a person would see there."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import termios

SEQUENCE = re.compile(r"\x1b\[(\??)([0-9;]*)([A-Za-z])")
READ_MAX_BYTES = 64 << 10


class Terminal:
    """Interprets the control sequences that KubeAI and rich use; fails on any other.

    Lines are kept unwrapped, so that they can be wrapped again when the width changes, as terminals
    do. The cursor is in a row of one of them. Its column is the width if the next character wraps.
    """

    def __init__(self, columns: int = 100) -> None:
        self._columns = columns
        self.lines = [""]
        self.cursor_shown = True
        self._line = self._row = self._column = 0
        self._rest = ""

    def resize(self, columns: int) -> None:
        self._row, self._column = divmod(self._row * self._columns + self._column, columns)
        self._columns = columns

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        while text:
            if text[0] == "\x1b":
                match = SEQUENCE.match(text)
                if match is None:
                    assert len(text) < 20, f"unknown sequence: {text[:20]!r}"
                    self._rest = text
                    return
                self._obey(*match.groups())
                text = text[match.end() :]
            else:
                run = text.partition("\x1b")[0]
                for char in run:
                    self._put(char)
                text = text[len(run) :]

    def seen(self) -> str:
        """The text, without trailing spaces."""
        return "\n".join(line.rstrip() for line in self.lines).rstrip("\n")

    def _put(self, char: str) -> None:
        if char == "\r":
            self._column = 0
        elif char == "\n":
            self._line += 1
            self._row = self._column = 0
            if self._line == len(self.lines):
                self.lines.append("")
        elif char == "\x07":
            pass
        else:
            assert char.isprintable() or char == "\t", repr(char)
            if self._column == self._columns:
                self._row, self._column = self._row + 1, 0
            at = self._row * self._columns + self._column
            line = self.lines[self._line].ljust(at)
            self.lines[self._line] = line[:at] + char + line[at + 1 :]
            self._column += 1

    def _obey(self, private: str, number: str, letter: str) -> None:
        if private:
            if number == "25":
                self.cursor_shown = letter == "h"
        elif letter == "H":
            self._line = self._row = self._column = 0
        elif letter == "A":
            for _ in range(int(number or 1)):
                self._up()
        elif letter in "JK":
            assert number in ("", "0", "2"), number
            start = 0 if number == "2" else self._row * self._columns + self._column
            self.lines[self._line] = self.lines[self._line][:start]
            if letter == "J":
                del self.lines[self._line + 1 :]
        else:
            assert letter == "m", (private, number, letter)

    def _up(self) -> None:
        if self._row:
            self._row -= 1
        elif self._line:
            self._line -= 1
            self._row = max(0, len(self.lines[self._line]) - 1) // self._columns


class PtyProcess:
    """A program on a pseudo-terminal of its own; ``terminal`` is what it shows."""

    def __init__(self, *command: str, columns: int = 100, rows: int = 30, **env: str) -> None:
        self.terminal = Terminal(columns)
        self.raw = b""
        self._command = command
        self._size = columns, rows
        # pytest-xdist sets COLUMNS, which rich believes.
        self._env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS")}
        self._env |= {"TERM": "xterm-256color"} | env

    async def __aenter__(self) -> PtyProcess:
        self._master, slave = pty.openpty()
        self.resize(*self._size)
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=self._env,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(slave)
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._master, self._read)
        return self

    async def __aexit__(self, *_: object) -> None:
        print(self.terminal.seen())  # pytest shows it with a failure
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        self._close()

    def _read(self) -> None:
        try:
            piece = os.read(self._master, READ_MAX_BYTES)
        except OSError:  # the last process has closed the terminal
            piece = b""
        if piece:
            self.raw += piece
            self.terminal.feed(piece.decode(errors="replace"))
        else:
            self._close()

    def _close(self) -> None:
        if not self._ended.is_set():
            asyncio.get_running_loop().remove_reader(self._master)
            os.close(self._master)
            self._ended.set()

    async def end(self, timeout_s: float = 20.0) -> int:
        """Wait until every process has closed the terminal; returns the exit status."""
        async with asyncio.timeout(timeout_s):
            await self._ended.wait()
            return await self.process.wait()

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def resize(self, columns: int, rows: int) -> None:
        self.terminal.resize(columns)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def sees(self, text: str) -> bool:
        return text in self.terminal.seen()
