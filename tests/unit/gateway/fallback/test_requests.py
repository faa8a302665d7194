"""Any kind of request falls back whole: large bodies, streams, uploads, continued responses."""

import asyncio
import gzip
import json
import random

import pytest
from fakes.chats import ask, failing, reset
from fakes.fallbacks import BLOCK, NOW, Watcher, by, echo, fallbacks, got
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, post, says

from kubeai.routing.channel import EventCount, EventReport
from kubeai.routing.routes import Block

CHAT = "/v1/chat/completions"
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\naudio\r\n--x--\r\n'
)


async def streams(wire: Wire, request: Message) -> None:
    name = json.dumps(json.loads(request.body)["model"]).encode()
    await wire.send(CHUNKED + chunk(b'data: {"model":%b}\n\n' % name) + chunk(b""))


async def test_a_large_body_and_a_compressed_one_are_rewritten(fallen):
    world = await fallen()
    world.route("m", {}, **NOW)
    body = json.dumps({"model": "m", "prompt": "x" * (2 << 20)}).encode()
    by(await got(world, post(CHAT, body)), "b")
    small = gzip.compress(b'{"model":"m"}')
    by(await got(world, post(CHAT, small, "Content-Encoding: gzip")), "b")
    for request in next(iter(world.engines.values())).requests:
        assert json.loads(request.body)["model"] == "b"
        assert request.one("content-encoding") is None


async def test_a_request_by_alias_keeps_its_name(fallen):
    world = await fallen()
    world.route("m", {}, aliases=("x",), **NOW)
    by(await got(world, ask("x")), "b", "x")


async def test_a_stream_that_has_begun_with_comments_falls_back(fallen):
    world = await fallen(hold_comment_after_s=0.01)
    world.route("b", {"b-1": await world.engine(streams)})
    world.route("m", {}, fallbacks=("b",), wait_before_fallback_s=0.05)
    answered = await got(world, ask(stream=True))
    assert answered.body.startswith(b": waiting for a replica")
    assert b": fallback: the model b\n\n" in answered.body
    assert answered.body.endswith(b'data: {"model":"m"}\n\n')
    assert answered.one("x-kubeai-model") is None


async def test_an_upload_falls_back(fallen):
    world = await fallen(retries=0)
    engine = await world.engine(says(b'{"text":"hi"}'))
    world.route("b", {"b-1": engine})
    world.route("m", {"m-1": await world.engine(failing(503))}, **NOW)
    form = post("/v1/audio/transcriptions", FORM, "Content-Type: multipart/form-data; boundary=x")
    answered = await got(world, form)
    assert (answered.status, answered.body) == (200, b'{"text":"hi"}')
    assert answered.one("x-kubeai-model") == "b"
    (request,) = engine.requests
    assert b"\r\n\r\nb\r\n" in request.body
    assert b"audio" in request.body


async def test_a_request_that_continues_a_response_stays_with_the_replica_that_has_it(fallen):
    world = await fallen(retries=0)

    async def stores(wire: Wire, request: Message) -> None:
        found = request.method == "GET"
        await wire.send(answer(200 if found else 503, b'{"model":"m"}'))

    async def lacks(wire: Wire, request: Message) -> None:
        await wire.send(answer(404, b"{}"))

    m, other = await world.engine(stores), await world.engine(lacks)
    world.route("b", {"b-1": other})
    world.route("m", {"m-1": m, "m-2": other}, **NOW)
    continued = ask(path="/v1/responses", previous_response_id="resp_x")
    assert (await got(world, continued)).status == 503
    assert fallbacks(world) == {}


async def test_a_request_that_continues_a_response_which_nobody_has_does_not_fall_back(fallen):
    world = await fallen(retries=0)
    world.route("b", {})
    world.route("m", {"m-1": await world.engine(failing(503))}, **NOW)
    continued = ask(path="/v1/responses", previous_response_id="resp_x")
    assert (await got(world, continued)).status == 503
    assert fallbacks(world) == {}


async def test_the_pick_of_a_fallback_is_explained(fallen):
    world = await fallen(explain=True)
    world.route("m", {}, **NOW)
    answered = await got(world, ask("m", "X-KubeAI-Explain: 1"))
    assert "b-1" in answered.one("x-kubeai-explain")


async def test_a_response_that_a_fallback_made_is_continued_there(fallen):
    world = await fallen()

    async def stores(wire: Wire, request: Message) -> None:
        if request.method == "GET":
            await wire.send(answer(200, b'{"model":"b"}', "Content-Type: application/json"))
        else:
            await echo(wire, request)

    async def lacks(wire: Wire, request: Message) -> None:
        await wire.send(answer(404, b"{}"))

    world.route("b", {"b-1": await world.engine(stores)})
    world.route("m", {"m-1": await world.engine(lacks)}, **NOW)
    by(await got(world, ask(path="/v1/responses", previous_response_id="resp_x")), "b")


async def test_a_message_takes_a_handler_again_before_it_falls_back(fallen):
    world = await fallen()
    watcher = world.context.hold_watcher = Watcher()
    world.route("m", {}, **NOW)
    by(await got(world, ask()), "b")
    assert watcher.calls == ["hold", "endpoint"]


async def test_counts_are_sent_together(fallen):
    world = await fallen()
    sent: list[object] = []
    world.context.events.send = sent.append
    world.route("m", {}, **NOW)
    for _ in range(3):
        by(await got(world, ask()), "b")
    world.context.events.flush()
    (message,) = sent
    assert message == EventReport((EventCount("fallback", ("m", "b", "not_ready"), 3),))
    world.context.events.flush()
    assert len(sent) == 1


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_each_request_gets_one_answer_and_nothing_stays_counted(start, seed):
    chance = random.Random(seed)
    world = await start(retries=1, hold_timeout_s=1.0, hold_max_requests=5, rows=1024)
    engines = [await world.engine(script) for script in (echo, echo, failing(503), reset)]

    def change(name: str) -> None:
        """Give a Model other endpoints, or a block."""
        made = {f"{name}-{i}": each for i, each in enumerate(engines) if chance.random() < 0.3}
        world.route(
            name,
            made,
            block=None if made else chance.choice([None, BLOCK, Block("Slow", "no")]),
            fallbacks=tuple(chance.sample("abc", 2)),
            wait_before_fallback_s=chance.choice([0.0, 0.02]),
            canary=chance.choice(["", *"abc"]),
            canary_percent=50,
        )

    async def request(number: int) -> None:
        await asyncio.sleep(chance.random() * 0.3)
        change(chance.choice("abc"))
        wire = await world.client()
        asked = chance.choice("abc")
        await wire.send(ask(asked, messages=[{"role": "user", "content": f"{number}"}]))
        if chance.random() < 0.2:
            await asyncio.sleep(chance.random() * 0.05)
            wire.reset()
            return
        answered = await wire.answer()
        assert answered.status in (200, 502, 503, 504)
        if answered.status == 200:
            assert json.loads(answered.body)["model"] == asked

    for name in "abcabc":
        change(name)
    await asyncio.gather(*map(request, range(60)))
    await world.at_rest()
