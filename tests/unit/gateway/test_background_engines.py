"""Responses in the background at engines that hang, are slow, or have not answered yet."""

import asyncio
import json
from typing import Any

import pytest
import uvloop
from fakes.api_keys import REQUIRED
from fakes.limited_keys import KeyedWorld, bearer, digest_of
from fakes.storing_engine import TEXT, Storing
from fakes.wire import Broken, Message, Wire, post, until

from kubeai._key_table import Use
from kubeai._limits import live
from kubeai.gateway import background_responses
from kubeai.gateway._fast_path import end_revoked

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
PATH = "/openai/v1/responses"
DONE = {"status": "completed", "usage": {"input_tokens": 110, "output_tokens": 40}}


class Slow(Storing):
    """An engine that does not answer while ``silent`` says so, for a method."""

    def __init__(self) -> None:
        super().__init__()
        self.silent: set[str] = set()
        self.waiting = 0  # requests that have no answer yet
        self.begun = 0
        self.cancelled: list[str] = []
        self.go_on = asyncio.Event()

    async def __call__(self, wire: Wire, request: Message) -> None:
        if request.target.endswith("/cancel"):
            self.cancelled.append(request.target.split("/")[3])
        elif request.method in self.silent:
            if request.method == "POST":  # it has the response before it answers
                made = json.loads(request.body)["request_id"]
                self.responses[made] = {"id": made, "status": "in_progress"}
                self.begun += 1
            self.waiting += 1
            try:
                await self.go_on.wait()
            finally:
                self.waiting -= 1
        await super().__call__(wire, request)


class Keyed(KeyedWorld):
    """A World with two keys that have limits."""

    @property
    def following(self) -> int:
        return len(self.world.context.background_responses)

    async def ask(self, model: str = "m", name: str = "alice", **fields: Any) -> Wire:
        wire = await self.world.client()
        body = {"model": model, "input": TEXT, "background": True, **fields}
        await wire.send(post(PATH, json.dumps(body).encode(), bearer(name)))
        return wire

    async def begin(self, model: str, name: str, count: int = 1) -> None:
        for _ in range(count):
            wire = await self.ask(model, name)
            assert (await wire.answer()).status == 200
            wire.close()

    def revoke(self, name: str) -> None:
        self.world.context.keys[digest_of(f"sk-{name}")].is_revoked = True
        end_revoked(self.world.server.relay)
        self.world.context.background_responses.end_revoked()


@pytest.fixture
async def keyed(start, monkeypatch):
    async def make(**config):
        monkeypatch.setattr(background_responses, "PAUSE_MIN_S", 0.01)
        monkeypatch.setattr(background_responses, "PAUSE_MAX_S", 0.01)
        made.append(Keyed(await start(keys=REQUIRED, **config)))
        for name in ("alice", "bob"):
            made[0].add(name, tokens_per_minute=1_000_000, in_flight_max=1000)
        return made[0]

    made: list[Keyed] = []
    yield make
    (keyed,) = made
    await keyed.world.context.background_responses.close()
    await keyed.world.at_rest()
    assert live() == 0
    keyed.close()


# -- engines that hang, or have many responses -----------------------------------------------------


async def test_an_engine_that_hangs_does_not_hold_up_the_responses_of_others(keyed):
    keyed = await keyed()
    good, hangs = Storing(), Slow()
    keyed.world.route("good", {"a": await keyed.world.engine(good)})
    keyed.world.route("hangs", {"b": await keyed.world.engine(hangs)})
    hangs.silent = {"GET"}
    at_once = background_responses.ASKS_PER_ENGINE_MAX_COUNT
    await keyed.begin("hangs", "bob", at_once + 8)
    await until(lambda: hangs.waiting == at_once, "the engine that hangs is asked")
    await keyed.begin("good", "alice")
    await until(lambda: good.asked > 1, "the other engine is asked nevertheless")
    good.end(**DONE)
    await until(lambda: keyed.use("alice").in_flight == 0, "its response is done")
    assert hangs.waiting == at_once
    assert keyed.use("alice") == Use(0, 1, 150)
    (row,) = keyed.world.context.meter.take()
    assert (row.key, *row[3:]) == ("alice", 1, 0, 110, 0, 40)


async def test_a_response_whose_turn_to_be_asked_for_has_not_come_is_not_given_up(
    keyed, monkeypatch
):
    monkeypatch.setattr(background_responses, "SILENT_MAX_S", 0.0)
    monkeypatch.setattr(background_responses, "ASKS_PER_ENGINE_MAX_COUNT", 1)
    keyed, engine = await keyed(), Slow()
    keyed.world.route("m", {"a": await keyed.world.engine(engine)})
    engine.silent = {"GET"}
    await keyed.begin("m", "alice", 3)
    await until(lambda: engine.waiting == 1, "the engine is slow to answer for one")
    engine.go_on.set()
    await until(lambda: engine.asked > 6, "it has answered for all")
    assert keyed.following == 3
    engine.end(**DONE)
    await until(lambda: keyed.following == 0, "all are done")
    assert keyed.use("alice") == Use(0, 3, 450)


async def test_a_response_is_given_up_when_all_that_was_asked_remains_without_an_answer(
    keyed, monkeypatch
):
    monkeypatch.setattr(background_responses, "SILENT_MAX_S", 0.02)
    keyed, engine = await keyed(), Slow()
    keyed.world.route("m", {"a": await keyed.world.engine(engine)})
    await keyed.begin("m", "alice")
    await until(lambda: engine.asked, "the engine answers")
    engine.fails = True
    await until(lambda: keyed.following == 0, "it does not any more")
    engine.fails = False


# -- attempts without an answer --------------------------------------------------------------------


async def test_a_response_whose_key_is_revoked_before_the_engine_answers_is_cancelled(keyed):
    keyed, engine = await keyed(), Slow()
    keyed.world.route("m", {"a": await keyed.world.engine(engine)})
    engine.silent = {"POST"}
    wire = await keyed.ask()
    await until(lambda: engine.begun, "the engine has begun it")
    keyed.revoke("alice")
    assert (await wire.answer()).status == 401
    await until(lambda: engine.cancelled == [engine.id], "it is cancelled")
    await until(lambda: keyed.following == 0, "it is settled")
    (row,) = keyed.world.context.meter.take()
    assert (row.requests, row.estimated_requests) == (1, 1)
    assert row.prompt_tokens > 0
    assert keyed.use("alice") == Use(0, 1, row.prompt_tokens + row.completion_tokens)


async def test_a_foreground_response_whose_key_is_revoked_before_the_answer_costs_nothing(keyed):
    keyed, engine = await keyed(), Slow()
    keyed.world.route("m", {"a": await keyed.world.engine(engine)})
    engine.silent = {"POST"}
    wire = await keyed.ask(background=False)
    await until(lambda: engine.begun, "the engine has begun it")
    keyed.revoke("alice")
    assert (await wire.answer()).status == 401
    await keyed.world.at_rest()
    assert (keyed.following, engine.cancelled) == (0, [])
    assert keyed.use("alice") == Use(0, 1, 0)


async def test_a_response_that_its_client_cannot_ask_for_is_cancelled_and_not_counted(keyed):
    """The engine does not answer in time, and the client does not know the gateway's ID."""
    keyed, engine = await keyed(first_byte_timeout_s=0.05, retries=0), Slow()
    keyed.world.route("m", {"a": await keyed.world.engine(engine)})
    engine.silent = {"POST"}
    wire = await keyed.ask()
    assert (await wire.answer()).status == 504
    engine.silent = set()
    await until(lambda: engine.cancelled == [engine.id], "it is cancelled")
    assert keyed.world.active("m") == 0
    engine.end(**DONE)
    await until(lambda: keyed.following == 0, "it is not followed any more")
    assert keyed.use("alice") == Use(0, 1, 0)


async def test_a_response_whose_engine_is_lost_for_good_is_cancelled_and_not_counted(keyed):
    keyed, engine = await keyed(retries=0), Slow()

    async def loses(wire: Wire, request: Message) -> None:
        if request.method == "POST" and not request.target.endswith("/cancel"):
            made = json.loads(request.body)["request_id"]
            engine.responses[made] = {"id": made, "status": "in_progress"}
            raise Broken(b"", False)
        await engine(wire, request)

    keyed.world.route("m", {"a": await keyed.world.engine(loses)})
    wire = await keyed.ask()
    assert (await wire.answer()).status == 502
    await until(lambda: engine.cancelled == [*engine.responses], "it is cancelled")
    assert keyed.use("alice") == Use(0, 1, 0)


async def test_the_response_of_an_attempt_that_is_retried_is_cancelled(keyed):
    keyed = await keyed()
    first, second = Slow(), Slow()

    async def loses(wire: Wire, request: Message) -> None:
        if request.method == "POST" and not request.target.endswith("/cancel"):
            made = json.loads(request.body)["request_id"]
            first.responses[made] = {"id": made, "status": "in_progress"}
            raise Broken(b"", False)  # for example its API server has been restarted
        await first(wire, request)

    keyed.world.route("m", {"a": await keyed.world.engine(loses)}, fallbacks=("other",))
    keyed.world.route("other", {"b": await keyed.world.engine(second)})
    wire = await keyed.ask()
    assert (await wire.answer()).status == 200
    await until(lambda: first.responses and set(first.cancelled) == set(first.responses))
    await until(lambda: keyed.following == 1, "only the other response goes on")
    assert second.cancelled == []
    assert keyed.use("alice").in_flight == 1
    second.end(**DONE)
    await until(lambda: keyed.following == 0, "it is done")
    (row,) = keyed.world.context.meter.take()
    assert row[3:] == (1, 0, 110, 0, 40)
    assert keyed.use("alice") == Use(0, 1, 150)


async def test_a_response_that_an_engine_refuses_after_another_was_lost_is_not_followed(keyed):
    keyed = await keyed()

    async def loses(wire: Wire, request: Message) -> None:
        raise Broken(b"", False)

    async def refuses(wire: Wire, request: Message) -> None:
        await wire.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}")

    keyed.world.route("m", {"a": await keyed.world.engine(loses)}, fallbacks=("other",))
    keyed.world.route("other", {"b": await keyed.world.engine(refuses)})
    wire = await keyed.ask(background=False)
    assert (await wire.answer()).status == 400
    await keyed.world.at_rest()
    assert keyed.following == 0
    assert keyed.use("alice") == Use(0, 1, 0)
