"""HTTP/1.1 in the relay, byte for byte, in both directions."""

import asyncio
import contextlib
import json
import re
import socket
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httptools
import pytest
import uvloop
from aiohttp import web
from fakes.wire import (
    CHUNKED,
    Broken,
    Engine,
    Message,
    Wire,
    answer,
    chunk,
    post,
    says,
    until,
)
from fakes.world import World
from hypothesis import example, given
from hypothesis import strategies as st

from kubeai.gateway.relay._downstream import Downstream
from kubeai.gateway.relay._exchange import Exchange, Relay
from kubeai.gateway.relay._http1 import unchunk

HEAD = b"POST /openai/v1/chat/completions HTTP/1.1\r\nHost: h\r\n"
BODY = b'{"model":"m"}'

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


SLOW = asyncio.Event()  # an upload to /slow is read once this is set


async def echo(request: web.Request) -> web.Response:
    if request.path == "/slow":
        await SLOW.wait()
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "path": request.raw_path,
            "size": len(body),
            "headers": [[k, v] for k, v in request.headers.items()],
        }
    )


def pages() -> web.Application:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", echo)
    return app


class Running:
    """A gateway with one engine that serves the model ``m``."""

    def __init__(self, world: World, engine: Engine) -> None:
        self.world = world
        self.engine = engine

    @property
    def relay(self) -> Relay:
        return self.world.server.relay

    async def client(self, **options: object) -> Wire:
        return await self.world.client(**options)

    def runs(self, script) -> None:
        self.engine.script = script


@pytest.fixture
async def start():
    worlds = []

    async def start(script=None, **config) -> Running:
        world = await World.start(app=pages(), **config)
        worlds.append(world)
        engine = await world.engine(script or says(b"{}"))
        world.route("m", {"pod-1": engine})
        return Running(world, engine)

    yield start
    for world in worlds:
        await world.close()


async def fails(wire: Wire, status: int) -> None:
    """Check that the connection gets this error response and is closed."""
    answered = await wire.answer()
    assert answered.status == status, answered
    assert answered.one("connection") == "close"
    assert b'"error":{"message":' in answered.body
    await wire.ended()


# -- what a client may send ------------------------------------------------------------------------

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
    running = await start(body_timeout_s=0.05)
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
        ("Content-Encoding: gzip",),
        ("Content-Encoding: identity, br",),
        ("Content-Encoding: identity", "Content-Encoding: zstd"),
        ("Content-Encoding: identity identity",),
    ],
)
async def test_a_body_in_another_encoding_is_rejected(start, headers):
    running = await start()
    wire = await running.client()
    await wire.send(post("/openai/v1/chat/completions", BODY, *headers))
    refused = await wire.answer()
    assert (refused.status, refused.one("accept-encoding")) == (415, "identity")
    assert not running.engine.requests


# -- forwarding ------------------------------------------------------------------------------------


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


# -- versions and methods --------------------------------------------------------------------------


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
    await wire.send(post("/openai/v1/chat/completions", b"x" * 100, "Content-Encoding: gzip"))
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
    await wire.send(post("/openai/v1/chat/completions", b"x" * 100, "Content-Encoding: gzip")[:-9])
    await fails(wire, 415)


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


# -- connections -----------------------------------------------------------------------------------


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
    running = await start(script, upstream_idle_timeout_s=0.02, tick_s=60)
    wires = [await running.client() for _ in range(4)]
    for wire in wires:
        await wire.send(post(body=b'{"model":"m","burst":1}'))
    ports = {(await wire.answer()).body for wire in wires}
    assert len(ports) == 4
    at_rest_s = time.monotonic()
    await until(lambda: time.monotonic() > at_rest_s + 0.01)
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


# -- chunk framing against llhttp ------------------------------------------------------------------


class _Reference:
    def __init__(self) -> None:
        self.data = b""
        self.ended = False
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self.data += data

    def on_message_complete(self) -> None:
        self.ended = True


noise = st.lists(
    st.sampled_from(
        [b"\r\n", b"0", b"1", b"a", b"3\r\nabc\r\n", b"0\r\n", b";x=y", b"X: y\r\n", b" ", b"\n"]
    ),
    max_size=12,
).map(b"".join)
tidy = st.lists(st.binary(min_size=1, max_size=40), max_size=5).map(
    lambda chunks: b"".join(map(chunk, chunks)) + b"0\r\n\r\n"
)


@given(st.one_of(noise, tidy), st.integers(1, 20))
def test_chunks_end_where_llhttp_ends_them_or_are_rejected(body, piece):
    reference = _Reference()
    bad = False
    at = 0
    try:
        while at < len(body) and not reference.ended:
            reference.parser.feed_data(body[at : at + 1])
            at += 1
    except httptools.HttpParserError:
        bad = True
    try:
        data, used, ended = unchunk(*(body[i : i + piece] for i in range(0, len(body), piece)))
    except ValueError:
        return  # stricter than llhttp is fine
    assert not bad
    assert (data, ended) == (reference.data, reference.ended)
    if ended:
        assert used == at


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=5), st.integers(1, 20))
def test_well_formed_chunks_are_accepted(chunks, piece):
    body = b"".join(map(chunk, chunks)) + b"0\r\n\r\n"
    pieces = [body[i : i + piece] for i in range(0, len(body), piece)]
    assert unchunk(*pieces, b"next") == (b"".join(chunks), len(body), True)


# -- where requests begin and end, against llhttp --------------------------------------------------


class _Loop:
    def call_exception_handler(self, context: dict) -> None:
        raise AssertionError(context["message"]) from context["exception"]

    def call_later(self, *_: object) -> None:
        return None


class _Transport:
    """Accepts writes without counting them; closes at once."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def get_extra_info(self, name: str) -> tuple[str, int]:
        return ("10.0.0.1", 1)

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.written += data

    def close(self) -> None:
        self.closed = True

    abort = write_eof = close

    def pause_reading(self) -> None:
        raise AssertionError("every request is answered at once")

    resume_reading = pause_reading


class _Echo(Exchange):
    def __init__(self, downstream, taken) -> None:
        self.taken = taken

    def on_head(self) -> None:
        self.collect(1 << 20)

    def on_body(self) -> None:
        self.taken.append((self.method, self.target, self.body))
        self.answer(200, b"{}")


class _Requests:
    """llhttp's parse of the same bytes."""

    def __init__(self) -> None:
        self.whole: list[tuple[str, str, bytes]] = []
        self.parser = httptools.HttpRequestParser(self)

    def on_message_begin(self) -> None:
        self.target, self.body = b"", b""

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.whole.append((self.parser.get_method().decode(), self.target.decode(), self.body))


PARTS = [
    b"POST /a HTTP/1.1\r\nHost: h\r\n",
    b"GET /b HTTP/1.1\r\nHost: h\r\n\r\n",
    b"POST /c HTTP/1.0\r\n",
    b"Content-Length: 5\r\n",
    b"content-length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"X: y\r\n",
    b"\r\n",
    b"\r",
    b"\n",
    b" ",
    b":",
    b"\0",
    b"hello",
    b"5\r\nhello\r\n",
    b"0\r\n\r\n",
    b"0\r\n",
    b"GET ",
]


@given(st.lists(st.sampled_from(PARTS), max_size=14).map(b"".join), st.integers(1, 200))
@example(b"POST /a HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhelloGET /b HTTP/1.1\r\n", 1)
def test_requests_are_framed_as_in_llhttp_or_rejected(data, piece):
    taken: list[tuple[str, str, bytes]] = []
    relay = Relay(
        taken,
        lambda downstream: _Echo(downstream, taken),
        lambda status, message, target, request_id: (message.encode(), b""),
        head_max_bytes=10_000,
        head_max_count=100,
        head_timeout_s=60,
        body_timeout_s=60,
        keep_alive_timeout_s=60,
        stall_timeout_s=60,
        connections_max=1,
        buffer_max_bytes=1 << 20,
    )
    relay.start(_Loop())
    downstream = Downstream(relay)
    transport = _Transport()
    downstream.connection_made(transport)
    for i in range(0, len(data), piece):
        downstream.data_received(data[i : i + piece])
    downstream.connection_lost(None)
    assert relay.exchanges == relay.connections == 0

    reference = _Requests()
    with contextlib.suppress(httptools.HttpParserError):
        for i in range(len(data)):
            reference.parser.feed_data(data[i : i + 1])
    assert taken == reference.whole[: len(taken)]
    assert transport.written.count(b"HTTP/1.1 200 OK\r\n") == len(taken)
    if transport.closed and b"HTTP/1.1 4" not in transport.written:
        assert b"Connection: close\r\n" in transport.written
