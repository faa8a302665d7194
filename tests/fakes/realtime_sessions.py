"""WebSocket frames, and an engine that records what it gets of a session."""

import asyncio
import json
import struct

from fakes.websocket import SWITCHED
from fakes.wire import Message, Wire
from fakes.world import World

TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
KEY = "dGhlIHNhbXBsZSBub25jZQ=="  # RFC 6455's example
UPDATE = b'{"type":"session.update","model":"m"}'
CREATED = b'\x81\x1a{"type":"session.created"}'


def handshake(target: str = "/v1/realtime", key: str = KEY, version: str = "13") -> bytes:
    return (
        f"GET {target} HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: {version}\r\n"
        "Sec-WebSocket-Extensions: permessage-deflate\r\nSec-WebSocket-Protocol: realtime\r\n\r\n"
    ).encode()


def masked(payload: bytes, opcode: int = TEXT, first: int = 0x80) -> bytes:
    mask = b"\x11\x22\x33\x44"
    size = len(payload)
    if size < 126:
        head = bytes((first | opcode, 0x80 | size))
    elif size < 1 << 16:
        head = bytes((first | opcode, 0x80 | 126)) + struct.pack(">H", size)
    else:
        head = bytes((first | opcode, 0x80 | 127)) + struct.pack(">Q", size)
    return head + mask + bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


async def frame(wire: Wire) -> tuple[int, bytes]:
    """Receive a frame, from either side."""
    first, second = await wire.reader.readexactly(2)
    size = second & 0x7F
    if size > 125:
        size = int.from_bytes(await wire.reader.readexactly(2 if size == 126 else 8), "big")
    mask = await wire.reader.readexactly(4) if second & 0x80 else bytes(4)
    payload = await wire.reader.readexactly(size)
    return first & 0x0F, bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))


class RecordingEngine:
    """A script that accepts, greets, records the frames, and sends them back as text."""

    def __init__(self, *greeting: bytes) -> None:
        self.greeting = greeting or (CREATED,)
        self.frames: list[tuple[int, bytes]] = []

    async def __call__(self, wire: Wire, request: Message) -> None:
        await wire.send(SWITCHED)
        for part in self.greeting:
            await wire.send(part)
        try:
            while True:
                self.frames.append(await frame(wire))
        except asyncio.IncompleteReadError:
            wire.close()


async def opened(world: World, **options: str) -> Wire:
    wire = await world.client()
    await wire.send(handshake(**options))
    head = await wire.head()
    assert head.status == 101
    opcode, payload = await frame(wire)
    assert (opcode, json.loads(payload)["type"]) == (TEXT, "session.created")
    return wire


async def closed_with(wire: Wire, code: int) -> dict:
    """Receive an error event and this close code."""
    opcode, payload = await frame(wire)
    assert opcode == TEXT
    error = json.loads(payload)
    assert error["type"] == "error"
    assert await frame(wire) == (CLOSE, struct.pack(">H", code))
    await wire.ended()
    return error


async def unsent(wire: Wire) -> int:
    """Wait until nothing more of what was written is read. The bytes that are left."""
    left, size = -1, 0
    while left != size:
        await asyncio.sleep(0.1)
        left, size = size, wire.writer.transport.get_write_buffer_size()
    return size
