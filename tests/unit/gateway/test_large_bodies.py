"""Large bodies, which are parsed in a thread."""

import asyncio
import random
import threading

import pytest
import uvloop
from fakes.chats import CHAT, ask, error_of
from fakes.wire import chunk, post, says, until

from kubeai.openai import request as openai

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


LARGE = b'{"model":"%s","x":"' + b"x" * openai.LARGE_BYTES + b'"}'


class Slow:
    """Stands in for a slow function of openai.py: it returns when the test lets it."""

    def __init__(self, monkeypatch, name: str) -> None:
        self._real = getattr(openai, name)
        self.begun, self.may_end = threading.Event(), threading.Event()
        monkeypatch.setattr(openai, name, self)

    def __call__(self, *args):
        self.begun.set()
        assert self.may_end.wait(5)
        return self._real(*args)


@pytest.mark.parametrize("path", [CHAT, CHAT + "?a=b"])
async def test_a_large_body_is_parsed_like_a_small_one(start, path):
    world = await start()
    plain, tuned = await world.engine(says(b"plain")), await world.engine(says(b"tuned"))
    world.route("m", {"a": plain, "b": (tuned, ["fin"])}, adapters=("fin",))
    wire = await world.client()
    await wire.send(post(path, LARGE % b"m_fin"))
    assert (await wire.answer()).body == b"tuned"
    assert tuned.requests[0].body == LARGE % b"fin"
    for body, status, param in (
        (LARGE % b"m_other", 404, "model"),
        (LARGE % b"other", 404, "model"),
        (LARGE % b'm","model":"m', 400, "model"),
        (LARGE % b'm","Model":"m', 400, "model"),
        (LARGE % b"", 400, "model"),
        (LARGE.replace(b'"%s"', b"1"), 400, "model"),
        (LARGE.replace(b"model", b"other") % b"", 400, "model"),
        (LARGE % b"m" + b"x", 400, None),
        (LARGE % b"m\xff", 400, None),
        (b"[" + LARGE % b"m" + b"]", 400, None),
        (b'{"a":' + b"[" * openai.LARGE_BYTES, 400, None),
        (b"{" + b'"a":1,' * openai.LARGE_BYTES, 400, None),
    ):
        await wire.send(post(path, body))
        error = await error_of(wire, status)
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
    await wire.send(post(path, LARGE % b"m"))
    assert (await wire.answer()).status == 200
    assert len(plain.requests) + len(tuned.requests) == 2


async def test_a_conversation_keeps_its_endpoint_as_it_becomes_large(start):
    world = await start()
    engines = {name: await world.engine(says(b"")) for name in "abcdefgh"}
    world.route("m", engines, strategy="PrefixHash")
    wire = await world.client()
    first = {"role": "user", "content": "same"}
    for size in (1, 1000, openai.LARGE_BYTES, 2 * openai.LARGE_BYTES):
        await wire.send(ask(messages=[first, {"role": "user", "content": "x" * size}]))
        assert (await wire.answer()).status == 200
    assert sorted(len(engine.requests) for engine in engines.values())[-2:] == [0, 4]


async def test_other_requests_proceed_while_a_large_body_is_parsed(start, monkeypatch):
    world = await start()
    world.route("m", {"a": await world.engine(says(b"fine"))})
    slow = Slow(monkeypatch, "read")
    wire, other = await world.client(), await world.client()
    await wire.send(post(CHAT, LARGE % b"m"))
    await until(slow.begun.is_set)
    await other.send(ask())
    assert (await other.answer()).body == b"fine"
    assert world.active("m") == 0
    slow.may_end.set()
    assert (await wire.answer()).body == b"fine"


@pytest.mark.parametrize("during", ["read", "prompt_of", "body_for"])
async def test_a_client_may_disconnect_while_its_large_body_is_parsed(start, monkeypatch, during):
    world = await start()
    engine = await world.engine(says(b""))
    world.route("m", {"a": engine})
    slow = Slow(monkeypatch, during)
    wire = await world.client()
    await wire.send(post(CHAT, LARGE % b"m"))
    await until(slow.begun.is_set)
    wire.close()
    await world.at_rest()
    slow.may_end.set()
    await asyncio.sleep(0.05)
    assert engine.requests == []
    await world.at_rest()


async def test_a_model_may_be_deleted_or_recreated_while_a_large_body_is_parsed(start, monkeypatch):
    world = await start()
    world.route("m", {"a": await world.engine(says(b"old"))})
    for recreated in (False, True):
        slow = Slow(monkeypatch, "prompt_of")
        wire = await world.client()
        await wire.send(post(CHAT, LARGE % b"m"))
        await until(slow.begun.is_set)
        world.unroute("m")
        if recreated:
            world.route("m", {"a": await world.engine(says(b"new"))})
        slow.may_end.set()
        if recreated:
            assert (await wire.answer()).body == b"new"
        else:
            await error_of(wire, 404)
            world.route("m", {"a": await world.engine(says(b"other"))})


async def test_a_large_body_for_a_cold_model_is_held(start):
    world = await start()
    world.route("m", {})
    wire = await world.client()
    await wire.send(post(CHAT, LARGE % b"m"))
    await until(lambda: world.held("m") == 1)
    assert world.demanded == ["m"]
    world.route("m", {"a": await world.engine(says(b"warm"))})
    assert (await wire.answer()).body == b"warm"


async def test_an_exception_in_the_parsing_thread_fails_one_request(start, monkeypatch):
    world = await start()
    world.route("m", {"a": await world.engine(says(b"fine"))})
    wire = await world.client()
    with monkeypatch.context() as patch:
        patch.setattr(openai, "read", lambda *_: 1 / 0)
        await wire.send(post(CHAT, LARGE % b"m"))
        assert (await error_of(wire, 500))["type"] == "server_error"
    await wire.send(post(CHAT, LARGE % b"m"))
    assert (await wire.answer()).body == b"fine"


@pytest.mark.parametrize("piece", [1_000, 300_000, 3_000_000])
async def test_a_large_chunked_body_arrives_complete(start, piece):
    world = await start()
    engine = await world.engine(says(b""))
    world.route("m", {"a": engine})
    wire = await world.client()
    text = random.Random(piece).randbytes(3_500_000).hex().encode()
    body = b'{"model":"m","x":"%s"}' % text
    chunks = [chunk(body[at : at + piece]) for at in range(0, len(body), piece)]
    for _ in range(2):
        await wire.send(
            b"POST %s HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode()
            + b"".join(chunks)
            + b"0\r\n\r\n"
        )
        assert (await wire.answer()).status == 200
    assert [got.body for got in engine.requests] == [body, body]
