"""Processes of this package, forked from one that has imported their modules.

`kubeai local` starts them in the same way. By exec, each would import the modules again, which
takes most of the CPU time of a short test.
"""

from __future__ import annotations

import functools
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence

import msgspec

from kubeai import processes
from kubeai.processes import Command, Process, send_command, set_subreaper

MODULES = ("kubeai.gateway.worker", "kubeai.local.apiserver", "kubeai.local.kubelet")
START_TIMEOUT_S = 120.0  # of a machine that is busy with other things
# By exec, because this process may have threads. It ends when its socket is closed.
SERVER = """
import socket, sys
from kubeai.processes import serve_forks
serve_forks(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
"""


@functools.cache
def _server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        number = theirs.fileno()
        subprocess.Popen(
            [sys.executable, "-c", SERVER, str(number), *MODULES],
            pass_fds=(number,),
            stdin=subprocess.DEVNULL,
        )
    ours.settimeout(START_TIMEOUT_S)
    return ours


def _fork(command: Command) -> int:
    """Fork a process, which becomes a child of this one; returns its ID."""
    server = _server()
    set_subreaper(True)
    try:
        send_command(server, command)
        reply = server.recv(64)
    finally:
        set_subreaper(False)
    assert reply, "the fork server has ended"
    return msgspec.msgpack.decode(reply, type=int)


async def spawn(command: Command) -> Process:
    """A `kubeai.processes.Spawn`."""
    return processes.Forked(_fork(command))


class Forked:
    """A forked process, with what is used here of `subprocess.Popen`."""

    def __init__(
        self, command: Sequence[str], pass_fds: tuple[int, ...] = (), output: int | None = None
    ) -> None:
        """``command``: ``python -m module arguments``. ``output``: for stdout and stderr."""
        module, *arguments = command[2:]
        self.pid = _fork(Command(module, tuple(arguments), output=output, pass_fds=pass_fds))
        self.returncode: int | None = None
        self._fd = os.pidfd_open(self.pid)

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._fd], [], [], 0)[0]:
            self._reap()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._fd], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self._reap()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._fd, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _reap(self) -> None:
        _, status = os.waitpid(self.pid, 0)
        os.close(self._fd)
        self.returncode = os.waitstatus_to_exitcode(status)


def popen(
    command: Sequence[str], pass_fds: tuple[int, ...] = (), output: int | None = None
) -> subprocess.Popen[bytes] | Forked:
    """Start a command, by fork if the fork server has its module."""
    if tuple(command[:2]) == (sys.executable, "-m") and command[2] in MODULES:
        return Forked(command, pass_fds, output)
    return subprocess.Popen(command, stdout=output, stderr=output, pass_fds=pass_fds)
