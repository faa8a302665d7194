"""Which of several fallbacks serves a request, and what a request waits for."""

import pytest
from fakes.chats import ask, error_of, failing
from fakes.fallbacks import BLOCK, NOW, by, echo, fallbacks, got
from fakes.wire import until


@pytest.fixture
async def cold(fallen):
    """A world whose Model `m` and its fallback `b` are both cold, and a client."""
    world = await fallen()
    world.route("b", {})
    world.route("m", {}, **NOW)
    return world, await world.client()


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


async def test_a_clients_own_limit_counts_for_all_models_together(cold):
    _, wire = cold
    await wire.send(ask("m", "X-KubeAI-Max-Wait: 50ms"))
    assert (await error_of(wire, 504))["code"] == "timeout"


async def test_a_client_may_leave_while_it_waits_for_two_models(cold):
    world, wire = cold
    await wire.send(ask())
    await until(lambda: world.held("b") == 1)
    wire.reset()
    await until(lambda: world.active("m") == world.active("b") == 0)


async def test_a_model_that_is_deleted_meanwhile_is_not_found(cold):
    world, wire = cold
    await wire.send(ask())
    await until(lambda: world.held("b") == 1)
    world.unroute("m")
    assert (await error_of(wire, 404))["code"] == "model_not_found"
