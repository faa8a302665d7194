"""The supervisor's handle of one worker process: starts it, restarts it, talks to it, and kills
it if it hangs.

The messenger is such a process too, without a listener.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kubeai.api.config.system import GatewayConfig, Messaging
from kubeai.kube.backoff import RestartBackoff
from kubeai.logs import get_logger
from kubeai.processes import Command, Process, Spawn
from kubeai.routing.channel import (
    STACK_SIGNAL,
    Channel,
    Demand,
    Down,
    EventReport,
    Ready,
    Streams,
    Up,
    WorkerSettings,
)
from kubeai.routing.usage import UsageReport
from kubeai.supervisor.memory import Memory

log = get_logger(__name__)

RESPAWN_BACKOFF_FIRST_S, RESPAWN_BACKOFF_MAX_S = 0.2, 5.0
CHANNEL_END_TIMEOUT_S = 1.0
RESPAWN_SETTLED_S = 10.0  # a worker that ran this long is restarted at once
START_MAX_S = 300.0  # until a process sends its first message, which does not wait for routes
# A process that sends nothing for this long hangs. It sends a Heartbeat each second.
SILENCE_MAX_S = 30.0

WORKER = "kubeai.gateway.worker"
MESSENGER = "kubeai.messenger"


class Program(NamedTuple):
    """What a process runs. ``console_path``, ``messaging``: see :class:`WorkerSettings`."""

    gateway: GatewayConfig
    module: str = WORKER
    console_path: str = ""
    messaging: Messaging | None = None


class Reports(NamedTuple):
    """The functions that are called with what a process reports.

    ``ready``: it accepts requests. ``demand``: it holds a request for the model of this name.
    ``streams``: the messenger's report. ``events``: counts of events. ``usage``: what API keys use.
    ``end``: it has ended.
    """

    ready: Callable[[], None]
    demand: Callable[[str], None]
    streams: Callable[[Streams], None] = lambda _: None
    events: Callable[[EventReport], None] = lambda _: None
    usage: Callable[[UsageReport], None] = lambda _: None
    end: Callable[[], None] = lambda: None


class WorkerProcess:
    """One column of the shared memory, one listener, and the process that currently uses them."""

    def __init__(
        self,
        column: int,
        listener: socket.socket | None,
        memory: Memory,
        program: Program,
        reports: Reports,
        *,
        snapshot: Callable[[], Sequence[Down]],
        spawn: Spawn,
    ) -> None:
        """``listener``: None for the messenger.

        ``snapshot``: the routes and keys for a new process; empty: they are not known yet.
        """
        self.column = column
        self.listener = listener
        self.ready = False
        self.pid = 0
        self.restarts = 0
        self.stopping = False  # the process is not restarted when it exits
        self._memory = memory
        self._program = program
        self._reports = reports
        self._snapshot = snapshot
        self._spawn = spawn
        self._channel: Channel | None = None
        self._process: Process | None = None
        self._heard = False  # whether the process has sent anything
        self._silent_s = 0.0  # since then, or since its start

    @property
    def _name(self) -> str:
        return "worker" if self._program.module == WORKER else "messenger"

    async def run(self) -> None:
        """Start the process, and restart it when it exits, until ``stopping``."""
        loop = asyncio.get_running_loop()
        backoff = RestartBackoff(RESPAWN_BACKOFF_FIRST_S, RESPAWN_BACKOFF_MAX_S, RESPAWN_SETTLED_S)
        while not self.stopping:
            started = loop.time()
            code = await self._run_once()
            # The process has been reaped, so it can no longer write to its column.
            self._memory.clear_column(self.column)
            self._reports.end()
            if self.stopping:
                return
            log.error(
                "process died", process=self._name, worker=self.column, pid=self.pid, exit_code=code
            )
            await asyncio.sleep(backoff.next_s(loop.time() - started))
            self.restarts += 1

    async def _run_once(self) -> int:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            settings = self._settings(theirs.fileno())
            process = await self._spawn(
                Command(
                    self._program.module,
                    env={**os.environ, **settings.environment},
                    pass_fds=settings.descriptors,
                )
            )
            self._process = process
            self._heard, self._silent_s = False, 0.0
            self.pid = process.pid
            theirs.close()
            channel = Channel(Up, self._received, lambda: None)
            await loop.create_connection(lambda: channel, sock=ours.dup())
        self._channel = channel
        for message in self._snapshot():
            self.send(message)
        try:
            code = await process.wait()
            # What it has sent is still to be read, unless another process keeps the other end open.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(channel.ended.wait(), CHANNEL_END_TIMEOUT_S)
            return code
        finally:
            self.ready = False
            self._channel = None
            self._process = None
            channel.close()

    def _settings(self, channel_fd: int) -> WorkerSettings:
        memory, program = self._memory, self._program
        return WorkerSettings(
            column=self.column,
            table_fd=memory.loads.fd,
            index_fd=memory.prefixes.fd,
            listen_fd=-1 if self.listener is None else self.listener.fileno(),
            channel_fd=channel_fd,
            gateway=program.gateway,
            journal_fd=memory.journal.fd if program.console_path else -1,
            key_table_fd=-1 if memory.keys is None else memory.keys.fd,
            console_path=program.console_path,
            messaging=program.messaging,
            queue_fd=memory.queues.fd,
            wake_fds=memory.queues.wake_fds,
        )

    def _received(self, message: object) -> None:
        self._heard, self._silent_s = True, 0.0
        if isinstance(message, Ready):
            self.ready = True
            self._reports.ready()
        elif isinstance(message, Demand):
            self._reports.demand(message.model)
        elif isinstance(message, Streams):
            self._reports.streams(message)
        elif isinstance(message, UsageReport):
            self._reports.usage(message)
        elif isinstance(message, EventReport):
            self._reports.events(message)

    def send(self, message: Down) -> None:
        """Send a message to the process; dropped if it does not run."""
        if self._channel is not None:
            self._channel.send(message)

    def check(self, elapsed_s: float) -> None:
        """Kill a process that hangs. ``elapsed_s``: the interval of the calls.

        It is not measured, because no worker hangs when the whole machine, or the supervisor, has
        stood still. One check before it is killed, the process writes its stack, unless it has not
        got as far as that.
        """
        if self._process is None or self._process.returncode is not None:
            return
        before_s, limit_s = self._silent_s, self._silence_max_s
        self._silent_s += elapsed_s
        if before_s > limit_s:
            self._process.kill()
        elif self._silent_s > limit_s:
            if self._heard:
                self._process.send_signal(STACK_SIGNAL)
            log.error(
                "process hangs, killing it",
                process=self._name,
                worker=self.column,
                pid=self.pid,
                silent_s=self._silent_s,
            )

    @property
    def _silence_max_s(self) -> float:
        if not self._heard:
            return START_MAX_S
        if self._channel is None or self._channel.ended.is_set():
            # Without the channel it drains, and cannot send anything.
            gateway = self._program.gateway
            return gateway.drain_accept_s + gateway.drain_timeout_s + SILENCE_MAX_S
        return SILENCE_MAX_S

    @property
    def alive(self) -> bool:
        """Whether the process runs, or its column has not been cleared yet."""
        return self._process is not None

    def close_listener(self) -> None:
        """Close the listener, if there is one."""
        if self.listener is not None:
            self.listener.close()

    def kill(self) -> None:
        """Send SIGKILL to the process, if it runs."""
        if self._process is not None:
            self._process.kill()
