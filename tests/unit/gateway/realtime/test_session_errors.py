"""A WebSocket whose model is in an event: faults become error events, and close it."""

import asyncio
import base64
import json
import struct

import pytest
import uvloop
from fakes.realtime_sessions import (
    CLOSE,
    PING,
    UPDATE,
    closed_with,
    frame,
    handshake,
    masked,
    opened,
    unsent,
)
from fakes.wire import Message, Wire, answer, until

from kubeai.gateway import realtime

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


@pytest.mark.parametrize(
    ("update", "code"),
    [
        ({"model": "none"}, "model_not_found"),
        ({"model": "m_none"}, "model_not_found"),
    ],
)
async def test_a_model_that_does_not_exist_is_an_error_event(serving, update, code):
    world, _, engine = serving
    wire = await opened(world)
    await wire.send(masked(json.dumps({"type": "session.update"} | update).encode()))
    assert (await closed_with(wire, 1008))["code"] == code
    assert not engine.requests


async def test_a_deleted_model_is_an_error_event(start):
    world = await start()
    world.route("m", {})
    wire = await opened(world)
    await wire.send(masked(UPDATE))
    await until(lambda: world.held("m") == 1)
    world.unroute("m")
    assert (await closed_with(wire, 1008))["code"] == "model_not_found"


async def test_a_paused_client_gets_the_error_and_may_leave_without_a_reset(start):
    world = await start()
    world.route("m", {})
    wire = await opened(world)
    await wire.send(masked(UPDATE))
    await until(lambda: world.held("m") == 1)
    wire.writer.write(masked(bytes(60_000)) * 400)  # more than the kernel buffers
    assert await unsent(wire) > 1_000_000
    world.unroute("m")
    event, closing = await frame(wire), await frame(wire)
    assert json.loads(event[1])["code"] == "model_not_found"
    assert closing[0] == CLOSE
    await until(lambda: wire.writer.transport.get_write_buffer_size() == 0, "all of it is taken")
    await wire.send(masked(closing[1], CLOSE))
    await wire.ended()


async def test_after_the_hold_timeout_the_client_may_try_again(start):
    world = await start(hold_timeout_s=0.05)
    world.route("m", {})
    wire = await opened(world)
    await wire.send(masked(UPDATE))
    assert (await closed_with(wire, 1013))["code"] == "timeout"


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (answer(403, b'{"error":{"message":"not here"}}', reason="No"), 1008),
        (answer(500, b'{"error":{"message":"not here"}}', reason="No"), 1011),
        (answer(200, b"data: x\n\n", "Content-Type: text/event-stream"), 1011),
    ],
)
async def test_an_engine_that_does_not_accept_is_an_error_event(start, reply, code):
    world = await start(retries=0)

    async def refuse(wire: Wire, request: Message) -> None:
        await wire.send(reply)

    world.route("m", {"pod-1": await world.engine(refuse)})
    wire = await opened(world)
    await wire.send(masked(UPDATE))
    error = await closed_with(wire, code)
    assert "not" in error["error"]


@pytest.mark.parametrize(
    "data",
    [
        masked(b"{}", first=0x00),  # the first of several fragments
        masked(b"{}", first=0xC0),  # compressed
        b"\x81\x02{}",  # not masked
        masked(bytes(126), PING),
    ],
    ids=["fragment", "reserved bit", "unmasked", "long ping"],
)
async def test_an_invalid_frame_is_an_error_event(serving, data):
    world, _, _ = serving
    wire = await opened(world)
    await wire.send(data)
    await closed_with(wire, 1008)


async def test_much_data_without_a_model_is_an_error_event(serving):
    world, _, _ = serving
    wire = await opened(world)
    for _ in range(9):
        await wire.send(masked(b"x" * 30_000))
    await closed_with(wire, 1008)


async def test_a_frame_that_is_announced_to_be_huge_is_an_error_event(serving):
    world, _, _ = serving
    wire = await opened(world)
    await wire.send(b"\x81\xff" + struct.pack(">Q", 1 << 62) + bytes(4))
    await closed_with(wire, 1008)


async def test_without_a_model_in_time_it_ends(serving, monkeypatch):
    monkeypatch.setattr(realtime, "MODEL_TIMEOUT_S", 0.05)
    world, _, _ = serving
    wire = await opened(world)
    await wire.send(masked(b"{}"))
    await closed_with(wire, 1008)
    await world.at_rest()


@pytest.mark.parametrize(
    "options",
    [
        {"version": "8"},
        {"key": ""},
        {"key": "short"},
        {"key": base64.b64encode(bytes(15)).decode()},
        {"key": "!" * 24},
    ],
)
async def test_an_invalid_handshake_is_a_400(serving, options):
    world, _, _ = serving
    wire = await world.client()
    await wire.send(handshake(**options))
    assert (await wire.answer()).status == 400


async def test_a_bug_closes_the_connection(serving, monkeypatch):
    world, _, _ = serving

    def crash(self: object, frame: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(realtime.Session, "_take", crash)
    wire = await opened(world)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)
    await wire.send(masked(UPDATE))
    await wire.ended()
    await world.at_rest()
