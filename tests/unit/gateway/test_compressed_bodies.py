"""Compressed request bodies are read for routing, and sent on as they came."""

import asyncio
import gzip
import json
import sys
import threading

import pytest
from fakes.wire import Message, Wire, answer, post, until
from fakes.world import World

from kubeai.gateway import bodies
from kubeai.openai.content_coding import decompress

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESS = {"gzip": gzip.compress, "zstd": zstd.compress}
CHAT = "/v1/chat/completions"
CODINGS = sorted(COMPRESS)


async def ok(wire: Wire, request: Message) -> None:
    await wire.send(answer(200, b'{"ok":1}'))


def chat(model: str = "m", content: str = "Hello", **fields: object) -> bytes:
    messages = [{"role": "user", "content": content}]
    return json.dumps({"model": model, "messages": messages, **fields}).encode()


def compressed(coding: str, body: bytes, *headers: str, path: str = CHAT) -> bytes:
    encoded = COMPRESS[coding](body)
    return post(path, encoded, f"Content-Encoding: {coding}", *headers)


async def sent(world: World, request: bytes) -> Message:
    wire = await world.client()
    await wire.send(request)
    return await wire.answer()


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("size", [10, 3 << 20], ids=["small", "large"])
async def test_a_compressed_body_reaches_the_engine_as_it_came(start, coding, size):
    world = await start()
    engine = await world.engine(ok)
    world.route("m", {"pod-1": engine})
    body = chat(content="x" * size)
    assert (await sent(world, compressed(coding, body))).status == 200
    (request,) = engine.requests
    assert request.body == COMPRESS[coding](body) or decompress(coding, request.body, 4 << 20)
    assert request.one("content-encoding") == coding
    assert int(request.one("content-length")) == len(request.body)


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Encoding: x-gzip",),
        ("Content-Encoding: GZip",),
        ("Content-Encoding: gzip, identity",),
        ("Content-Encoding: Identity", "Content-Encoding: X-GZIP,"),
    ],
)
@pytest.mark.parametrize("size", [10, 3 << 20], ids=["small", "large"])
async def test_an_engine_gets_the_standard_name_of_the_coding(start, headers, size):
    world = await start()
    engine = await world.engine(ok)
    world.route("m", {"pod-1": engine})
    body = gzip.compress(chat(content="x" * size))
    assert (await sent(world, post(CHAT, body, *headers))).status == 200
    (request,) = engine.requests
    assert (request.body, request.one("content-encoding")) == (body, "gzip")


async def test_a_chunked_compressed_body_is_read(start):
    world = await start()
    engine = await world.engine(ok)
    world.route("m", {"pod-1": engine})
    wire = await world.client()
    body = gzip.compress(chat())
    head = f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nContent-Encoding: gzip\r\n"
    await wire.send(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
    for at in range(0, len(body), 7):
        part = body[at : at + 7]
        await wire.send(b"%x\r\n%b\r\n" % (len(part), part))
    await wire.send(b"0\r\n\r\n")
    assert (await wire.answer()).status == 200
    assert engine.requests[0].body == body


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("strategy", ["PrefixHash", "PrefixCache"])
async def test_compressed_and_plain_requests_with_one_prefix_get_one_endpoint(
    start, coding, strategy
):
    world = await start()
    engines = [await world.engine(ok) for _ in range(4)]
    pods = {f"pod-{i}": engine for i, engine in enumerate(engines)}
    world.route("m", pods, strategy=strategy)
    body = chat(content="A long prompt. " * 200)
    for request in (post(CHAT, body), compressed(coding, body), post(CHAT, body)):
        assert (await sent(world, request)).status == 200
    assert sorted(len(engine.requests) for engine in engines) == [0, 0, 0, 3]


async def test_a_model_that_does_not_exist_is_a_404(start):
    world = await start()
    got = await sent(world, compressed("gzip", chat("none")))
    assert got.status == 404
    assert b"'none'" in got.body


@pytest.mark.parametrize("coding", CODINGS)
async def test_for_an_adapter_the_body_is_sent_uncompressed(start, coding):
    world = await start()
    engine = await world.engine(ok)
    world.route("m", {"pod-1": (engine, ["a"])}, adapters=("a",))
    assert (await sent(world, compressed(coding, chat("m_a")))).status == 200
    (request,) = engine.requests
    assert request.all("content-encoding") == []
    assert json.loads(request.body) == json.loads(chat("a"))


async def test_with_decompress_bodies_engines_get_them_uncompressed(start):
    world = await start(decompress_bodies=True)
    engine = await world.engine(ok)
    world.route("m", {"pod-1": engine})
    assert (await sent(world, compressed("zstd", chat()))).status == 200
    (request,) = engine.requests
    assert (request.all("content-encoding"), request.body) == ([], chat())


async def test_a_retry_sends_the_same_compressed_body(start):
    world = await start()

    async def fail(wire: Wire, request: Message) -> None:
        await wire.send(answer(503, b"{}"))

    engines = [await world.engine(fail), await world.engine(ok)]
    world.route("m", {"pod-1": engines[0], "pod-2": engines[1]}, strategy="LeastLoad")
    for _ in range(2):
        assert (await sent(world, compressed("gzip", chat()))).status == 200
    requests = engines[0].requests + engines[1].requests
    assert len(requests) >= 3
    assert {request.one("content-encoding") for request in requests} == {"gzip"}
    assert {gzip.decompress(request.body) for request in requests} == {chat()}


@pytest.mark.parametrize("coding", ["br", "deflate", "gzip, gzip", "zstd, gzip"])
async def test_another_coding_is_a_415_with_those_that_are_accepted(start, coding):
    world = await start()
    got = await sent(world, post(CHAT, b"x", f"Content-Encoding: {coding}"))
    assert (got.status, got.one("accept-encoding")) == (415, "gzip, zstd")
    assert json.loads(got.body)["error"]["param"] == "Content-Encoding"


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("path", [CHAT, "/v1/messages"])
async def test_a_malformed_body_is_a_400_that_names_the_header(start, coding, path):
    world = await start()
    engine = await world.engine(ok)
    world.route("m", {"pod-1": engine})
    got = await sent(world, post(path, b"{}", f"Content-Encoding: {coding}"))
    assert got.status == 400
    assert f"Content-Encoding is {coding}, but the body is" in got.body.decode()
    assert not engine.requests


@pytest.mark.parametrize("coding", CODINGS)
async def test_a_bomb_is_a_413_and_no_memory_stays_reserved(start, coding):
    world = await start(body_max_bytes=1 << 20)
    world.route("m", {})
    got = await sent(world, compressed(coding, bytes(64 << 20)))
    assert got.status == 413
    assert b"decompressed" in got.body
    await world.at_rest()
    assert world.server.relay.buffered_bytes == 0


async def test_decompressed_bodies_count_as_buffered_while_the_request_lasts(start):
    world = await start(buffer_max_bytes=3 << 20)
    answering = asyncio.Event()

    async def wait(wire: Wire, request: Message) -> None:
        await answering.wait()
        await wire.send(answer(200, b"{}"))

    engine = await world.engine(wait)
    world.route("m", {"pod-1": engine})
    body = chat(content="x" * (2 << 20))
    first, second = await world.client(), await world.client()
    await first.send(compressed("gzip", body))
    await until(lambda: engine.requests)
    assert world.server.relay.buffered_bytes > len(body)
    await second.send(compressed("gzip", body))
    refused = await second.answer()
    assert refused.status == 503
    assert refused.one("retry-after")
    answering.set()
    assert (await first.answer()).status == 200
    await world.at_rest()
    assert world.server.relay.buffered_bytes == 0


@pytest.mark.parametrize(("model", "copies"), [("m", 1), ("alias", 2)])
async def test_a_copy_with_another_name_of_the_model_counts_as_buffered(start, model, copies):
    world = await start()
    answering = asyncio.Event()

    async def wait(wire: Wire, request: Message) -> None:
        await answering.wait()
        await wire.send(answer(200, b"{}"))

    engine = await world.engine(wait)
    world.route("m", {"pod-1": engine}, aliases=("alias",))
    body = chat(model, content="x" * (2 << 20))
    client = await world.client()
    await client.send(post(CHAT, body))
    await until(lambda: engine.requests)
    assert round(world.server.relay.buffered_bytes / len(body)) == copies
    answering.set()
    assert (await client.answer()).status == 200
    await world.at_rest()
    assert world.server.relay.buffered_bytes == 0


async def test_decompression_does_not_block_the_event_loop(start, monkeypatch):
    world = await start()
    engine = await world.engine(ok)
    world.route("m", {"pod-1": engine})
    finish = threading.Event()

    def slow(coding: str, body: bytes, max_bytes: int) -> bytes:
        assert finish.wait(10)
        return decompress(coding, body, max_bytes)

    monkeypatch.setattr(bodies, "decompress", slow)
    slowed = await world.client()
    await slowed.send(compressed("gzip", chat()))
    assert (await sent(world, post(CHAT, chat()))).status == 200
    assert world.active("m") == 0  # not counted before its body is read
    finish.set()
    assert (await slowed.answer()).status == 200


async def test_a_client_that_leaves_during_decompression_leaves_nothing_behind(start, monkeypatch):
    world = await start()
    world.route("m", {})
    finish, began = threading.Event(), threading.Event()

    def slow(coding: str, body: bytes, max_bytes: int) -> bytes:
        began.set()
        assert finish.wait(10)
        return decompress(coding, body, max_bytes)

    monkeypatch.setattr(bodies, "decompress", slow)
    wire = await world.client()
    await wire.send(compressed("gzip", chat()))
    await until(began.is_set)
    wire.close()
    await until(lambda: world.server.relay.exchanges == 0)
    finish.set()
    await world.at_rest()
    assert world.server.relay.buffered_bytes == 0


async def test_a_compressed_form_is_a_415(start):
    world = await start()
    got = await sent(
        world,
        post(
            "/v1/audio/transcriptions",
            gzip.compress(b"--b--\r\n"),
            "Content-Type: multipart/form-data; boundary=b",
            "Content-Encoding: gzip",
        ),
    )
    assert (got.status, got.one("accept-encoding")) == (415, "identity")
    assert b"Compressed forms are not supported" in got.body
