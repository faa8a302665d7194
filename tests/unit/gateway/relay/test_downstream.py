"""What a client may send, byte for byte: heads, bodies, limits and upgrades."""

import asyncio
import json

import pytest
import uvloop
from fakes.relay import BODY, HEAD, fails
from fakes.wire import chunk, post, until

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


MALFORMED = {
    "both framings": HEAD + b"Content-Length: 13\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY,
    "both framings, other order": HEAD
    + b"Transfer-Encoding: chunked\r\nContent-Length: 13\r\n\r\n"
    + BODY,
    "two lengths": HEAD + b"Content-Length: 13\r\nContent-Length: 14\r\n\r\n" + BODY,
    "two equal lengths": HEAD + b"Content-Length: 13\r\nContent-Length: 13\r\n\r\n" + BODY,
    "list of lengths": HEAD + b"Content-Length: 13, 13\r\n\r\n" + BODY,
    "signed length": HEAD + b"Content-Length: +13\r\n\r\n" + BODY,
    "hex length": HEAD + b"Content-Length: 0xd\r\n\r\n" + BODY,
    "empty length": HEAD + b"Content-Length:\r\n\r\n",
    "huge length": HEAD + b"Content-Length: 99999999999999999999\r\n\r\n",
    "coding of another name": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "identity": HEAD + b"Transfer-Encoding: identity\r\n\r\n",
    "compressed transfer": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": HEAD
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded header": HEAD + b"X: a\r\n b\r\nContent-Length: 13\r\n\r\n" + BODY,
    "folded with tab": HEAD + b"X: a\r\n\tb\r\nContent-Length: 13\r\n\r\n" + BODY,
    "space before colon": HEAD + b"Content-Length : 13\r\n\r\n" + BODY,
    "NUL": HEAD + b"X: a\0b\r\nContent-Length: 13\r\n\r\n" + BODY,
    "control character": HEAD + b"X: a\x01b\r\nContent-Length: 13\r\n\r\n" + BODY,
    "bare CR": HEAD + b"X: a\rContent-Length: 13\r\n\r\n" + BODY,
    "bare LF after a header": HEAD + b"X: a\nContent-Length: 13\r\n\r\n" + BODY,
    "bare LF everywhere": HEAD.replace(b"\r\n", b"\n") + b"Content-Length: 13\n\n" + BODY,
    "bare LF as the end": HEAD + b"Content-Length: 13\r\n\n" + BODY,
    "no name": HEAD + b": a\r\n\r\n",
    "no colon": HEAD + b"abc\r\n\r\n",
    "bad name": HEAD + b"X(: a\r\n\r\n",
    "name not ASCII": HEAD + b"X\xff: a\r\n\r\n",
    "no Host": b"POST /openai/v1/completions HTTP/1.1\r\nContent-Length: 13\r\n\r\n" + BODY,
    "two Hosts": HEAD + b"Host: other\r\nContent-Length: 13\r\n\r\n" + BODY,
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"GET / HTTP/2.0\r\nHost: h\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: h\r\n\r\n",
    "RTSP": b"GET / RTSP/1.0\r\nHost: h\r\n\r\n",
    "unknown method": b"BREW / HTTP/1.1\r\nHost: h\r\n\r\n",
    "lower case method": b"get / HTTP/1.1\r\nHost: h\r\n\r\n",
    "CONNECT": b"CONNECT engine:8000 HTTP/1.1\r\nHost: h\r\n\r\n",
    "two spaces before the target": b"GET  /a HTTP/1.1\r\nHost: h\r\n\r\n",
    "two spaces after the target": b"GET /a  HTTP/1.1\r\nHost: h\r\n\r\n",
    "space in target": b"GET /a b HTTP/1.1\r\nHost: h\r\n\r\n",
    "control in target": b"GET /a\x01 HTTP/1.1\r\nHost: h\r\n\r\n",
    "relative target": b"GET a HTTP/1.1\r\nHost: h\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "chunked in HTTP/1.0": b"POST /openai/v1/completions HTTP/1.0\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("request_", MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_head_gets_a_400_and_reaches_no_engine(start, request_):
    running = await start()
    wire = await running.client()
    await wire.send(request_ + post())
    await fails(wire, 400)
    await running.world.at_rest()
    assert running.engine.connections == 0


@pytest.mark.parametrize("request_", MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_head_in_single_bytes_is_rejected(start, request_):
    running = await start()
    wire = await running.client()
    try:
        for i in range(len(request_)):
            await wire.send(request_[i : i + 1])
            await asyncio.sleep(0)
    except ConnectionError:
        pass
    await fails(wire, 400)
    assert running.engine.connections == 0


CHUNKED_HEAD = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "body",
    [
        b"d\n" + BODY + b"\r\n0\r\n\r\n",
        b"d\r\n" + BODY + b"\n0\r\n\r\n",
        b"c\r\n" + BODY + b"\r\n0\r\n\r\n",
        b" d\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"d \r\n" + BODY + b"\r\n0\r\n\r\n",
        b"0xd\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"-d\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"fffffffffffffffff\r\n" + BODY,
        b"d;" + b"x" * 300 + b"\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"d;a\nb\r\n" + BODY + b"\r\n0\r\n\r\n",
        b"d\r\n" + BODY + b"\r\n0\r\nX: a\nY: b\r\n\r\n",
        b"d\r\n" + BODY + b"\r\n0\r\n folded\r\n\r\n",
        b"d\r\n" + BODY + b"\r\n0\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
    ],
)
async def test_malformed_chunks_are_rejected(start, body):
    running = await start()
    wire = await running.client()
    await wire.send(CHUNKED_HEAD + body)
    await fails(wire, 400)
    assert running.engine.connections == 0


async def test_a_head_that_is_too_long_is_rejected(start):
    running = await start(head_max_bytes=1000)
    for request in (
        HEAD + b"X: " + b"x" * 1000 + b"\r\n\r\n",
        HEAD + b"X: " + b"x" * 1000,
        b"GET /" + b"x" * 1000,
    ):
        wire = await running.client()
        await wire.send(request)
        await fails(wire, 431)


async def test_too_many_headers_are_rejected(start):
    running = await start(head_max_count=10)
    wire = await running.client()
    await wire.send(HEAD + b"X: y\r\n" * 9 + b"\r\n")
    assert (await wire.answer()).status == 400  # no body: the head was good
    wire = await running.client()
    await wire.send(HEAD + b"X: y\r\n" * 10 + b"\r\n")
    await fails(wire, 431)


async def test_a_head_that_is_too_slow_is_rejected_without_disturbing_others(start):
    running = await start(head_timeout_s=0.05)
    slow = await running.client()
    await slow.send(HEAD)
    other = await running.client()
    await other.send(post())
    assert (await other.answer()).status == 200
    await fails(slow, 408)
    await other.send(post())
    assert (await other.answer()).status == 200


async def test_a_body_that_is_too_slow_is_rejected_and_never_counted(start):
    running = await start(body_timeout_s=0.5)
    wire = await running.client()
    await wire.send(post()[:-1])
    await until(lambda: running.relay.exchanges == 1)
    assert running.world.active("m") == 0
    await fails(wire, 408)
    assert running.engine.connections == 0


@pytest.mark.parametrize("size", [1001, 1 << 40])
async def test_a_too_long_content_length_is_rejected_before_the_body_arrives(start, size):
    running = await start(body_max_bytes=1000)
    wire = await running.client()
    await wire.send(HEAD + b"Content-Length: %d\r\n\r\n" % size)
    await fails(wire, 413)


async def test_a_chunked_body_is_rejected_once_it_is_too_long(start):
    running = await start(body_max_bytes=1000)
    wire = await running.client()
    await wire.send(CHUNKED_HEAD + chunk(b"x" * 1001))
    await fails(wire, 413)


async def test_an_upload_to_the_local_routes_has_its_own_limit(start):
    running = await start(body_max_bytes=10, multipart_max_bytes=1000)
    wire = await running.client()
    await wire.send(post("/upload", b"x" * 1000))
    assert b'"size": 1000' in (await wire.answer()).body
    await wire.send(post("/upload", b"x" * 1001)[:-500])
    await fails(wire, 413)
    wire = await running.client()
    upload = b"POST /upload HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
    await wire.send(upload + chunk(b"x" * 600), chunk(b"x" * 600))
    await fails(wire, 413)


async def test_expect_100_continue_gets_a_100_continue(start):
    running = await start()
    wire = await running.client()
    for path in ("/openai/v1/chat/completions", "/upload"):
        request = post(path, BODY, "Expect: 100-continue")
        await wire.send(request[: -len(BODY)])
        assert (await wire.answer()).status == 100
        await wire.send(BODY)
        assert (await wire.answer()).status == 200
    # A client that sends the body at once gets no 100 Continue.
    await wire.send(post(body=BODY, path="/upload") + post())
    assert (await wire.answer()).status == 200
    assert (await wire.answer()).status == 200
    assert [r.one("expect") for r in running.engine.requests] == [None, None]


async def test_no_100_continue_is_sent_for_a_body_that_will_be_rejected(start):
    running = await start(body_max_bytes=1000)
    wire = await running.client()
    await wire.send(HEAD + b"Expect: 100-continue\r\nContent-Length: 1001\r\n\r\n")
    await fails(wire, 413)


async def test_other_expectations_are_rejected(start):
    running = await start()
    wire = await running.client()
    await wire.send(HEAD + b"Expect: a miracle\r\nContent-Length: 13\r\n\r\n" + BODY)
    await fails(wire, 417)


@pytest.mark.parametrize(
    "body",
    [
        chunk(BODY) + b"0\r\n\r\n",
        b"".join(chunk(BODY[i : i + 1]) for i in range(len(BODY))) + b"0\r\n\r\n",
        b"00D;ext=1\r\n" + BODY + b"\r\n000\r\nX-Trailer: t\r\n\r\n",
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 10000])
async def test_a_chunked_body_reaches_the_engine_with_a_content_length(start, body, piece):
    running = await start()
    wire = await running.client()
    request = CHUNKED_HEAD + body
    for _ in range(2):  # and the connection stays usable
        for i in range(0, len(request), piece):
            await wire.send(request[i : i + piece])
            await asyncio.sleep(0)
        assert (await wire.answer()).status == 200
    for got in running.engine.requests:
        assert got.body == BODY
        assert got.one("content-length") == str(len(BODY))
        assert got.one("transfer-encoding") is None
        assert got.one("x-trailer") is None


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000, 5_000_000])
async def test_a_body_of_any_size_reaches_the_engine_unchanged(start, size):
    running = await start()
    wire = await running.client()
    body = b'{"model":"m","x":"' + bytes(97 + i % 26 for i in range(size)) + b'"}'
    for _ in range(2):
        await wire.send(post(body=body))
        assert (await wire.answer()).status == 200
    assert [r.body == body for r in running.engine.requests] == [True, True]
    assert running.engine.connections == 1


async def test_empty_lines_between_requests_are_skipped(start):
    running = await start()
    wire = await running.client()
    await wire.send(b"\r\n\r\n" + post() + b"\r\n")
    assert (await wire.answer()).status == 200
    await wire.send(b"\r\n" + post())
    assert (await wire.answer()).status == 200


async def test_an_upgrade_is_ignored(start):
    running = await start()
    wire = await running.client()
    for _ in range(2):
        await wire.send(
            post(
                "/openai/v1/chat/completions",
                BODY,
                "Connection: Upgrade, HTTP2-Settings",
                "Upgrade: h2c",
                "HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA",
            )
        )
        assert (await wire.answer()).status == 200
    (got, _) = running.engine.requests
    assert not {"upgrade", "http2-settings", "connection"} & {k.lower() for k, _ in got.headers}


def handshake(path: str, *headers: str, version: str = "1.1") -> bytes:
    headers = headers or ("Connection: Upgrade", "Upgrade: websocket")
    lines = [f"GET {path} HTTP/{version}", "Host: h", *headers, "Sec-WebSocket-Version: 13"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Upgrade: WebSocket", "Connection: keep-alive, upgrade"),
        ("Connection: Upgrade", "Upgrade: h2c, websocket"),
    ],
)
@pytest.mark.parametrize(
    "path",
    ["/openai/v1/responses", "/openai/v1/responses?a=b", "/openai/v1/audio/transcriptions"],
)
async def test_a_websocket_handshake_gets_a_426_and_reaches_no_engine(start, path, headers):
    running = await start()
    wire = await running.client()
    await wire.send(handshake(path, *headers))
    refused = await wire.answer()
    assert refused.status == 426
    assert (refused.one("upgrade"), refused.one("connection")) == ("HTTP/1.1", "Upgrade")
    error = json.loads(refused.body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "upgrade_required")
    assert "WebSocket" in error["message"]
    await wire.send(post())  # the connection still speaks HTTP
    assert (await wire.answer()).status == 200
    assert [got.method for got in running.engine.requests] == ["POST"]


@pytest.mark.parametrize(
    "request_",
    [
        handshake("/openai/v1/models"),
        handshake("/nothing"),
        handshake("/openai/v1/responses", "Connection: keep-alive"),
        handshake("/openai/v1/responses", "Connection: Upgrade", "Upgrade: h2c"),
        handshake("/openai/v1/responses", version="1.0"),
    ],
)
async def test_other_upgrades_are_ignored(start, request_):
    running = await start()
    wire = await running.client()
    await wire.send(request_)
    answered = await wire.answer()
    assert answered.status == 200  # from the stand-in for the local routes
    names = {name.lower() for name, _ in json.loads(answered.body)["headers"]}
    assert not {"upgrade", "connection"} & names
    assert not running.engine.requests


async def test_frames_after_a_handshake_are_not_parsed_as_requests(start):
    running = await start()
    wire = await running.client()
    await wire.send(handshake("/openai/v1/responses") + b"\x81\x85abcdefghi")
    assert (await wire.answer()).status == 426
    await fails(wire, 400)
    assert not running.engine.requests


IDENTITY = [
    ("Content-Encoding: identity",),
    ("Content-Encoding: Identity",),
    ("Content-Encoding:",),
    ("Content-Encoding: identity , IDENTITY",),
    ("content-encoding: identity,", "Content-Encoding: identity"),
]


@pytest.mark.parametrize("headers", IDENTITY)
async def test_a_body_with_identity_encoding_is_forwarded(start, headers):
    running = await start()
    wire = await running.client()
    await wire.send(post("/openai/v1/chat/completions", BODY, *headers))
    assert (await wire.answer()).status == 200
    (got,) = running.engine.requests
    assert (got.body, got.all("content-encoding")) == (BODY, [])


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Encoding: deflate",),
        ("Content-Encoding: identity, br",),
        ("Content-Encoding: gzip", "Content-Encoding: zstd"),
        ("Content-Encoding: identity identity",),
    ],
)
async def test_a_body_in_another_encoding_is_rejected(start, headers):
    running = await start()
    wire = await running.client()
    await wire.send(post("/openai/v1/chat/completions", BODY, *headers))
    refused = await wire.answer()
    assert (refused.status, refused.one("accept-encoding")) == (415, "gzip, zstd")
    assert not running.engine.requests
