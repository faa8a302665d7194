"""The terminal of ``kubeai local``: log lines above, a live table of Models below.

The lines come from several processes (the main process and its workers), and a table at the bottom
must not be torn by them. So one process draws: :class:`Screen` forks it and replaces stderr, and
stdout if that is the same terminal, by a pipe to it. All processes started afterwards inherit the
pipe and, as it is no terminal, log JSON lines, which the drawing process turns into lines for
people. Text that is not JSON, such as a traceback of the interpreter, is shown as it is.

No line is lost. The pipe is the only buffer (``PIPE_BYTES``); when it is full, writers wait, as
they do for a slow terminal. The drawing process outlives the main process and ends when the last
writer has closed the pipe, so that workers which finish their requests still have a terminal. If it
is killed itself, a thread of the main process copies the pipe to the terminal from then on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import sys
import termios
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from setproctitle import setproctitle

from kubeai.logs import is_console
from kubeai.terminal.models import Shown, Summary, attention_first

PIPE_BYTES = 1 << 20
READ_MAX_BYTES = 64 << 10
LINE_MAX_BYTES = 256 << 10  # longer lines are shown in parts
TABLE_MAX_BYTES = 128 << 10
TABLE_MAX_MODELS = 100  # more do not fit on a terminal
MESSAGE_MAX_CHARS = 300
CLOSE_TIMEOUT_S = 5.0
RESIZE_CHECK_S = 0.5
SHOW_CURSOR = "\x1b[?25h"
# Ctrl-C and the signals that end a process group reach the drawing process too; it ends when the
# other processes have ended. SIGTTOU would stop it when the job is sent to the background.
_IGNORED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTTOU


@contextlib.contextmanager
def open_screen() -> Iterator[Screen | None]:
    """Take over the terminal while the block runs; None if stderr is not one or logs are JSON.

    Enter it before the first thread and before any event loop.
    """
    dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown")
    if dumb or not sys.stderr.isatty() or not is_console() or _is_in_background():
        yield None
        return
    screen = Screen()
    try:
        yield screen
    finally:
        screen.close()


class Screen:
    """See the module. Created by :func:`open_screen`."""

    def __init__(self) -> None:
        self._pipe, write_end = os.pipe()
        with contextlib.suppress(OSError):  # the limit for this user may be smaller
            fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _flush()
        self._terminal = os.dup(2)
        self._attributes = _attributes(self._terminal)
        self._replaced = [fd for fd in (1, 2) if fd == 2 or _same_terminal(1, 2)]
        self.pid = os.fork()
        if self.pid == 0:
            for fd in (write_end, ours.fileno()):
                os.close(fd)
            _draw_and_exit(self._pipe, theirs, self._terminal)
        theirs.close()
        ours.setblocking(False)
        self._socket = ours
        for fd in self._replaced:
            os.dup2(write_end, fd)
        os.close(write_end)
        self._sent = b""
        self._guard: threading.Thread | None = None

    def guard(self) -> None:
        """Start the thread that takes over if the drawing process ends before this one."""
        self._guard = threading.Thread(target=self._wait, name="terminal", daemon=True)
        self._guard.start()

    def _wait(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        with contextlib.suppress(OSError, termios.error):
            if self._attributes is not None:
                termios.tcsetattr(self._terminal, termios.TCSANOW, self._attributes)
            os.write(self._terminal, f"{SHOW_CURSOR}\r\n".encode())
            while piece := os.read(self._pipe, READ_MAX_BYTES):
                os.write(self._terminal, piece)

    def show(self, models: Sequence[Summary]) -> None:
        """Show these Models in the table; dropped if the terminal has not shown the last ones."""
        fit = len(models) <= TABLE_MAX_MODELS
        chosen = models if fit else attention_first(models)[:TABLE_MAX_MODELS]
        data = msgspec.json.encode(Shown([_short(model) for model in chosen], len(models)))
        if data != self._sent and len(data) <= TABLE_MAX_BYTES:
            with contextlib.suppress(OSError):  # its buffer is full, or the process has ended
                self._socket.send(data)
                self._sent = data

    def close(self) -> None:
        """Remove the table, give the terminal back, and wait until every line has been shown.

        Not longer than ``CLOSE_TIMEOUT_S``: another process may still have the pipe open.
        """
        _flush()
        for fd in self._replaced:
            os.dup2(self._terminal, fd)
        self._socket.close()
        if self._guard is not None:
            self._guard.join(CLOSE_TIMEOUT_S)
            return
        pidfd = os.pidfd_open(self.pid)
        select.select([pidfd], [], [], CLOSE_TIMEOUT_S)
        os.close(pidfd)


def _short(model: Summary) -> dict[str, Any]:
    """A Model with a message that is no longer than a line."""
    return {**model, "message": str(model.get("message") or "")[:MESSAGE_MAX_CHARS]}


def _is_in_background() -> bool:
    """Whether this process is a background job, which must not draw on the shell's terminal."""
    try:
        return os.tcgetpgrp(2) != os.getpgrp()
    except OSError:  # it is not the terminal that controls this process
        return False


def _attributes(terminal: int) -> list[Any] | None:
    try:
        return termios.tcgetattr(terminal)
    except termios.error:
        return None


def _same_terminal(one: int, other: int) -> bool:
    return os.isatty(one) and os.fstat(one).st_rdev == os.fstat(other).st_rdev


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


# -- the drawing process ---------------------------------------------------------------------------


def _draw_and_exit(pipe: int, tables: socket.socket, terminal: int) -> None:
    status = 1
    try:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        setproctitle(f"{sys.executable} -m kubeai: terminal")
        _draw(pipe, tables, terminal)
        status = 0
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(terminal, (SHOW_CURSOR + traceback.format_exc()).encode())
    os._exit(status)


def _draw(pipe: int, tables: socket.socket, terminal: int) -> None:
    """Show lines and tables until every writer has closed the pipe."""
    from kubeai.terminal.display import Display  # rich, which only this process needs

    display = Display(terminal)
    rest = b""
    waiting: list[int | socket.socket] = [pipe, tables]
    while True:
        ready, _, _ = select.select(waiting, [], [], RESIZE_CHECK_S)
        if tables in ready:
            data = tables.recv(TABLE_MAX_BYTES)
            display.show(msgspec.json.decode(data, type=Shown) if data else None)
            if not data:  # the main process has ended
                waiting.remove(tables)
        if pipe in ready:
            piece = os.read(pipe, READ_MAX_BYTES)
            *lines, rest = (rest + piece).split(b"\n")
            if rest and (not piece or len(rest) > LINE_MAX_BYTES):
                lines.append(rest)
                rest = b""
            display.print(lines)
            if not piece:
                display.show(None)
                return
        display.check_size()
