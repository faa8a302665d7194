"""Requests of a Model with PrefixCache, from the client's body to the engine that gets it."""

import asyncio
import json

import pytest
from fakes.chats import ask
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, says, until
from structlog.testing import capture_logs

SYSTEM = {"role": "system", "content": "You answer in verse. " * 100}


def conversation(name, turns, words=200):
    messages = [SYSTEM, {"role": "user", "content": f"{name} " * words}]
    for turn in range(1, turns):
        messages.append({"role": "assistant", "content": f"reply {turn} to {name}. " * words})
        messages.append({"role": "user", "content": f"question {turn} of {name}. " * words})
    return messages


async def served_by(wire, world, **fields):
    before = {name: len(engine.requests) for name, engine in world.by_name.items()}
    await wire.send(ask(**fields))
    response = await wire.answer()
    assert response.status == 200
    (name,) = (n for n, e in world.by_name.items() if len(e.requests) > before[n])
    return name, response


async def replicas(world, names, script, **route):
    """Publish a model "m" with an engine for each name."""
    world.by_name = {name: await world.engine(script) for name in names}
    world.route("m", world.by_name, strategy="PrefixCache", **route)


async def test_later_turns_go_where_the_conversation_is_cached(start):
    world = await start()
    await replicas(world, "abcd", says(b"fine"))
    wire = await world.client()
    homes = {}
    for turns in (1, 2, 3):
        for name in ("ann", "bob", "cid", "dee"):
            messages = conversation(name, turns)
            home, _ = await served_by(wire, world, messages=messages, stream=True)
            assert home == homes.setdefault(name, home)


async def test_tokens_are_pending_until_the_body_begins_and_not_only_the_head(start):
    world = await start()
    go_on, finish = asyncio.Event(), asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED)  # as vLLM does, before the prefill
        await go_on.wait()
        await wire.send(chunk(b"data: 1\n\n"))
        await finish.wait()
        await wire.send(chunk(b""))

    await replicas(world, "a", script)
    wire = await world.client()
    await wire.send(ask(messages=conversation("ann", 1), stream=True))
    await until(lambda: world.by_name["a"].requests)
    await asyncio.sleep(0.02)
    assert 500 < world.pending("m") < 2000
    go_on.set()
    await until(lambda: world.pending("m") == 0)
    assert world.in_flight("m") == 1
    finish.set()
    await wire.answer()


async def test_a_retry_counts_its_tokens_at_the_other_endpoint(start):
    world = await start()
    fails = answer(503, b"full")

    async def script(wire: Wire, request: Message) -> None:
        failed = sum(len(engine.requests) for engine in world.by_name.values()) == 1
        await wire.send(fails if failed else answer(200, b"fine"))

    await replicas(world, "ab", script)
    wire = await world.client()
    await wire.send(ask(messages=conversation("ann", 1)))
    assert (await wire.answer()).body == b"fine"
    assert {name: len(e.requests) for name, e in world.by_name.items()} == {"a": 1, "b": 1}


async def test_adapters_have_prompts_of_their_own(start):
    world = await start(explain=True)
    world.by_name = {name: await world.engine(says(b"fine")) for name in "ab"}
    endpoints = {name: (engine, ("x", "y")) for name, engine in world.by_name.items()}
    world.route("m", endpoints, strategy="PrefixCache", adapters=("x", "y"))
    wire = await world.client()
    for model, found in (("m", False), ("m_x", False), ("m_y", False), ("m", True), ("m_x", True)):
        await wire.send(ask(model, "X-KubeAI-Explain: 1", messages=conversation("ann", 3)))
        told = json.loads((await wire.answer()).one("x-kubeai-explain"))
        assert (told["cached"] > 0) is found, model


async def test_a_request_that_moves_off_its_cached_endpoint_is_logged_with_both_costs(start):
    world = await start()
    go_on = asyncio.Event()
    go_on.set()

    async def script(wire: Wire, request: Message) -> None:
        await go_on.wait()
        await wire.send(answer())

    await replicas(world, "ab", script)
    wires = [await world.client() for _ in range(8)]
    await served_by(wires[0], world, messages=conversation("ann", 1))
    go_on.clear()
    with capture_logs() as logs:
        for n, wire in enumerate(wires):
            messages = [*conversation("ann", 1), {"role": "user", "content": f"{n} " * 4000}]
            await wire.send(ask(messages=messages, stream=True))
            await until(lambda count=n + 1: world.in_flight("m") == count)
    go_on.set()
    for wire in wires:
        await wire.answer()
    moved = [entry for entry in logs if entry["event"] == "request moved off its first endpoint"]
    assert moved
    for entry in moved:
        assert entry["endpoint"] != entry["first"]
        assert entry["first_cached"] > entry["cached"]
        assert entry["first_cost"] >= entry["cost"]


# -- explained -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["LeastLoad", "PrefixHash", "PrefixCache"])
async def test_a_client_is_told_why_its_endpoint_was_picked(start, strategy):
    world = await start(explain=True)
    world.by_name = {name: await world.engine(says(b"fine")) for name in "ab"}
    world.route("m", world.by_name, strategy=strategy)
    wire = await world.client()
    for _ in range(2):
        await wire.send(ask("m", "X-KubeAI-Explain: 1", messages=conversation("ann", 1)))
        response = await wire.answer()
        told = json.loads(response.one("x-kubeai-explain"))
        assert len(world.by_name[told["endpoint"]].requests) >= 1
        assert told["strategy"] == strategy
        assert 500 < told["tokens"] < 2000
        assert {one["endpoint"] for one in told["candidates"]} == {"a", "b"}
    if strategy != "LeastLoad":
        cached = {one["endpoint"]: one["cached"] for one in told["candidates"]}
        assert cached[told["endpoint"]] > 0.8 * told["tokens"]
    await wire.send(ask("m", messages=conversation("ann", 1)))
    assert (await wire.answer()).one("x-kubeai-explain") is None, "it was not asked for"


async def test_nothing_is_explained_unless_the_config_allows_it(start):
    world = await start()
    await replicas(world, "a", says(b"fine"))
    wire = await world.client()
    await wire.send(ask("m", "X-KubeAI-Explain: 1"))
    assert (await wire.answer()).one("x-kubeai-explain") is None
