"""Responses for an adapter name the model as its client does."""

import asyncio
import gzip
import json

import pytest
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, post, until
from fakes.world import World

CHAT = "/v1/chat/completions"
JSON = "Content-Type: application/json"
REPLY = b'{"id":"1","model":"a","choices":[{"message":{"content":"\\"model\\":\\"a\\""}}]}'
RENAMED = REPLY.replace(b'"model":"a"', b'"model":"m_a"', 1)
EVENTS = b'data: {"model":"a","choices":[]}\n\n' * 3 + b"data: [DONE]\n\n"


def ask(model: str = "m_a", path: str = CHAT, version: str = "1.1", **fields: object) -> bytes:
    body = json.dumps({"model": model, "messages": [], **fields}).encode()
    return post(path, body, version=version)


@pytest.fixture
async def adapters(start):
    world = await start()

    async def serve(*parts: bytes, close: bool = False) -> World:
        async def script(wire: Wire, request: Message) -> None:
            for part in parts:
                await wire.send(part)
                await asyncio.sleep(0)
            if close:
                wire.close()

        engine = await world.engine(script)
        world.route("m", {"pod-1": (engine, ["a"])}, adapters=("a",))
        return world

    return serve


async def got(world: World, request: bytes) -> Message:
    wire = await world.client()
    await wire.send(request)
    return await wire.answer()


async def test_json_of_known_length_is_renamed(adapters):
    world = await adapters(answer(200, REPLY, JSON))
    answered = await got(world, ask())
    assert (answered.status, answered.body) == (200, RENAMED)
    assert world.engines.popitem()[1].requests[0].body.startswith(b'{"model": "a"')


async def test_the_connection_serves_further_requests(adapters):
    world = await adapters(answer(200, REPLY, JSON))
    wire = await world.client()
    for model, body in (("m_a", RENAMED), ("m", REPLY), ("m_a", RENAMED)):
        await wire.send(ask(model))
        assert (await wire.answer()).body == body


async def test_without_an_adapter_nothing_is_changed(adapters):
    world = await adapters(answer(200, REPLY.replace(b'"a"', b'"m"'), JSON))
    answered = await got(world, ask("m"))
    assert answered.body == REPLY.replace(b'"a"', b'"m"')
    assert answered.one("content-length") == str(len(answered.body))


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_chunked_response_is_renamed(adapters, version):
    head = CHUNKED.replace(b"text/event-stream", b"application/json; charset=utf-8")
    parts = [chunk(REPLY[at : at + 5]) for at in range(0, len(REPLY), 5)]
    world = await adapters(head, *parts, chunk(b""))
    assert (await got(world, ask(version=version))).body == RENAMED


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_response_until_the_end_of_the_connection_is_renamed(adapters, version):
    head = f"HTTP/1.1 200 OK\r\n{JSON}\r\n\r\n".encode()
    world = await adapters(head, REPLY[:20], REPLY[20:], close=True)
    assert (await got(world, ask(version=version))).body == RENAMED


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_the_events_of_a_stream_are_renamed(adapters, version):
    world = await adapters(
        CHUNKED, *map(chunk, (EVENTS[:9], EVENTS[9:50], EVENTS[50:])), chunk(b"")
    )
    answered = await got(world, ask(stream=True, version=version))
    assert answered.body == EVENTS.replace(b'"a"', b'"m_a"')


@pytest.mark.parametrize(
    ("path", "event"),
    [
        ("/v1/responses", b'data: {"type":"response.created","response":{"model":"a"}}\n\n'),
        ("/v1/messages", b'data: {"type":"message_start","message":{"model":"a"}}\n\n'),
    ],
)
async def test_nested_models_of_events_are_renamed(adapters, path, event):
    world = await adapters(CHUNKED, chunk(event), chunk(b""))
    answered = await got(world, ask(path=path, stream=True, input="x"))
    assert answered.body == event.replace(b'"a"', b'"m_a"')


async def test_an_event_reaches_the_client_before_the_next_one_comes(start):
    world = await start()
    more = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED, chunk(b'data: {"model":"a"}\n\n'))
        await more.wait()
        await wire.send(chunk(b"data: [DONE]\n\n"), chunk(b""))

    engine = await world.engine(script)
    world.route("m", {"pod-1": (engine, ["a"])}, adapters=("a",))
    wire = await world.client()
    await wire.send(ask(stream=True))
    head = await wire.head()
    async with asyncio.timeout(5):
        first = await wire.reader.readuntil(b"\n\n\r\n")
    assert b'data: {"model":"m_a"}' in first
    more.set()
    assert (await wire.body(head)).body == b"data: [DONE]\n\n"


@pytest.mark.parametrize(
    "headers",
    [
        (JSON, "Content-Encoding: gzip"),
        ("Content-Type: text/plain",),
        (),
    ],
)
async def test_a_response_that_cannot_be_read_is_unchanged(adapters, headers):
    body = gzip.compress(REPLY) if len(headers) == 2 else REPLY
    world = await adapters(answer(200, body, *headers))
    answered = await got(world, ask())
    assert answered.body == body
    assert answered.one("content-length") == str(len(body))


@pytest.mark.parametrize("coding", ["identity", "Identity", "identity, identity", ""])
async def test_a_response_that_is_not_compressed_is_renamed(adapters, coding):
    world = await adapters(answer(200, REPLY, JSON, f"Content-Encoding: {coding}"))
    assert b'"m_a"' in (await got(world, ask())).body


@pytest.mark.parametrize("coding", ["x-gzip", "identity, gzip", "gzip, identity"])
async def test_a_compressed_response_is_unchanged(adapters, coding):
    body = gzip.compress(REPLY)
    world = await adapters(answer(200, body, JSON, f"Content-Encoding: {coding}"))
    answered = await got(world, ask())
    assert (answered.body, answered.one("content-encoding")) == (body, coding)


async def test_an_error_of_the_engine_is_passed_on(adapters):
    body = b'{"error":{"message":"The model `a` is busy","model":"a"}}'
    world = await adapters(answer(400, body, JSON, reason="Bad Request"))
    answered = await got(world, ask())
    assert (answered.status, answered.body) == (400, body)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_broken_response_does_not_look_complete(adapters, version):
    head = f"HTTP/1.1 200 OK\r\n{JSON}\r\nContent-Length: {len(REPLY)}\r\n\r\n".encode()
    world = await adapters(head, REPLY[:-5], close=True)
    wire = await world.client()
    await wire.send(ask(version=version))
    head = await wire.head()
    with pytest.raises(Broken):
        await wire.body(head, until_close=True)


async def test_a_retried_request_is_renamed_from_its_beginning(start):
    world = await start()

    async def die(wire: Wire, request: Message) -> None:
        await wire.send(answer(503, b'{"model":"a"', JSON))

    async def serve(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, REPLY, JSON))

    engines = [await world.engine(die), await world.engine(serve)]
    pods = {f"pod-{i}": (engine, ["a"]) for i, engine in enumerate(engines)}
    world.route("m", pods, adapters=("a",))
    for _ in range(3):
        assert (await got(world, ask())).body == RENAMED


async def test_a_stream_that_began_with_comments_is_renamed(start):
    world = await start(hold_comment_after_s=0.01, hold_comment_interval_s=0.01)

    async def serve(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED, chunk(EVENTS), chunk(b""))

    engine = await world.engine(serve)
    world.route("m", {}, adapters=("a",))
    wire = await world.client()
    await wire.send(ask(stream=True))
    head = await wire.head()
    await until(lambda: world.held("m") == 1)
    world.route("m", {"pod-1": (engine, ["a"])}, adapters=("a",))
    body = (await wire.body(head)).body
    assert body.startswith(b": waiting for a replica")
    assert body.endswith(EVENTS.replace(b'"a"', b'"m_a"'))


async def test_a_form_for_an_adapter_is_renamed_too(adapters):
    world = await adapters(CHUNKED, chunk(b'data: {"model":"a","text":"x"}\n\n'), chunk(b""))
    form = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm_a\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nRIFF\r\n--b--\r\n'
    )
    kind = "Content-Type: multipart/form-data; boundary=b"
    answered = await got(world, post("/v1/audio/transcriptions", form, kind))
    assert answered.body == b'data: {"model":"m_a","text":"x"}\n\n'
