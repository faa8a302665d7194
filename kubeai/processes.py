"""Start processes that run a module of this package: by exec, or by fork from a fork server.

Most of the CPU time of a process's start goes into imports. `kubeai local` therefore forks a
:class:`ForkServer` once it has imported its own modules, and lets it fork the embedded API, the
kubelet and the workers, which share its memory. The fork server has one thread, no event loop and
no state, so that a fork of it is as good as a new process.

A forked process becomes a child of the process that asked for it, not of the fork server: it is
orphaned on purpose, and adopted by its nearest subreaper (prctl(2)). Its exit status and its
parent's death reach it as if it had been started by exec, and the end of the fork server harms no
other process; from then on, processes are started by exec. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import gc
import importlib.util
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Sequence
from types import ModuleType
from typing import Any, NoReturn, Protocol

import msgspec
from setproctitle import setproctitle

from kubeai.logs import get_logger

log = get_logger(__name__)

Handlers = dict[signal.Signals, Any]  # of the parent, before it forked the server

SPAWN_TIMEOUT_S = 30.0  # includes the fork server's imports
REQUEST_MAX_BYTES = 256 << 10
FDS_MAX_COUNT = 16
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# The fork server ignores these, because it ends with its parent.
_IGNORED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


class Process(Protocol):
    """A child process; the part of `asyncio.subprocess.Process` that is used here."""

    pid: int

    @property
    def returncode(self) -> int | None:
        """The exit status, negative for a signal; None while the process runs."""

    async def wait(self) -> int:
        """Wait for the exit status."""

    def send_signal(self, signal: int) -> None:
        """Send a signal to the process, if it runs."""

    def kill(self) -> None:
        """Send SIGKILL to the process, if it runs."""


class Command(msgspec.Struct, frozen=True):
    """``python -m module arguments``, and what the process inherits."""

    module: str
    arguments: tuple[str, ...] = ()
    env: dict[str, str] | None = None  # None: this process's
    output: int | None = (
        None  # descriptor for stdout and stderr, with stdin closed; None: inherited
    )
    pass_fds: tuple[int, ...] = ()  # they keep their numbers; all others are closed
    new_session: bool = False


Spawn = Callable[[Command], Awaitable[Process]]  # OSError if the process cannot be started


async def spawn_by_exec(command: Command) -> Process:
    """Start a new interpreter."""
    return _ExecProcess(
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", command.module, *command.arguments),
            env=command.env,
            stdin=None if command.output is None else asyncio.subprocess.DEVNULL,
            stdout=command.output,
            stderr=command.output,
            pass_fds=command.pass_fds,
            start_new_session=command.new_session,
        )
    )


class _ExecProcess:
    """asyncio's process, whose methods raise ProcessLookupError once it has exited."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.pid = process.pid
        self._process = process

    @property
    def returncode(self) -> int | None:
        """See Process."""
        return self._process.returncode

    async def wait(self) -> int:
        """See Process."""
        return await self._process.wait()

    def send_signal(self, number: int) -> None:
        """See Process."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """See Process."""
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """A process that has imported modules, and forks processes that run them.

    Create it before the first thread and before any event loop.
    """

    def __init__(self, *modules: str) -> None:
        """Fork the server, which then imports ``modules``."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _flush()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _end_with(parent)
            serve_forks(theirs, modules)
        theirs.close()
        ours.setblocking(False)
        self._sock: socket.socket | None = ours
        self._turn = asyncio.Lock()

    def close(self) -> None:
        """End the server. The processes that it has started keep running."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    async def spawn(self, command: Command) -> Process:
        """Fork a process; if the server has ended, start a new interpreter."""
        async with self._turn:
            if self._sock is not None:
                try:
                    return await self._fork(self._sock, command)
                except (OSError, EOFError) as error:
                    log.error(
                        "the fork server has failed", error=str(error) or type(error).__name__
                    )
                    self.close()
        return await spawn_by_exec(command)

    async def _fork(self, sock: socket.socket, command: Command) -> Process:
        """Like :meth:`_ask`, but a cancellation waits for the reply, and kills the process."""
        asking = asyncio.ensure_future(self._ask(sock, command))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            (await asking).kill()
            raise

    async def _ask(self, sock: socket.socket, command: Command) -> Process:
        set_subreaper(True)
        try:
            send_command(sock, command)
            async with asyncio.timeout(SPAWN_TIMEOUT_S):
                reply = await asyncio.get_running_loop().sock_recv(sock, REQUEST_MAX_BYTES)
        finally:
            set_subreaper(False)
        if not reply:
            raise EOFError("it has exited")
        return Forked(msgspec.msgpack.decode(reply, type=int))


def send_command(sock: socket.socket, command: Command) -> None:
    """Ask a fork server for a process, whose ID it replies.

    The caller is a subreaper until then, so that the process becomes its child.
    """
    if command.env is None:
        command = msgspec.structs.replace(command, env=dict(os.environ))
    outputs = () if command.output is None else (command.output, command.output)
    data = msgspec.msgpack.encode(command)
    socket.send_fds(sock, [data], (*outputs, *command.pass_fds))


class Forked:
    """A child process that was not started by asyncio."""

    def __init__(self, pid: int) -> None:
        loop = asyncio.get_running_loop()
        self.pid = pid
        self.returncode: int | None = None
        self._fd = os.pidfd_open(pid)
        self._exited: asyncio.Future[int] = loop.create_future()
        loop.add_reader(self._fd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        self._exited.set_result(self.returncode)

    async def wait(self) -> int:
        """See Process."""
        return await asyncio.shield(self._exited)

    def send_signal(self, number: int) -> None:
        """See Process."""
        if self.returncode is None:
            signal.pidfd_send_signal(self._fd, number)

    def kill(self) -> None:
        """See Process."""
        self.send_signal(signal.SIGKILL)


def set_death_signal(number: int) -> None:
    """Have the kernel send this process a signal when its parent exits.

    Nothing is sent if the parent has already exited.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def set_subreaper(adopt: bool) -> None:
    """Whether orphaned descendants become children of this process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)


# -- the fork server -------------------------------------------------------------------------------


def serve_forks(sock: socket.socket, modules: Sequence[str]) -> NoReturn:
    """Fork a process for each request until the other end is closed."""
    try:
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _IGNORED}
        setproctitle(f"{sys.executable} -m kubeai: fork server")
        for module in modules:
            _import(module)
        gc.collect()
        gc.freeze()  # so that collections in the forked processes do not copy its pages
        while True:
            data, fds, _, _ = socket.recv_fds(sock, REQUEST_MAX_BYTES, FDS_MAX_COUNT)
            if not data:
                os._exit(0)
            command = msgspec.msgpack.decode(data, type=Command)
            sock.send(msgspec.msgpack.encode(_fork_orphan(command, fds, sock, handlers)))
            for fd in fds:
                os.close(fd)
    except BaseException:
        traceback.print_exc()
        _flush()
        os._exit(1)


def _fork_orphan(command: Command, fds: list[int], sock: socket.socket, handlers: Handlers) -> int:
    """Fork a process whose parent has exited by the time that it runs; returns its ID."""
    go_read, go_write = os.pipe()
    pid_read, pid_write = os.pipe()
    between = os.fork()
    if between == 0:
        pid = os.fork()
        if pid:
            os.write(pid_write, str(pid).encode())
            os._exit(0)
        os.close(go_write)
        os.read(go_read, 1)  # until it is closed
        sock.detach()  # so that it never closes a descriptor that has got its number
        _become(command, fds, handlers)
    os.waitpid(between, 0)  # now the process has been adopted
    os.close(pid_write)
    pid = int(os.read(pid_read, 32))
    for fd in (pid_read, go_read, go_write):
        os.close(fd)  # the end of the last one lets the process go on
    return pid


def _become(command: Command, fds: list[int], handlers: Handlers) -> NoReturn:
    """Turn this fork of the server into the requested process, and run it to its end."""
    status = 1
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if command.new_session:
            os.setsid()
        outputs = () if command.output is None else (1, 2)
        _place(fds, (*outputs, *command.pass_fds))
        if outputs:
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.close(null)
        os.environ.clear()
        os.environ.update(command.env or {})
        sys.argv = [command.module, *command.arguments]
        setproctitle(" ".join((sys.executable, "-m", *sys.argv)))
        status = _status_of(_import(command.module).main)
        threading._shutdown()  # type: ignore[attr-defined]  # as multiprocessing does
    except BaseException:
        traceback.print_exc()
    _flush()
    os._exit(status)


def _import(module: str) -> ModuleType:
    """Import what ``python -m module`` runs."""
    spec = importlib.util.find_spec(module)
    is_package = spec is not None and spec.submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if is_package else module)


def _status_of(main: Callable[[], int | None]) -> int:
    """Run a ``main``; returns the exit status that the interpreter would exit with."""
    try:
        code: object = main()
    except SystemExit as exit_:
        code = exit_.code
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1


def _place(fds: list[int], numbers: Sequence[int]) -> None:
    """Give descriptors their numbers; close all others except stdin, stdout and stderr."""
    free = max(numbers, default=2) + 1
    moved = [fcntl.fcntl(fd, fcntl.F_DUPFD, free) for fd in fds]
    for fd, number in zip(moved, numbers, strict=True):
        os.dup2(fd, number)
    after = 3
    for number in sorted(set(numbers)):
        if number >= after:
            os.closerange(after, number)
            after = number + 1
    os.closerange(after, os.sysconf("SC_OPEN_MAX"))


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent exits."""
    set_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
