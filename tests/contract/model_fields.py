"""What the tests of fields read of a Model: its pod, its conditions, refusals, and the gateway."""

from __future__ import annotations

import contextlib

import aiohttp
import pytest
from aiohttp import web
from fakes.engine_pods import server
from operators import CONFIG, until

from kubeai._load import LoadTable
from kubeai.api.config.system import GatewayConfig
from kubeai.gateway.context import Context
from kubeai.gateway.local_routes import make_runner
from kubeai.gateway.server import Server
from kubeai.kube.errors import ApiError
from kubeai.routing.publisher import Publisher

FAST = "".join(line for line in CONFIG.splitlines(True) if not line.startswith("resourceProfiles"))


def env(pod):
    """The server's variables: what they are, or where from. A real API drops empty values."""
    variables = server(pod).get("env", [])
    return {one["name"]: one.get("valueFrom") or one.get("value", "") for one in variables}


async def pod_of(world, name="m"):
    (pod,) = await world.pods_once(1, name)
    return pod


async def told(world, reason, name="m", type_="Ready"):
    """The message of the condition, once it is False for that reason."""

    async def condition():
        return await world.condition(type_, name) == ("False", reason)

    await until(condition, f"{name} is told {reason}")
    return await message(world, type_, name)


async def message(world, type_="Ready", name="m"):
    conditions = (await world.status(name)).get("conditions") or []
    return next(c["message"] for c in conditions if c["type"] == type_)


async def refusal(world, **spec):
    """What the API says when it refuses to create such a Model."""
    with pytest.raises(ApiError) as caught:
        await world.create(**spec)
    assert caught.value.status == 422, caught.value
    return str(caught.value)


ENV = {"op": "add", "path": "/spec/containers/0/env/-", "value": {"name": "A", "value": "1"}}


@contextlib.asynccontextmanager
async def gateway(routes):
    """A gateway that has these routes, and a session to ask it."""
    table = LoadTable.create(64, 1)
    publisher = Publisher(table)
    config = GatewayConfig()
    context = Context(config, lambda model: None)
    routing = Server(context, LoadTable.attach(table.fd, 0)).routes
    for model, route in routes.items():
        routing.apply(publisher.update(model, route))
    runner = make_runner(context)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession(f"http://127.0.0.1:{runner.addresses[0][1]}") as session:
            yield session
    finally:
        await runner.cleanup()
        table.close()


async def listed(session, query="", *selectors):
    headers = [("X-Label-Selector", selector) for selector in selectors]
    async with session.get(f"/openai/v1/models{query}", headers=headers) as response:
        assert response.status == 200
        return {item["id"]: item for item in (await response.json())["data"]}
