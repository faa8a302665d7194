"""Requests and responses are forwarded with the headers and framing of HTTP/1.1."""

import asyncio
import re

import pytest
import uvloop
from fakes.relay import BODY, HEAD
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, post, says, until

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


async def test_a_request_is_forwarded_without_hop_by_hop_headers(start):
    running = await start()
    wire = await running.client()
    await wire.send(
        post(
            "/openai/v1/chat/completions?a=b&c",
            BODY,
            "Authorization: Bearer x",
            "X-Forwarded-For: 10.0.0.1",
            "x-forwarded-for: 10.0.0.2",
            "X-FORWARDED-PROTO: https",
            "X-Request-ID: mine",
            "Connection: keep-alive, X-Private , close",
            "X-Private: secret",
            "Keep-Alive: timeout=5",
            "Proxy-Connection: keep-alive",
            "Proxy-Authorization: Basic x",
            "TE: trailers",
            "Accept: text/event-stream",
            "Empty:",
        )
    )
    answered = await wire.answer()
    assert answered.one("connection") == "close"
    assert await wire.ended() is False
    (got,) = running.engine.requests
    assert got.line == "POST /v1/chat/completions?a=b&c HTTP/1.1"
    assert got.headers == [
        ("Host", running.engine.address),
        ("Authorization", "Bearer x"),
        ("X-FORWARDED-PROTO", "https"),
        ("Accept", "text/event-stream"),
        ("Empty", ""),
        ("X-Forwarded-For", "10.0.0.1, 10.0.0.2, 127.0.0.1"),
        ("X-Forwarded-Host", "gateway"),
        ("X-Request-Id", "mine"),
        ("Content-Length", "13"),
    ]
    assert got.body == BODY


async def test_header_values_are_forwarded_without_surrounding_blanks(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(b"HTTP/1.1 200 OK\r\nX:\t a \tb \t\r\nY:\r\nContent-Length: \t0\t \r\n\r\n")

    running = await start(script)
    wire = await running.client()
    await wire.send(HEAD + b"A:b:c \r\nB: \t\r\nC:\t\xff  d\r\nContent-Length:13 \r\n\r\n" + BODY)
    answered = await wire.answer()
    (got,) = running.engine.requests
    assert [got.one(name) for name in "ABC"] == ["b:c", "", "\xff  d"]
    assert (answered.one("x"), answered.one("y"), answered.body) == ("a \tb", "", b"")


async def test_forwarding_headers_are_added(start):
    running = await start()
    wire = await running.client()
    await wire.send(post())
    await wire.answer()
    (got,) = running.engine.requests
    assert got.one("x-forwarded-for") == "127.0.0.1"
    assert got.one("x-forwarded-proto") == "http"
    assert got.one("x-forwarded-host") == "gateway"


async def test_each_request_has_its_own_forwarding_headers(start):
    """The parsed ones are reused for a connection's next request, which may have different ones."""
    running = await start()
    wire = await running.client()
    for host in ("h", "h", "other", "h"):
        await wire.send(post(host=host))
        await wire.answer()
    await wire.send(post("/openai/v1/chat/completions", BODY, "X-Forwarded-Host: outside"))
    await wire.answer()
    hosts = [got.one("x-forwarded-host") for got in running.engine.requests]
    assert hosts == ["h", "h", "other", "h", "outside"]


async def test_a_request_keeps_its_id(start):
    running = await start()
    wire = await running.client()
    await wire.send(post("/openai/v1/chat/completions", BODY, "x-request-id: client's-1"))
    assert (await wire.answer()).one("x-request-id") == "client's-1"
    assert running.engine.requests[0].one("x-request-id") == "client's-1"


async def test_a_request_without_an_id_gets_a_new_one(start):
    running = await start()
    wire = await running.client()
    ids = []
    for _ in range(3):
        await wire.send(post())
        ids.append((await wire.answer()).one("x-request-id"))
    assert [got.one("x-request-id") for got in running.engine.requests] == ids
    assert len(set(ids)) == 3
    assert all(len(each) == 28 and each.isalnum() for each in ids)


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, "café"])
async def test_an_invalid_request_id_is_replaced(start, given):
    running = await start()
    wire = await running.client()
    await wire.send(post("/openai/v1/chat/completions", BODY, f"X-Request-Id: {given}"))
    answered = await wire.answer()
    assert len(answered.one("x-request-id")) == 28
    assert running.engine.requests[0].all("x-request-id") == answered.all("x-request-id")


async def test_the_engines_own_request_id_is_not_forwarded(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, b"", "X-Request-Id: engine's"))

    running = await start(script)
    wire = await running.client()
    await wire.send(post("/openai/v1/chat/completions", BODY, "X-Request-Id: mine"))
    assert (await wire.answer()).all("x-request-id") == ["mine"]


async def test_the_gateways_own_response_has_the_request_id(start):
    running = await start()
    wire = await running.client()
    await wire.send(post("/openai/v1/chat/completions", b"{", "X-Request-Id: mine"))
    answered = await wire.answer()
    assert (answered.status, answered.one("x-request-id")) == (400, "mine")


async def test_a_traceparent_is_forwarded_unchanged(start):
    running = await start()
    wire = await running.client()
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await wire.send(
        post("/openai/v1/chat/completions", BODY, f"traceparent: {parent}", "tracestate: a=b")
    )
    await wire.answer()
    (got,) = running.engine.requests
    assert (got.one("traceparent"), got.one("tracestate")) == (parent, "a=b")


async def test_more_connections_than_allowed_get_an_error(start):
    running = await start(connections_max=2)
    first, second = await running.client(), await running.client()
    for wire in (first, second):
        await wire.send(post())
        await wire.answer()
    third = await running.client()
    refused = await third.answer()
    assert (refused.status, refused.one("retry-after")) == (503, "5")
    assert refused.one("connection") == "close"
    assert "connections" in refused.body.decode()
    first.close()
    await until(lambda: running.relay.connections < 3)
    third.close()
    await until(lambda: running.relay.connections == 1)
    fourth = await running.client()
    await fourth.send(post())
    assert (await fourth.answer()).status == 200


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_bodies_have_a_limit_together_over_all_connections(start, framing):
    running = await start(body_max_bytes=1 << 20, buffer_max_bytes=3 << 19)
    whole = post(body=b" " * (900 << 10) + BODY)
    if framing == "chunked":
        head, _, body = whole.partition(b"\r\n\r\n")
        head = re.sub(rb"Content-Length: \d+", b"Transfer-Encoding: chunked", head)
        whole = head + b"\r\n\r\n" + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    first, second = await running.client(), await running.client()
    await first.send(whole[:-5])
    await until(lambda: running.relay.buffered_bytes >= 900 << 10)
    await second.send(whole[:-5])
    refused = await second.answer()
    assert (refused.status, refused.one("retry-after")) == (503, "5")
    await first.send(whole[-5:])
    assert (await first.answer()).status == 200
    await until(lambda: running.relay.buffered_bytes == 0)
    await first.send(whole)
    assert (await first.answer()).status == 200


async def test_a_response_is_forwarded_without_hop_by_hop_headers(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(
            answer(
                201,
                b"body",
                "Connection: keep-alive, X-Private",
                "X-Private: secret",
                "Keep-Alive: timeout=5",
                "Proxy-Authenticate: Basic",
                "Set-Cookie: a=b",
                "Set-Cookie: c=d",
                reason="Made  here",
            )
        )

    running = await start(script)
    wire = await running.client()
    await wire.send(post())
    answered = await wire.answer()
    assert answered.line == "HTTP/1.1 201 Made  here"
    assert answered.headers == [
        ("Set-Cookie", "a=b"),
        ("Set-Cookie", "c=d"),
        ("X-Request-Id", answered.one("x-request-id")),
        ("Content-Length", "4"),
    ]
    assert answered.body == b"body"


async def test_chunked_responses_are_forwarded_unchanged_with_trailers(start):
    raw = b"5;a=b\r\nhello\r\n1\r\n \r\n05\r\nworld\r\n0\r\nX-Sum: 1\r\nX-Other: 2\r\n\r\n"

    async def script(wire: Wire, request: Message) -> None:
        for i in range(0, len(raw), 3):
            await wire.send((CHUNKED if i == 0 else b"") + raw[i : i + 3])
            await asyncio.sleep(0)

    running = await start(script)
    wire = await running.client()
    for _ in range(3):
        await wire.send(post())
        answered = await wire.answer()
        assert answered.one("transfer-encoding") == "chunked"
        assert answered.raw_body == raw
        assert answered.body == b"hello world"
        assert answered.trailers == ["X-Sum: 1", "X-Other: 2"]
    assert running.engine.connections == 1


async def test_a_stream_is_forwarded_chunk_by_chunk(start):
    go_on = asyncio.Semaphore(0)

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED)
        for i in range(3):
            await go_on.acquire()
            await wire.send(chunk(b"data: %d\n\n" % i))
        await go_on.acquire()
        await wire.send(b"0\r\n\r\n")

    running = await start(script)
    wire = await running.client()
    await wire.send(post())
    head = await wire.head()
    assert head.status == 200
    for i in range(3):
        go_on.release()
        assert await wire.reader.readexactly(14) == chunk(b"data: %d\n\n" % i)
    go_on.release()
    assert await wire.reader.readexactly(5) == b"0\r\n\r\n"


async def test_a_response_delimited_by_close_becomes_chunked(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nfirst ")
        await asyncio.sleep(0.01)
        await wire.send(b"second")
        wire.close()

    running = await start(script)
    wire = await running.client()
    for _ in range(2):
        await wire.send(post())
        answered = await wire.answer()
        assert answered.one("transfer-encoding") == "chunked"
        assert answered.body == b"first second"
    assert running.engine.connections == 2


@pytest.mark.parametrize("status", [204, 304])
async def test_responses_without_a_body_end_with_their_head(start, status):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(b"HTTP/1.1 %d No\r\nETag: x\r\n\r\n" % status)

    running = await start(script)
    wire = await running.client()
    for _ in range(2):
        await wire.send(post())
        answered = await wire.answer()
        assert answered.status == status
        assert answered.headers == [
            ("ETag", "x"),
            ("X-Request-Id", answered.one("x-request-id")),
        ]
    assert running.engine.connections == 1


async def test_interim_responses_are_dropped(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n")
        await asyncio.sleep(0.01)
        await wire.send(b"\r\n" + answer(200, b"done"))

    running = await start(script)
    wire = await running.client()
    for _ in range(2):
        await wire.send(post())
        answered = await wire.answer()
        assert (answered.status, answered.body) == (200, b"done")
        assert answered.one("link") is None


@pytest.mark.parametrize("piece", [1, 5])
async def test_a_response_may_arrive_in_pieces(start, piece):
    async def script(wire: Wire, request: Message) -> None:
        raw = answer(200, b"0123456789", "X: y")
        for i in range(0, len(raw), piece):
            await wire.send(raw[i : i + piece])
            await asyncio.sleep(0)

    running = await start(script)
    wire = await running.client()
    for _ in range(2):
        await wire.send(post())
        assert (await wire.answer()).body == b"0123456789"
    assert running.engine.connections == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"hello\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
        b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
        b"\x16\x03\x01",
        b"HTTP/1.1 200 O\0K\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 O\x1bK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 O\x7fK\r\nContent-Length: 0\r\n\r\n",
    ],
)
async def test_a_response_that_is_not_http_is_a_502(start, raw):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(raw)

    running = await start(script, retries=0)
    wire = await running.client()
    await wire.send(post())
    assert (await wire.answer()).status == 502
    running.runs(says(b"fine"))
    await wire.send(post())
    assert (await wire.answer()).body == b"fine"


async def test_bytes_after_a_response_are_discarded_with_the_connection(start):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, b"mine") + answer(200, b"whose?"))

    running = await start(script)
    wire = await running.client()
    for _ in range(2):
        await wire.send(post())
        assert (await wire.answer()).body == b"mine"
    assert running.engine.connections == 2
