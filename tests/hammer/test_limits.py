"""Limits of API keys on real workers, of one replica and of two."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import uvloop
from fakes.fleet import Fleet
from fakes.wire import Broken, Engine, Message, Wire, answer, connect, post, until

from kubeai._key_table import Use
from kubeai.api.api_key import ApiKey
from kubeai.routing.routes import Endpoint, Route

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}
WORKERS = 2
CLIENTS = 8
CHAT = post(
    "/openai/v1/chat/completions", b'{"model":"m","max_tokens":5}', "Authorization: Bearer sk-k"
)
ANSWER = b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}'


def key(**limits: int) -> ApiKey:
    return ApiKey("k", hashlib.sha256(b"sk-k").digest(), "tenant", **limits)


@pytest.fixture
async def answers() -> asyncio.Event:
    """Whether the engine answers."""
    event = asyncio.Event()
    event.set()
    return event


@pytest.fixture
async def start(answers, monkeypatch) -> AsyncIterator[Callable[..., Awaitable[Fleet]]]:
    """Start a replica with one engine, which answers while ``answers`` is set."""
    monkeypatch.setenv("LOG_LEVEL", "error")

    async def serve(wire: Wire, _: Message) -> None:
        await answers.wait()
        await wire.send(answer(200, ANSWER))

    engine = await Engine(serve).start()
    fleets: list[Fleet] = []

    async def start(*peers: Fleet, **limits: int) -> Fleet:
        fleet = await Fleet.start(
            [Route("m", "VLLM", endpoints=(Endpoint("pod", engine.address),))],
            workers=WORKERS,
            keys=[key(**limits)],
            identity=f"replica-{len(fleets)}",
            peers=tuple(peer.supervisor.metrics_address for peer in peers),
            drain_accept_s=0.0,
            drain_timeout_s=1.0,
        )
        fleets.append(fleet)
        return fleet

    yield start
    answers.set()
    for fleet in fleets:
        await fleet.close()
    await engine.stop()


async def ask(fleet: Fleet, count: int) -> Counter:
    """Send requests on connections to all workers; statuses of the responses."""

    async def client(share: int) -> None:
        for _ in range(share):
            wire = await connect(fleet.port)
            await wire.send(CHAT)
            statuses[(await wire.answer()).status] += 1
            wire.close()

    statuses: Counter = Counter()
    await asyncio.gather(*(client(len(range(n, count, CLIENTS))) for n in range(CLIENTS)))
    return statuses


def use(fleet: Fleet) -> Use:
    return fleet.supervisor.key_table.use(fleet.supervisor.keys.rows["k"][0])


async def test_a_limit_holds_for_all_workers(start):
    fleet = await start(requests_per_minute=20)
    statuses = await ask(fleet, 60)
    assert 20 <= statuses[200] < 20 + WORKERS
    assert statuses[429] == 60 - statuses[200]
    await until(lambda: use(fleet).in_flight == 0)


async def test_tokens_are_settled_by_the_worker_that_reserved_them(start):
    fleet = await start(tokens_per_minute=100_000)
    assert await ask(fleet, 16) == {200: 16}
    await until(lambda: use(fleet) == Use(0, 16, 16 * 7))


async def test_a_killed_worker_leaves_nothing_in_flight(start, answers):
    fleet = await start(in_flight_max=6, requests_per_minute=1000)
    answers.clear()
    wires = [await connect(fleet.port) for _ in range(6)]
    for wire in wires:
        await wire.send(CHAT)
    await until(lambda: use(fleet).in_flight == 6)
    assert await ask(fleet, 4) == {429: 4}
    pids = set(fleet.pids)
    for column in range(WORKERS):
        await until(lambda column=column: fleet.kill(column))
    for wire in wires:
        with pytest.raises((Broken, OSError)):
            await wire.answer()
        wire.close()
    await until(lambda: fleet.ready and not pids & set(fleet.pids), within_s=20)
    answers.set()
    assert use(fleet) == Use(0, 6, 6 * 5), "what they have counted and reserved stays"
    assert await ask(fleet, 4) == {200: 4}


async def test_a_limit_holds_for_two_replicas_with_two_workers_each(start):
    one = await start(requests_per_minute=20)
    other = await start(one, requests_per_minute=20)
    assert await ask(one, 12) == {200: 12}
    await until(lambda: use(other).requests == 12, "the other replica has heard of it")
    statuses = await ask(other, 20)
    assert 8 <= statuses[200] < 8 + WORKERS


async def test_a_changed_limit_applies_and_what_was_used_still_counts(start):
    fleet = await start(requests_per_minute=5)
    statuses = await ask(fleet, 8)
    assert statuses[429] >= 2
    fleet.key("k", key(requests_per_minute=50))

    async def is_served() -> bool:
        return (await ask(fleet, CLIENTS))[200] == CLIENTS

    async with asyncio.timeout(20):
        while not await is_served():
            pass
    assert use(fleet).requests >= 5 + CLIENTS
