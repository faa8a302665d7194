"""The embedded API's process: ``python -m kubeai.local.apiserver --data-dir D``.

Writes ``ready <port>`` to the descriptor given by ``--ready-fd`` once it serves. Exits on SIGTERM,
or when its parent exits for any reason. Without ``--port`` it reuses the port of the last start on
this data directory, if that port is free.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sqlite3
import sys
from pathlib import Path

from kubeai.errors import KubeAIError
from kubeai.local import ports
from kubeai.local.apiserver import credentials
from kubeai.local.apiserver.http.server import Server
from kubeai.local.apiserver.kinds.resources import Catalog
from kubeai.local.apiserver.storage.collector import Collector
from kubeai.local.apiserver.storage.registry import Registry
from kubeai.local.apiserver.storage.store import Store
from kubeai.logs import get_logger, setup_logging
from kubeai.processes import set_death_signal

log = get_logger(__name__)


def die_with_parent() -> None:
    """Have the kernel send SIGTERM when the parent exits; exit if it has just exited.

    If the parent exited before this call, writing the ready line fails.
    """
    parent = os.getppid()
    set_death_signal(signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(0)


async def serve(directory: Path, port: int, namespace: str, ready_fd: int | None) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    identity = credentials.load(directory)
    store = Store(directory / "objects.db")
    registry = Registry(store, Catalog())
    collector = asyncio.create_task(Collector(registry).run())
    server = Server(registry, identity.token)
    try:
        port = await server.start(ports.candidates(directory, port), identity.tls)
        kubeconfig = identity.write_kubeconfig(port, namespace)
        log.info("the Kubernetes API is ready", port=port, kubeconfig=str(kubeconfig))
        if ready_fd is not None:
            os.write(ready_fd, f"ready {port}\n".encode())
            os.close(ready_fd)
        await _first(stop, collector)
    finally:
        await server.stop()
        collector.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await collector
        store.close()


async def _first(stop: asyncio.Event, collector: asyncio.Task[None]) -> None:
    """Wait for ``stop``. If the collector ends first, raise its exception."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((stopping, collector), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if collector.done():
        collector.result()


def main() -> None:
    """Parse the arguments and serve. Exits with a message if the server cannot start."""
    parser = argparse.ArgumentParser(prog="python -m kubeai.local.apiserver", description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--namespace", default="default", help="the kubeconfig's namespace")
    parser.add_argument("--ready-fd", type=int)
    options = parser.parse_args()
    die_with_parent()
    setup_logging()
    os.umask(0o077)
    try:
        options.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        asyncio.run(serve(options.data_dir, options.port, options.namespace, options.ready_fd))
    except (KubeAIError, OSError, sqlite3.Error) as error:
        sys.exit(f"the Kubernetes API cannot start: {getattr(error, 'strerror', None) or error}")


if __name__ == "__main__":
    main()
