"""A request waits for its own Model and for its fallbacks at the same time, in all their queues."""

import asyncio
import time

import pytest
from fakes.chats import ask
from fakes.fallbacks import NOW, Full, Watcher, by, echo, fallbacks, got
from fakes.wire import Wire, until
from fakes.world import World

from kubeai.routing.routes import Block


async def asking(world: World, *headers: str) -> Wire:
    wire = await world.client()
    await wire.send(ask("m", *headers))
    return wire


def waiting(world: World, model: str) -> int:
    """How many requests are in a Model's queue."""
    return sum(world.queues.waiting(world.publisher.row(model)))


async def occupied(world: World, model: str, **fields) -> tuple[Wire, Full]:
    """Give a Model one replica with room for one request, and have another client use it."""
    full = Full()
    world.route(model, {f"{model}-1": await world.engine(full)}, capacity=1, **fields)
    wire = await world.client()
    await wire.send(ask(model))
    await until(lambda: full.came)
    return wire, full


async def test_all_that_wait_for_a_small_fallback_are_served_once_it_is_ready(fallen):
    world = await fallen()
    world.route("b", {}, capacity=1)
    world.route("m", {}, **NOW)
    wires = [await asking(world) for _ in range(5)]
    await until(lambda: world.held("m") == 5)
    world.route("b", {"b-1": await world.engine(echo)}, capacity=1)
    for wire in wires:
        by(await wire.answer(), "b")
    assert fallbacks(world) == {("m", "b", "not_ready"): 5}
    await world.at_rest()


async def test_a_fallback_that_is_full_serves_the_request_when_it_has_room(fallen):
    world = await fallen()
    other, full = await occupied(world, "b")
    world.route("m", {}, **NOW)
    wire = await asking(world)
    await until(lambda: waiting(world, "b") == 1)
    assert (world.held("m"), world.held("b"), world.active("b")) == (1, 0, 1), "it counts once"
    full.room.set()
    by(await wire.answer(), "b")
    await other.answer()
    await world.at_rest()


async def test_in_the_queue_of_a_fallback_a_request_still_waits_for_its_own_model(fallen):
    world = await fallen()
    other, full = await occupied(world, "b")
    world.route("m", {}, **NOW)
    wire = await asking(world)
    await until(lambda: waiting(world, "b") == 1)
    world.route("m", {"m-1": await world.engine(echo)}, **NOW)
    by(await wire.answer(), "m")
    assert fallbacks(world) == {}
    full.room.set()
    await other.answer()
    await world.at_rest()


async def test_of_two_fallbacks_that_are_full_the_one_with_room_first_serves(fallen):
    world = await fallen()
    others = [await occupied(world, name) for name in ("b", "c")]
    world.route("m", {}, fallbacks=("b", "c"), wait_before_fallback_s=0.0)
    wire = await asking(world)
    await until(lambda: waiting(world, "b") == waiting(world, "c") == 1)
    others[1][1].room.set()
    by(await wire.answer(), "c")
    others[0][1].room.set()
    for other, _ in others:
        await other.answer()
    await world.at_rest()


@pytest.mark.parametrize("grace_s", [0.0, 0.05])
async def test_if_the_fallback_that_was_started_cannot_start_the_next_one_is(fallen, grace_s):
    world = await fallen()
    for name in ("b", "c"):
        world.route(name, {})
    world.route("m", {}, fallbacks=("b", "c"), wait_before_fallback_s=0.0)
    wire = await asking(world)
    await until(lambda: "b" in world.demanded)
    assert "c" not in world.demanded
    world.route("b", {}, block=Block("Unschedulable", "no", time.monotonic() + grace_s))
    await until(lambda: "c" in world.demanded)
    assert (world.active("b"), world.active("c")) == (0, 1)
    world.route("c", {"c-1": await world.engine(echo)})
    by(await wire.answer(), "c")
    await world.at_rest()


async def test_a_client_that_leaves_is_in_no_queue_any_more(fallen):
    world = await fallen()
    other, full = await occupied(world, "b")
    world.route("m", {}, **NOW)
    wire = await asking(world)
    await until(lambda: waiting(world, "b") == 1)
    wire.reset()
    await until(lambda: waiting(world, "b") == 0)
    full.room.set()
    await other.answer()
    await world.at_rest()


async def test_requests_that_wait_for_two_models_use_up_the_limit_of_their_own_only(fallen):
    world = await fallen(hold_max_requests=2)
    other, full = await occupied(world, "b")
    world.route("m", {}, **NOW)
    wires = [await asking(world) for _ in range(2)]
    await until(lambda: waiting(world, "b") == 2)
    wires.append(await world.client())
    await wires[2].send(ask("b"))
    await until(lambda: world.held("b") == 1)
    full.room.set()
    for wire in (other, *wires):
        assert (await wire.answer()).status == 200
    await world.at_rest()


async def test_a_message_that_waited_for_a_full_fallback_takes_a_handler_before_it_is_sent(fallen):
    world = await fallen()
    other, full = await occupied(world, "b")
    watcher = world.context.hold_watcher = Watcher()
    world.route("m", {}, **NOW)
    wire = await asking(world)
    await until(lambda: waiting(world, "b") == 1)
    assert watcher.calls == ["hold", "endpoint", "hold"], "at first it asks for a place at once"
    full.room.set()
    by(await wire.answer(), "b")
    assert watcher.calls[3:] == ["endpoint"]
    await other.answer()
    await world.at_rest()


async def test_a_message_whose_place_was_taken_meanwhile_waits_for_its_own_model_too(fallen):
    world = await fallen()
    permitted, asked = asyncio.Event(), asyncio.Event()
    permitted.set()

    class Slow(Watcher):
        async def on_endpoint(self, request_id: str) -> None:
            asked.set()
            await permitted.wait()

    other, full = await occupied(world, "b")
    world.context.hold_watcher = Slow()
    world.route("m", {}, **NOW)
    wire = await asking(world)
    await until(lambda: waiting(world, "b") == 1)
    permitted.clear()
    asked.clear()
    full.room.set()
    await other.answer()
    await asked.wait()
    full.room.clear()
    another = await world.client()
    await another.send(ask("b"))
    await until(lambda: len(full.came) == 2)
    permitted.set()
    await until(lambda: waiting(world, "b") == 1)
    world.route("m", {"m-1": await world.engine(echo)}, **NOW)
    by(await wire.answer(), "m")
    full.room.set()
    await another.answer()
    await world.at_rest()


# -- canaries ------------------------------------------------------------------------------------

ALL = {"canary": "new", "canary_percent": 100}


async def test_clients_of_a_canary_that_does_not_start_wait_for_their_model_only(fallen):
    world = await fallen()
    world.route("new", {})
    other, full = await occupied(world, "m")
    world.route("m", {"m-1": world.routes["m"].endpoints[0].address}, capacity=1, **ALL)
    wires = [await asking(world) for _ in range(3)]
    await until(lambda: world.held("m") == 3)
    full.room.set()
    for wire in wires:
        by(await wire.answer(), "m")
    await other.answer()
    assert world.demanded == ["new"] * 3
    await world.at_rest()


async def test_clients_of_a_busy_canary_wait_in_the_queue_of_their_model(fallen):
    world = await fallen()
    canarys, new = await occupied(world, "new")
    other, full = await occupied(world, "m")
    world.route("m", {"m-1": world.routes["m"].endpoints[0].address}, capacity=1, **ALL)
    wire = await asking(world)
    await until(lambda: world.held("m") == 1)
    assert world.held("new") == 0
    full.room.set()
    by(await wire.answer(), "m")
    new.room.set()
    await asyncio.gather(other.answer(), canarys.answer())
    await world.at_rest()


async def test_a_canary_does_not_shorten_the_wait_before_a_fallback(fallen):
    world = await fallen()
    world.route("new", {})
    other, full = await occupied(world, "m")
    world.route(
        "m",
        {"m-1": world.routes["m"].endpoints[0].address},
        capacity=1,
        fallbacks=("b",),
        wait_before_fallback_s=60.0,
        **ALL,
    )
    wire = await asking(world)
    await until(lambda: world.held("m") == 1)
    full.room.set()
    by(await wire.answer(), "m")
    await other.answer()
    await world.at_rest()


async def test_the_fallbacks_follow_when_a_canary_and_its_model_are_not_ready(fallen):
    world = await fallen()
    world.route("new", {})
    world.route("m", {}, **NOW, **ALL)
    by(await got(world, ask()), "b")
    assert world.demanded == ["new", "m"]
    assert fallbacks(world) == {("new", "m", "not_ready"): 1, ("m", "b", "not_ready"): 1}
    await world.at_rest()
