"""Real message brokers for tests: each is a process on 127.0.0.1 that ends with the test process.

The programs are in the folder that the environment variable BROKERS names, which
``tests/brokers/build.sh`` prints. Without it, the tests are skipped. All methods block: call them
from the main thread only, because the kernel ends a server with the thread that has started it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import pytest

from kubeai.processes import set_death_signal

START_TIMEOUT_S = 90.0  # RabbitMQ takes 10 s on an idle machine
STOP_TIMEOUT_S = 30.0
POLL_S = 0.05


def program(broker: str, path: str) -> Path:
    """A file that build.sh has installed for a broker; skips the test if there is none."""
    folder = os.environ.get("BROKERS", "")
    found = Path(folder) / broker / path
    if not folder or not found.exists():
        pytest.skip(f"needs BROKERS=$(tests/brokers/build.sh {broker})")
    return found


def free_port() -> int:
    """A port on which nothing listens, for a server that cannot choose one by itself.

    It is outside of the ephemeral range: nothing else takes it before the server binds it.
    """
    ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, ephemeral)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def accepts(port: int) -> bool:
    """Whether something accepts connections on the port."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class BrokerServer(ABC):
    """A broker's process. Its port and its data in ``folder`` outlive a restart.

    A subclass sets ``environment`` and ``port`` in its constructor.
    """

    environment: dict[str, str]  # what a client of the broker reads
    port: int

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def command(self) -> list[str]:
        """The command that runs the server in the foreground."""

    def process_environment(self) -> dict[str, str]:
        """The environment of the server's process."""
        return dict(os.environ)

    def ready(self) -> bool:
        """Whether the server serves clients."""
        return accepts(self.port)

    def start(self) -> None:
        """Start the server, and wait until it serves clients."""
        assert self._process is None, "the server runs already"
        self._process = self.spawn(self.command())
        self._until("it serves clients", self._serves, START_TIMEOUT_S)

    def spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Start a process that ends with this one, in a process group of its own."""
        with self._log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.process_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: set_death_signal(signal.SIGKILL),
            )

    def stop(self) -> None:
        """End the server in an orderly way. No effect if it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End the server by SIGKILL. No effect if it does not run."""
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        """Kill the server and start it again, on the same port and data."""
        self.kill()
        self.start()

    def suspend(self) -> None:
        """Stop the server's processes (SIGSTOP), like a network that loses every packet."""
        self._signal(signal.SIGSTOP)
        self._until("all threads have stopped", self._stopped, STOP_TIMEOUT_S)

    def resume(self) -> None:
        """Continue after ``suspend``."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None, "the server does not run"
        os.killpg(self._process.pid, number)

    def _stopped(self) -> bool:
        assert self._process is not None
        stats = Path(f"/proc/{self._process.pid}/task").glob("*/stat")
        try:
            return all(stat.read_text().rpartition(")")[2].split()[0] == "T" for stat in stats)
        except OSError:  # a thread has ended meanwhile
            return False

    def _serves(self) -> bool:
        assert self._process is not None
        if (status := self._process.poll()) is not None:
            raise AssertionError(f"the server has exited with {status}:\n{self.log_tail()}")
        return self.ready()

    def _end(self, number: int) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log_tail(self) -> str:
        """The last lines of the server's output."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])

    def _until(self, what: str, check: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not check():
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout_s} s: {what}\n{self.log_tail()}")
            time.sleep(POLL_S)


class QueueServer(BrokerServer):
    """A program of this folder, with queues, that keeps its messages in memory.

    ``kill`` and ``stop`` only close the port and the connections, because the service that it
    stands for loses no messages in an outage. ``end`` ends the process.
    """

    script: Path  # its arguments are the port and the queues

    def __init__(self, folder: Path, *queues: str) -> None:
        super().__init__(folder)
        self.port = free_port()
        self._queues = queues

    def command(self) -> list[str]:
        return [sys.executable, str(self.script), str(self.port), *self._queues]

    def start(self) -> None:
        """Start the process, or end the outage."""
        if self._process is None:
            super().start()
        else:
            self._signal(signal.SIGUSR2)
            self._until("it serves again", self._serves, START_TIMEOUT_S)

    def kill(self) -> None:
        """Begin an outage."""
        self._signal(signal.SIGUSR1)
        self._until("it serves nobody", lambda: not accepts(self.port), START_TIMEOUT_S)

    def stop(self) -> None:
        """Begin an outage."""
        self.kill()

    def end(self) -> None:
        """End the process. No effect if it does not run."""
        self._end(signal.SIGKILL)
