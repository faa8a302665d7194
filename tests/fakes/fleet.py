"""The real supervisor and its worker processes, with routes that a script hands out.

Everything but the control plane is what `kubeai serve` runs: listeners, load table, supervisor,
workers and their successors. :class:`Fleet` is for tests; as a program it serves ``bench/``:
``fleet.py '{"workers": 2, "gateway": {…}, "routes": […]}'`` prints ``{"port": …, "pids": […]}``
once it serves, answers each line on standard input with the gauges that are not 0, and exits when
standard input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import msgspec

from kubeai.api.config.system import GatewayConfig, Messaging, SystemConfig
from kubeai.logs import setup_logging
from kubeai.routing.routes import Route
from kubeai.supervisor import supervisor

START_TIMEOUT_S = 30.0


class _Script:
    """Stands in for the operator: the routes it was given, and word of demand."""

    def __init__(self, routes: list[Route], demanded: Callable[[str], None]) -> None:
        self._routes = routes
        self._ended = asyncio.Event()
        self.demand = demanded
        self.synced = asyncio.Event()

    def __call__(self, *_: object, publish: Callable[[str, Route | None], None], **__: Any):
        self.publish = publish
        return self

    async def run(self) -> None:
        for route in self._routes:
            self.publish(route.model, route)
        self.synced.set()
        await self._ended.wait()

    async def resign(self) -> None:
        pass

    async def stop(self) -> None:
        self._ended.set()


class Fleet:
    """``await Fleet.start(routes, workers=4, hold_timeout_s=2)`` … ``await fleet.close()``."""

    port: int
    supervisor: supervisor.Supervisor
    _script: _Script
    _life: asyncio.Task[int]

    @classmethod
    async def start(
        cls,
        routes: list[Route],
        *,
        workers: int,
        demanded: Callable[[str], None] = lambda model: None,
        reads_cache_sizes: bool = False,
        messaging: Messaging | None = None,
        identity: str = "fleet",
        **gateway: Any,
    ) -> Fleet:
        """``reads_cache_sizes``: whether engines are asked for ``/metrics``, as in a cluster."""
        fleet = cls()
        fleet._script = _Script(routes, demanded)
        ready = asyncio.Event()
        config = SystemConfig(
            gateway=GatewayConfig(**gateway),
            messaging=messaging or Messaging(),
            metrics_addr="127.0.0.1:0",
            health_address="127.0.0.1:0",
        )
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(supervisor, "Operator", fleet._script))
            if not reads_cache_sizes:
                patches.enter_context(mock.patch.object(supervisor, "CacheSizes", autospec=True))
            fleet.supervisor = supervisor.Supervisor(
                mock.Mock(),
                config,
                namespace="default",
                identity=identity,
                host="127.0.0.1",
                port=0,
                workers=workers,
                started=ready.set,
            )
        fleet.port = fleet.supervisor.port
        fleet._life = asyncio.create_task(fleet.supervisor.run())
        async with asyncio.timeout(START_TIMEOUT_S):
            started = asyncio.create_task(ready.wait())
            await asyncio.wait({started, fleet._life}, return_when=asyncio.FIRST_COMPLETED)
        if fleet._life.done():
            started.cancel()
            await fleet._life
        return fleet

    def route(self, model: str, route: Route | None) -> None:
        """Publish a model's new route; None: the model is gone."""
        self._script.publish(model, route)

    @property
    def ready(self) -> bool:
        return self.supervisor.ready

    @property
    def pids(self) -> list[int]:
        """Of the workers that live."""
        return [worker.pid for worker in self.supervisor._workers if worker.alive]

    @property
    def messenger(self) -> int:
        """The pid of the messenger; 0 if there is none."""
        process = self.supervisor._messenger
        return process.pid if process is not None and process.ready else 0

    def kill(self, column: int) -> bool:
        """SIGKILL a worker that serves; False when it does not just now."""
        worker = self.supervisor._workers[column]
        if not worker.ready:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        return True

    def counts(self) -> dict[str, int]:
        """Every gauge of the load table that is not 0."""
        table, publisher = self.supervisor.table, self.supervisor.publisher
        counts = {"active, all": table.active_total()}
        for model in publisher.models():
            row = publisher.row(model)
            counts[f"active {model}"] = table.active(row)
            counts[f"held {model}"] = table.held(row)
            counts[f"in flight {model}"] = table.in_flight(row)
            for endpoint, row in publisher.endpoint_rows(model).items():
                counts[f"in flight {model} {endpoint}"] = table.in_flight(row)
        return {name: count for name, count in counts.items() if count}

    async def close(self) -> None:
        self.supervisor.stop()
        await self._life


async def _main(spec: dict) -> None:
    routes = msgspec.convert(spec["routes"], list[Route])
    gateway = {"drain_accept_s": 0.0, "drain_timeout_s": 1.0, **spec.get("gateway", {})}
    fleet = await Fleet.start(
        routes,
        workers=spec["workers"],
        reads_cache_sizes=spec.get("reads_cache_sizes", False),
        **gateway,
    )
    print(json.dumps({"port": fleet.port, "pids": [os.getpid(), *fleet.pids]}), flush=True)
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        print(json.dumps(fleet.counts()), flush=True)
    await fleet.close()


if __name__ == "__main__":
    setup_logging()  # to standard error: standard output has the answers
    asyncio.run(_main(json.loads(sys.argv[1])))
