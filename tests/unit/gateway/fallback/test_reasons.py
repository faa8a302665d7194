"""Another Model serves a request that its own cannot: why a request falls back, and when not."""

import pytest
from fakes.chats import ask, error_of, failing, hang, lose
from fakes.fallbacks import BLOCK, NOW, by, echo, fallbacks, got
from fakes.wire import Engine, Message, Wire, answer, says, until

from kubeai.routing.fair_queue import FairQueue
from kubeai.routing.queueing import Waiting
from kubeai.routing.routes import Block


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
