"""Idle connections: which are kept, reused, closed or replaced."""

import asyncio
import time

import uvloop
from fakes.wire import Message, Wire, answer, post, until

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


async def test_an_idle_client_connection_is_closed(start):
    running = await start(keep_alive_timeout_s=0.05)
    for requests in (0, 1):
        wire = await running.client()
        for _ in range(requests):
            await wire.send(post())
            await wire.answer()
        assert await wire.ended() is False


async def test_an_idle_upstream_connection_is_closed_before_the_engine_would(start):
    running = await start(upstream_idle_timeout_s=0.05)
    wire = await running.client()
    await wire.send(post())
    await wire.answer()
    assert len(running.engine.open) == 1
    await until(lambda: not running.engine.open)
    await wire.send(post())
    assert (await wire.answer()).status == 200
    assert running.engine.connections == 2


def port_of(wire: Wire) -> bytes:
    """Which of the gateway's connections this is, as reported by the engine."""
    return str(wire.writer.get_extra_info("peername")[1]).encode()


async def test_the_most_recently_used_connection_is_reused_first(start):
    at_work = asyncio.Semaphore(0)

    async def script(wire: Wire, request: Message) -> None:
        if b"wait" in request.body:
            await at_work.acquire()
        await wire.send(answer(200, port_of(wire)))

    running = await start(script)
    wires = [await running.client() for _ in range(3)]
    for wire in wires:
        await wire.send(post(body=b'{"model":"m","wait":1}'))
    await until(lambda: len(running.engine.requests) == 3)
    for _ in wires:
        at_work.release()
    ports = [(await wire.answer()).body for wire in wires]
    assert len(set(ports)) == 3
    used = set()
    for _ in range(5):
        await wires[0].send(post())
        used.add((await wires[0].answer()).body)
    assert len(used) == 1
    assert running.engine.connections == 3


async def test_connections_opened_for_a_burst_stay_open_under_frequent_requests(start):
    """A connection past half of its idle time is used before the most recently returned one."""
    all_at_work = asyncio.Barrier(4)

    async def script(wire: Wire, request: Message) -> None:
        if b"burst" in request.body:
            await all_at_work.wait()
        await wire.send(answer(200, port_of(wire)))

    # The clock's tick is too long to close any.
    running = await start(script, upstream_idle_timeout_s=0.2, tick_s=60)
    wires = [await running.client() for _ in range(4)]
    for wire in wires:
        await wire.send(post(body=b'{"model":"m","burst":1}'))
    ports = {(await wire.answer()).body for wire in wires}
    assert len(ports) == 4
    at_rest_s = time.monotonic()
    # Half of the idle time, and 20 ms for the kernel's tick, whose time the relay uses.
    await until(lambda: time.monotonic() > at_rest_s + 0.1 + 0.02)
    used = []
    for _ in range(4):
        await wires[0].send(post())
        used.append((await wires[0].answer()).body)
    assert set(used) == ports


async def test_no_more_idle_connections_are_kept_than_allowed(start):
    both = asyncio.Barrier(2)

    async def script(wire: Wire, request: Message) -> None:
        await both.wait()
        await wire.send(answer())

    running = await start(script, upstream_max_idle=1)
    for wire in [await running.client() for _ in range(2)]:
        await wire.send(post())
    await until(lambda: len(running.engine.requests) == 2)
    await until(lambda: len(running.engine.open) == 1)


async def test_a_request_on_a_stale_connection_is_replayed_once(start):
    """The engine's close crosses the request in transit."""

    async def script(wire: Wire, request: Message) -> None:
        if b"bye" in request.body and wire in used:
            wire.close()  # after reading the request, but before any byte of the response
        else:
            used.add(wire)
            await wire.send(answer(200, request.body))

    used: set[Wire] = set()
    running = await start(script, retries=0)
    wire = await running.client()
    await wire.send(post())
    await wire.answer()
    body = b'{"model":"m","bye":1}'
    await wire.send(post(body=body))
    answered = await wire.answer()
    assert (answered.status, answered.body) == (200, body)
    assert running.engine.connections == 2
    assert len(running.engine.requests) == 3


async def test_a_request_is_replayed_only_once(start):
    async def script(wire: Wire, request: Message) -> None:
        if b"bye" in request.body:
            wire.close()
        else:
            await wire.send(answer())

    running = await start(script, retries=0)
    wire = await running.client()
    await wire.send(post())
    await wire.answer()
    await wire.send(post(body=b'{"model":"m","bye":1}'))
    assert (await wire.answer()).status == 502
    assert len(running.engine.requests) == 3


async def test_a_request_on_a_new_connection_is_not_replayed(start):
    async def script(wire: Wire, request: Message) -> None:
        wire.close()

    running = await start(script, retries=0)
    wire = await running.client()
    await wire.send(post())
    assert (await wire.answer()).status == 502
    assert len(running.engine.requests) == 1


async def test_a_started_response_is_not_replayed(start):
    async def script(wire: Wire, request: Message) -> None:
        if b"bye" in request.body:
            await wire.send(b"HTTP/1.1 2")
            wire.close()
        else:
            await wire.send(answer())

    running = await start(script, retries=0)
    wire = await running.client()
    await wire.send(post())
    await wire.answer()
    await wire.send(post(body=b'{"model":"m","bye":1}'))
    assert (await wire.answer()).status == 502
    assert len(running.engine.requests) == 2
