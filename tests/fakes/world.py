"""A worker's data plane in one process: load table, routing table, server, and scripted engines."""

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from fakes.wire import Engine, Script, Wire, connect, until
from kubeai._journal import Journal
from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai._queue_table import QueueTable
from kubeai.api.config.system import GatewayConfig
from kubeai.gateway.access_log import Observers
from kubeai.gateway.context import Context
from kubeai.gateway.server import Server
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route
from kubeai.routing.table import RoutingTable


class World:
    """``await World.start(...)`` … ``await world.close()``, which checks that nothing is left."""

    supervisors: LoadTable
    loads: LoadTable
    index: PrefixIndex
    queues: QueueTable
    journal: Journal
    publisher: Publisher
    config: GatewayConfig
    demanded: list[str]
    context: Context
    server: Server
    table: RoutingTable
    runner: web.AppRunner
    port: int
    engines: dict[str, Engine]
    routes: dict[str, Route]
    wires: list[Wire]

    @classmethod
    async def start(
        cls,
        *,
        app: web.Application | None = None,
        local_routes: Callable[[Context], web.Application] | None = None,
        tick_s: float = 0.01,
        observers: Observers | None = None,
        console_path: str = "",
        rows: int = 64,
        **config: Any,
    ) -> "World":
        """``app`` replaces the local routes; ``local_routes`` creates them.

        ``rows``: of models and endpoints together.

        ``console_path``: of the socket where something serves the console; empty: nothing does.
        """
        world = cls()
        world.supervisors = LoadTable.create(rows, 1)
        world.loads = LoadTable.attach(world.supervisors.fd, 0)
        world.index = PrefixIndex.create(rows, 4096)
        world.queues = QueueTable.create(rows, 1)
        world.publisher = Publisher(world.supervisors, world.index, world.queues)
        world.config = GatewayConfig(**config)
        world.demanded = []
        world.context = Context(world.config, world.demanded.append, observers)
        world.journal = Journal.create(1)
        world.context.journal = Journal.attach(world.journal.fd, 0)
        workers_index = PrefixIndex.attach(world.index.fd, 0)
        queues = QueueTable.attach(world.queues.fd, 0, world.queues.wake_fds)
        world.server = Server(world.context, world.loads, workers_index, queues, tick_s=tick_s)
        world.table = world.server.routes
        if local_routes is not None:
            app = local_routes(world.context)
        world.runner = web.AppRunner(
            app or web.Application(), access_log=None, handler_cancellation=True
        )
        await world.runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        world.port = listener.getsockname()[1]
        await world.server.serve(world.runner.server, listener, console_path)
        world.engines = {}
        world.routes = {}
        world.wires = []
        return world

    async def engine(self, script: Script) -> Engine:
        return await self.added(Engine(script))

    async def added(self, engine: Engine) -> Engine:
        """An engine of another kind, started."""
        await engine.start()
        self.engines[engine.address] = engine
        return engine

    def route(self, model: str, endpoints: dict[str, object], **fields: Any) -> None:
        """Publish a model with endpoints: name → Engine, or "ip:port", or (either, adapters)."""
        made = []
        for name, where in endpoints.items():
            where, adapters = where if isinstance(where, tuple) else (where, ())
            address = where if isinstance(where, str) else where.address
            made.append(Endpoint(name, address, tuple(adapters)))
        route = Route(**{"model": model, "engine": "VLLM", "endpoints": tuple(made), **fields})
        self.routes[model] = route
        delta = self.publisher.update(model, route)
        if delta is not None:
            self.table.apply(delta)

    def unroute(self, model: str) -> None:
        self.table.apply(self.publisher.update(model, None))

    async def client(self, **options: Any) -> Wire:
        wire = await connect(self.port, **options)
        self.wires.append(wire)
        return wire

    def active(self, model: str) -> int:
        return self.loads.active(self.publisher.row(model))

    def held(self, model: str) -> int:
        return self.loads.held(self.publisher.row(model))

    def in_flight(self, model: str) -> int:
        return self.loads.in_flight(self.publisher.row(model))

    def pending(self, model: str) -> int:
        return self.loads.pending(self.publisher.row(model))

    def outcomes(self, model: str) -> dict[str, int]:
        return self.loads.outcomes(self.publisher.row(model))

    def ejected(self, model: str) -> set[str]:
        """The endpoints that are ejected or half-open."""
        rows = self.publisher.endpoint_rows(model)
        return {name for name, row in rows.items() if self.loads.ejected_until(row)}

    async def at_rest(self) -> None:
        """No request is open and none is counted."""
        await until(lambda: self.server.relay.exchanges == 0, "no exchange open")
        for model in self.publisher.models():
            assert self.active(model) == 0
            assert self.held(model) == 0
            # What a request has waited for is given back by its task, which ends a turn later.
            await until(lambda: self.context.held(model) == 0)  # noqa: B023 (awaited here)
            await until(lambda: self.in_flight(model) == 0)  # noqa: B023 (awaited here)
            assert self.pending(model) == 0
            assert set(self.endpoint_loads(model).values()) <= {0}
            assert sum(self.queues.waiting(self.publisher.row(model))) == 0

    def endpoint_loads(self, model: str) -> dict[str, int]:
        rows = self.publisher.endpoint_rows(model)
        return {name: self.loads.in_flight(row) for name, row in rows.items()}

    async def close(self) -> None:
        for wire in self.wires:
            wire.close()
        await self.at_rest()
        self.server.close()
        await self.context.stored_responses.close()
        await self.context.background_responses.close()
        await self.runner.cleanup()
        for engine in self.engines.values():
            await engine.stop()
        relay = self.server.relay
        await until(lambda: not relay.downstreams and not relay.upstreams, "no connection left")
        await asyncio.sleep(0)
        self.context.journal = None
        self.journal.close()
        self.loads.close()
        self.supervisors.close()
        self.queues.close()


def unique(prefix: str = "m") -> str:
    return f"{prefix}-{uuid.uuid4().hex[:6]}"


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Awaitable[World]]]:
    """Starts Worlds, which are closed when the test has ended."""
    worlds = []

    async def start(**config: Any) -> World:
        worlds.append(await World.start(**config))
        return worlds[-1]

    yield start
    for world in worlds:
        await world.close()
