"""What a request uses is counted for its key, and the client of a stream sees nothing of it."""

import asyncio
import gzip
import hashlib
import json

import pytest
from fakes.api_keys import stored_id
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, post, says, until
from fakes.world import World

from kubeai._keys import Key
from kubeai.api.config.system import KeysConfig
from kubeai.gateway.usage_refusals import REFUSAL_S, UsageRefusals
from kubeai.routing.keys import KeyRecord

SECRET = "sk-test"
DIGEST = hashlib.sha256(SECRET.encode()).digest()
AUTHORIZATION = f"Authorization: Bearer {SECRET}"
CHAT, COMPLETIONS = "/v1/chat/completions", "/openai/v1/completions"
USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 8},
}
OPTIONS = {"include_usage": True}


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps({"id": "1", "model": "m", **fields}).encode() + b"\n\n"


TOKEN = event(choices=[{"index": 0, "delta": {"content": "hi"}}])
REPORT = event(choices=[], usage=USAGE)
DONE = b"data: [DONE]\n\n"


def ask(path: str = CHAT, *headers: str, version: str = "1.1", **fields: object) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}], **fields}
    return post(path, json.dumps(body).encode(), AUTHORIZATION, *headers, version=version)


@pytest.fixture
async def keyed(start):
    """Start a gateway in which each request has a key."""
    key = Key(KeyRecord("alice", DIGEST, "acme"))

    async def keyed(**config) -> World:
        world = await start(keys=KeysConfig(required=True), **config)
        world.context.keys[DIGEST] = key
        return world

    return keyed


async def counted(world: World) -> dict[str, tuple[int, ...]]:
    """By Model: requests, estimated requests, prompt, cached and completion tokens."""
    await world.at_rest()
    rows = world.context.meter.take()
    assert {(row.key, row.tenant) for row in rows} <= {("alice", "acme")}
    return {row.model: row[3:] for row in rows}


async def got(world: World, request: bytes) -> Message:
    wire = await world.client()
    await wire.send(request)
    return await wire.answer()


def streams(*events: bytes):
    """A script that streams events, each in its own chunk; the usage only if it is asked for."""

    async def script(wire: Wire, request: Message) -> None:
        options = json.loads(request.body).get("stream_options")
        await wire.send(CHUNKED)
        for each in events:
            if each is not REPORT or options == OPTIONS:
                await wire.send(chunk(each))
        await wire.send(chunk(b""))

    return script


async def test_a_response_counts_with_the_tokens_that_it_reports(keyed):
    world = await keyed()
    body = json.dumps({"choices": [], "usage": USAGE}).encode()
    world.route("m", {"pod": await world.engine(says(body))})
    for _ in range(3):
        assert (await got(world, ask())).body == body
    assert await counted(world) == {"m": (3, 0, 36, 24, 21)}
    assert await counted(world) == {}


@pytest.mark.parametrize("size", [61, 1000, 2047, 5000])
async def test_a_report_near_the_end_is_found_wherever_the_buffers_of_a_response_end(keyed, size):
    lengths = range(0, 2200, 43)
    bodies = [
        b'{"choices": "%b", "usage": %b, "more": "%b"}'
        % (b"x" * length, json.dumps(USAGE).encode(), b"y" * (7 * length % 1900))
        for length in lengths
    ]
    left = iter(bodies)

    async def script(wire: Wire, request: Message) -> None:
        body = next(left)
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        for at in range(0, len(body), size):
            await wire.send(body[at : at + size])

    world = await keyed()
    world.route("m", {"pod": await world.engine(script)})
    wire = await world.client()
    for body in bodies:
        await wire.send(ask())
        assert (await wire.answer()).body == body
    count = len(lengths)
    assert await counted(world) == {"m": (count, 0, 12 * count, 8 * count, 7 * count)}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_stream_is_counted_and_its_client_does_not_see_the_report(keyed, path, version):
    world = await keyed()
    engine = await world.engine(streams(TOKEN, TOKEN, REPORT, DONE))
    world.route("m", {"pod": engine})
    answered = await got(world, ask(path, version=version, prompt="x", stream=True))
    assert answered.body == TOKEN + TOKEN + DONE
    assert json.loads(engine.requests[0].body)["stream_options"] == OPTIONS
    assert await counted(world) == {"m": (1, 0, 12, 8, 7)}


async def test_a_client_that_asks_for_the_usage_sees_it(keyed):
    world = await keyed()
    world.route("m", {"pod": await world.engine(streams(TOKEN, REPORT, DONE))})
    answered = await got(world, ask(stream=True, stream_options=OPTIONS))
    assert answered.body == TOKEN + REPORT + DONE
    assert await counted(world) == {"m": (1, 0, 12, 8, 7)}


async def test_without_a_key_the_engine_is_not_asked(start):
    world = await start()
    engine = await world.engine(streams(TOKEN, REPORT, DONE))
    world.route("m", {"pod": engine})
    request = ask(stream=True)
    assert (await got(world, request)).body == TOKEN + DONE
    assert engine.requests[0].body == request.partition(b"\r\n\r\n")[2]
    assert world.context.meter is None


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_the_report_is_found_and_removed_however_it_is_split(keyed, size):
    body = TOKEN + REPORT + DONE

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED)
        for at in range(0, len(body), size):
            await wire.send(chunk(body[at : at + size]))
        await wire.send(chunk(b""))

    world = await keyed()
    world.route("m", {"pod": await world.engine(script)})
    assert (await got(world, ask(stream=True))).body == TOKEN + DONE


async def test_the_framing_of_chunks_does_not_matter(keyed):
    framed = (
        chunk(TOKEN)
        + b"0%X;name=value\r\n%b\r\n" % (len(TOKEN), TOKEN)
        + chunk(TOKEN + TOKEN[:9])
        + chunk(TOKEN[9:])
        + chunk(REPORT)
        + chunk(DONE)
        + b"0\r\nTrailer: x\r\n\r\n"
    )
    cuts = iter(range(1, len(framed), 19))

    async def script(wire: Wire, request: Message) -> None:
        cut = next(cuts)
        await wire.send(CHUNKED + framed[:cut])
        for _ in range(3):
            await asyncio.sleep(0)
        await wire.send(framed[cut:])

    world = await keyed()
    world.route("m", {"pod": await world.engine(script)})
    count = len(range(1, len(framed), 19))
    for _ in range(count):
        assert (await got(world, ask(stream=True))).body == TOKEN * 4 + DONE
    assert await counted(world) == {"m": (count, 0, 12 * count, 8 * count, 7 * count)}


async def test_a_report_whose_bytes_come_apart_is_counted(keyed):
    framed = chunk(TOKEN) + chunk(REPORT) + chunk(DONE) + chunk(b"")
    cut = framed.index(b'"completion_tokens"') + 5

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + framed[:cut])
        await until(lambda: came, "the client has the first part")
        await wire.send(framed[cut:])

    came = []
    world = await keyed()
    world.route("m", {"pod": await world.engine(script)})
    wire = await world.client()
    await wire.send(ask(stream=True))
    await wire.reader.readuntil(TOKEN[-20:])
    came.append(True)
    await wire.reader.readuntil(b"0\r\n\r\n")
    assert await counted(world) == {"m": (1, 0, 12, 8, 7)}


async def test_an_adapters_stream_is_renamed_and_filtered(keyed):
    events = [each.replace(b'"m"', b'"a"') for each in (TOKEN, REPORT)]
    world = await keyed()
    engine = await world.engine(streams(*events, DONE))
    world.route("m", {"pod": (engine, ["a"])}, adapters=("a",))
    answered = await got(world, ask(model="m_a", stream=True))
    assert answered.body == TOKEN.replace(b'"m"', b'"m_a"') + DONE
    sent = json.loads(engine.requests[0].body)
    assert (sent["model"], sent["stream_options"]) == ("a", OPTIONS)
    assert await counted(world) == {"m": (1, 0, 12, 8, 7)}


@pytest.mark.parametrize(("engine_kind", "kept"), [("VLLM", False), ("SGLang", True)])
async def test_null_usage_is_removed_unless_the_engine_always_writes_it(keyed, engine_kind, kept):
    null = event(choices=[{"delta": {}}], usage=None)
    world = await keyed()
    engine = await world.engine(streams(null, REPORT, DONE))
    world.route("m", {"pod": engine}, engine=engine_kind)
    expected = null if kept else event(choices=[{"delta": {}}])
    assert (await got(world, ask(stream=True))).body == expected + DONE


@pytest.mark.parametrize("coding", ["gzip", None])
@pytest.mark.parametrize("size", [100, 2 << 20])
async def test_large_and_compressed_bodies_are_asked_like_others(keyed, coding, size):
    world = await keyed()
    engine = await world.engine(streams(TOKEN, REPORT, DONE))
    world.route("m", {"pod": engine})
    body = json.dumps({"model": "m", "stream": True, "prompt": "x" * size}).encode()
    headers = [AUTHORIZATION]
    if coding:
        headers.append(f"Content-Encoding: {coding}")
    sent = gzip.compress(body) if coding else body
    assert (await got(world, post(COMPLETIONS, sent, *headers))).body == TOKEN + DONE
    (request,) = engine.requests
    assert request.all("content-encoding") == []
    assert json.loads(request.body) == json.loads(body) | {"stream_options": OPTIONS}
    assert await counted(world) == {"m": (1, 0, 12, 8, 7)}


async def test_a_compressed_body_that_does_not_stream_is_sent_as_it_came(keyed):
    world = await keyed()
    engine = await world.engine(says(b"{}"))
    world.route("m", {"pod": engine})
    body = gzip.compress(b'{"model":"m"}')
    await got(world, post(CHAT, body, AUTHORIZATION, "Content-Encoding: gzip"))
    assert engine.requests[0].body == body


@pytest.mark.parametrize("status", [400, 422])
@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("size", [400, 2 << 20])
async def test_an_engine_that_rejects_the_field_is_sent_the_clients_body(
    keyed, status, length, size
):
    reason = b'{"error":"unknown field stream_options"}'
    head = f"HTTP/1.1 {status} Bad\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    plain = streams(TOKEN, DONE)

    async def script(wire: Wire, request: Message) -> None:
        if b"stream_options" in request.body:
            await wire.send(answer(status, reason) if length else head + chunk(reason) + chunk(b""))
        else:
            await plain(wire, request)

    world = await keyed()
    engine = await world.engine(script)
    world.route("m", {"pod": engine})
    request = ask(stream=True, prompt="x" * size)
    assert (await got(world, request)).body == TOKEN + DONE
    assert engine.requests[1].body == request.partition(b"\r\n\r\n")[2]
    assert (await got(world, request)).body == TOKEN + DONE
    assert len(engine.requests) == 3, "it is not asked again"
    requests, estimated, prompt, *_ = (await counted(world))["m"]
    assert (requests, estimated) == (2, 2)
    assert prompt > 100
    assert world.outcomes("m")["retried"] == 0


async def test_a_request_that_is_invalid_without_the_field_too_gets_the_engines_error(keyed):
    world = await keyed()
    engine = await world.engine(says(b'{"error":"temperature"}', 400))
    world.route("m", {"pod": engine})
    for _ in range(2):
        answered = await got(world, ask(stream=True))
        assert (answered.status, answered.body) == (400, b'{"error":"temperature"}')
    assert len(engine.requests) == 4, "the engine has not been shown to reject the field"
    assert await counted(world) == {"m": (2, 0, 0, 0, 0)}


def test_an_engine_that_rejected_the_field_is_asked_again_later():
    class Routed:
        pass

    now_s = 100.0
    refusals = UsageRefusals(lambda: now_s)
    routed, other = Routed(), Routed()
    refusals.add(routed)
    assert (routed in refusals, other in refusals) == (True, False)
    now_s += REFUSAL_S
    assert routed not in refusals


async def test_a_retry_on_another_endpoint_asks_as_well(keyed):
    world = await keyed()
    bad = await world.engine(says(b"{}", 503))
    good = await world.engine(streams(TOKEN, REPORT, DONE))
    world.route("m", {"bad": bad})
    wire = await world.client()
    await wire.send(ask(stream=True))
    await until(lambda: bad.requests, "the first attempt was made")
    world.route("m", {"bad": bad, "good": good})
    assert (await wire.answer()).body == TOKEN + DONE
    assert json.loads(good.requests[0].body)["stream_options"] == OPTIONS
    assert await counted(world) == {"m": (1, 0, 12, 8, 7)}


async def test_a_client_that_leaves_is_counted_with_what_was_sent(keyed):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(TOKEN) * 200)
        await wire.ended()

    world = await keyed()
    world.route("m", {"pod": await world.engine(streams(*[TOKEN] * 100, REPORT, DONE))})
    await got(world, ask(stream=True))
    # 7 tokens are too few to learn from: without a sample, the default applies.
    assert (await counted(world))["m"][4] == 7
    world.route("m", {"pod": await world.engine(script)})
    wire = await world.client()
    await wire.send(ask(stream=True))
    for _ in range(200):
        await wire.reader.readuntil(b"\n\n")
    wire.close()
    requests, estimated, prompt, cached, completion = (await counted(world))["m"]
    assert (requests, estimated, cached) == (1, 1, 0)
    assert 90 < prompt < 130
    assert 60 < completion < 220


@pytest.mark.parametrize("stream", [1, "yes"])
async def test_a_stream_that_only_the_engine_recognises_is_counted_as_one(keyed, stream):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(TOKEN) * 200)
        await wire.ended()

    world = await keyed()
    world.route("m", {"pod": await world.engine(script)})
    wire = await world.client()
    await wire.send(ask(stream=stream))
    for _ in range(200):
        await wire.reader.readuntil(b"\n\n")
    wire.close()
    assert 60 < (await counted(world))["m"][4] < 220


async def test_the_size_of_a_models_tokens_is_learned_from_its_streams(keyed):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(TOKEN) * 200)
        await wire.ended()

    world = await keyed()
    report = event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 400})
    world.route("m", {"pod": await world.engine(streams(*[TOKEN] * 200, report, DONE))})
    await got(world, ask(stream=True))
    await counted(world)
    world.route("m", {"pod": await world.engine(script)})
    wire = await world.client()
    await wire.send(ask(stream=True))
    for _ in range(200):
        await wire.reader.readuntil(b"\n\n")
    wire.close()
    assert 370 < (await counted(world))["m"][4] < 430


async def test_a_client_that_leaves_before_the_first_byte_is_counted_with_its_prompt(keyed):
    async def script(wire: Wire, request: Message) -> None:
        await wire.ended()

    world = await keyed()
    engine = await world.engine(script)
    world.route("m", {"pod": engine})
    wire = await world.client()
    await wire.send(ask(stream=True))
    await until(lambda: engine.requests, "the engine has the request")
    wire.close()
    requests, estimated, prompt, _, completion = (await counted(world))["m"]
    assert (requests, estimated, completion) == (1, 1, 0)
    assert prompt > 90


@pytest.mark.parametrize("status", [404, 500])
async def test_an_error_counts_as_a_request_without_tokens(keyed, status):
    world = await keyed(retries=0)
    world.route("m", {"pod": await world.engine(says(b'{"error":{}}', status))})
    await got(world, ask(stream=True))
    assert await counted(world) == {"m": (1, 0, 0, 0, 0)}


async def test_a_request_for_an_unknown_model_is_not_counted(keyed):
    world = await keyed()
    assert (await got(world, ask())).status == 404
    assert world.context.meter.take() == ()


async def test_embeddings_count_their_prompt(keyed):
    body = json.dumps({"data": [], "usage": {"prompt_tokens": 5, "total_tokens": 5}}).encode()
    world = await keyed()
    world.route("m", {"pod": await world.engine(says(body))}, features=("TextEmbedding",))
    request = post("/v1/embeddings", b'{"model":"m","input":"x"}', AUTHORIZATION)
    assert (await got(world, request)).status == 200
    assert await counted(world) == {"m": (1, 0, 5, 0, 0)}


async def test_reading_a_stored_response_does_not_count_its_tokens_again(keyed):
    async def script(wire: Wire, request: Message) -> None:
        usage = {"input_tokens": 12, "output_tokens": 7}
        await wire.send(answer(200, json.dumps({"id": "resp_1", "usage": usage}).encode()))

    world = await keyed()
    world.route("m", {"pod": await world.engine(script)})
    request = (
        f"GET /v1/responses/{stored_id('acme')} HTTP/1.1\r\nHost: g\r\n{AUTHORIZATION}\r\n\r\n"
    )
    assert (await got(world, request.encode())).status == 200
    assert await counted(world) == {"m": (1, 0, 0, 0, 0)}
