"""The supervisor's handle of one worker process: starts it, restarts it, talks to it.

The messenger is such a process too, without a listener.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence

from kubeai._key_table import KeyTable
from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai._queue_table import QueueTable
from kubeai.api.config.system import GatewayConfig, Messaging
from kubeai.kube.backoff import RestartBackoff
from kubeai.logs import get_logger
from kubeai.processes import Command, Process, Spawn
from kubeai.routing.channel import (
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

log = get_logger(__name__)

RESPAWN_BACKOFF_FIRST_S, RESPAWN_BACKOFF_MAX_S = 0.2, 5.0
CHANNEL_END_TIMEOUT_S = 1.0
RESPAWN_SETTLED_S = 10.0  # a worker that ran this long is restarted at once


WORKER = "kubeai.gateway.worker"
MESSENGER = "kubeai.messenger"


class WorkerProcess:
    """One column of the load table, one listener, and the process that currently uses them."""

    def __init__(
        self,
        column: int,
        listener: socket.socket | None,
        table: LoadTable,
        index: PrefixIndex,
        queues: QueueTable,
        config: GatewayConfig,
        *,
        journal_fd: int,
        key_table: KeyTable | None,
        console_path: str,
        snapshot: Callable[[], Sequence[Down]],
        on_ready: Callable[[], None],
        on_demand: Callable[[str], None],
        spawn: Spawn,
        module: str = WORKER,
        messaging: Messaging | None = None,
        on_streams: Callable[[Streams], None] = lambda _: None,
        on_events: Callable[[EventReport], None] = lambda _: None,
        on_end: Callable[[], None] = lambda: None,
        on_usage: Callable[[UsageReport], None] = lambda _: None,
    ) -> None:
        """``listener``: None for the messenger.

        ``journal_fd``, ``console_path``, ``messaging``: see :class:`WorkerSettings`.
        ``key_table``: None: keys are not required.

        ``snapshot``: the routes and keys for a new process; empty: they are not known yet.

        ``on_ready``: called when the process accepts requests. ``on_demand``: called with the name
        of a model for which it holds a request.

        ``module``: what the process runs. ``on_streams``: called with the messenger's reports.
        ``on_events``: called with the counts of events.
        ``on_end``: called when the process has ended. ``on_usage``: called with its reports of what
        API keys use.
        """
        self.column = column
        self.listener = listener
        self.ready = False
        self.pid = 0
        self.restarts = 0
        self.stopping = False  # the process is not restarted when it exits
        self._table = table
        self._index = index
        self._queues = queues
        self._config = config
        self._journal_fd = journal_fd
        self._key_table = key_table
        self._console_path = console_path
        self._snapshot = snapshot
        self._on_ready = on_ready
        self._on_demand = on_demand
        self._spawn = spawn
        self._module = module
        self._messaging = messaging
        self._on_streams = on_streams
        self._on_events = on_events
        self._on_end = on_end
        self._on_usage = on_usage
        self._channel: Channel | None = None
        self._process: Process | None = None

    async def run(self) -> None:
        """Start the process, and restart it when it exits, until ``stopping``."""
        loop = asyncio.get_running_loop()
        backoff = RestartBackoff(RESPAWN_BACKOFF_FIRST_S, RESPAWN_BACKOFF_MAX_S, RESPAWN_SETTLED_S)
        while not self.stopping:
            started = loop.time()
            code = await self._run_once()
            # The process has been reaped, so it can no longer write to its column.
            self._table.clear_column(self.column)
            if self._key_table is not None:
                self._key_table.clear_column(self.column)
            self._queues.clear_column(self.column)
            self._on_end()
            if self.stopping:
                return
            name = "worker" if self._module == WORKER else "messenger"
            log.error(f"{name} died", worker=self.column, pid=self.pid, exit_code=code)
            await asyncio.sleep(backoff.next_s(loop.time() - started))
            self.restarts += 1

    async def _run_once(self) -> int:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            settings = WorkerSettings(
                column=self.column,
                table_fd=self._table.fd,
                index_fd=self._index.fd,
                listen_fd=-1 if self.listener is None else self.listener.fileno(),
                channel_fd=theirs.fileno(),
                gateway=self._config,
                journal_fd=self._journal_fd,
                key_table_fd=-1 if self._key_table is None else self._key_table.fd,
                console_path=self._console_path,
                messaging=self._messaging,
                queue_fd=self._queues.fd,
                wake_fds=self._queues.wake_fds,
            )
            process = await self._spawn(
                Command(
                    self._module,
                    env={**os.environ, **settings.environment},
                    pass_fds=settings.descriptors,
                )
            )
            self._process = process
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

    def _received(self, message: object) -> None:
        if isinstance(message, Ready):
            self.ready = True
            self._on_ready()
        elif isinstance(message, Demand):
            self._on_demand(message.model)
        elif isinstance(message, Streams):
            self._on_streams(message)
        elif isinstance(message, UsageReport):
            self._on_usage(message)
        elif isinstance(message, EventReport):
            self._on_events(message)

    def send(self, message: Down) -> None:
        """Send a message to the process; dropped if it does not run."""
        if self._channel is not None:
            self._channel.send(message)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None

    def close_listener(self) -> None:
        """Close the listener, if there is one."""
        if self.listener is not None:
            self.listener.close()

    def kill(self) -> None:
        """Send SIGKILL to the process, if it runs."""
        if self._process is not None:
            self._process.kill()
