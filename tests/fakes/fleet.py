"""The real supervisor and its worker processes, with routes that a script hands out.

Everything but the control plane is what `kubeai serve` runs: listeners, load table, supervisor,
workers and their successors. :class:`Fleet` is for tests; as a program it serves ``bench/``:
``fleet.py '{"workers": 2, "gateway": {…}, "routes": […], "keys": 0}'`` (of keys, their number)
prints ``{"port": …, "pids": […]}`` once it serves, answers each line on standard input with the
gauges that are not 0, and exits when standard input closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import msgspec

from kubeai.api.api_key import ApiKey
from kubeai.api.config.system import GatewayConfig, KeysConfig, Messaging, SystemConfig
from kubeai.logs import setup_logging
from kubeai.processes import Spawn, spawn_by_exec
from kubeai.routing.routes import Route
from kubeai.supervisor import supervisor

START_TIMEOUT_S = 30.0


class _Script:
    """Stands in for the operator: the routes and keys it was given, and word of demand."""

    publish_key: Callable[[str, ApiKey | None], None] | None = None

    def __init__(
        self, routes: list[Route], demanded: Callable[[str], None], keys: list[ApiKey]
    ) -> None:
        self._routes = routes
        self._keys = keys
        self._ended = asyncio.Event()
        self.demand = demanded
        self.synced = asyncio.Event()

    def __call__(
        self,
        *_: object,
        publish: Callable[[str, Route | None], None],
        publish_key: Callable[[str, ApiKey | None], None] | None = None,
        **__: Any,
    ):
        self.publish = publish
        self.publish_key = publish_key
        return self

    async def run(self) -> None:
        for route in self._routes:
            self.publish(route.model, route)
        for key in self._keys:
            assert self.publish_key is not None, "keys are required"
            self.publish_key(key.name, key)
        self.synced.set()
        await self._ended.wait()

    async def resign(self) -> None:
        pass

    async def stop(self) -> None:
        self._ended.set()


def _api() -> mock.Mock:
    """A Kubernetes API that has nothing, and accepts the usage of keys."""
    accepts = mock.AsyncMock()
    return mock.Mock(list=mock.AsyncMock(return_value=([], "")), create=accepts, patch=accepts)


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
        keys: list[ApiKey] | None = None,
        identity: str = "fleet",
        peers: tuple[str, ...] = (),
        spawn: Spawn | None = None,
        **gateway: Any,
    ) -> Fleet:
        """``reads_cache_sizes``: whether engines are asked for ``/metrics``, as in a cluster.

        ``keys``: those at the start; None: requests need no key. ``spawn``: None: a fork.
        """
        if spawn is None:
            from fakes import forked  # which is not on the path of bench/

            spawn = forked.spawn
        if keys is not None:
            gateway["keys"] = KeysConfig(required=True)
        fleet = cls()
        fleet._script = _Script(routes, demanded, keys or [])
        ready = asyncio.Event()
        config = SystemConfig(
            # Nothing has to learn that the fleet stops, unless a test says so.
            gateway=GatewayConfig(**{"drain_accept_s": 0.0, **gateway}),
            messaging=messaging or Messaging(),
            metrics_addr="127.0.0.1:0",
            health_address="127.0.0.1:0",
            fixed_self_metric_addrs=peers,
        )
        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(supervisor, "Operator", fleet._script))
            if not reads_cache_sizes:
                patches.enter_context(mock.patch.object(supervisor, "CacheSizes", autospec=True))
            fleet.supervisor = supervisor.Supervisor(
                _api(),
                config,
                namespace="default",
                identity=identity,
                host="127.0.0.1",
                port=0,
                workers=workers,
                started=ready.set,
                spawn=spawn,
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

    def key(self, name: str, key: ApiKey | None) -> None:
        """Publish the key of a Secret; None: it has none."""
        assert self._script.publish_key is not None, "the fleet was started with keys"
        self._script.publish_key(name, key)

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


def limited_keys(count: int) -> list[Any]:
    """Keys ``sk-0``, ``sk-1`` … with all limits, none of which is reached."""
    from kubeai.api.api_key import ApiKey

    limits = {
        "requests_per_minute": 10**9,
        "tokens_per_minute": 10**9,
        "in_flight_max": 10**9,
    }
    return [
        ApiKey(f"key-{n}", hashlib.sha256(f"sk-{n}".encode()).digest(), f"tenant-{n}", **limits)
        for n in range(count)
    ]


async def _main(spec: dict) -> None:
    routes = msgspec.convert(spec["routes"], list[Route])
    gateway = {"drain_accept_s": 0.0, "drain_timeout_s": 1.0, **spec.get("gateway", {})}
    if spec.get("keys"):  # their number
        gateway |= {"keys": limited_keys(spec["keys"])}
    fleet = await Fleet.start(
        routes,
        workers=spec["workers"],
        reads_cache_sizes=spec.get("reads_cache_sizes", False),
        spawn=spawn_by_exec,
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
