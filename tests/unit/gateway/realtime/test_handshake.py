"""``/v1/realtime``: the handshake is routed, held and retried like other requests."""

import pytest
import uvloop
from fakes.websocket import PATH, SWITCHED, echo, handshake, opened
from fakes.wire import Broken, Message, Wire, answer, post, until

from kubeai.gateway.local_routes import make_app

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


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
