"""``/v1/realtime``: a handshake that is routed like other requests, and then bytes both ways."""

import asyncio
import socket
from typing import cast

import pytest
import uvloop
from fakes.websocket import PATH, SWITCHED, echo, handshake
from fakes.wire import Broken, Message, Wire, answer, post, until
from fakes.world import World
from typing_extensions import override

from kubeai.gateway.access_log import Observation, Observers
from kubeai.gateway.endpoint_pool import EndpointPool
from kubeai.gateway.local_routes import make_app
from kubeai.gateway.observation import RequestEnd, RequestStart
from kubeai.gateway.relay._upstream import Upstream

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


async def opened(world: World, request: bytes = b"") -> Wire:
    wire = await world.client()
    await wire.send(request or handshake())
    assert (await wire.head()).status == 101
    return wire


@pytest.fixture
async def echoing(start):
    world = await start()
    engine = await world.engine(echo)
    world.route("m", {"pod-1": engine})
    return world, engine


# -- the handshake -------------------------------------------------------------------------------


async def test_bytes_pass_both_ways_after_the_handshake(echoing):
    world, _ = echoing
    wire = await opened(world)
    for data in (b"\x81\x85abcdhello", bytes(range(256)) * 1000):
        await wire.send(data)
        assert await wire.reader.readexactly(len(data)) == data


@pytest.mark.parametrize("prefix", ["", "/openai"])
async def test_the_engine_gets_the_clients_handshake(echoing, prefix):
    world, engine = echoing
    more = ("Sec-WebSocket-Protocol: realtime, x", "Sec-WebSocket-Extensions: permessage-deflate")
    wire = await world.client()
    await wire.send(handshake(f"{prefix}/v1/realtime?intent=a%20b&model=m", *more))
    accepted = await wire.head()
    (request,) = engine.requests
    assert (request.method, request.target) == ("GET", "/v1/realtime?intent=a%20b&model=m")
    assert request.all("upgrade") == ["websocket"]
    assert request.all("connection") == ["Upgrade"]
    assert request.all("content-length") == []
    assert request.one("sec-websocket-key") == "a2V5"
    assert request.one("sec-websocket-protocol") == "realtime, x"
    assert request.one("sec-websocket-extensions") == "permessage-deflate"
    assert accepted.one("sec-websocket-accept") == "made-by-the-engine"
    assert (accepted.one("upgrade"), accepted.one("connection")) == ("websocket", "Upgrade")
    assert accepted.one("x-request-id") == request.one("x-request-id")


async def test_data_that_came_with_the_handshakes_is_passed_on(start):
    world = await start()

    async def eager(wire: Wire, request: Message) -> None:
        await wire.send(SWITCHED + b"from the engine")
        assert await wire.reader.readexactly(15) == b"from the client"
        await wire.send(b", got it")
        await wire.reader.read()
        wire.close()

    world.route("m", {"pod-1": await world.engine(eager)})
    wire = await opened(world, handshake() + b"from the client")
    assert await wire.reader.readexactly(23) == b"from the engine, got it"


async def test_an_adapter_is_named_to_the_engine_as_it_knows_it(start):
    world = await start()
    engine = await world.engine(echo)
    world.route("m", {"pod-1": (engine, ["a"])}, adapters=("a",))
    await opened(world, handshake("/v1/realtime?x=1&mod%65l=m%5Fa&y"))
    assert engine.requests[0].target == "/v1/realtime?x=1&model=a&y"


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v1/realtime?model=none", 404),
        ("/v1/realtime?model=m_none", 404),
        ("/v1/realtime?model=m&model=m", 400),
        ("/v1/realtime?model=", 400),
        ("/v1/realtime/x?model=m", 404),
    ],
)
async def test_a_handshake_without_a_model_that_exists_is_refused(echoing, target, status):
    world, engine = echoing
    wire = await world.client()
    await wire.send(handshake(target))
    assert (await wire.answer()).status == status
    assert not engine.requests


@pytest.mark.parametrize("more", [[], ["Connection: X-Label-Selector"]])
async def test_a_selector_that_does_not_match_is_a_404(echoing, more):
    world, _ = echoing
    wire = await world.client()
    await wire.send(handshake(PATH, "X-Label-Selector: a=b", *more))
    assert (await wire.answer()).status == 404


async def test_a_get_without_upgrade_is_a_426_that_names_the_protocol(echoing):
    world, engine = echoing
    wire = await world.client()
    await wire.send(b"GET /v1/realtime?model=m HTTP/1.1\r\nHost: h\r\n\r\n")
    refused = await wire.answer()
    assert (refused.status, refused.one("upgrade")) == (426, "websocket")
    assert not engine.requests


async def test_other_methods_are_a_405(start):
    world = await start(local_routes=make_app)
    wire = await world.client()
    await wire.send(post("/v1/realtime?model=m"))
    refused = await wire.answer()
    assert (refused.status, refused.one("allow")) == (405, "GET")


async def test_a_handshake_with_a_body_is_refused(echoing):
    world, engine = echoing
    wire = await world.client()
    await wire.send(handshake(PATH, "Content-Length: 5") + b"hello")
    assert (await wire.answer()).status == 400
    assert not engine.requests


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://gateway", 101),
        ("https://allowed.example", 101),
        ("https://allowed.example.evil", 403),
        ("http://gateway.evil", 403),
        ("null", 403),
    ],
)
async def test_only_pages_that_may_use_the_api_open_a_websocket(start, origin, status):
    world = await start(cors_origins=("https://allowed.example",))
    engine = await world.engine(echo)
    world.route("m", {"pod-1": engine})
    wire = await world.client()
    await wire.send(handshake(PATH, f"Origin: {origin}"))
    assert (await wire.head()).status == status
    assert all(request.all("origin") == [] for request in engine.requests)
    assert bool(engine.requests) == (status == 101)


async def test_without_cors_origins_a_foreign_page_is_refused(echoing):
    world, _ = echoing
    wire = await world.client()
    await wire.send(handshake(PATH, "Origin: https://evil.example"))
    assert (await wire.answer()).status == 403


@pytest.mark.parametrize("status", [400, 403, 404])
async def test_another_response_of_the_engine_is_passed_on(start, status):
    world = await start()

    async def refuse(wire: Wire, request: Message) -> None:
        await wire.send(answer(status, b"no", "X-Why: x", reason="No"))

    world.route("m", {"pod-1": await world.engine(refuse)})
    wire = await world.client()
    for _ in range(2):  # the connection stays usable
        await wire.send(handshake())
        refused = await wire.answer()
        assert (refused.status, refused.body, refused.one("x-why")) == (status, b"no", "x")


async def test_a_handshake_is_retried_on_another_endpoint(start):
    world = await start()

    async def fail(wire: Wire, request: Message) -> None:
        await wire.send(answer(503))

    async def drop(wire: Wire, request: Message) -> None:
        raise Broken(b"", False)

    engines = [await world.engine(script) for script in (fail, drop, echo)]
    world.route("m", {f"pod-{i}": engine for i, engine in enumerate(engines)})
    for _ in range(3):
        wire = await opened(world)
        await wire.send(b"hello")
        assert await wire.reader.readexactly(5) == b"hello"
        wire.close()
        await world.at_rest()


async def test_a_handshake_is_held_until_a_replica_is_ready(start):
    world = await start(hold_comment_after_s=0.01)
    engine = await world.engine(echo)
    world.route("m", {})
    wire = await world.client()
    await wire.send(handshake())
    await until(lambda: world.held("m") == 1)
    assert world.demanded == ["m"]
    world.route("m", {"pod-1": engine})
    accepted = await wire.head()
    assert accepted.status == 101
    assert accepted.one("x-kubeai-waited")


async def test_an_alias_is_replaced_in_the_query(start):
    world = await start()
    engine = await world.engine(echo)
    world.route("m", {"pod-1": engine}, aliases=("openai/whisper",))
    await opened(world, handshake("/v1/realtime?model=openai%2Fwhisper&x=1"))
    assert engine.requests[0].target == "/v1/realtime?model=m&x=1"


@pytest.mark.parametrize("fails", [True, False])
async def test_a_handshake_falls_back(start, fails):
    world = await start(retries=0)

    async def fail(wire: Wire, request: Message) -> None:
        await wire.send(answer(503))

    engine = await world.engine(echo)
    world.route("b", {"b-1": engine})
    endpoints = {"m-1": await world.engine(fail)} if fails else {}
    world.route("m", endpoints, fallbacks=("b",))
    wire = await opened(world, handshake("/v1/realtime?a=1&model=m"))
    assert engine.requests[0].target == "/v1/realtime?a=1&model=b"
    await wire.send(b"abc")
    assert await wire.reader.readexactly(3) == b"abc"


async def test_a_101_to_a_request_that_is_no_handshake_is_invalid(start):
    world = await start(retries=0)
    world.route("m", {"pod-1": await world.engine(echo)})
    wire = await world.client()
    await wire.send(post())
    assert (await wire.answer()).status == 502


# -- while it is open ----------------------------------------------------------------------------


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
    async with asyncio.timeout(1):
        assert await wire.reader.read() == b""
        await world.at_rest()
    assert world.outcomes("m")["broken" if reset else "2xx"] == 1


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
async def test_when_the_client_leaves_the_engine_is_closed_at_once(echoing, reset):
    world, engine = echoing
    wire = await opened(world)
    wire.reset() if reset else wire.close()
    async with asyncio.timeout(1):
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


async def test_a_slow_engine_pauses_its_client(start):
    world = await start()
    reading = asyncio.Event()
    got = 0

    async def slow(wire: Wire, request: Message) -> None:
        nonlocal got
        await wire.send(SWITCHED)
        await reading.wait()  # the stream's limit and the socket's buffer hold 2 MiB or so
        while data := await wire.reader.read(1 << 20):
            got += len(data)
        wire.close()

    world.route("m", {"pod-1": await world.engine(slow)})
    wire = await opened(world)
    for _ in range(64):
        wire.writer.write(bytes(1 << 20))
    assert await stalled(wire.writer) > 32 << 20
    reading.set()
    await wire.writer.drain()
    wire.close()
    await until(lambda: got == 64 << 20)


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
    world = await start(websocket_idle_timeout_s=0.1)
    engine = await world.engine(echo)
    world.route("m", {"pod-1": engine})
    wire = await opened(world)
    for _ in range(8):  # longer than the timeout in total
        await wire.send(b"ping")
        assert await wire.reader.readexactly(4) == b"ping"
        await asyncio.sleep(0.03)
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
