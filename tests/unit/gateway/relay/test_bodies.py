"""Bodies under flow control, and responses that break off."""

import asyncio
import socket

import pytest
import uvloop
from fakes.relay import BODY, HEAD, SLOW
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, post, until

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


# -- flow control ----------------------------------------------------------------------------------


async def test_a_slow_reader_pauses_its_own_engine_and_no_other(start):
    sent = 0
    piece = chunk(b"x" * 65536)

    async def script(wire: Wire, request: Message) -> None:
        nonlocal sent
        if b"slow" not in request.body:
            await wire.send(answer(200, b"quick"))
            return
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        await wire.send(CHUNKED)
        for _ in range(512):
            await wire.send(piece)
            sent += 1
        await wire.send(b"0\r\n\r\n")

    running = await start(script)
    slow = await running.client(receive_buffer_bytes=16384)
    await slow.send(post(body=b'{"model":"m","slow":1}'))
    await slow.head()

    before = -1
    while before != sent:  # until the engine is blocked
        before = sent
        other = await running.client()
        for _ in range(20):
            await other.send(post())
            assert (await other.answer()).body == b"quick"
        other.close()
    assert sent < 256, "the relay kept reading: backpressure did not reach the engine"
    slow.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    raw = await slow.reader.readexactly(512 * len(piece) + 5)
    assert raw == piece * 512 + b"0\r\n\r\n"


async def test_a_client_that_stops_reading_is_disconnected(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED)
        while True:
            await wire.send(chunk(b"x" * 65536))

    running = await start(script, between_bytes_timeout_s=0.1)
    wire = await running.client(receive_buffer_bytes=16384)
    await wire.send(post())
    await wire.head()
    await until(lambda: running.relay.exchanges == 0)
    await until(lambda: not running.engine.open)


async def test_an_upload_streams_to_the_local_routes_under_flow_control(start):
    running = await start(body_timeout_s=0.2)
    wire = await running.client()
    upload = b"POST /slow HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % (32 << 20)
    piece = b"x" * (1 << 20)
    sent = 0

    async def send() -> None:
        nonlocal sent
        await wire.send(upload)
        for _ in range(32):
            await wire.send(piece)
            sent += 1

    sending = asyncio.create_task(send())
    before = -1
    while before != sent or not sent:
        before = sent
        await asyncio.sleep(0.3)  # longer than a body may take: it is not the client that is slow
    assert sent < 24
    SLOW.set()
    await sending
    assert b'"size": %d' % (32 << 20) in (await wire.answer()).body


async def test_a_client_that_leaves_closes_its_upstream_connection(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"x"))
        await wire.reader.read()
        wire.close()

    running = await start(script)
    for leave in (Wire.close, Wire.reset):
        wire = await running.client()
        await wire.send(post())
        await wire.head()
        assert running.world.in_flight("m") == 1
        leave(wire)
        await until(lambda: not running.engine.open)
        await running.world.at_rest()


@pytest.mark.parametrize("begun", [b"", CHUNKED + chunk(b"data: 1\n\n")])
async def test_a_client_that_half_closes_its_connection_has_disconnected(start, begun):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(begun)
        await wire.reader.read()

    running = await start(script)
    wire = await running.client()
    await wire.send(post())
    if begun:
        await wire.head()
    await until(lambda: running.world.in_flight("m") == 1)
    wire.writer.write_eof()
    await until(lambda: not running.engine.open)
    await running.world.at_rest()
    await until(lambda: running.relay.connections == 0)


@pytest.mark.parametrize("sent", [0, 5, len(HEAD), len(post()) - 5])
async def test_a_client_may_disconnect_in_the_middle_of_a_request(start, sent):
    running = await start()
    for leave in (Wire.close, Wire.reset):
        wire = await running.client()
        await wire.send(post()[:sent])
        leave(wire)
        await until(lambda: running.relay.connections == 0)
    assert running.engine.connections == 0


# -- broken answers --------------------------------------------------------------------------------

BEGUN = {
    "chunked": CHUNKED + chunk(b"data: 1\n\n"),
    "chunked, inside a chunk": CHUNKED + b"10\r\nabc",
    "of known length": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nabc",
}


@pytest.mark.parametrize("how", [Wire.close, Wire.reset])
@pytest.mark.parametrize("begun", BEGUN.values(), ids=BEGUN)
async def test_a_broken_response_never_looks_complete(start, begun, how):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(begun)
        await seen.wait()
        how(wire)

    running = await start(script)
    for version in ("1.1", "1.0"):
        seen = asyncio.Event()
        wire = await running.client()
        await wire.send(post("/openai/v1/chat/completions", BODY, version=version))
        head = await wire.head()
        assert head.status == 200
        seen.set()
        if head.one("content-length") or head.one("transfer-encoding"):
            with pytest.raises(Broken):
                await wire.body(head)
        else:
            with pytest.raises(Broken) as broken:
                await wire.body(head, until_close=True)
            assert broken.value.reset


async def test_a_reset_is_not_the_end_of_a_response_delimited_by_close(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\nsome")
        await seen.wait()
        wire.reset()

    running = await start(script)
    for version in ("1.1", "1.0"):
        seen = asyncio.Event()
        wire = await running.client()
        await wire.send(post("/openai/v1/chat/completions", BODY, version=version))
        head = await wire.head()
        seen.set()
        with pytest.raises(Broken) as broken:
            await wire.body(head, until_close=True)
        assert version == "1.1" or broken.value.reset


async def test_bad_response_chunks_truncate_the_response(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"good"))
        await asyncio.sleep(0.01)
        await wire.send(b"zz\r\nbad\r\n0\r\n\r\n")

    running = await start(script)
    wire = await running.client()
    await wire.send(post())
    head = await wire.head()
    with pytest.raises(Broken):
        await wire.body(head)


async def test_an_engine_that_stalls_is_disconnected(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"good"))
        await wire.reader.read()

    running = await start(script, between_bytes_timeout_s=0.05)
    wire = await running.client()
    await wire.send(post())
    head = await wire.head()
    with pytest.raises(Broken):
        await wire.body(head)
    await until(lambda: not running.engine.open)
