"""How the wait of a held request ends without a response: error events, and the client's limit."""

import asyncio
import json

import pytest
import uvloop
from fakes.chats import failing, hang, lose
from fakes.held_streams import EVENTS, SSE, ask, begun, openai_error_of, stream_of, streams
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, says, until

from kubeai.gateway.local_routes import make_app
from kubeai.routing.routes import Block

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
MESSAGES = "/openai/v1/messages"
RESPONSES = "/openai/v1/responses"


async def test_the_end_of_the_hold_is_an_error_event(start):
    block = Block("ReplicasStarting", "0 of 1 replica is ready")
    world, wire, head = await begun(start, route={"block": block}, hold_timeout_s=0.05)
    error = await openai_error_of(wire, head)
    assert (error["type"], error["code"]) == ("server_error", "timeout")
    assert "ReplicasStarting" in error["message"]
    await world.at_rest()
    assert world.outcomes("m")["5xx"] == 1
    await wire.send(ask(model="other"))  # the connection is still in use
    assert (await wire.answer()).status == 404


async def test_a_model_that_cannot_start_is_an_error_event(start):
    world, wire, head = await begun(start)
    world.route("m", {}, block=Block("InvalidURL", "spec.url: wrong", 0.0, retry=False))
    error = await openai_error_of(wire, head)
    assert error["code"] == "model_cannot_start"


async def test_a_deleted_model_is_an_error_event(start):
    world, wire, head = await begun(start)
    world.unroute("m")
    error = await openai_error_of(wire, head)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


async def test_anthropics_clients_get_an_error_event_of_their_api(start):
    request = ask("X-Request-Id: mine", path=MESSAGES)
    _, wire, head = await begun(start, request, hold_timeout_s=0.05)
    assert head.one("request-id") == "mine"
    rest = await stream_of(wire, head)
    event, data, *end = rest.split(b"\n")
    assert (event, end) == (b"event: error", [b"", b""])
    body = json.loads(data.removeprefix(b"data: "))
    assert (body["type"], body["request_id"]) == ("error", "mine")
    assert body["error"]["type"] == "timeout_error"


async def test_clients_of_the_responses_api_get_its_error_event(start):
    _, wire, head = await begun(start, ask(path=RESPONSES), hold_timeout_s=0.05)
    event, data, *end = (await stream_of(wire, head)).split(b"\n")
    assert (event, end) == (b"event: error", [b"", b""])
    body = json.loads(data.removeprefix(b"data: "))
    assert body.pop("message")
    assert body == {"type": "error", "code": "timeout", "param": None, "sequence_number": 0}


async def test_an_http_1_0_client_gets_the_error_event_and_the_end_of_the_connection(start):
    _, wire, head = await begun(start, ask(version="1.0"), hold_timeout_s=0.05)
    assert (await openai_error_of(wire, head))["code"] == "timeout"
    assert await wire.ended() is False


async def test_a_fault_in_the_gateway_is_an_error_event(start, monkeypatch):
    world, wire, head = await begun(start)
    monkeypatch.setattr(type(world.table.find("m")), "pick", lambda *_: 1 / 0)
    world.route("m", {"a": await world.engine(streams)})
    assert (await openai_error_of(wire, head))["code"] == "internal_error"


async def headless(wire: Wire, request: Message) -> None:
    """Die after the head of an event stream, before its first event."""
    await wire.send(CHUNKED)
    wire.close()


@pytest.mark.parametrize("script", [failing(503), failing(500), lose, headless])
async def test_a_failed_attempt_is_retried_after_the_head(start, script):
    world, wire, head = await begun(start)
    bad, good = await world.engine(script), await world.engine(streams)
    world.route("m", {"a": bad})
    await until(lambda: bad.requests)
    world.route("m", {"a": bad, "b": good})
    assert await stream_of(wire, head) == EVENTS
    assert len(good.requests) == 1
    await world.at_rest()
    assert world.outcomes("m")["retried"] >= 1


@pytest.mark.parametrize("script", [lose, headless])
async def test_an_engine_that_dies_before_its_first_event_is_an_error_event(start, script):
    world, wire, head = await begun(start, retries=0)
    world.route("m", {"a": await world.engine(script)})
    error = await openai_error_of(wire, head)
    assert (error["type"], error["code"]) == ("server_error", "bad_gateway")
    await world.at_rest()
    assert world.outcomes("m")["5xx"] == 1


async def test_a_first_byte_timeout_is_an_error_event(start):
    world, wire, head = await begun(start, first_byte_timeout_s=0.1)
    world.route("m", {"a": await world.engine(hang)})
    assert (await openai_error_of(wire, head))["code"] == "timeout"


ERROR = {"message": "too long", "type": "BadRequestError", "param": "input", "code": 400}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": ERROR}, {**ERROR, "code": "400"}),
        ({"object": "error", **ERROR}, {**ERROR, "code": "400"}),
        (
            {"type": "error", "error": {"type": "overloaded_error", "message": "no"}},
            {"message": "no", "type": "overloaded_error", "param": None, "code": None},
        ),
        (
            {"detail": "Not Found"},
            {
                "message": "Not Found",
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            },
        ),
        ([], None),
    ],
)
async def test_an_error_of_the_engine_is_an_error_event_with_its_message(start, body, expected):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(400, json.dumps(body).encode(), "Content-Type: application/json"))

    world, wire, head = await begun(start)
    world.route("m", {"a": await world.engine(script)})
    error = await openai_error_of(wire, head)
    if expected is None:
        assert "400" in error["message"]
    else:
        assert error == expected
    await world.at_rest()
    assert world.outcomes("m")["4xx"] == 1


async def test_an_engines_error_in_chunks_is_joined_and_cut_off_when_it_is_long(start):
    message = json.dumps({"error": {"message": "too long"}}).encode()

    async def script(wire: Wire, request: Message) -> None:
        first = CHUNKED.replace(b"200 OK", b"422 No")
        if b"endless" in request.body:
            await wire.send(first)
            while True:
                await wire.send(chunk(b"x" * 10_000))
        await wire.send(first + chunk(message[:7]) + chunk(message[7:]) + b"0\r\n\r\n")

    world, wire, head = await begun(start, ask())
    world.route("m", {"a": await world.engine(script)})
    assert (await openai_error_of(wire, head))["message"] == "too long"
    world.route("m", {})
    await wire.send(ask(endless=1))
    head = await wire.head()
    world.route("m", {"a": await world.engine(script)})
    assert "x" in (await openai_error_of(wire, head))["message"]


async def test_an_error_that_breaks_off_is_an_error_event_all_the_same(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(400, b"{}" * 50)[:-20])
        wire.close()

    world, wire, head = await begun(start)
    world.route("m", {"a": await world.engine(script)})
    assert (await openai_error_of(wire, head))["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "headers", [("Content-Type: application/json",), (), (SSE, "Content-Encoding: gzip")]
)
async def test_a_response_that_is_no_event_stream_is_an_error_event(start, headers):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, b'{"id":"x"}', *headers))

    world, wire, head = await begun(start)
    world.route("m", {"a": await world.engine(script)})
    error = await openai_error_of(wire, head)
    assert "event stream" in error["message"]
    assert error["code"] == "bad_gateway"


async def test_the_clients_limit_ends_the_wait(start):
    world = await start()
    world.route("m", {})
    wire = await world.client()
    for limit, was_held in (("20ms", True), ("0s", False), ("0", False)):
        await wire.send(ask(f"x-kubeai-MAX-wait: {limit}", stream=False))
        answered = await wire.answer()
        assert answered.status == 504
        assert (0.02 <= float(answered.one("x-kubeai-waited") or 0) < 5) is was_held
        assert answered.one("retry-after") is None
    assert world.demanded == ["m"] * 3


async def test_the_clients_limit_ends_a_wait_that_has_sent_comments(start):
    _, wire, head = await begun(start, ask("X-KubeAI-Max-Wait: 50ms"))
    assert (await openai_error_of(wire, head))["code"] == "timeout"


async def test_the_clients_limit_does_not_extend_the_hold(start):
    world = await start(hold_timeout_s=0.02)
    world.route("m", {})
    wire = await world.client()
    await wire.send(ask("X-KubeAI-Max-Wait: 1h", stream=False))
    async with asyncio.timeout(5):
        assert (await wire.answer()).status == 504


@pytest.mark.parametrize(
    "headers",
    [("x",), ("30",), ("-1s",), ("",), ("1s", "1s"), ("1s, 2s",), ("9999999999h",)],
)
async def test_an_invalid_limit_is_a_400_that_names_the_header(start, headers):
    world = await start()
    world.route("m", {"a": await world.engine(says(b""))})
    wire = await world.client()
    await wire.send(ask(*(f"X-KubeAI-Max-Wait: {value}" for value in headers)))
    answered = await wire.answer()
    assert answered.status == 400
    error = json.loads(answered.body)["error"]
    assert error["param"] == "X-KubeAI-Max-Wait"
    assert "X-KubeAI-Max-Wait" in error["message"]


async def test_a_request_with_a_limit_is_served_like_others(start):
    world = await start()
    world.route("m", {"a": await world.engine(says(b"served"))})
    wire = await world.client()
    await wire.send(ask("X-KubeAI-Max-Wait: 30s"))
    assert (await wire.answer()).body == b"served"


@pytest.mark.parametrize(("start_s", "retry_after"), [(0, "5"), (42, "42"), (90_000, "600")])
async def test_retry_after_is_the_models_start_time(start, start_s, retry_after):
    world = await start(hold_max_requests=0, local_routes=make_app)
    world.route("m", {}, start_s=start_s)
    wire = await world.client()
    await wire.send(ask())
    answered = await wire.answer()
    assert (answered.status, answered.one("retry-after")) == (503, retry_after)
    world.route("m", {}, start_s=start_s, block=Block("Unschedulable", "no node", 0.0))
    await wire.send(ask())
    answered = await wire.answer()
    assert (answered.status, answered.one("retry-after")) == (503, retry_after)
    assert answered.one("x-kubeai-waited") is None


async def test_a_wait_that_timed_out_says_when_to_retry_if_that_is_known(start):
    world = await start()
    world.route("m", {}, start_s=42)
    wire = await world.client()
    await wire.send(ask("X-KubeAI-Max-Wait: 0s"))
    answered = await wire.answer()
    assert (answered.status, answered.one("retry-after")) == (504, "42")
