"""A WebSocket whose model is in an event: the gateway accepts it before there is an engine."""

import asyncio
import gc
import json
import struct

import pytest
import uvloop
from fakes.realtime_sessions import (
    CLOSE,
    CREATED,
    KEY,
    PING,
    PONG,
    TEXT,
    UPDATE,
    RecordingEngine,
    closed_with,
    frame,
    handshake,
    masked,
    opened,
    unsent,
)
from fakes.websocket import SWITCHED
from fakes.wire import Message, Wire, answer, until

from kubeai.gateway import realtime

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


async def test_the_gateway_accepts_and_creates_the_session(serving):
    world, _, engine = serving
    wire = await world.client()
    await wire.send(handshake())
    head = await wire.head()
    assert head.one("sec-websocket-accept") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
    assert (head.one("upgrade"), head.one("connection")) == ("websocket", "Upgrade")
    assert head.all("sec-websocket-extensions") + head.all("sec-websocket-protocol") == []
    opcode, payload = await frame(wire)
    created = json.loads(payload)
    assert (opcode, created["type"]) == (TEXT, "session.created")
    assert created["id"] == f"sess-{head.one('x-request-id')}"
    assert not engine.requests
    assert world.active("m") == 0


async def test_the_engine_gets_all_messages_in_order(serving):
    world, script, engine = serving
    wire = await opened(world, target="/v1/realtime?x=1")
    await wire.send(masked(b'{"type":"before"}') + masked(UPDATE) + masked(b"after"))
    await until(lambda: len(script.frames) == 3)
    await wire.send(masked(b"later", opcode=2))
    await until(lambda: len(script.frames) == 4)
    assert script.frames == [
        (TEXT, b'{"type":"before"}'),
        (TEXT, UPDATE),
        (TEXT, b"after"),
        (2, b"later"),
    ]
    (request,) = engine.requests
    assert request.target == "/v1/realtime?x=1"
    assert request.all("sec-websocket-extensions") + request.all("sec-websocket-protocol") == []
    assert request.one("sec-websocket-key") == KEY
    assert world.in_flight("m") == 1


async def test_frames_that_come_byte_by_byte_are_read(serving):
    world, script, _ = serving
    wire = await world.client()
    sent = handshake() + masked(b"{}") + masked(UPDATE) + masked(b"x" * 300)
    for i in range(len(sent)):
        await wire.send(sent[i : i + 1])
    await until(lambda: len(script.frames) == 3)
    assert [payload for _, payload in script.frames] == [b"{}", UPDATE, b"x" * 300]


async def test_an_adapter_is_named_to_the_engine_as_it_knows_it(serving):
    world, script, _ = serving
    wire = await opened(world)
    update = {"type": "session.update", "session": {"x": ["é" * 200]}, "model": "m_a"}
    await wire.send(masked(b"{}") + masked(json.dumps(update).encode()) + masked(b"after"))
    await until(lambda: len(script.frames) == 3)
    assert json.loads(script.frames[1][1]) == update | {"model": "a"}
    assert script.frames[2] == (TEXT, b"after")


@pytest.mark.parametrize(
    "greeting",
    [
        (CREATED + b"\x81\x02ok",),
        (CREATED, b"\x81\x02ok"),
        (CREATED[:5], CREATED[5:], b"\x81\x02ok"),
    ],
    ids=["together", "apart", "split"],
)
async def test_the_client_gets_one_session_created(start, greeting):
    world = await start()
    world.route("m", {"pod-1": await world.engine(RecordingEngine(*greeting))})
    wire = await opened(world)
    await wire.send(masked(UPDATE))
    assert await frame(wire) == (TEXT, b"ok")


@pytest.mark.parametrize("first", [b"\x81\x05other", b"\x82\x7e\x20\x00" + bytes(8192)])
async def test_another_first_frame_of_the_engine_is_passed_on(start, first):
    world = await start()
    world.route("m", {"pod-1": await world.engine(RecordingEngine(first))})
    wire = await opened(world)
    await wire.send(masked(UPDATE))
    assert await wire.reader.readexactly(len(first)) == first


async def test_pings_are_answered_before_there_is_an_engine(serving):
    world, script, _ = serving
    wire = await opened(world)
    await wire.send(masked(b"hi", PING) + masked(b"", PONG) + masked(UPDATE))
    assert await frame(wire) == (PONG, b"hi")
    await until(lambda: len(script.frames) == 2)
    assert script.frames == [(PONG, b""), (TEXT, UPDATE)]


async def test_endless_pings_without_a_model_are_an_error_event(serving, monkeypatch):
    monkeypatch.setattr(realtime, "FRAMES_MAX_COUNT", 10)
    world, _, _ = serving
    wire = await opened(world)
    await wire.send(masked(b"", PING) * 20)
    for _ in range(10):
        assert await frame(wire) == (PONG, b"")
    await closed_with(wire, 1008)
    await world.at_rest()


async def test_the_engine_gets_pings_that_were_not_answered(start, monkeypatch):
    monkeypatch.setattr(realtime, "FRAMES_MAX_COUNT", 3)
    world = await start()
    script = RecordingEngine()
    world.route("m", {})
    wire = await opened(world)
    pings = [masked(b"%d" % n, PING) for n in range(4)]
    await wire.send(pings[0] + masked(UPDATE) + pings[1] + pings[2])
    await until(lambda: world.held("m") == 1)
    await wire.send(pings[3] + masked(b"later"))
    world.route("m", {"pod-1": await world.engine(script)})
    await until(lambda: len(script.frames) == 4)
    assert script.frames == [(TEXT, UPDATE), (PING, b"2"), (PING, b"3"), (TEXT, b"later")]


async def test_a_close_before_there_is_an_engine_is_answered(serving):
    world, _, engine = serving
    wire = await opened(world)
    await wire.send(masked(struct.pack(">H", 1000), CLOSE))
    assert await frame(wire) == (CLOSE, struct.pack(">H", 1000))
    await wire.ended()
    assert not engine.requests
    await world.at_rest()


async def test_a_close_right_after_the_model_leaves_nothing_counted(serving):
    world, _, engine = serving
    wire = await world.client()
    await wire.send(handshake() + masked(UPDATE) + masked(struct.pack(">H", 1000), CLOSE))
    assert (await wire.head()).status == 101
    await frame(wire)
    assert await frame(wire) == (CLOSE, struct.pack(">H", 1000))
    await wire.ended()
    await world.at_rest()
    assert not engine.requests


async def test_an_invalid_frame_after_a_close_is_not_an_error_of_the_gateway(serving):
    world, _, _ = serving
    reported = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    wire = await world.client()
    await wire.send(handshake() + masked(b"", CLOSE) + b"\x81\x02{}")
    await wire.head()
    assert [(await frame(wire))[0] for _ in range(2)] == [TEXT, CLOSE]
    await wire.ended()
    wire.close()
    await until(lambda: world.server.relay.connections == 0)
    gc.collect()
    assert reported == []


async def test_it_is_held_until_a_replica_is_ready(start):
    world = await start(hold_comment_after_s=0.01)
    script = RecordingEngine()
    engine = await world.engine(script)
    world.route("m", {})
    wire = await opened(world)
    await wire.send(masked(UPDATE))
    await until(lambda: world.held("m") == 1)
    await wire.send(masked(b"more") + masked(b"?", PING))
    assert await frame(wire) == (PONG, b"?")  # and no comment
    world.route("m", {"pod-1": engine})
    await until(lambda: len(script.frames) == 2)
    assert script.frames == [(TEXT, UPDATE), (TEXT, b"more")]


async def test_a_client_that_leaves_while_it_is_held_is_no_longer_counted(start):
    world = await start()
    world.route("m", {})
    wire = await opened(world)
    await wire.send(masked(UPDATE))
    await until(lambda: world.held("m") == 1)
    wire.close()
    await world.at_rest()


async def test_a_client_that_sends_much_while_it_is_held_is_paused(start):
    world = await start()
    got = 0

    async def count(wire: Wire, request: Message) -> None:
        nonlocal got
        await wire.send(SWITCHED)
        while data := await wire.reader.read(1 << 20):
            got += len(data)
        wire.close()

    engine = await world.engine(count)
    world.route("m", {})
    wire = await opened(world)
    await wire.send(masked(UPDATE))
    await until(lambda: world.held("m") == 1)
    sent = masked(bytes(60_000)) * 500
    wire.writer.write(sent)
    assert await unsent(wire) > len(sent) // 2
    world.route("m", {"pod-1": engine})
    await until(lambda: got == len(masked(UPDATE)) + len(sent), within_s=20)


async def test_what_comes_before_there_is_an_engine_counts_as_buffered(start):
    world = await start(buffer_max_bytes=100_000)
    script = RecordingEngine()
    world.route("m", {})
    first, second = await opened(world), await opened(world)
    relay = world.server.relay
    await first.send(masked(UPDATE) + masked(bytes(60_000)))
    await until(lambda: relay.buffered_bytes > 60_000)
    second.writer.write((masked(UPDATE) + masked(bytes(60_000))) * 400)  # the kernel buffers some
    assert await unsent(second) > 2_000_000
    assert relay.buffered_bytes < 100_000
    world.route("m", {"pod-1": await world.engine(script)})
    await until(lambda: len(script.frames) == 802, within_s=20)
    assert relay.buffered_bytes == 0


async def test_the_engines_handshake_is_retried(start):
    world = await start()

    async def fail(wire: Wire, request: Message) -> None:
        await wire.send(answer(503))

    script = RecordingEngine()
    engines = [await world.engine(fail), await world.engine(script)]
    world.route("m", {f"pod-{i}": engine for i, engine in enumerate(engines)})
    for count in (1, 2):
        wire = await opened(world)
        await wire.send(masked(UPDATE))
        await until(lambda: len(script.frames) == count)  # noqa: B023 (awaited here)


@pytest.mark.parametrize(("asked", "sent"), [("m", "b"), ("x", "b"), ("b", "b")])
async def test_a_session_falls_back_and_the_event_names_the_fallback(start, asked, sent):
    world = await start(retries=0)

    async def fail(wire: Wire, request: Message) -> None:
        await wire.send(answer(503))

    script = RecordingEngine()
    world.route("b", {"b-1": await world.engine(script)})
    world.route("m", {"m-1": await world.engine(fail)}, fallbacks=("b",), aliases=("x",))
    wire = await opened(world)
    update = json.dumps({"type": "session.update", "model": asked}).encode()
    await wire.send(masked(update), masked(b"next"))
    await until(lambda: len(script.frames) == 2)
    assert json.loads(script.frames[0][1]) == {"type": "session.update", "model": sent}
    assert script.frames[1] == (TEXT, b"next")
