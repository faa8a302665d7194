"""One data-plane process: ``python -m kubeai.gateway.worker``, started by the supervisor.

:class:`Worker` is also the base class of the messenger's process (messenger/).

It inherits file descriptors for the load table, the prefix index, the journal, the key table, the
queue table with an eventfd for each worker, a listening socket, and its end of the channel to the
supervisor (routing/channel.py). The environment variable ``KUBEAI_WORKER`` has their numbers and
its column of the load table (JSON, :class:`.WorkerSettings`). It serves once it has received the
first routing table, and the API keys if they are required. It drains on ``Drain``, on SIGTERM, and
when the channel closes: a worker whose supervisor is gone finishes its open requests, then exits 0.
It ignores SIGINT, which the supervisor handles.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable

import msgspec
import uvloop
from aiohttp import web

from kubeai._journal import Journal
from kubeai._key_table import KeyTable
from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai._queue_table import QueueTable
from kubeai.gateway.access_log import make_observers
from kubeai.gateway.context import Context
from kubeai.gateway.local_routes import make_runner
from kubeai.gateway.server import Server
from kubeai.gateway.usage_reporter import UsageReporter
from kubeai.logs import get_logger, setup_logging
from kubeai.routing.channel import (
    HEARTBEAT_INTERVAL_S,
    SETTINGS_VARIABLE,
    STACK_SIGNAL,
    Channel,
    Demand,
    Down,
    Drain,
    Heartbeat,
    KeyDelta,
    KeySnapshot,
    Ready,
    WorkerSettings,
)
from kubeai.routing.routes import Delta, RequestType, Snapshot

log = get_logger(__name__)

KEPT_MAX_BYTES = 64 << 20  # free memory at the end of the heap
KEPT_BLOCK_MAX_BYTES = 4 << 20  # larger blocks are mapped, and unmapped when freed
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Worker:
    """The components of the process and its lifecycle."""

    request_type: RequestType = "http"  # what its requests count as

    def __init__(self, settings: WorkerSettings) -> None:
        self._settings = settings
        self._table = LoadTable.attach(settings.table_fd, settings.column)
        observers = make_observers(settings.gateway)
        self._context = Context(
            settings.gateway, self._demand, observers, request_type=self.request_type
        )
        if settings.journal_fd >= 0:
            self._context.journal = Journal.attach(settings.journal_fd, settings.column)
        if settings.key_table_fd >= 0:
            self._context.limits = KeyTable.attach(settings.key_table_fd, settings.column)
        self._index = PrefixIndex.attach(settings.index_fd, settings.column)
        queues = None
        if settings.queue_fd >= 0:
            queues = QueueTable.attach(settings.queue_fd, settings.column, settings.wake_fds)
        self._server = Server(self._context, self._table, self._index, queues)
        self._channel = Channel(Down, self._on_message, self._channel_ended)
        # What has not arrived yet: the worker serves once it has routes, and keys if it needs any.
        self._awaited: set[type] = {Snapshot}
        if self._context.keys is not None:
            self._awaited.add(KeySnapshot)
        self._started = asyncio.Event()  # nothing is awaited
        self._usage = UsageReporter(self._context.meter, self._channel.send)
        self._context.events.send = self._channel.send
        self._stopped: asyncio.Future[Drain] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Serve until the supervisor requests a drain, then drain."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop, None)
        sock = socket.socket(fileno=self._settings.channel_fd)
        sock.setblocking(False)
        await loop.create_unix_connection(lambda: self._channel, sock=sock)
        heartbeats = asyncio.create_task(self._send_heartbeats())
        try:
            await self._run()
        finally:
            heartbeats.cancel()
            self._channel.close()

    async def _send_heartbeats(self) -> None:
        while True:
            self._channel.send(Heartbeat())
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    async def _run(self) -> None:
        started = asyncio.ensure_future(self._started.wait())
        await asyncio.wait((started, self._stopped), return_when=asyncio.FIRST_COMPLETED)
        started.cancel()
        if self._stopped.done():
            return
        runner = make_runner(self._context)
        await runner.setup()
        assert runner.server is not None, "set up"
        try:
            await self._serve(runner.server)
        finally:
            self._server.close()
            await self._context.stored_responses.close()
            await self._context.background_responses.close()
            await runner.cleanup()
            self._usage.close()
            self._context.events.flush()

    async def _serve(self, local_routes: web.Server) -> None:
        """Serve requests until the supervisor requests a drain, then drain."""
        listener = socket.socket(fileno=self._settings.listen_fd)
        listener.setblocking(False)
        await self._server.serve(local_routes, listener, self._settings.console_path)
        self._announce()
        drain = await self._stopped
        await self._server.drain(drain.accept_s, drain.timeout_s)

    def _announce(self) -> None:
        """Report that the process is ready."""
        self._context.ready = True
        self._usage.start()
        self._channel.send(Ready(os.getpid()))
        # Objects created at start-up live as long as the process, so exclude them from collections.
        gc.collect()
        gc.freeze()

    def _demand(self, model: str) -> None:
        self._channel.send(Demand(model))

    def _on_message(self, message: object) -> None:
        if isinstance(message, Drain):
            self._stop(message)
            return
        if isinstance(message, KeySnapshot | KeyDelta):
            self._server.apply_keys(message)
        else:
            assert isinstance(message, Snapshot | Delta)
            self._server.routes.apply(message)
        self._awaited.discard(type(message))
        if not self._awaited:
            self._started.set()

    def _channel_ended(self) -> None:
        if not self._stopped.done():
            log.warning("lost the connection to the supervisor, draining")
        self._stop(None)

    def _stop(self, drain: Drain | None) -> None:
        """Start draining. Without ``drain``, the config's timeouts apply."""
        config = self._settings.gateway
        if not self._stopped.done():
            self._stopped.set_result(drain or Drain(config.drain_accept_s, config.drain_timeout_s))


def _keep_memory() -> None:
    """Let malloc keep freed memory for reuse instead of returning it to the kernel.

    glibc returns free memory at the end of its heap. With prompts of 400 KB, that cost a brk and
    four page faults each.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # musl has none
        mallopt(_M_MMAP_THRESHOLD, KEPT_BLOCK_MAX_BYTES)
        mallopt(_M_TRIM_THRESHOLD, KEPT_MAX_BYTES)


def _raise_descriptors() -> None:
    """Raise the limit of open files to the hard limit; the usual soft limit is only 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def run_worker(make: Callable[[WorkerSettings], Worker]) -> int:
    """Run a worker process; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.stderr is not None:
        faulthandler.register(STACK_SIGNAL)  # writes the stack of each thread to stderr
    _keep_memory()
    _raise_descriptors()
    setup_logging()
    text = os.environ.pop(SETTINGS_VARIABLE, None)
    if text is None:
        print(
            f"{SETTINGS_VARIABLE} is not set: only kubeai serve and kubeai local start this module",
            file=sys.stderr,
        )
        return 2
    settings = msgspec.json.decode(text, type=WorkerSettings)

    async def run() -> None:
        await make(settings).run()

    began = time.monotonic()
    uvloop.run(run())
    log.info("worker ended", worker=settings.column, lived_s=round(time.monotonic() - began, 1))
    return 0


def main() -> int:
    """Run a worker; returns the exit status."""
    return run_worker(Worker)


if __name__ == "__main__":
    sys.exit(main())
