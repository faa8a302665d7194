"""A command that runs alongside a container's main process, and its streams."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import msgspec

from kubeai.local.kubelet.runtime.shim.main import EXEC_STREAMS

EXEC_OUTPUT_MAX_BYTES = 10 << 10  # of a probe's or a hook's command
EXEC_READ_MAX_BYTES = 32 << 10
EXEC_DRAIN_MAX_BYTES = 1 << 20  # read after a command's end, if its children still write


class ExecResult(msgspec.Struct, frozen=True):
    """The result of a command in the container.

    ``code`` is -1 if it could not be started or its container has ended; ``output`` is then the
    reason.
    """

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
        """Close the command's stdin."""
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

    def finish(self, code: int, why: str) -> None:
        """Set its result, unless it has one already."""
        if not self.ended.done():
            self.ended.set_result(ExecResult(code, why))

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


def open_pipes() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Pipes for stdin, stdout and stderr: the command's ends and ours."""
    made: list[int] = []
    try:
        for _ in range(EXEC_STREAMS):
            made += os.pipe()
    except OSError:
        for fd in made:
            os.close(fd)
        raise
    return (made[0], made[3], made[5]), (made[1], made[2], made[4])
