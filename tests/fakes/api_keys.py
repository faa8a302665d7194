"""API keys for a World: what the supervisor would send to its worker."""

import json
from hashlib import sha256
from typing import Any

from fakes.wire import Message, Wire, post
from fakes.world import World
from kubeai._keys import Key
from kubeai.api.config.system import KeysConfig
from kubeai.gateway.local_routes import make_app
from kubeai.gateway.stored_responses import new_id
from kubeai.routing.keys import KeyDelta, KeyRecord, KeySnapshot

REQUIRED = KeysConfig(required=True)
ALICE, BOB = "sk-alice-0123456789", "sk-bob-0123456789"
CHAT = "/openai/v1/chat/completions"


def record(name: str, key: str, **fields: Any) -> KeyRecord:
    """The key of a Secret. Its tenant is ``name`` unless ``fields`` say otherwise."""
    digest = sha256(key.encode()).digest()
    return KeyRecord(**{"name": name, "digest": digest, "tenant": name} | fields)


def stored_id(tenant: str) -> str:
    """The ID of a stored response that belongs to a tenant."""
    return new_id(Key(KeyRecord("key", b"", tenant)))


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


def give(world: World, *records: KeyRecord) -> None:
    """All keys at once, as a worker gets them when it starts."""
    world.server.apply_keys(KeySnapshot(world.publisher.version, records))


def change(world: World, name: str, key: KeyRecord | None) -> None:
    """One Secret's key, or None if it has none any more."""
    world.server.apply_keys(KeyDelta(world.publisher.advance(), name, key))


async def keyed(start: Any, *records: KeyRecord, **config: Any) -> World:
    """A World that requires keys, and has these."""
    world: World = await start(**{"local_routes": make_app, "keys": REQUIRED} | config)
    give(world, *records)
    return world


async def ask(
    wire: Wire,
    *headers: str,
    path: str = CHAT,
    body: bytes = b'{"model":"m"}',
    host: str = "gateway",
) -> Message:
    """POST a request."""
    await wire.send(post(path, body, *headers, host=host))
    return await wire.answer()


async def get(wire: Wire, path: str, *headers: str, method: str = "GET") -> Message:
    """Send a request without a body."""
    lines = [f"{method} {path} HTTP/1.1", "Host: gateway", *headers]
    await wire.send(("\r\n".join(lines) + "\r\n\r\n").encode())
    return await wire.answer(method)


def error(message: Message) -> dict[str, Any]:
    """The error in a response, in the format of OpenAI's or Anthropic's API."""
    found: dict[str, Any] = json.loads(message.body)["error"]
    return found


def sent(world: World) -> list[Message]:
    """The requests that the engines of a World have received."""
    return [request for engine in world.engines.values() for request in engine.requests]
