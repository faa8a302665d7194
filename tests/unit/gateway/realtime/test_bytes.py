"""``/v1/realtime`` after the handshake: bytes both ways, flow control, timeouts, drains."""

import asyncio
import socket
from typing import cast

import pytest
import uvloop
from fakes.websocket import SWITCHED, echo, handshake, opened
from fakes.wire import Message, Wire, until
from typing_extensions import override

from kubeai.gateway.access_log import Observation, Observers
from kubeai.gateway.endpoint_pool import EndpointPool
from kubeai.gateway.observation import RequestEnd, RequestStart
from kubeai.gateway.relay._upstream import Upstream

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


async def test_it_is_counted_until_it_closes(echoing):
    world, engine = echoing
    wire = await opened(world)
    assert (world.active("m"), world.in_flight("m")) == (1, 1)
    assert world.endpoint_loads("m") == {"pod-1": 1}
    wire.close()
    await world.at_rest()
    assert world.outcomes("m")["2xx"] == 1
    await until(lambda: not engine.open)


async def test_what_the_client_sent_last_reaches_the_engine(start):
    world = await start()
    got = b""

    async def listen(wire: Wire, request: Message) -> None:
        nonlocal got
        await wire.send(SWITCHED)
        got = await wire.reader.read()
        wire.close()

    world.route("m", {"pod-1": await world.engine(listen)})
    wire = await opened(world)
    await wire.send(b"x" * 100_000 + b"bye")
    wire.close()
    await until(lambda: got.endswith(b"bye") and len(got) == 100_003)


async def test_what_the_engine_sent_last_reaches_the_client(start):
    world = await start()

    async def talk(wire: Wire, request: Message) -> None:
        await wire.send(SWITCHED, b"y" * 1_000_000, b"bye")
        wire.close()

    world.route("m", {"pod-1": await world.engine(talk)})
    wire = await opened(world)
    await wire.send(b"still talking")
    received = await wire.reader.read()
    assert (len(received), received[-3:]) == (1_000_003, b"bye")
    await world.at_rest()
    assert world.outcomes("m")["2xx"] == 1


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
async def test_when_the_engine_dies_the_client_is_closed_at_once(start, reset):
    world = await start()
    dying = asyncio.Event()

    async def die(wire: Wire, request: Message) -> None:
        await wire.send(SWITCHED)
        await dying.wait()
        wire.reset() if reset else wire.close()

    world.route("m", {"pod-1": await world.engine(die)})
    wire = await opened(world)
    dying.set()
    async with asyncio.timeout(5):
        assert await wire.reader.read() == b""
        await world.at_rest()
    assert world.outcomes("m")["broken" if reset else "2xx"] == 1


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
async def test_when_the_client_leaves_the_engine_is_closed_at_once(echoing, reset):
    world, engine = echoing
    wire = await opened(world)
    wire.reset() if reset else wire.close()
    async with asyncio.timeout(5):
        await until(lambda: not engine.open)
        await world.at_rest()
    assert world.outcomes("m")["left" if reset else "2xx"] == 1


async def stalled(writer: asyncio.StreamWriter) -> int:
    """Wait until nothing more is read from a writer; returns the bytes that it keeps."""
    left, size = -1, writer.transport.get_write_buffer_size()
    while left != size:
        await asyncio.sleep(0.1)
        left, size = size, writer.transport.get_write_buffer_size()
    return size


SENT_MIB = 128


async def test_a_slow_engine_pauses_its_client(start):
    world = await start()
    reading = asyncio.Event()
    got = 0

    async def slow(wire: Wire, request: Message) -> None:
        nonlocal got
        await wire.send(SWITCHED)
        await reading.wait()
        while data := await wire.reader.read(1 << 20):
            got += len(data)
        wire.close()

    world.route("m", {"pod-1": await world.engine(slow)})
    wire = await opened(world)
    # On both connections, the kernel's buffers can grow to 36 MiB.
    for _ in range(SENT_MIB):
        wire.writer.write(bytes(1 << 20))
    assert await stalled(wire.writer) > (SENT_MIB - 2 * 36 - 8) << 20
    reading.set()
    await wire.writer.drain()
    wire.close()
    await until(lambda: got == SENT_MIB << 20)


async def test_an_engine_that_does_not_read_what_came_early_pauses_its_client(start, monkeypatch):
    async def dial(pool: EndpointPool, upstream: Upstream) -> None:
        loop = asyncio.get_running_loop()
        sock = socket.create_connection(pool.host.split(":"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        sock.setblocking(False)
        await loop.create_connection(lambda: upstream, sock=sock)

    monkeypatch.setattr(EndpointPool, "_dial", dial)
    world = await start()
    reading = asyncio.Event()

    async def slow(wire: Wire, request: Message) -> None:
        transport = cast(asyncio.Transport, wire.writer.transport)
        transport.pause_reading()
        await wire.send(SWITCHED)
        await reading.wait()
        transport.resume_reading()
        while await wire.reader.read(1 << 20):
            pass
        wire.close()

    engine = await world.engine(slow)
    world.route("m", {})
    wire = await world.client()
    await wire.send(handshake() + bytes(200_000))
    await until(lambda: world.held("m") == 1)
    world.route("m", {"pod-1": engine})
    assert (await wire.head()).status == 101
    for _ in range(64):
        wire.writer.write(bytes(1 << 20))
    assert await stalled(wire.writer) > 32 << 20
    wire.writer.transport.abort()
    reading.set()


async def test_a_slow_client_pauses_its_engine(start):
    world = await start()
    engines = []

    async def flood(wire: Wire, request: Message) -> None:
        engines.append(wire)
        await wire.send(SWITCHED)
        for _ in range(64):
            wire.writer.write(bytes(1 << 20))
        await wire.writer.drain()
        wire.close()

    world.route("m", {"pod-1": await world.engine(flood)})
    wire = await world.client(receive_buffer_bytes=4096)
    await wire.send(handshake())
    await until(lambda: engines)
    assert await stalled(engines[0].writer) > 32 << 20
    head = await wire.head()
    assert head.status == 101
    assert len(await wire.reader.read(-1)) == 64 << 20


async def test_a_side_that_does_not_read_ends_it(start):
    world = await start(between_bytes_timeout_s=0.05)

    async def flood(wire: Wire, request: Message) -> None:
        await wire.send(SWITCHED)
        for _ in range(64):
            await wire.send(bytes(1 << 20))

    engine = await world.engine(flood)
    world.route("m", {"pod-1": engine})
    wire = await world.client(receive_buffer_bytes=4096)
    await wire.send(handshake())
    await until(lambda: engine.requests)
    await until(lambda: world.server.relay.exchanges == 0)
    await until(lambda: not engine.open)


async def test_it_ends_when_nothing_passes_for_the_idle_timeout(start):
    world = await start(websocket_idle_timeout_s=1.0)
    engine = await world.engine(echo)
    world.route("m", {"pod-1": engine})
    wire = await opened(world)
    for _ in range(5):  # longer than the timeout in total
        await wire.send(b"ping")
        assert await wire.reader.readexactly(4) == b"ping"
        await asyncio.sleep(0.25)
    assert await wire.ended() in (True, False)
    await until(lambda: not engine.open)


async def test_it_outlives_the_timeouts_of_requests(start):
    short = {"between_bytes_timeout_s": 0.05, "first_byte_timeout_s": 0.05, "body_timeout_s": 0.05}
    world = await start(keep_alive_timeout_s=0.05, head_timeout_s=0.05, **short)
    world.route("m", {"pod-1": await world.engine(echo)})
    wire = await opened(world)
    loop = asyncio.get_running_loop()
    late_s = loop.time() + 0.3
    await until(lambda: loop.time() > late_s)
    await wire.send(b"hello")
    assert await wire.reader.readexactly(5) == b"hello"


async def test_it_drains_like_a_long_stream(echoing):
    world, _ = echoing
    wire = await opened(world)
    draining = asyncio.create_task(world.server.drain(0, 20))
    await until(lambda: world.server.relay.draining)
    await wire.send(b"hello")
    assert await wire.reader.readexactly(5) == b"hello"
    assert not draining.done()
    wire.close()
    async with asyncio.timeout(5):
        await draining


async def test_it_ends_when_the_drain_times_out(echoing):
    world, engine = echoing
    wire = await opened(world)
    await world.server.drain(0, 0.05)
    world.server.relay.stop()
    await wire.ended()
    await until(lambda: not engine.open)


async def test_it_stays_where_it_is_when_its_endpoint_leaves_the_route(echoing):
    world, _ = echoing
    wire = await opened(world)
    other = await world.engine(echo)
    world.route("m", {"pod-2": other})
    await wire.send(b"hello")
    assert await wire.reader.readexactly(5) == b"hello"
    assert not other.requests


async def test_observers_see_the_status_and_the_bytes(start):
    ends: list[RequestEnd] = []

    class Watching(Observers):
        @override
        def began(self, request: RequestStart) -> Observation:
            return Seen(self, request)

    class Seen(Observation):
        @override
        def ended(self, ending: RequestEnd) -> None:
            ends.append(ending)

    world = await start(observers=Watching(None, None))
    world.route("m", {"pod-1": await world.engine(echo)})
    wire = await opened(world)
    await wire.send(b"hello")
    await wire.reader.readexactly(5)
    wire.close()
    await until(lambda: ends)
    (end,) = ends
    assert (end.status, end.end, end.model, end.endpoint) == (101, "whole", "m", "pod-1")
    assert end.request_bytes == 5
    assert end.response_bytes > 5
