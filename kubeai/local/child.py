"""Child processes of ``kubeai local``: started, awaited until ready, restarted, stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from kubeai.errors import KubeAIError
from kubeai.kube.backoff import RestartBackoff
from kubeai.logs import get_logger
from kubeai.processes import Command, Process, Spawn

log = get_logger(__name__)

CHILD_START_TIMEOUT_S = 30.0
CHILD_STOP_TIMEOUT_S = 15.0
CHILD_RESTART_FIRST_S, CHILD_RESTART_MAX_S = 0.2, 5.0
CHILD_SETTLED_S = 10.0  # a process that ran this long is restarted at once
LOG_TAIL_MAX_BYTES = 4096


class Child:
    """A child process: started, awaited until ready, restarted when it exits, stopped with us."""

    def __init__(
        self, name: str, command: Callable[[], list[str]], log_file: Path, spawn: Spawn
    ) -> None:
        """``command``: the module to run, and its arguments."""
        self.name = name
        self.port = 0
        self._command = command
        self._log_file = log_file
        self._spawn_process = spawn
        self._process: Process | None = None
        self._restarter: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the process; KubeAIError if it does not become ready in time."""
        await self._spawn()
        self._restarter = asyncio.create_task(self._restart(), name=f"restart {self.name}")

    async def _spawn(self) -> None:
        """Start the process and wait until it reports that it is ready."""
        reader, writer = os.pipe()
        try:
            with self._log_file.open("ab") as log_to:
                log_begin = log_to.tell()
                module, *arguments = self._command()
                self._process = await self._spawn_process(
                    Command(
                        module,
                        (*arguments, "--ready-fd", str(writer)),
                        output=log_to.fileno(),
                        pass_fds=(writer,),
                        new_session=True,  # Ctrl-C reaches only us: we stop the children in order
                    )
                )
        finally:
            os.close(writer)
        line = await _read_line(reader, CHILD_START_TIMEOUT_S)
        if not line.startswith("ready"):
            await self._terminate()
            why = _last_line(self._log_file, log_begin)
            raise KubeAIError(f"the {self.name} did not start: {why} (see {self._log_file})")
        words = line.split()
        self.port = int(words[1]) if len(words) > 1 else 0

    async def _restart(self) -> None:
        backoff = RestartBackoff(CHILD_RESTART_FIRST_S, CHILD_RESTART_MAX_S, CHILD_SETTLED_S)
        while True:
            assert self._process is not None
            began_s = time.monotonic()
            code = await self._process.wait()
            log.error("process exited, restarting it", process=self.name, exit_code=code)
            await asyncio.sleep(backoff.next_s(time.monotonic() - began_s))
            try:
                await self._spawn()
            except (KubeAIError, OSError) as error:
                log.error("failed to restart process", process=self.name, error=str(error))

    async def stop(self) -> None:
        """End the process: SIGTERM, then SIGKILL after ``CHILD_STOP_TIMEOUT_S``."""
        if self._restarter is not None:
            self._restarter.cancel()
            await asyncio.gather(self._restarter, return_exceptions=True)
        await self._terminate()

    async def _terminate(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(CHILD_STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _last_line(log_file: Path, begin: int) -> str:
    """Return the last non-empty line that a process logged since offset ``begin``."""
    with log_file.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(begin, end - LOG_TAIL_MAX_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")


async def _read_line(fd: int, timeout_s: float) -> str:
    """Read one line from a pipe; shorter at its end, empty at the deadline."""
    loop = asyncio.get_running_loop()
    stream = asyncio.StreamReader()
    pipe = os.fdopen(fd, "rb")
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stream), pipe)
    try:
        # Not wait_for: in Python 3.11 it may swallow a cancellation, and `stop` would hang.
        async with asyncio.timeout(timeout_s):
            return (await stream.readline()).decode()
    except TimeoutError:
        return ""
    finally:
        transport.close()
