"""WebSocket handshakes, byte by byte, and an engine that accepts them."""

from fakes.wire import Message, Wire
from fakes.world import World

SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: made-by-the-engine\r\n\r\n"
)


PATH = "/v1/realtime?model=m"


def handshake(target: str = PATH, *headers: str, version: str = "1.1", key: str = "a2V5") -> bytes:
    lines = (
        f"GET {target} HTTP/{version}",
        "Host: gateway",
        "Connection: keep-alive, Upgrade",
        "Upgrade: websocket",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
        *headers,
    )
    return "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


async def echo(wire: Wire, request: Message) -> None:
    """An engine that accepts, and sends back what it receives."""
    await wire.send(SWITCHED)
    while data := await wire.reader.read(65536):
        await wire.send(data)
    wire.close()


async def opened(world: World, request: bytes = b"") -> Wire:
    """A client's connection after its handshake."""
    wire = await world.client()
    await wire.send(request or handshake())
    assert (await wire.head()).status == 101
    return wire
