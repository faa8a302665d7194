"""The response to a held streaming request: its head and comments, then a stream or an error.

Both times are short here, so that a held request is soon sent its first comments.
"""

import asyncio
import json

import pytest
import uvloop
from fakes.chats import CHAT, failing, hang, lose
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, post, says, until

from kubeai.gateway.local_routes import make_app
from kubeai.routing.routes import Block

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
MESSAGES = "/openai/v1/messages"
RESPONSES = "/openai/v1/responses"
SOON = {"hold_comment_after_s": 0.01, "hold_comment_interval_s": 0.01}
EVENTS = b'data: {"a":1}\n\ndata: [DONE]\n\n'
SSE = "Content-Type: text/event-stream"
WAITING = b": waiting for a replica: "


def ask(*headers: str, path: str = CHAT, version: str = "1.1", model: str = "m", **fields) -> bytes:
    body = json.dumps({"model": model, "stream": True, **fields}).encode()
    return post(path, body, *headers, version=version)


async def streams(wire: Wire, request: Message) -> None:
    await wire.send(CHUNKED + chunk(EVENTS[:9]) + chunk(EVENTS[9:]) + b"0\r\n\r\n")


def parts(body: bytes) -> tuple[list[bytes], bytes]:
    """The comments at the beginning of a stream, and what follows them."""
    comments = []
    while body.startswith(b":"):
        comment, separator, body = body.partition(b"\n\n")
        assert separator
        comments.append(comment)
    return comments, body


async def begun(start, *requests: bytes, route: dict | None = None, **config):
    """A world and a connection whose request is held, and the head of its response."""
    world = await start(**{**SOON, **config})
    world.route("m", {}, **(route or {}))
    wire = await world.client()
    await wire.send(*(requests or (ask(),)))
    return world, wire, await wire.head()


async def stream_of(wire: Wire, head: Message) -> bytes:
    """What follows the comments of a response that ends properly."""
    comments, rest = parts((await wire.body(head, until_close=True)).body)
    assert comments
    assert comments[0].startswith(WAITING)
    return rest


async def openai_error_of(wire: Wire, head: Message) -> dict:
    rest = await stream_of(wire, head)
    assert b"[DONE]" not in rest
    assert rest.startswith(b"data: ")
    assert rest.endswith(b"\n\n")
    assert rest.count(b"\n\n") == 1
    error = json.loads(rest[6:])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


# -- the head and the comments ---------------------------------------------------------------------


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
async def test_a_held_stream_begins_with_a_head_and_comments(start, path):
    request = ask("X-Request-Id: mine", path=f"/v1/{path}")
    world, wire, head = await begun(start, request, route={"progress": "pulling image, 1 of 3"})
    assert head.status == 200
    assert head.one("content-type") == "text/event-stream; charset=utf-8"
    assert head.one("cache-control") == "no-cache"
    assert head.one("transfer-encoding") == "chunked"
    assert head.one("connection") is None
    assert head.one("x-request-id") == "mine"
    assert float(head.one("x-kubeai-waited")) >= 0.01
    comment = WAITING + b"pulling image, 1 of 3\n\n"
    assert await wire.reader.readexactly(2 * len(chunk(comment))) == 2 * chunk(comment)
    world.route("m", {"a": await world.engine(streams)})
    comments, rest = parts((await wire.body(head)).body)
    assert comments[-1].startswith(b": waited ")
    assert rest == EVENTS
    await world.at_rest()
    assert world.outcomes("m")["2xx"] == 1


async def test_comments_follow_the_progress_of_the_start(start):
    world, wire, head = await begun(start)
    assert b"starting" in await wire.reader.readuntil(b"\n\n\r\n")
    for phrase in ("waiting for a node", "loading\r\nthe model"):
        world.route("m", {}, progress=phrase)
        expected = " ".join(phrase.split()).encode()
        async with asyncio.timeout(5):
            while expected not in await wire.reader.readuntil(b"\n\n\r\n"):
                pass
    world.route("m", {"a": await world.engine(streams)})
    assert (await wire.body(head)).body.endswith(EVENTS)


async def test_a_request_for_an_adapter_hears_that_the_adapter_is_loaded(start):
    world = await start(**SOON)
    engine = await world.engine(streams)
    world.route("m", {"a": engine}, adapters=("fin",))
    wire = await world.client()
    await wire.send(ask(model="m_fin"))
    head = await wire.head()
    assert b"loading the adapter" in await wire.reader.readuntil(b"\n\n\r\n")
    world.route("m", {"a": (engine, ["fin"])}, adapters=("fin",))
    assert (await wire.body(head)).body.endswith(EVENTS)


async def comments_on(wire: Wire, count: int) -> None:
    """Read the head of a response and this number of comments."""
    await wire.head()
    for _ in range(count):
        size = int(await wire.reader.readuntil(b"\r\n"), 16)
        assert (await wire.reader.readexactly(size + 2)).startswith(WAITING)


@pytest.mark.parametrize(
    "request_", [ask(stream=False), post(CHAT), ask(path="/openai/v1/embeddings")]
)
async def test_other_requests_get_the_engines_own_head(start, request_):
    world = await start(**SOON)
    world.route("m", {})
    wire, other = await world.client(), await world.client()
    await wire.send(request_)
    await until(lambda: world.held("m") == 1)
    await other.send(ask())
    await comments_on(other, 3)
    other.close()
    await until(lambda: world.held("m") == 1)
    world.route("m", {"a": await world.engine(says(b"whole"))})
    answered = await wire.answer()
    assert (answered.body, answered.one("content-length")) == (b"whole", "5")
    assert 0.03 <= float(answered.one("x-kubeai-waited")) < 5
    assert answered.one("content-type") is None


async def test_a_request_that_is_not_held_has_no_waited_header(start):
    world = await start(**SOON)
    world.route("m", {"a": await world.engine(streams)})
    wire = await world.client()
    await wire.send(ask())
    answered = await wire.answer()
    assert answered.body == EVENTS
    assert answered.one("x-kubeai-waited") is None


async def test_the_connection_is_kept_for_the_next_request(start):
    world, wire, head = await begun(start, ask(), ask())
    engine = await world.engine(streams)
    world.route("m", {"a": engine})
    assert await stream_of(wire, head)
    again = await wire.answer()
    assert (again.body, again.one("x-kubeai-waited")) == (EVENTS, None)
    assert len(engine.requests) == 2


async def test_the_engine_is_asked_for_an_uncompressed_stream(start):
    world, wire, head = await begun(start, ask("Accept-Encoding: gzip"))
    engine = await world.engine(streams)
    world.route("m", {"a": engine})
    assert await stream_of(wire, head)
    assert engine.requests[0].all("accept-encoding") == ["identity"]


# -- framing ---------------------------------------------------------------------------------------


async def sized(wire: Wire, request: Message) -> None:
    await wire.send(answer(200, EVENTS, SSE))


async def until_close(wire: Wire, request: Message) -> None:
    await wire.send(b"HTTP/1.1 200 OK\r\n" + SSE.encode() + b"\r\n\r\n" + EVENTS)
    wire.close()


async def nothing(wire: Wire, request: Message) -> None:
    await wire.send(answer(200, b"", SSE))


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize(
    ("script", "body"),
    [(streams, EVENTS), (sized, EVENTS), (until_close, EVENTS), (nothing, b"")],
)
async def test_every_framing_of_the_engine_becomes_the_clients(start, version, script, body):
    world, wire, head = await begun(start, ask(version=version))
    coding = head.one("transfer-encoding")
    assert coding == ("chunked" if version == "1.1" else None)
    assert head.one("connection") == (None if version == "1.1" else "close")
    world.route("m", {"a": await world.engine(script)})
    comments, rest = parts((await wire.body(head, until_close=True)).body)
    assert comments[-1].startswith(b": waited ")
    assert rest == body
    if version == "1.0":
        assert await wire.ended() is False
    else:
        await wire.send(ask())
        assert (await wire.head()).status == 200


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("framing", ["chunked", "sized", "until close", "refused"])
async def test_the_engines_response_may_come_byte_by_byte(start, version, framing):
    head = b"HTTP/1.1 200 OK\r\n" + SSE.encode() + b"\r\n"
    whole = {
        "chunked": CHUNKED + chunk(EVENTS[:9]) + chunk(EVENTS[9:]) + b"0\r\nTrailer: 1\r\n\r\n",
        "sized": answer(200, EVENTS, SSE),
        "until close": head + b"\r\n" + EVENTS,
        "refused": CHUNKED.replace(b"200", b"400") + chunk(b"not ") + chunk(b"now") + b"0\r\n\r\n",
    }[framing]

    async def script(wire: Wire, request: Message) -> None:
        for at in range(len(whole)):
            await wire.send(whole[at : at + 1])
            await asyncio.sleep(0)
        if framing == "until close":
            wire.close()

    world, wire, head = await begun(start, ask(version=version))
    world.route("m", {"a": await world.engine(script)})
    if framing == "refused":
        assert (await openai_error_of(wire, head))["message"] == "not now"
    else:
        assert (await stream_of(wire, head)).endswith(EVENTS)


async def test_a_stream_to_an_http_1_0_client_that_asks_for_keep_alive_still_ends_by_closing(start):
    world, wire, head = await begun(start, ask("Connection: keep-alive", version="1.0"))
    assert head.one("connection") == "close"
    world.route("m", {"a": await world.engine(sized)})
    assert await stream_of(wire, head) == EVENTS
    assert await wire.ended() is False


@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_stream_that_breaks_in_the_middle_does_not_look_complete(start, version):
    async def breaks(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, EVENTS, SSE)[:-5])
        wire.close()

    world, wire, head = await begun(start, ask(version=version), retries=0)
    world.route("m", {"a": await world.engine(breaks)})
    with pytest.raises(Broken) as caught:
        await wire.body(head, until_close=True)
    assert caught.value.reset or version == "1.1"
    await world.at_rest()
    assert world.outcomes("m")["broken"] == 1


async def test_comments_for_a_client_that_does_not_read_are_not_buffered(start):
    world = await start(hold_comment_after_s=0.001, hold_comment_interval_s=0.001)
    world.route("m", {}, progress="x" * 1_000_000)
    slow, quick = await world.client(receive_buffer_bytes=4096), await world.client()
    for wire in (slow, quick):
        await wire.send(ask())
    head = await slow.head()
    await comments_on(quick, 50)  # 50 MB
    quick.close()
    world.route("m", {"a": await world.engine(streams)})
    body = (await slow.body(head)).body
    assert body.endswith(EVENTS)
    assert len(body) < 32 << 20


# -- errors ----------------------------------------------------------------------------------------


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


# -- attempts --------------------------------------------------------------------------------------


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


# -- clients that leave, draining ------------------------------------------------------------------


@pytest.mark.parametrize("leave", [Wire.close, Wire.reset])
async def test_a_client_that_leaves_after_the_head_is_no_longer_held(start, leave):
    world, wire, _ = await begun(start)
    leave(wire)
    await until(lambda: world.held("m") == 0)
    await world.at_rest()
    assert world.outcomes("m")["left"] == 1
    engine = await world.engine(streams)
    world.route("m", {"a": engine})
    other = await world.client()
    await other.send(ask())
    assert (await other.answer()).status == 200
    assert len(engine.requests) == 1


async def test_a_held_stream_is_finished_while_the_worker_drains(start):
    world, wire, head = await begun(start)
    late = await world.client()
    drained = asyncio.create_task(world.server.drain(accept_s=0.05, timeout_s=5))
    await until(lambda: world.server.relay.draining)
    await late.send(ask())
    late_head = await late.head()
    assert (late_head.one("connection"), late_head.one("transfer-encoding")) == ("close", "chunked")
    world.route("m", {"a": await world.engine(streams)})
    assert await stream_of(wire, head) == EVENTS
    assert await stream_of(late, late_head) == EVENTS
    assert await late.ended() is False
    assert await wire.ended() is False
    await drained


# -- X-KubeAI-Max-Wait, Retry-After ----------------------------------------------------------------


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
