"""Starts, signals and reaps container processes.

Owns the shim processes (shim/) and the sockets to each. Promises: when a :class:`Process` has
``exited`` set, no process of it is left. If a shim is killed, its container's processes are found
and killed, because the kubelet is a subreaper (see children.py).
"""

from __future__ import annotations

import asyncio
import functools
import marshal
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from kubeai.framing import FrameTooLong, frame, read_frame
from kubeai.local.kubelet.runtime import shim
from kubeai.local.kubelet.runtime.children import add_child, kill_orphans, wait_for_exit
from kubeai.local.kubelet.runtime.command import Command, open_pipes
from kubeai.local.kubelet.runtime.process_table import PAGE_BYTES, ProcessTable, resident_pages
from kubeai.local.kubelet.runtime.shim.processes import kill

LOG_FILE_MAX_BYTES = 10 << 20
START_TIMEOUT_S = 20.0
SHIM_KILL_TIMEOUT_S = 35.0  # a shim that has not ended its container by then is killed
_MESSAGE_MAX_BYTES = 1 << 20


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
    namespace: str = "auto"  # see shim/mounts.py


class Exit(msgspec.Struct, frozen=True):
    """How a main process ended."""

    code: int  # 128 + the signal's number if a signal ended it
    signal: int
    finished_s: float  # since the epoch
    message: str = ""


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
        self._handover = handover  # passes the pipes of commands to the shim
        self._reading = asyncio.create_task(self._read(reader), name=f"shim {shim_pid}")
        self._kill_timer: asyncio.TimerHandle | None = None

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
        if self._kill_timer is None:
            loop = asyncio.get_running_loop()
            self._kill_timer = loop.call_later(
                SHIM_KILL_TIMEOUT_S, kill, self.shim_pid, signal.SIGKILL
            )

    def open(self, argv: list[str], env: dict[str, str]) -> Command:
        """Start a command alongside the main process, with the same mounts and working directory.

        If it cannot be started, it ends with code -1 and the reason as its output. OSError if this
        process has too many open files.
        """
        self._next_exec += 1
        id = self._next_exec
        theirs, ours = open_pipes()
        command = Command(lambda: self._send(("exec-kill", id)), *ours)
        try:
            socket.send_fds(self._handover, [b"e"], theirs)
        except OSError as error:
            why = "the container has ended" if self.exited.done() else str(error)
            command.finish(-1, why)
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
            pages = resident_pages(pid)
            own += pages[0]
            shared = max(shared, pages[1])
        return (own + shared) * PAGE_BYTES

    # -- the control socket ----------------------------------------------------------------------

    def _send(self, message: tuple[Any, ...]) -> None:
        if not self._writer.is_closing():
            self._writer.write(frame(marshal.dumps(message)))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Handle the shim's messages until it has exited; then set ``exited``.

        A shim that was killed sends no "exited": its container's processes are killed here.
        """
        end: Exit | None = None
        try:
            while True:
                message = await read_frame(reader, _MESSAGE_MAX_BYTES)
                end = self._handle(marshal.loads(message)) or end
        except (FrameTooLong, asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writer.close()
            self._handover.close()
        await wait_for_exit(self.shim_pid)
        if end is None:
            end = Exit(137, signal.SIGKILL, time.time(), "the container's shim was killed")
            await kill_orphans()
        if self._kill_timer is not None:
            self._kill_timer.cancel()
        if not self._started.done():
            self._started.set_exception(StartError("StartError", end.message))
            self._started.exception()  # mark as retrieved: the waiter may be gone
        for command in list(self._commands.values()):
            command.finish(-1, "the container has ended")
        self.exited.set_result(end)

    def _handle(self, message: tuple[Any, ...]) -> Exit | None:
        """Handle a message, which shim/main.py lists; an Exit if the main process has ended."""
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
                command.finish(_code(rest[1]), rest[2])
        elif kind == "exited":
            status, finished_ns, survivors = rest
            left = f"{survivors} processes could not be killed" if survivors else ""
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            return Exit(_code(status), number, finished_ns / 1e9, left)
        return None


def _code(status: int) -> int:
    """The exit code for a wait status, or -1 for -1: not started."""
    if status == -1:
        return -1
    return 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


# Compiling the shim's modules would be half of its 40 ms start time, so the kubelet compiles them
# once and every shim reads the code from a memory file. Each is a module before the next is run, so
# that they can import each other by name, without the packages that contain them.
_SHIM_MODULES = ("processes", "log", "mounts", "main")
_BOOT = (
    "import marshal,os,sys;fd=int(sys.argv.pop(1));"
    "modules=marshal.loads(os.pread(fd,1<<20,0));os.close(fd);"
    "[exec(code,sys.modules.setdefault(name,type(sys)(name)).__dict__) for name,code in modules];"
    "sys.modules[modules[-1][0]].main()"
)


@functools.cache
def _compiled_shim() -> int:
    directory, modules = Path(shim.__path__[0]), []
    for name in _SHIM_MODULES:
        path = directory / f"{name}.py"
        code = compile(path.read_bytes(), str(path), "exec", dont_inherit=True)
        modules.append((f"{shim.__name__}.{name}", code))
    fd = os.memfd_create("kubeai-shim")
    os.write(fd, marshal.dumps(modules))
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
    popen.returncode = 0  # reaped by wait_for_exit, not by Popen
    add_child(popen.pid)
    return popen.pid
