"""A relay with one scripted engine, and local routes that describe what they receive."""

import asyncio
from typing import Any

from aiohttp import web

from fakes.wire import Engine, Wire
from fakes.world import World
from kubeai.gateway.relay._relay import Relay

HEAD = b"POST /openai/v1/chat/completions HTTP/1.1\r\nHost: h\r\n"
BODY = b'{"model":"m"}'

SLOW = asyncio.Event()  # an upload to /slow is read once this is set


async def echo(request: web.Request) -> web.Response:
    if request.path == "/slow":
        await SLOW.wait()
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "path": request.raw_path,
            "size": len(body),
            "headers": [[k, v] for k, v in request.headers.items()],
        }
    )


def pages() -> web.Application:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", echo)
    return app


class Running:
    """A gateway with one engine that serves the model ``m``."""

    def __init__(self, world: World, engine: Engine) -> None:
        self.world = world
        self.engine = engine

    @property
    def relay(self) -> Relay:
        return self.world.server.relay

    async def client(self, **options: Any) -> Wire:
        return await self.world.client(**options)

    def runs(self, script) -> None:
        self.engine.script = script


async def fails(wire: Wire, status: int) -> None:
    """Check that the connection gets this error response and is closed."""
    answered = await wire.answer()
    assert answered.status == status, answered
    assert answered.one("connection") == "close"
    assert b'"error":{"message":' in answered.body
    await wire.ended()
