"""HTTP/1.0, HEAD, pipelining, and which connections stay open."""

import asyncio
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import pytest
import uvloop
from fakes.relay import BODY, fails
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, post

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


async def test_http_1_0_closes_by_default(start):
    running = await start()
    wire = await running.client()
    await wire.send(b"POST /openai/v1/completions HTTP/1.0\r\nContent-Length: 13\r\n\r\n" + BODY)
    answered = await wire.answer()
    assert answered.status == 200
    assert answered.one("connection") == "close"
    assert await wire.ended() is False


async def test_http_1_0_may_keep_alive(start):
    running = await start()
    wire = await running.client()
    for _ in range(2):
        await wire.send(
            post("/openai/v1/completions", BODY, "Connection: keep-alive", version="1.0")
        )
        answered = await wire.answer()
        assert answered.status == 200
        assert answered.one("connection") == "keep-alive"


@pytest.mark.parametrize("framed", [True, False])
async def test_http_1_0_gets_streams_unchunked(start, framed):
    async def script(wire: Wire, request: Message) -> None:
        if framed:
            await wire.send(CHUNKED + chunk(b"one "))
            await asyncio.sleep(0.01)
            await wire.send(chunk(b"two") + b"0\r\n\r\n")
        else:
            await wire.send(b"HTTP/1.1 200 OK\r\n\r\none two")
            wire.close()

    running = await start(script)
    wire = await running.client()
    await wire.send(post("/openai/v1/completions", BODY, "Connection: keep-alive", version="1.0"))
    answered = await wire.answer()
    assert answered.one("transfer-encoding") is None
    assert answered.one("connection") == "close"
    assert answered.body == b"one two"
    assert await wire.ended() is False


async def test_head_gets_only_the_response_head(start):
    running = await start()
    wire = await running.client()
    for _ in range(2):
        await wire.send(b"HEAD /page HTTP/1.1\r\nHost: h\r\n\r\n")
        answered = await wire.answer(to="HEAD")
        assert answered.status == 200
        assert int(answered.one("content-length")) > 0
    await wire.send(post())
    assert (await wire.answer()).status == 200


async def test_other_paths_go_to_the_local_routes_on_the_same_connection(start):
    running = await start()
    wire = await running.client()
    for _ in range(2):
        await wire.send(b"GET /page?q=1 HTTP/1.1\r\nHost: me\r\nX: y\r\n\r\n")
        page = await wire.answer()
        assert b'"path": "/page?q=1"' in page.body
        assert b'["X", "y"]' in page.body
        await wire.send(post())
        assert (await wire.answer()).body == b"{}"
        await wire.send(b"OPTIONS * HTTP/1.1\r\nHost: me\r\n\r\n")
        assert (await wire.answer()).status in (200, 404)
        upload = b"POST /upload HTTP/1.1\r\nHost: me\r\nTransfer-Encoding: chunked\r\n\r\n"
        await wire.send(upload + chunk(b"abc") + chunk(b"de") + b"0\r\n\r\n")
        assert b'"size": 5' in (await wire.answer()).body
        await wire.send(b"GET http://me/absolute HTTP/1.1\r\nHost: me\r\n\r\n")
        assert b'"path": "/absolute"' in (await wire.answer()).body
    assert len(running.engine.requests) == 2


async def test_pipelined_requests_are_answered_in_order_one_at_a_time(start):
    at_once = most = 0

    async def script(wire: Wire, request: Message) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.005)
        at_once -= 1
        await wire.send(answer(200, request.body))

    running = await start(script)
    wire = await running.client()
    bodies = [b'{"model":"m","n":%d}' % i for i in range(20)]
    await wire.send(b"".join(post(body=body) for body in bodies[:10]))
    await wire.send(b"GET /page HTTP/1.1\r\nHost: h\r\n\r\n")
    await wire.send(b"".join(post(body=body) for body in bodies[10:]))
    for body in bodies[:10]:
        assert (await wire.answer()).body == body
    assert b'"path": "/page"' in (await wire.answer()).body
    for body in bodies[10:]:
        assert (await wire.answer()).body == body
    assert most == 1


@pytest.mark.parametrize("size", [300_000, 1_500_000, 6_000_000])
async def test_a_request_pipelined_after_a_large_body_is_not_read_as_part_of_it(start, size):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, request.body[-9:]))

    running = await start(script)
    wire = await running.client()
    large = b'{"model":"m","n":"' + b"x" * size + b'LARGE-1"}'
    small = b'{"model":"m","n":"SMALL-2"}'
    await wire.send(post(body=large) + post(body=small))
    assert (await wire.answer()).body == b'LARGE-1"}'
    assert (await wire.answer()).body == b'SMALL-2"}'
    assert [request.body for request in running.engine.requests] == [large, small]


async def test_a_thousand_pipelined_bad_requests_are_answered_one_by_one(start):
    running = await start()
    wire = await running.client()
    await wire.send(post(body=b"{}") * 1000)
    for _ in range(1000):
        assert (await wire.answer()).status == 400
    await wire.send(post())
    assert (await wire.answer()).status == 200


async def test_the_connection_stays_usable_after_an_early_rejection(start):
    running = await start()
    wire = await running.client()
    await wire.send(post("/openai/v1/chat/completions", b"x" * 100, "Content-Encoding: br"))
    answered = await wire.answer()
    assert answered.status == 415
    assert answered.one("connection") is None
    await wire.send(post())
    assert (await wire.answer()).status == 200


async def test_the_gateways_own_response_has_a_date(start):
    running = await start()
    wire = await running.client()
    await wire.send(post(body=b"no json"), b"nonsense\r\n\r\n")
    for _ in range(2):
        made = parsedate_to_datetime((await wire.answer()).one("date"))
        assert abs((datetime.now(UTC) - made).total_seconds()) < 5


async def test_a_response_before_the_end_of_the_body_closes_the_connection(start):
    running = await start()
    wire = await running.client()
    await wire.send(post("/openai/v1/chat/completions", b"x" * 100, "Content-Encoding: br")[:-9])
    await fails(wire, 415)
