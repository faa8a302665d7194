"""A server that drains serves new requests, then closes and finishes open ones."""

import asyncio

import pytest
import uvloop
from fakes.chats import ask
from fakes.wire import CHUNKED, Broken, Message, Script, Wire, answer, chunk, says, until

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


def slow_until(go_on: asyncio.Event) -> Script:
    """Respond at once, except to a slow request: in two parts, the second on a signal."""

    async def script(wire: Wire, request: Message) -> None:
        if b"slow" in request.body:
            await wire.send(CHUNKED + chunk(b"1"))
            await go_on.wait()
            await wire.send(chunk(b"2") + b"0\r\n\r\n")
        else:
            await wire.send(answer(200, b"quick"))

    return script


async def test_draining_serves_new_requests_then_closes_and_finishes_open_ones(start):
    world = await start()
    go_on = asyncio.Event()
    world.route("m", {"a": await world.engine(slow_until(go_on))})
    world.route("cold", {})
    streaming = await world.client()
    await streaming.send(ask(slow=1))
    head = await streaming.head()
    held = await world.client()
    await held.send(ask("cold"))
    await until(lambda: world.held("cold") == 1)
    idle = await world.client()
    await idle.send(ask())
    assert (await idle.answer()).one("connection") is None
    silent = await world.client()
    await until(lambda: world.server.relay.connections == 4)

    drained = asyncio.create_task(world.server.drain(accept_s=1.0, timeout_s=5))
    await until(lambda: world.context.draining)
    new = await world.client()
    await new.send(ask())
    answered = await new.answer()
    assert (answered.body, answered.one("connection")) == (b"quick", "close")
    assert await new.ended() is False

    assert await idle.ended() is False
    assert await silent.ended() is False
    with pytest.raises(ConnectionError):
        await world.client()
    assert not drained.done()
    go_on.set()
    assert (await streaming.body(head)).body == b"12"
    assert await streaming.ended() is False
    world.route("cold", {"c": await world.engine(says(b"warm"))})
    answered = await held.answer()
    assert (answered.body, answered.one("connection")) == (b"warm", "close")
    await drained


async def test_a_keep_alive_connection_accepts_one_more_request_while_draining(start):
    """The response's head announced no close, so its client may send another request."""
    world = await start()
    go_on = asyncio.Event()
    world.route("m", {"a": await world.engine(slow_until(go_on))})
    wire = await world.client()
    await wire.send(ask(slow=1))
    head = await wire.head()
    fresh = await world.client()
    await fresh.send(ask())
    assert (await fresh.answer()).one("connection") is None
    drained = asyncio.create_task(world.server.drain(accept_s=0, timeout_s=5))
    await until(lambda: world.server.relay.draining)
    while await listens(world):
        pass
    go_on.set()
    assert (await wire.body(head)).body == b"12"
    for one in (wire, fresh):
        await one.send(ask())
        answered = await one.answer()
        assert (answered.body, answered.one("connection")) == (b"quick", "close")
        assert await one.ended() is False
    await drained


async def listens(world) -> bool:
    try:
        (await world.client()).close()
    except ConnectionError:
        return False
    return True


async def test_draining_times_out(start):
    world = await start()

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED)
        await wire.reader.read()

    world.route("m", {"a": await world.engine(script)})
    wire = await world.client()
    await wire.send(ask())
    head = await wire.head()
    await world.server.drain(accept_s=0, timeout_s=0.05)
    world.server.close()
    with pytest.raises(Broken):
        await wire.body(head)
