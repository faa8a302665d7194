"""Supervises one container: a small process between the kubelet and the container's main process.

Owns the container's processes (all descendants, including daemons, as their subreaper), its private
view of the file system, and its log. Promises: when the main process ends, the kubelet requests it,
or the kubelet exits (EOF on the control socket), every descendant is killed before this process
exits. If this process itself is SIGKILLed, the kernel kills the main process (PR_SET_PDEATHSIG),
and the kubelet inherits and kills the others.

Started by process.py with ``python -I -S`` and the descriptors of two sockets. Its start is part of
a model's cold start, so it imports little. Messages on the control socket are marshalled in both
directions (both ends are the same interpreter), each preceded by its length in 4 bytes, network
order. Before each "exec" the kubelet passes the command's stdin, stdout and stderr over the second
socket, so that command output does not go through this process:

to the shim     ("start", {argv, env, cwd, log, log_max_bytes, mounts, root, namespace})
                ("signal", number) · ("kill",) · ("exec", id, argv, env) · ("exec-kill", id)
from the shim   ("started", pid) | ("failed", reason, message), once
                ("exec", id, wait status or -1, why it was not started)
                ("exited", wait status, ns since the epoch, survivors), last
"""

from __future__ import annotations

import errno
import marshal
import os
import select
import signal
import socket
import sys
import time
from typing import Any

from kubeai.local.kubelet.runtime.shim.log import Log
from kubeai.local.kubelet.runtime.shim.mounts import MountError, mount_volumes
from kubeai.local.kubelet.runtime.shim.processes import (
    PR_SET_CHILD_SUBREAPER,
    descendants,
    kill,
    kill_all,
    kill_session,
    libc,
    spawn,
)

EXEC_STREAMS = 3
DRAIN_MAX_READS = 64  # per pipe, for data left after all its writers have exited


class Shim:
    """The event loop over the control socket, the pipes and SIGCHLD."""

    def __init__(self, control: int, handover: int) -> None:
        self._control = control
        self._handover = socket.socket(fileno=handover)
        self._handover.setblocking(False)
        self._received = b""
        self._main = 0
        self._exited: tuple[int, int] | None = None
        self._log: Log | None = None
        self._env: dict[str, str] = {}
        self._cwd = "/"
        self._streams: dict[int, bytes] = {}
        self._execs: dict[int, int] = {}  # a command's pid → the kubelet's id for it
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._wakeup = self._signals()

    def _signals(self) -> int:
        reader, writer = os.pipe()
        for fd in (reader, writer):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # only the kubelet decides
        self._poll.register(reader, select.POLLIN)
        return reader

    def run(self) -> None:
        """Serve the kubelet until the main process has ended, then kill all descendants."""
        while self._exited is None:
            for fd, _ in self._poll.poll():
                if fd == self._control:
                    self._receive()
                elif fd == self._wakeup:
                    _read(fd)
                    self._reap()
                elif fd in self._streams:
                    self._copy(fd)
        status, finished_ns = self._exited
        survivors = kill_all()
        self._drain()
        self._send(("exited", status, finished_ns, survivors))

    # -- the kubelet -----------------------------------------------------------------------------

    def _receive(self) -> None:
        data = _read(self._control)
        if not data:
            kill_all()
            self._drain()
            os._exit(0)
        self._received += data
        while len(self._received) >= 4:
            size = int.from_bytes(self._received[:4], "big")
            if len(self._received) < 4 + size:
                return
            message = marshal.loads(self._received[4 : 4 + size])
            self._received = self._received[4 + size :]
            self._handle(message)

    def _handle(self, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if kind == "start":
            self._start(rest[0])
        elif kind == "signal":
            if self._main and self._exited is None:
                kill(self._main, rest[0])
        elif kind == "kill":
            for pid in descendants(os.getpid()):
                kill(pid, signal.SIGKILL)
        elif kind == "exec":
            self._exec(*rest)
        elif kind == "exec-kill":
            for pid, id in self._execs.items():
                if id == rest[0]:
                    kill_session(pid)

    def _send(self, message: tuple[Any, ...]) -> None:
        data = marshal.dumps(message)
        data = len(data).to_bytes(4, "big") + data
        try:
            while data:
                data = data[os.write(self._control, data) :]
        except OSError:
            pass  # the kubelet is gone; the next read reports EOF

    def _start(self, spec: dict[str, Any]) -> None:
        try:
            self._log = Log(spec["log"], spec["log_max_bytes"])
            if spec["mounts"]:
                mount_volumes(spec["mounts"], spec["root"], spec["namespace"])
            self._env, self._cwd = spec["env"], spec["cwd"]
            out, err = os.pipe(), os.pipe()
            self._main = spawn(spec["argv"], self._env, self._cwd, self._null, out[1], err[1])
        except MountError as error:
            self._fail("MountError", str(error))
        except OSError as error:
            self._fail("StartError", f"{error.filename}: {error.strerror}")
        for (reader, writer), stream in ((out, b"stdout"), (err, b"stderr")):
            os.close(writer)
            self._streams[reader] = stream
            self._poll.register(reader, select.POLLIN)
        self._send(("started", self._main))

    def _fail(self, reason: str, message: str) -> None:
        self._send(("failed", reason, message))
        sys.exit(0)

    # -- children and their output ---------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid == self._main:
                self._exited = (status, time.time_ns())
            id = self._execs.pop(pid, None)
            if id is not None:
                self._send(("exec", id, status, ""))

    def _copy(self, fd: int) -> None:
        data = _read(fd)
        if data:
            assert self._log is not None
            self._log.write(self._streams[fd], data)
        else:
            self._poll.unregister(fd)
            os.close(fd)
            del self._streams[fd]

    def _exec(self, id: int, argv: list[str], env: dict[str, str]) -> None:
        """Run a command alongside the main process: of a probe, a hook or a user."""
        streams: list[int] = []
        try:
            _, streams, _, _ = socket.recv_fds(self._handover, 1, EXEC_STREAMS)
            for fd in streams:
                os.set_inheritable(fd, False)
            if len(streams) < EXEC_STREAMS:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), argv[0])
            pid = spawn(argv, env, self._cwd, *streams)
        except OSError as error:
            self._send(("exec", id, -1, f"{error.filename}: {error.strerror}"))
        else:
            self._execs[pid] = id
        finally:
            for fd in streams:
                os.close(fd)

    def _drain(self) -> None:
        if self._log is None:
            return
        for fd, stream in self._streams.items():
            os.set_blocking(fd, False)
            for _ in range(DRAIN_MAX_READS):
                data = _read(fd)
                if not data:
                    break
                self._log.write(stream, data)
        self._log.finish()


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:  # EAGAIN, or a reset, which is treated like EOF
        return b""


def main() -> None:
    """Run the shim of one container; the arguments are the descriptors of its two sockets."""
    control, handover = int(sys.argv[1]), int(sys.argv[2])
    for fd in (control, handover):
        os.set_inheritable(fd, False)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Shim(control, handover).run()
