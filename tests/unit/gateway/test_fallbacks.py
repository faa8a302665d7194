"""Another Model serves a request that its own cannot, before anything reaches the client."""

import asyncio
import gzip
import json
import random

import pytest
from fakes.chats import ask, error_of, failing, hang, lose, reset
from fakes.wire import CHUNKED, Engine, Message, Wire, answer, chunk, post, says, until
from fakes.world import World

from kubeai.routing.channel import EventCount, EventReport
from kubeai.routing.fair_queue import FairQueue
from kubeai.routing.queueing import Waiting
from kubeai.routing.routes import Block

CHAT = "/v1/chat/completions"
FORM = (
    b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\naudio\r\n--x--\r\n'
)
BLOCK = Block("OutOfMemory", "no", 0.0)
NOW = {"fallbacks": ("b",), "wait_before_fallback_s": 0.0}


async def echo(wire: Wire, request: Message) -> None:
    body = json.dumps({"model": json.loads(request.body)["model"]}).encode()
    await wire.send(answer(200, body, "Content-Type: application/json"))


async def streams(wire: Wire, request: Message) -> None:
    name = json.dumps(json.loads(request.body)["model"]).encode()
    await wire.send(CHUNKED + chunk(b'data: {"model":%b}\n\n' % name) + chunk(b""))


@pytest.fixture
async def fallen(start):
    """A world whose Model `b` answers; `m` is routed by the test."""

    async def begin(**config) -> World:
        world = await start(**config)
        world.route("b", {"b-1": await world.engine(echo)})
        return world

    return begin


async def got(world: World, request: bytes) -> Message:
    wire = await world.client()
    await wire.send(request)
    return await wire.answer()


def fallbacks(world: World) -> dict[tuple[str, str, str], int]:
    return {labels: count for (_, labels), count in world.context.events._counts.items()}


def by(answered: Message, name: str, asked: str = "m") -> None:
    """Check that a Model answered in the name of the one that was asked for."""
    assert (answered.status, json.loads(answered.body)["model"]) == (200, asked)
    assert answered.one("x-kubeai-model") == (None if name == asked else name)


# -- when ------------------------------------------------------------------------------------------


async def test_a_model_that_is_not_ready_is_started_while_a_fallback_answers(fallen):
    world = await fallen()
    world.route("m", {}, **NOW)
    by(await got(world, ask()), "b")
    assert world.demanded == ["m"]
    assert fallbacks(world) == {("m", "b", "not_ready"): 1}
    assert (sum(world.outcomes("m").values()), world.outcomes("b")["2xx"]) == (0, 1)


async def test_a_model_that_is_not_ready_counts_what_its_fallback_serves_as_load(fallen):
    world = await fallen()
    world.route("b", {"b-1": await world.engine(hang)})
    world.route("m", {}, **NOW)
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: world.in_flight("b") or sum(world.endpoint_loads("b").values()))
    assert (world.active("m"), world.held("m"), world.active("b")) == (1, 0, 1)
    wire.reset()


async def test_a_request_waits_for_its_model_before_it_falls_back(fallen):
    world = await fallen()
    world.route("m", {}, fallbacks=("b",), wait_before_fallback_s=60.0)
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: world.held("m") == 1)
    world.route("m", {"m-1": await world.engine(echo)}, **NOW)
    by(await wire.answer(), "m")
    assert fallbacks(world) == {}


@pytest.mark.parametrize("block", [BLOCK, Block("OutOfMemory", "no", 0.0, retry=False)])
async def test_a_model_that_cannot_start_is_not_waited_for(fallen, block):
    world = await fallen()
    world.route("m", {}, block=block, fallbacks=("b",), wait_before_fallback_s=60.0)
    by(await got(world, ask()), "b")
    assert world.demanded == []
    assert fallbacks(world) == {("m", "b", "blocked"): 1}


@pytest.mark.parametrize("script", [failing(500), failing(503), failing(599), lose])
async def test_a_model_whose_endpoints_all_fail_falls_back(fallen, script):
    world = await fallen(retries=1)
    bad = {name: await world.engine(script) for name in ("m-1", "m-2")}
    if script is lose:  # no crash: the engines still listen
        world.route("m", bad, **NOW)
    world.route("m", bad, **NOW)
    by(await got(world, ask()), "b")
    assert sum(len(engine.requests) for engine in bad.values()) >= 1
    assert fallbacks(world) == {("m", "b", "failing"): 1}
    assert world.outcomes("m")["retried"] >= 1


async def test_an_engine_that_cannot_be_reached_falls_back(fallen):
    world = await fallen(retries=0)
    gone = await world.engine(says(b""))
    await gone.stop()
    world.route("m", {"m-1": gone}, **NOW)
    by(await got(world, ask()), "b")


async def test_an_exhausted_retry_budget_falls_back(fallen):
    world = await fallen(retries=3, retry_budget_percent=0, retry_budget_min=0)
    world.route("m", {name: await world.engine(failing(503)) for name in "xyz"}, **NOW)
    by(await got(world, ask()), "b")


async def test_a_first_byte_timeout_falls_back(fallen):
    world = await fallen(first_byte_timeout_s=0.05, retries=0)
    world.route("m", {"m-1": await world.engine(hang)}, **NOW)
    by(await got(world, ask()), "b")


@pytest.mark.parametrize("status", [400, 404, 422, 429, 501])
async def test_a_response_that_is_no_failure_is_passed_on(fallen, status):
    world = await fallen()
    world.route("m", {"m-1": await world.engine(failing(status))}, **NOW)
    answered = await got(world, ask())
    assert (answered.status, answered.body) == (status, b"failed")
    assert fallbacks(world) == {}


async def test_a_request_that_crashes_its_engine_crashes_no_other(fallen):
    world = await fallen(retries=0)
    engine: Engine

    async def crash(wire: Wire, request: Message) -> None:
        engine.die()

    engine = await world.engine(crash)
    world.route("m", {"m-1": engine}, **NOW)
    wire = await world.client()
    await wire.send(ask())
    assert (await error_of(wire, 502))["code"] == "engine_died"
    assert fallbacks(world) == {}


async def test_a_response_that_has_begun_stays_where_it_is(fallen):
    world = await fallen()

    async def half(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, b"0123456789")[:-5])
        wire.close()

    world.route("m", {"m-1": await world.engine(half)}, **NOW)
    wire = await world.client()
    await wire.send(ask())
    head = await wire.head()
    assert head.status == 200
    await wire.reader.read()
    assert fallbacks(world) == {}


# -- saturation: a hold although the Model has endpoints -------------------------------------------


class Full:
    """An engine that answers once it is told to. ``came``: the marks of its requests."""

    def __init__(self) -> None:
        self.came: list[str | None] = []
        self.room = asyncio.Event()

    async def __call__(self, wire: Wire, request: Message) -> None:
        self.came.append(request.one("x-mark"))
        await self.room.wait()
        await echo(wire, request)


@pytest.fixture
async def saturated(fallen):
    """A world whose Model `m` serves one request, and has room for no other."""

    async def begin(**fields) -> tuple[World, Full]:
        world, full = await fallen(), Full()
        engine = await world.engine(full)
        world.route("m", {"m-1": engine}, capacity=1, **fields)
        await (await world.client()).send(ask())
        await until(lambda: full.came)
        return world, full

    return begin


async def test_a_saturated_model_spills_to_its_fallback(saturated):
    world, full = await saturated(**NOW)
    by(await got(world, ask()), "b")
    assert fallbacks(world) == {("m", "b", "saturated"): 1}
    full.room.set()


async def test_a_saturated_model_starts_its_fallback_and_waits_for_its_own_room(saturated):
    world, full = await saturated(**NOW)
    world.route("b", {})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: world.demanded == ["b"])
    full.room.set()
    by(await wire.answer(), "m")
    assert fallbacks(world) == {}


async def test_a_request_keeps_its_place_when_its_fallback_has_no_room(saturated, monkeypatch):
    world, full = await saturated(fallbacks=("b",), wait_before_fallback_s=0.3)
    world.route("b", {"b-1": await world.engine(hang)}, capacity=1)
    await (await world.client()).send(ask("b"))
    await until(lambda: world.in_flight("b") == 1)
    pushes: list[object] = []
    push = FairQueue.push

    def noted(queue: FairQueue[Waiting], waiting: Waiting) -> None:
        pushes.append(waiting)
        push(queue, waiting)

    monkeypatch.setattr(FairQueue, "push", noted)
    wires = [await world.client() for _ in range(2)]
    await wires[0].send(ask("m", "X-Mark: first"))
    await until(lambda: world.held("m") == 1)
    route = world.routes["m"]
    fields = {name: getattr(route, name) for name in ("fallbacks", "capacity")}
    engine = world.engines[route.endpoints[0].address]
    world.route("m", {"m-1": engine}, wait_before_fallback_s=60.0, **fields)
    await wires[1].send(ask("m", "X-Mark: second"))
    await until(lambda: len(pushes) == 3, "the first has looked for room, and waits again")
    full.room.set()
    for wire in wires:
        by(await wire.answer(), "m")
    assert full.came == [None, "first", "second"]


# -- where -----------------------------------------------------------------------------------------


async def test_the_first_fallback_that_can_serve_answers(fallen):
    world = await fallen()
    world.route("cold", {})
    world.route("stuck", {}, block=BLOCK)
    world.route("m", {}, fallbacks=("none", "m", "cold", "stuck", "b"), wait_before_fallback_s=0.0)
    by(await got(world, ask()), "b")
    assert world.demanded == ["m"]


async def test_a_failing_fallback_is_left_for_the_next(fallen):
    world = await fallen(retries=0)
    world.route("c", {"c-1": await world.engine(failing(503))})
    world.route("m", {"m-1": await world.engine(failing(500))}, fallbacks=("c", "b"))
    by(await got(world, ask()), "b")
    assert fallbacks(world) == {("m", "c", "failing"): 1, ("c", "b", "failing"): 1}
    assert world.outcomes("c")["retried"] == 1


async def test_the_last_failure_is_passed_on_when_all_fail(fallen):
    world = await fallen(retries=0)
    world.route("b", {"b-1": await world.engine(failing(503))}, fallbacks=("m", "c"))
    world.route("c", {"c-1": await world.engine(echo)})
    world.route("m", {"m-1": await world.engine(failing(500))}, fallbacks=("b",))
    answered = await got(world, ask())
    assert (answered.status, answered.body) == (503, b"failed")
    assert fallbacks(world) == {("m", "b", "failing"): 1}, "a fallback's fallbacks do not count"


async def test_a_fallback_that_the_selector_excludes_is_skipped(fallen):
    world = await fallen()
    world.route("c", {"c-1": await world.engine(echo)}, labels={"team": "a"})
    world.route("m", {}, fallbacks=("b", "c"), wait_before_fallback_s=0.0, labels={"team": "a"})
    by(await got(world, ask("m", "X-Label-Selector: team=a")), "c")


async def test_a_fallback_without_the_route_is_skipped(fallen):
    world = await fallen()
    world.route("c", {"c-1": await world.engine(echo)}, engine="Infinity")
    world.route("d", {"d-1": await world.engine(echo)}, features=("TextEmbedding",))
    text = ("TextGeneration",)
    world.route("b", {"b-1": await world.engine(echo)}, features=text, engine="OLlama")
    fallbacks = ("c", "d", "b")
    world.route("m", {}, fallbacks=fallbacks, wait_before_fallback_s=0.0, features=text)
    by(await got(world, ask()), "b")
    tokens = ask(path="/tokenize")
    wire = await world.client()
    await wire.send(tokens)
    await until(lambda: world.held("m") == 1)
    wire.reset()


async def test_adapters_drop_out(fallen):
    world = await fallen()
    world.route("m", {}, adapters=("fin",), **NOW)
    answered = await got(world, ask("m_fin"))
    by(answered, "b", "m_fin")


async def test_a_cold_fallback_is_started_when_its_model_cannot_start(fallen):
    world = await fallen()
    world.route("b", {})
    world.route("m", {}, block=BLOCK, **NOW)
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: world.held("b") == 1)
    assert (world.active("m"), world.demanded) == (0, ["b"])
    world.route("b", {"b-1": await world.engine(echo)})
    by(await wire.answer(), "b")


@pytest.mark.parametrize("first", ["m", "b"])
async def test_of_two_cold_models_the_one_that_is_ready_first_answers(fallen, first):
    world = await fallen()
    world.route("b", {})
    world.route("m", {}, **NOW)
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: world.held("b") == 1)
    assert (world.held("m"), world.demanded) == (1, ["m", "m", "b"]) or world.demanded
    fields = NOW if first == "m" else {}
    world.route(first, {f"{first}-1": await world.engine(echo)}, **fields)
    by(await wire.answer(), first)
    await until(lambda: world.held("m") == world.held("b") == 0)


async def test_when_neither_starts_the_hold_timeout_ends_the_wait(fallen):
    world = await fallen(hold_timeout_s=0.1)
    world.route("b", {})
    world.route("m", {}, **NOW)
    wire = await world.client()
    await wire.send(ask())
    assert (await error_of(wire, 504))["code"] == "timeout"
    assert fallbacks(world) == {}, "no other Model has served it, or is still to serve it"
    await until(lambda: sum(world.outcomes("m").values()) == 1)


async def test_when_its_own_model_is_busy_until_the_end_a_cold_fallback_is_not_tried(saturated):
    world, full = await saturated(**NOW)
    world.route("b", {})
    wire = await world.client()
    await wire.send(ask("m", "X-KubeAI-Max-Wait: 50ms"))
    error = await error_of(wire, 504)
    assert "busy" in error["message"]
    assert fallbacks(world) == {}
    full.room.set()


async def test_a_clients_own_limit_counts_for_all_models_together(fallen):
    world = await fallen()
    world.route("b", {})
    world.route("m", {}, **NOW)
    wire = await world.client()
    await wire.send(ask("m", "X-KubeAI-Max-Wait: 50ms"))
    assert (await error_of(wire, 504))["code"] == "timeout"


async def test_a_client_may_leave_while_it_waits_for_two_models(fallen):
    world = await fallen()
    world.route("b", {})
    world.route("m", {}, **NOW)
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: world.held("b") == 1)
    wire.reset()
    await until(lambda: world.active("m") == world.active("b") == 0)


async def test_a_model_that_is_deleted_meanwhile_is_not_found(fallen):
    world = await fallen()
    world.route("b", {})
    world.route("m", {}, **NOW)
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: world.held("b") == 1)
    world.unroute("m")
    assert (await error_of(wire, 404))["code"] == "model_not_found"


# -- requests of other kinds -----------------------------------------------------------------------


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
    calls: list[str] = []

    class Watcher:
        def on_hold(self, request_id: str) -> None:
            calls.append("hold")

        async def on_endpoint(self, request_id: str) -> None:
            calls.append("endpoint")

    world.context.hold_watcher = Watcher()
    world.route("m", {}, **NOW)
    by(await got(world, ask()), "b")
    assert calls == ["hold", "endpoint"]


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
