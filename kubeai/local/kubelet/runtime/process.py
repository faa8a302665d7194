"""Starts, signals and reaps container processes.

Owns the shim processes (shim.py), the sockets to each, and the streams of commands that run
alongside a container's main process (:class:`Command`). Promises: when a :class:`Process` has
``exited`` set, no process of it is left. If a shim is killed, its container's processes are found
and killed here, because the kubelet is a subreaper (:func:`become_subreaper`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import marshal
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from kubeai.local.kubelet.runtime import shim
from kubeai.logs import get_logger

log = get_logger(__name__)

LOG_FILE_MAX_BYTES = 10 << 20
START_TIMEOUT_S = 20.0
SHIM_KILL_TIMEOUT_S = 35.0  # a shim that has not ended its container by then is killed
ORPHAN_KILL_TIMEOUT_S = 5.0
HELPER_TIMEOUT_S = 10.0
EXEC_OUTPUT_MAX_BYTES = 10 << 10  # of a probe's or a hook's command
EXEC_READ_MAX_BYTES = 32 << 10
EXEC_DRAIN_MAX_BYTES = 1 << 20  # read after a command's end, if its children still write
_MESSAGE_MAX_BYTES = 1 << 20

# Children that are not orphans: shims and the programs started by run_helper.
_known: set[int] = set()
_reaping = False


class StartError(Exception):
    """A container's main process could not be started."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Mount(msgspec.Struct, frozen=True):
    """Mounts ``source`` of this machine at ``path`` in the container."""

    source: str
    path: str
    read_only: bool = False


class Launch(msgspec.Struct, frozen=True):
    """The specification of a container's main process."""

    argv: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    log: Path
    mounts: tuple[Mount, ...] = ()
    root: Path = Path("/nonexistent")  # where the private root is assembled; only with mounts
    log_max_bytes: int = LOG_FILE_MAX_BYTES
    namespace: str = "auto"  # see shim.realise_mounts


class Exit(msgspec.Struct, frozen=True):
    """How a main process ended."""

    code: int  # 128 + the signal's number if a signal ended it
    signal: int
    finished_s: float  # since the epoch
    message: str = ""


class ExecResult(msgspec.Struct, frozen=True):
    """The result of a command in the container; ``code`` is -1 if it could not be started."""

    code: int
    output: str


class Command:
    """A command alongside a container's main process, and its streams. Call ``close`` at the end.

    Only one task at a time may read a stream, and only one may write.
    """

    def __init__(self, kill: Callable[[], None], stdin: int, stdout: int, stderr: int) -> None:
        self.ended: asyncio.Future[ExecResult] = asyncio.get_running_loop().create_future()
        self.stdout, self.stderr = stdout, stderr  # for `read`
        self._kill = kill
        self._stdin = stdin
        self._drained_bytes = 0
        for fd in (stdin, stdout, stderr):
            os.set_blocking(fd, False)

    async def write(self, data: bytes) -> None:
        """Write input with backpressure; input after the command has closed stdin is dropped."""
        loop = asyncio.get_running_loop()
        while data and self._stdin >= 0:
            try:
                data = data[os.write(self._stdin, data) :]
            except BlockingIOError:
                await _until_ready(self._stdin, loop.add_writer, loop.remove_writer)
            except BrokenPipeError:
                self.end_input()

    def end_input(self) -> None:
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    async def read(self, stream: int) -> bytes:
        """The next output; empty at the end, or once the ended command's output is read."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                data = os.read(stream, EXEC_READ_MAX_BYTES)
            except BlockingIOError:
                if self.ended.done():
                    return b""  # its children may keep the stream open
                await _until_ready(stream, loop.add_reader, loop.remove_reader, self.ended)
                continue
            if self.ended.done():
                self._drained_bytes += len(data)
                if self._drained_bytes > EXEC_DRAIN_MAX_BYTES:
                    return b""
            return data

    async def result(self, timeout_s: float) -> ExecResult:
        """Wait for its result with the beginning of its output, without input.

        On TimeoutError it is killed.
        """
        output = bytearray()

        async def collect(stream: int) -> None:
            while data := await self.read(stream):
                output.extend(data[: EXEC_OUTPUT_MAX_BYTES - len(output)])

        try:
            self.end_input()
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(collect(self.stdout), collect(self.stderr))
                end = await asyncio.shield(self.ended)
        finally:
            self.close()
        return end if end.code == -1 else ExecResult(end.code, output.decode(errors="replace"))

    def close(self) -> None:
        """Kill it and its descendants if it is running. Call when no task reads or writes."""
        if self.stdout < 0:
            return
        if not self.ended.done():
            self._kill()
        self.end_input()
        os.close(self.stdout)
        os.close(self.stderr)
        self.stdout = self.stderr = -1


async def _until_ready(
    fd: int,
    watch: Callable[[int, Callable[[], None]], None],
    unwatch: Callable[[int], bool],
    or_else: asyncio.Future[Any] | None = None,
) -> None:
    ready = asyncio.Event()
    watch(fd, ready.set)

    def end(_: object) -> None:
        ready.set()

    if or_else is not None:
        or_else.add_done_callback(end)
    try:
        await ready.wait()
    finally:
        unwatch(fd)
        if or_else is not None:
            or_else.remove_done_callback(end)


def become_subreaper() -> None:
    """Inherit, and kill, the orphans of killed shims.

    Only for a process all of whose other children are known to this module.
    """
    global _reaping
    ctypes.CDLL(None).prctl(shim.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _reaping = True


class Process:
    """A container's main process and its descendants."""

    def __init__(
        self,
        shim_pid: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        handover: socket.socket,
    ) -> None:
        self.shim_pid = shim_pid
        self.pid = 0
        self.started_s = 0.0
        self.exited: asyncio.Future[Exit] = asyncio.get_running_loop().create_future()
        self._commands: dict[int, Command] = {}
        self._next_exec = 0
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writer = writer
        self._handover = handover
        self._reading = asyncio.create_task(self._read(reader), name=f"shim {shim_pid}")
        self._last_resort: asyncio.TimerHandle | None = None

    @classmethod
    async def start(cls, launch: Launch) -> Process:
        """Start; StartError if the program, its directory or a mount is not available."""
        launch.log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        handover, taking = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handover.setblocking(False)
        with theirs, taking:
            shim_pid = _spawn_shim(theirs.fileno(), taking.fileno(), launch.log)
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        process = cls(shim_pid, reader, writer, handover)
        process._send(
            (
                "start",
                {
                    "argv": list(launch.argv),
                    "env": launch.env,
                    "cwd": launch.cwd,
                    "log": str(launch.log),
                    "log_max_bytes": launch.log_max_bytes,
                    "mounts": [(m.source, m.path, m.read_only) for m in launch.mounts],
                    "root": str(launch.root),
                    "namespace": launch.namespace,
                },
            )
        )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.shield(process._started)
        except TimeoutError:
            process.kill()
            raise StartError("StartError", f"not started after {START_TIMEOUT_S:.0f} s") from None
        except StartError:
            await process.wait()
            raise
        except asyncio.CancelledError:
            process.kill()
            raise
        return process

    async def wait(self) -> Exit:
        """Wait until no process of it is left."""
        await asyncio.shield(self._reading)
        return self.exited.result()

    def signal(self, number: int) -> None:
        """Signal only the main process, like a container runtime."""
        self._send(("signal", int(number)))  # marshal does not support enums

    def kill(self) -> None:
        """SIGKILL the whole process tree."""
        if self.exited.done():
            return
        self._send(("kill",))
        if self._last_resort is None:
            loop = asyncio.get_running_loop()
            self._last_resort = loop.call_later(
                SHIM_KILL_TIMEOUT_S, shim.kill, self.shim_pid, signal.SIGKILL
            )

    def open(self, argv: list[str], env: dict[str, str]) -> Command:
        """Start a command alongside the main process, with the same mounts and working directory.

        If it cannot be started, it ends with code -1 and the reason as its output. OSError if this
        process has too many open files.
        """
        self._next_exec += 1
        id = self._next_exec
        theirs, ours = _pipes()
        command = Command(lambda: self._send(("exec-kill", id)), *ours)
        try:
            socket.send_fds(self._handover, [b"e"], theirs)
        except OSError as error:
            why = "the container has ended" if self.exited.done() else str(error)
            _end_command(command, -1, why)
            return command
        finally:
            for fd in theirs:
                os.close(fd)
        self._commands[id] = command
        command.ended.add_done_callback(lambda _: self._commands.pop(id, None))
        self._send(("exec", id, argv, env))
        return command

    def memory_bytes(self, processes: ProcessTable) -> int:
        """Resident memory of the tree: all private pages, plus the largest shared part."""
        own = shared = 0
        for pid in processes.below(self.shim_pid):
            pages = _resident_pages(pid)
            own += pages[0]
            shared = max(shared, pages[1])
        return (own + shared) * _PAGE_BYTES

    # -- the control socket ----------------------------------------------------------------------

    def _send(self, message: tuple[Any, ...]) -> None:
        if not self._writer.is_closing():
            data = marshal.dumps(message)
            self._writer.write(len(data).to_bytes(4, "big") + data)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        end: Exit | None = None
        try:
            while True:
                size = int.from_bytes(await reader.readexactly(4), "big")
                if size > _MESSAGE_MAX_BYTES:
                    break
                end = self._take(marshal.loads(await reader.readexactly(size))) or end
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writer.close()
            self._handover.close()
        await _wait_for_exit(self.shim_pid)
        if end is None:
            end = Exit(137, signal.SIGKILL, time.time(), "the container's guardian was killed")
            if _reaping:
                await kill_orphans()
        if self._last_resort is not None:
            self._last_resort.cancel()
        if not self._started.done():
            self._started.set_exception(StartError("StartError", end.message))
            self._started.exception()  # mark as retrieved: the waiter may be gone
        for command in list(self._commands.values()):
            _end_command(command, -1, "the container has ended")
        self.exited.set_result(end)

    def _take(self, message: tuple[Any, ...]) -> Exit | None:
        kind, *rest = message
        if kind == "started":
            self.pid, self.started_s = rest[0], time.time()
            self._started.set_result(None)
        elif kind == "failed":
            self._started.set_exception(StartError(rest[0], rest[1]))
            self._started.exception()
            return Exit(128, 0, time.time(), rest[1])
        elif kind == "exec":
            command = self._commands.get(rest[0])
            if command is not None:
                _end_command(command, _code(rest[1]), rest[2])
        elif kind == "exited":
            status, finished_ns, survivors = rest
            left = f"{survivors} processes could not be killed" if survivors else ""
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            return Exit(_code(status), number, finished_ns / 1e9, left)
        return None


def _pipes() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Pipes for stdin, stdout and stderr: the command's ends and ours."""
    made: list[int] = []
    try:
        for _ in range(shim.EXEC_STREAMS):
            made += os.pipe()
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    return (made[0], made[3], made[5]), (made[1], made[2], made[4])


def _end_command(command: Command, code: int, why: str) -> None:
    if not command.ended.done():
        command.ended.set_result(ExecResult(code, why))


def _code(status: int) -> int:
    if status == -1:
        return -1
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


# Compiling the script would be half of a shim's 40 ms start time, so the kubelet compiles it once
# and every shim reads the code from a memory file.
_BOOT = (
    "import marshal,os,sys;fd=int(sys.argv.pop(1));code=os.pread(fd,1<<20,0);os.close(fd);"
    "exec(marshal.loads(code))"
)


@functools.cache
def _compiled_shim() -> int:
    code = compile(Path(shim.__file__).read_bytes(), shim.__file__, "exec", dont_inherit=True)
    fd = os.memfd_create("kubeai-shim")
    os.write(fd, marshal.dumps(code))
    return fd


def _spawn_shim(control: int, handover: int, log: Path) -> int:
    code = _compiled_shim()
    name = f"{log.parent.parent.name}/{log.parent.name}"  # shown by ps
    popen = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _BOOT, str(code), str(control), str(handover), name],
        stdin=subprocess.DEVNULL,
        pass_fds=(code, control, handover),
        start_new_session=True,  # keep a terminal's Ctrl-C from the engines
        cwd="/",
    )
    popen.returncode = 0  # reaped by _wait_for_exit, not by Popen
    _known.add(popen.pid)
    return popen.pid


async def _wait_for_exit(pid: int) -> None:
    """Wait for a child process and reap it."""
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        _known.discard(pid)
        return
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    _reap(pid)
    _known.discard(pid)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


async def kill_orphans() -> None:
    """Kill the processes inherited from a dead shim, with their descendants."""
    give_up = time.monotonic() + ORPHAN_KILL_TIMEOUT_S
    while time.monotonic() < give_up:
        table = ProcessTable()
        orphans = [pid for pid in table.children(os.getpid()) if pid not in _known]
        if not orphans:
            return
        for pid in orphans:
            for descendant in (pid, *table.below(pid)):
                shim.kill(descendant, signal.SIGKILL)
        for pid in orphans:
            _reap(pid)
        await asyncio.sleep(0.005)
    log.error("failed to kill orphans", pids=orphans)


async def run_helper(argv: list[str], timeout_s: float = HELPER_TIMEOUT_S) -> tuple[int, str]:
    """Run a short program; its exit code (-1: could not be run, or timeout) and its output."""
    try:
        # Started on this thread, so that kill_orphans never sees it before it is known.
        popen = subprocess.Popen(  # noqa: ASYNC220
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
    except OSError:
        return -1, ""
    _known.add(popen.pid)
    try:
        output, _ = await asyncio.to_thread(popen.communicate, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return -1, ""
    finally:
        if popen.returncode is None:
            popen.kill()
            await asyncio.to_thread(popen.communicate)
        _known.discard(popen.pid)
    return popen.returncode, output.decode(errors="replace")


# -- /proc ---------------------------------------------------------------------------------------

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ProcessTable:
    """The process tree, from one scan of /proc."""

    def __init__(self) -> None:
        self._children: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                self._children.setdefault(shim.parent_of(int(entry)), []).append(int(entry))

    def children(self, pid: int) -> list[int]:
        return self._children.get(pid, [])

    def below(self, pid: int) -> list[int]:
        found: list[int] = []
        todo = [pid]
        while todo:
            children = self.children(todo.pop())
            found += children
            todo += children
        return found


def _resident_pages(pid: int) -> tuple[int, int]:
    """(private, shared) resident pages; zeros if the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_bytes().split()
        resident, shared = int(fields[1]), int(fields[2])
    except (OSError, IndexError, ValueError):
        return 0, 0
    return resident - shared, shared


def kill_leftovers(marker: str, spare: Callable[[int], bool] = lambda pid: False) -> int:
    """Kill all processes whose environment contains ``marker`` (``NAME=value``); returns the count.

    For processes left by an earlier kubelet of the same data directory that was killed together
    with a shim. Only sees environments that this user can read.
    """
    wanted = marker.encode()
    killed = 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid() or spare(int(entry)):
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0"):
            shim.kill(int(entry), signal.SIGKILL)
            killed += 1
    return killed
