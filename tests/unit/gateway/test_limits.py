"""The limits of API keys: what a request is charged, what is refused, what clients are told."""

import asyncio
import json
from typing import Any

import pytest
import uvloop
from fakes.api_keys import REQUIRED, stored_id
from fakes.chats import CHAT, ask, failing, hang, lose
from fakes.limited_keys import KeyedWorld, bearer, digest_of
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, post, says, until

from kubeai._key_table import Use
from kubeai.openai import request as openai

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
)
USAGE = b'{"choices":[{"text":"x"}],"usage":{"prompt_tokens":%d,"completion_tokens":%d}}'


@pytest.fixture
async def keyed(start):
    keyed = KeyedWorld(await start(keys=REQUIRED, hold_timeout_s=0.2, eject_time_s=60.0))
    yield keyed
    await keyed.world.at_rest()
    for name in keyed.rows.rows:
        assert keyed.use(name).in_flight == 0
    keyed.close()


def ask_as(name: str, model: str = "m", **options: Any) -> bytes:
    return ask(model, bearer(name), **options)


def limits_in(message: Message) -> dict[str, str]:
    found = {}
    for of in ("requests", "tokens"):
        for what in ("limit", "remaining", "reset"):
            value = message.one(f"x-ratelimit-{what}-{of}")
            if value is not None:
                found[f"{what}-{of}"] = value
    return found


async def refused(wire: Wire) -> tuple[dict, Message]:
    answered = await wire.answer()
    assert answered.status == 429, answered
    return json.loads(answered.body)["error"], answered


async def test_requests_beyond_the_limit_get_a_429_that_says_when_to_retry(keyed):
    world = keyed.world
    engine = await world.engine(says(b""))
    world.route("m", {"a": engine})
    keyed.add("k", requests_per_minute=2)
    keyed.add("other", requests_per_minute=2)
    wire = await world.client()
    for left in ("1", "0"):
        await wire.send(ask_as("k"))
        served = await wire.answer()
        assert served.status == 200
        assert limits_in(served) == {
            "limit-requests": "2",
            "remaining-requests": left,
            "reset-requests": "1m10s",
        }
    await wire.send(ask_as("k"))
    error, answered = await refused(wire)
    assert error == {
        "message": "Rate limit reached: this API key may send 2 requests per minute. "
        "Try again in 61 s.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert answered.one("retry-after") == "61"
    assert limits_in(answered)["remaining-requests"] == "0"
    assert len(engine.requests) == 2
    await wire.send(ask_as("other"))
    assert (await wire.answer()).status == 200
    keyed.clock.now_s += 66
    await wire.send(ask_as("k"))
    assert (await wire.answer()).status == 200


@pytest.mark.parametrize(
    ("path", "error_in"),
    [
        ("/openai/v1/messages", lambda body: (body["type"], body["error"]["type"])),
        ("/api/chat", lambda body: tuple(body)),
    ],
)
async def test_the_429_has_the_format_of_the_requests_api(keyed, path, error_in):
    world = keyed.world
    world.route("m", {"a": await world.engine(says(b""))}, engine="OLlama")
    keyed.add("k", requests_per_minute=1)
    wire = await world.client()
    await wire.send(ask_as("k", path=path))
    assert (await wire.answer()).status == 200
    await wire.send(ask_as("k", path=path))
    answered = await wire.answer()
    assert answered.status == 429
    assert answered.one("retry-after") == "61"
    assert error_in(json.loads(answered.body)) in (("error", "rate_limit_error"), ("error",))


async def test_nothing_is_counted_or_scaled_for_the_model_of_a_refused_request(keyed):
    world = keyed.world
    world.route("cold", {})
    world.route("m", {"a": await world.engine(says(b""))})
    keyed.add("k", requests_per_minute=1)
    wire = await world.client()
    await wire.send(ask_as("k"))
    assert (await wire.answer()).status == 200
    await wire.send(ask_as("k", "cold"))
    await refused(wire)
    assert world.demanded == []
    assert set(world.outcomes("cold").values()) == {0}
    assert keyed.use("k") == Use(0, 1, 0)


async def test_a_request_for_a_model_that_does_not_exist_is_not_charged(keyed):
    world = keyed.world
    world.route("m", {"a": await world.engine(says(b""))})
    keyed.add("k", requests_per_minute=1)
    wire = await world.client()
    await wire.send(ask_as("k", "missing"))
    assert (await wire.answer()).status == 404
    assert keyed.use("k") == Use(0, 0, 0)


async def test_a_request_larger_than_the_limit_is_refused_for_good(keyed):
    world = keyed.world
    world.route("m", {"a": await world.engine(says(b""))})
    keyed.add("k", tokens_per_minute=100)
    wire = await world.client()
    await wire.send(ask_as("k", max_tokens=101))
    error, answered = await refused(wire)
    assert "may use 101 tokens" in error["message"]
    assert "100 tokens per minute" in error["message"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "tokens")
    assert answered.one("x-should-retry") == "false"
    assert answered.one("retry-after") == "60"


async def test_requests_in_flight_are_limited_until_one_ends(keyed):
    world = keyed.world
    release = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        await release.wait()
        await wire.send(answer(200, b"{}"))

    world.route("m", {"a": await world.engine(script)})
    keyed.add("k", in_flight_max=2)
    first, second, third = [await world.client() for _ in range(3)]
    await first.send(ask_as("k"))
    await second.send(ask_as("k"))
    await until(lambda: keyed.use("k").in_flight == 2)
    await third.send(ask_as("k"))
    error, answered = await refused(third)
    assert "2 requests in flight" in error["message"]
    assert answered.one("retry-after") == "1"
    assert limits_in(answered) == {}
    release.set()
    assert (await first.answer()).status == (await second.answer()).status == 200
    await until(lambda: keyed.use("k").in_flight == 0)
    await third.send(ask_as("k"))
    assert (await third.answer()).status == 200


async def test_tokens_are_reserved_from_the_body_and_settled_from_the_reported_usage(keyed):
    world = keyed.world
    release = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        await release.wait()
        await wire.send(answer(200, USAGE % (30, 12)))

    world.route("m", {"a": await world.engine(script)})
    keyed.add("k", tokens_per_minute=1000)
    wire, other = await world.client(), await world.client()
    await wire.send(ask_as("k", max_tokens=900))
    await until(lambda: keyed.use("k").in_flight == 1)
    reserved = keyed.use("k").tokens
    assert 900 <= reserved < 910
    await other.send(ask_as("k", max_tokens=200))
    error, _ = await refused(other)
    assert error["type"] == "tokens"
    assert f"{1000 - reserved} are left, and the request may use " in error["message"]
    release.set()
    served = await wire.answer()
    assert limits_in(served) == {
        "limit-tokens": "1000",
        "remaining-tokens": str(1000 - reserved),
        "reset-tokens": "1m10s",
    }
    await until(lambda: keyed.use("k") == Use(0, 1, 42))


async def test_a_stream_is_settled_from_its_last_chunk(keyed):
    world = keyed.world

    async def script(wire: Wire, request: Message) -> None:
        usage = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":5}}\n\n'
        await wire.send(CHUNKED + chunk(b'data: {"choices":[{}]}\n\n') + chunk(usage))
        await wire.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    world.route("m", {"a": await world.engine(script)})
    keyed.add("k", tokens_per_minute=1000)
    wire = await world.client()
    await wire.send(ask_as("k", stream=True))
    assert (await wire.answer()).status == 200
    await until(lambda: keyed.use("k") == Use(0, 1, 12))


async def test_a_response_without_usage_is_settled_with_its_size_and_teaches_no_mean(keyed):
    world = keyed.world
    world.route("m", {"a": await world.engine(says(b"x" * 1000))})
    keyed.add("k", tokens_per_minute=10_000)
    wire = await world.client()
    await wire.send(ask_as("k"))
    assert (await wire.answer()).status == 200
    await world.at_rest()
    assert 180 <= keyed.use("k").tokens <= 200
    (key,) = world.context.keys.values()
    assert key.mean_output_tokens == 0


async def test_a_stream_whose_client_leaves_is_settled_with_what_it_was_sent(keyed):
    world = keyed.world
    event = b"data: " + b"x" * 400 + b"\n\n"

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(event) * 10)
        await wire.reader.read()

    world.route("m", {"a": await world.engine(script)})
    keyed.add("k", tokens_per_minute=100_000)
    wire = await world.client()
    await wire.send(ask_as("k", stream=True, max_tokens=50_000))
    head = await wire.head()
    assert head.status == 200
    await wire.reader.readuntil(event)
    assert keyed.use("k").tokens >= 50_000
    wire.reset()
    await until(lambda: keyed.use("k").in_flight == 0)
    assert 10 <= keyed.use("k").tokens <= 40


async def test_the_estimate_is_not_learned_from_clients_that_leave(keyed):
    world = keyed.world

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"data: {}\n\n"))
        await wire.reader.read()

    keyed.add("k", tokens_per_minute=1_000_000)
    key = world.context.keys[digest_of("sk-k")]
    world.route("m", {"a": await world.engine(says(USAGE % (10, 400)))})
    wire = await world.client()
    await wire.send(ask_as("k"))
    await wire.answer()
    await until(lambda: key.mean_output_tokens == 400)
    world.route("m", {"a": await world.engine(script)})
    wire = await world.client()
    await wire.send(ask_as("k", stream=True))
    await wire.head()
    wire.reset()
    await until(lambda: keyed.use("k").in_flight == 0)
    assert key.mean_output_tokens == 400


@pytest.mark.parametrize("script", [failing(500), failing(400), lose])
async def test_a_request_that_fails_counts_as_a_request_but_without_tokens(keyed, script):
    world = keyed.world
    world.route("m", {"a": await world.engine(script)})
    keyed.add("k", tokens_per_minute=1000, requests_per_minute=10)
    wire = await world.client()
    await wire.send(ask_as("k", max_tokens=500))
    served = await wire.answer()
    assert served.status >= 400
    assert limits_in(served)["limit-tokens"] == "1000"
    assert limits_in(served)["remaining-requests"] == "9"
    await until(lambda: keyed.use("k") == Use(0, 1, 0))


async def test_a_client_that_leaves_before_the_response_is_charged_its_prompt(keyed):
    world = keyed.world
    world.route("m", {"a": await world.engine(hang)})
    keyed.add("k", tokens_per_minute=100_000)
    wire = await world.client()
    text = "The quick brown fox. " * 200
    await wire.send(ask_as("k", max_tokens=500, messages=[{"role": "user", "content": text}]))
    await until(lambda: world.in_flight("m") == 1)
    reserved = keyed.use("k").tokens
    wire.reset()
    await until(lambda: keyed.use("k").in_flight == 0)
    assert keyed.use("k").tokens == reserved - 500
    assert keyed.use("k").tokens > 500


async def test_a_held_request_is_in_flight_and_costs_no_tokens_if_it_is_never_served(keyed):
    world = keyed.world
    world.route("m", {})
    keyed.add("k", tokens_per_minute=1000)
    wire = await world.client()
    await wire.send(ask_as("k", max_tokens=500))
    await until(lambda: world.held("m") == 1)
    assert keyed.use("k").in_flight == 1
    served = await wire.answer()
    assert served.status == 504
    assert limits_in(served)["limit-tokens"] == "1000"
    await until(lambda: keyed.use("k") == Use(0, 1, 0))


async def test_a_held_stream_tells_its_limits_when_it_begins(start):
    world = await start(keys=REQUIRED, hold_timeout_s=5.0, hold_comment_after_s=0.01)
    keyed = KeyedWorld(world)
    world.route("m", {})
    keyed.add("k", requests_per_minute=5)
    wire = await world.client()
    await wire.send(ask_as("k", stream=True))
    head = await wire.head()
    assert limits_in(head)["remaining-requests"] == "4"
    wire.close()
    await until(lambda: keyed.use("k").in_flight == 0)
    keyed.close()


async def test_an_attempt_elsewhere_is_not_charged_again(keyed):
    world = keyed.world
    bad, good = await world.engine(failing(503)), await world.engine(says(USAGE % (5, 5)))
    world.route("m", {"a": bad, "b": good})
    keyed.add("k", requests_per_minute=10, tokens_per_minute=1000)
    wire = await world.client()
    for _ in range(3):
        await wire.send(ask_as("k"))
        assert (await wire.answer()).status == 200
    assert bad.requests, "an attempt has failed"
    await until(lambda: keyed.use("k") == Use(0, 3, 30))


async def test_large_bodies_uploads_and_batches_count_too(keyed):
    world = keyed.world
    world.route("m", {"a": await world.engine(says(b"{}"))})
    keyed.add("k", requests_per_minute=2)
    wire = await world.client()
    large = [{"role": "user", "content": "x" * (openai.LARGE_BYTES + 1)}]
    await wire.send(ask_as("k", messages=large))
    assert (await wire.answer()).status == 200
    form = "Content-Type: multipart/form-data; boundary=b"
    upload = post("/openai/v1/audio/transcriptions", FORM, form, bearer("k"))
    await wire.send(upload)
    served = await wire.answer()
    assert (served.status, limits_in(served)["remaining-requests"]) == (200, "0")
    await wire.send(upload)
    await refused(wire)
    await wire.send(ask_as("k", messages=large))
    await refused(wire)


def stored_as(name: str) -> bytes:
    path = f"/openai/v1/responses/{stored_id(name)}"
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n{bearer(name)}\r\n\r\n".encode()


async def test_a_stored_response_is_a_request_without_tokens(keyed):
    world = keyed.world
    body = b'{"id":"resp_a","usage":{"input_tokens":900,"output_tokens":50}}'
    world.route("m", {"a": await world.engine(says(body))})
    keyed.add("k", requests_per_minute=10, tokens_per_minute=1000)
    wire = await world.client()
    await wire.send(stored_as("k"))
    assert (await wire.answer()).status == 200
    await until(lambda: keyed.use("k") == Use(0, 1, 0))


async def test_no_engine_is_asked_for_a_stored_response_beyond_the_limit(keyed):
    world = keyed.world
    engine = await world.engine(failing(404))
    world.route("m", {"a": engine})
    keyed.add("k", requests_per_minute=1)
    wire = await world.client()
    await wire.send(stored_as("k"))
    assert (await wire.answer()).status == 404
    asked = len(engine.requests)
    assert asked
    await wire.send(stored_as("k"))
    await refused(wire)
    previous = ask_as("k", path="/openai/v1/responses", previous_response_id=stored_id("k"))
    await wire.send(previous)
    await refused(wire)
    assert len(engine.requests) == asked


async def test_a_websocket_is_one_request_in_flight_until_it_closes(keyed):
    world = keyed.world

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: x\r\n\r\n"
        )
        await wire.reader.read()

    world.route("m", {"a": await world.engine(script)})
    keyed.add("k", in_flight_max=1, requests_per_minute=5)
    handshake = (
        "GET /openai/v1/realtime?model=m HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
        "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{bearer('k')}\r\n\r\n"
    ).encode()
    wire, other = await world.client(), await world.client()
    await wire.send(handshake)
    opened = await wire.head()
    assert (opened.status, limits_in(opened)["remaining-requests"]) == (101, "4")
    await other.send(handshake)
    await refused(other)
    assert keyed.use("k") == Use(1, 1, 0)
    wire.close()
    await until(lambda: keyed.use("k") == Use(0, 1, 0))


async def test_keys_without_limits_are_not_counted_and_get_no_headers(keyed):
    world = keyed.world
    world.route("m", {"a": await world.engine(says(b""))})
    keyed.add("k")
    wire = await world.client()
    await wire.send(ask_as("k"))
    served = await wire.answer()
    assert (served.status, limits_in(served)) == (200, {})
    assert keyed.use("k") == Use(0, 0, 0)


async def test_responses_teach_the_mean(keyed):
    world = keyed.world
    world.route("m", {"a": await world.engine(says(USAGE % (5, 40)))})
    keyed.add("k", tokens_per_minute=100_000)
    wire = await world.client()
    for _ in range(2):
        await wire.send(post(CHAT, b'{"model":"m"}', bearer("k")))
        assert (await wire.answer()).status == 200
    assert world.context.keys[digest_of("sk-k")].mean_output_tokens == 40
