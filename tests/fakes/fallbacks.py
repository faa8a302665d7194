"""A Model with a fallback: engines that say which Model they serve, and what was counted."""

import asyncio
import json

from fakes.wire import Message, Wire, answer
from fakes.world import World
from kubeai.routing.routes import Block

BLOCK = Block("OutOfMemory", "no", 0.0)
NOW = {"fallbacks": ("b",), "wait_before_fallback_s": 0.0}


async def echo(wire: Wire, request: Message) -> None:
    body = json.dumps({"model": json.loads(request.body)["model"]}).encode()
    await wire.send(answer(200, body, "Content-Type: application/json"))


async def got(world: World, request: bytes) -> Message:
    wire = await world.client()
    await wire.send(request)
    return await wire.answer()


def fallbacks(world: World) -> dict[tuple[str, str, str], int]:
    return {labels: count for (_, labels), count in world.context.events._counts.items()}


def by(answered: Message, name: str, asked: str = "m") -> None:
    """Check that a Model answered in the name of the one that was asked for."""
    assert (answered.status, json.loads(answered.body)["model"]) == (200, asked)
    assert answered.one("x-kubeai-model") == (None if name == asked else name)


class Watcher:
    """A ``hold_watcher`` that gives each permission at once. ``calls``: what it was asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_hold(self, request_id: str) -> None:
        self.calls.append("hold")

    async def on_endpoint(self, request_id: str) -> None:
        self.calls.append("endpoint")


class Full:
    """An engine that answers once it is told to. ``came``: the marks of its requests."""

    def __init__(self) -> None:
        self.came: list[str | None] = []
        self.room = asyncio.Event()

    async def __call__(self, wire: Wire, request: Message) -> None:
        self.came.append(request.one("x-mark"))
        await self.room.wait()
        await echo(wire, request)
