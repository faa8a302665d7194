"""API keys where a request may be served by another Model than the one that it asks for."""

import asyncio
import json
from typing import Any

import pytest
import uvloop
from fakes.api_keys import ALICE, bearer, change, error, give, keyed, record
from fakes.chats import ask, failing, hang
from fakes.wire import Message, Wire, answer, until
from fakes.world import World

from kubeai._key_table import KeyTable
from kubeai.gateway._names import bucket_of

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
MINE, OTHER = {"team": "mine"}, {"team": "other"}
NOW = {"fallbacks": ("b",), "wait_before_fallback_s": 0.0}


async def echo(wire: Wire, request: Message) -> None:
    body = json.dumps({"model": json.loads(request.body)["model"]}).encode()
    await wire.send(answer(200, body, "Content-Type: application/json"))


async def ended(world: World) -> None:
    """Wait until the tasks of requests that have ended have given back what they counted."""
    await until(lambda: world.active("b") == 0, "nothing counts as waiting for a fallback")
    await world.at_rest()


class Limited:
    """A World with keys and a key table."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.table = KeyTable.create(4, 1)
        world.context.limits = KeyTable.attach(self.table.fd, 0)
        self.generation = self.table.open_row(0)

    def give(self, **fields: Any) -> None:
        give(self.world, record("alice", ALICE, row=0, generation=self.generation, **fields))

    async def ask(self, model: str = "m") -> Message:
        wire = await self.world.client()
        await wire.send(ask(model, bearer(ALICE)))
        return await wire.answer()

    def close(self) -> None:
        self.world.context.limits.close()
        self.table.close()


@pytest.fixture
async def limited(start):
    made = []

    async def begin(**config: Any) -> Limited:
        made.append(Limited(await keyed(start, **{"retries": 0} | config)))
        return made[-1]

    yield begin
    for each in made:
        await each.world.at_rest()
        assert each.table.use(0).in_flight == 0
        each.close()


# -- rights ----------------------------------------------------------------------------------------


async def test_a_fallback_that_the_key_may_not_use_is_skipped(limited):
    keys = await limited(hold_timeout_s=0.05)
    keys.give(models="team=mine")
    engine = await keys.world.engine(echo)
    keys.world.route("b", {"b-1": engine}, labels=OTHER)
    keys.world.route("m", {}, labels=MINE, **NOW)
    answered = await keys.ask()
    assert (answered.status, answered.one("x-kubeai-model")) == (504, None)
    assert keys.world.demanded == ["m"]
    keys.world.route("b", {"b-1": engine}, labels=MINE)
    answered = await keys.ask()
    assert (answered.status, answered.one("x-kubeai-model")) == (200, "b")


async def test_a_fallback_at_zero_that_the_key_may_not_use_is_not_started(limited):
    keys = await limited(hold_timeout_s=0.05)
    keys.give(models="team=mine")
    keys.world.route("b", {}, labels=OTHER)
    keys.world.route("m", {}, labels=MINE, **NOW)
    assert (await keys.ask()).status == 504
    assert keys.world.demanded == ["m"]


async def test_a_failing_model_does_not_lead_to_a_fallback_that_the_key_may_not_use(limited):
    keys = await limited()
    keys.give(models="team=mine")
    keys.world.route("b", {"b-1": await keys.world.engine(echo)}, labels=OTHER)
    keys.world.route("m", {"m-1": await keys.world.engine(failing(500))}, labels=MINE, **NOW)
    answered = await keys.ask()
    assert (answered.status, answered.one("x-kubeai-model")) == (500, None)


async def test_a_canary_that_the_key_may_not_use_is_skipped(limited):
    keys = await limited()
    keys.give(models="team=mine")
    keys.world.route("new", {"new-1": await keys.world.engine(echo)}, labels=OTHER)
    stable = {"m-1": await keys.world.engine(echo)}
    keys.world.route("m", stable, labels=MINE, canary="new", canary_percent=100)
    answered = await keys.ask()
    assert (answered.status, answered.one("x-kubeai-model")) == (200, None)


async def test_an_alias_of_a_model_that_the_key_may_not_use_is_403(limited):
    keys = await limited()
    keys.give(models="team=mine")
    engine = await keys.world.engine(echo)
    keys.world.route("m", {"m-1": engine}, labels=OTHER, aliases=("x/y",), adapters=("fin",))
    for name in ("x/y", "x/y_fin", "m_fin", "m", "x/y_none", "missing"):
        answered = await keys.ask(name)
        assert (answered.status, error(answered)["code"]) == (403, "model_not_allowed")
        assert name in error(answered)["message"]
    assert not engine.requests


# -- limits ----------------------------------------------------------------------------------------


async def test_a_request_that_falls_back_is_charged_once_and_settled_once(limited):
    keys = await limited()
    keys.give(requests_per_minute=100, tokens_per_minute=10_000, in_flight_max=5)
    keys.world.route("b", {"b-1": await keys.world.engine(echo)})
    keys.world.route("m", {"m-1": await keys.world.engine(failing(500))}, **NOW)
    answered = await keys.ask()
    assert (answered.status, answered.one("x-kubeai-model")) == (200, "b")
    assert answered.one("x-ratelimit-remaining-requests") == "99"
    assert keys.table.use(0)[:2] == (0, 1)


async def test_a_429_after_the_choice_of_a_canary_names_no_model_and_counts_at_none(limited):
    keys = await limited()
    keys.give(requests_per_minute=1)
    assert bucket_of("m", b"alice") < 100
    keys.world.route("new", {"new-1": await keys.world.engine(echo)})
    stable = {"m-1": await keys.world.engine(echo)}
    keys.world.route("m", stable, canary="new", canary_percent=100)
    answered = await keys.ask()
    assert (answered.status, answered.one("x-kubeai-model")) == (200, "new")
    answered = await keys.ask()
    assert (answered.status, answered.one("x-kubeai-model")) == (429, None)
    assert answered.one("x-ratelimit-remaining-requests") == "0"
    assert keys.table.use(0)[:2] == (0, 1)
    assert sum(keys.world.outcomes("m").values()) == 0
    assert keys.world.outcomes("new")["2xx"] == 1


# -- revocation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", ["ready", "starting"])
async def test_a_key_that_is_revoked_while_a_fallback_serves_or_starts_ends_the_request(
    limited, fallback
):
    keys = await limited()
    keys.give(in_flight_max=1)
    world = keys.world
    world.route("b", {"b-1": await world.engine(hang)} if fallback == "ready" else {})
    world.route("m", {}, **NOW)
    wire = await world.client()
    await wire.send(ask("m", bearer(ALICE)))
    if fallback == "ready":
        await until(lambda: world.in_flight("b") == 1)
    else:
        await until(lambda: set(world.demanded) == {"m", "b"})
    assert keys.table.use(0).in_flight == 1
    change(world, "alice", None)
    answered = await wire.answer()
    assert (answered.status, error(answered)["code"]) == (401, "invalid_api_key")
    assert answered.one("x-kubeai-model") is None
    await ended(world)
    assert keys.table.use(0).in_flight == 0


async def test_keys_that_are_revoked_while_requests_fall_back_leave_nothing_behind(limited):
    keys = await limited(hold_timeout_s=5.0)
    world = keys.world
    slow = await world.engine(echo)
    for turn in range(20):
        keys.give(in_flight_max=50)
        world.route("b", {})
        world.route("m", {}, **NOW)
        wires = [await world.client() for _ in range(8)]
        for wire in wires:
            await wire.send(ask("m", bearer(ALICE)))
        await until(lambda: keys.table.use(0).in_flight == 8)
        world.route(("b", "m")[turn % 2], {"p-1": slow}, **({} if turn % 2 == 0 else NOW))
        for _ in range(turn % 5):
            await asyncio.sleep(0)
        change(world, "alice", None)
        assert {(await wire.answer()).status for wire in wires} <= {200, 401}
        await ended(world)
        assert keys.table.use(0).in_flight == 0
        for wire in wires:
            wire.close()
