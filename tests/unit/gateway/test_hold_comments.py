"""The response to a held streaming request: its head and comments, and then the engine's stream."""

import asyncio

import pytest
import uvloop
from fakes.chats import CHAT
from fakes.held_streams import (
    EVENTS,
    SOON,
    SSE,
    WAITING,
    ask,
    begun,
    openai_error_of,
    parts,
    stream_of,
    streams,
)
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, post, says, until

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


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
