"""Endpoints that fail are ejected, probed, and returned to service."""

import asyncio
import itertools
import time

import pytest
import uvloop
from fakes.chats import ask, failing, hang
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, says, until

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


async def test_an_endpoint_that_keeps_failing_is_ejected(start):
    world = await start(eject_after_failures=3)
    bad = await world.engine(failing(503))
    good = await world.engine(says(b"good"))
    world.route("m", {"a": bad, "b": good})
    wire = await world.client()
    for _ in range(20):
        await wire.send(ask())
        assert (await wire.answer()).body == b"good"
    assert len(bad.requests) == 3
    assert world.ejected("m") == {"a"}


async def test_a_success_resets_the_failure_count(start):
    world = await start(eject_after_failures=2, retries=0)

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(200 if len(flaky.requests) % 2 else 500))

    flaky = await world.engine(script)
    world.route("m", {"a": flaky, "b": await world.engine(says(b""))})
    wire = await world.client()
    for _ in range(12):
        await wire.send(ask())
        await wire.answer()
    assert len(flaky.requests) == 6
    assert world.ejected("m") == set()


async def test_truncated_responses_count_as_failures(start):
    """Even though the head of each was fine."""
    world = await start(eject_after_failures=2)

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"one"))
        wire.close()

    world.route("m", {"a": await world.engine(script), "b": await world.engine(says(b""))})
    for _ in range(6):
        wire = await world.client()
        await wire.send(ask())
        try:
            await wire.answer()
        except Broken:
            wire.close()
    assert world.ejected("m") == {"a"}
    assert world.outcomes("m")["broken"] == 2


@pytest.mark.parametrize(("count", "ejected"), [(1, 0), (2, 2), (3, 3)])
async def test_if_all_endpoints_are_ejected_all_are_tried(start, count, ejected):
    """Except for a model's only endpoint, where ejection gains nothing."""
    world = await start(eject_after_failures=2, retries=0)
    names = "abc"[:count]
    engines = {name: await world.engine(failing(503)) for name in names}
    world.route("m", engines)
    wire = await world.client()
    for _ in range(12):
        await wire.send(ask())
        assert (await wire.answer()).status == 503
    assert len(world.ejected("m")) == ejected
    assert min(len(engine.requests) for engine in engines.values()) >= 12 // count - 1
    for engine in engines.values():
        engine.script = says(b"good")
    await wire.send(ask())
    assert (await wire.answer()).body == b"good"
    await until(lambda: len(world.ejected("m")) == max(0, ejected - 1), "who answers serves again")


async def test_a_request_to_a_model_that_is_deleted_during_its_attempt_is_a_404(start):
    world = await start()

    async def deleted(wire: Wire, request: Message) -> None:
        world.unroute("m")
        await wire.send(answer(503))

    world.route("m", {name: await world.engine(deleted) for name in "ab"})
    wire = await world.client()
    await wire.send(ask())
    assert (await wire.answer()).status == 404


@pytest.mark.parametrize("retried", [True, False])
async def test_a_first_byte_timeout_is_retried_elsewhere_if_configured(start, retried):
    world = await start(first_byte_timeout_s=0.05, retry_first_byte_timeout=retried)
    world.route("m", {"a": await world.engine(hang)})
    wire = await world.client()
    await wire.send(ask())
    assert (await wire.answer()).status == 504, "there is no other endpoint"
    bodies = set()
    world.route("m", {"a": await world.engine(hang), "b": await world.engine(says(b"good"))})
    for _ in range(2):
        await wire.send(ask())
        bodies.add((await wire.answer()).body == b"good")
    assert bodies == ({True} if retried else {True, False})


async def test_an_ejected_endpoint_is_probed_by_one_request_and_returns_to_service(start):
    world = await start(eject_after_failures=1, eject_time_s=0.05, retries=1)
    answers = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        if len(bad.requests) == 1:
            await wire.send(answer(503))
        else:
            await answers.wait()
            await wire.send(answer(200, b"back"))

    bad = await world.engine(script)
    world.route("m", {"a": bad, "b": await world.engine(says(b"good"))})
    wire = await world.client()
    while not world.ejected("m"):
        await wire.send(ask())
        assert (await wire.answer()).body == b"good"
    while True:  # once the ejection has expired, one request is sent there
        await wire.send(ask())
        probe = asyncio.create_task(wire.answer())
        await until(lambda: probe.done() or len(bad.requests) == 2)  # noqa: B023 (awaited here)
        if not probe.done():
            break
        assert (await probe).body == b"good"
    other = await world.client()
    for _ in range(10):  # the others avoid it until it has responded
        await other.send(ask())
        assert (await other.answer()).body == b"good"
    assert len(bad.requests) == 2
    answers.set()
    assert (await probe).body == b"back"
    await until(lambda: not world.ejected("m"))
    for _ in range(4):
        await other.send(ask())
        await other.answer()
    assert len(bad.requests) >= 4


async def test_a_failed_probe_ejects_for_longer(start):
    world = await start(
        eject_after_failures=1, eject_time_s=0.02, eject_max_time_s=1000.0, retries=1
    )
    bad = await world.engine(failing(503))
    world.route("m", {"a": bad, "b": await world.engine(says(b"good"))})
    wire = await world.client()
    asked = []  # before and after each request sent there: the ejection happens in between
    while len(bad.requests) < 5:
        before, sent_s = len(bad.requests), time.monotonic()
        await wire.send(ask())
        assert (await wire.answer()).body == b"good"
        if len(bad.requests) > before:
            asked.append((sent_s, time.monotonic()))
    pauses = [later - earlier for (earlier, _), (_, later) in itertools.pairwise(asked)]
    assert all(pause >= 0.02 * 2**n for n, pause in enumerate(pauses)), pauses


async def test_a_probe_whose_client_left_does_not_make_the_next_failure_eject(start):
    world = await start(eject_after_failures=3)
    engine = await world.engine(hang)
    world.route("m", {"a": engine, "b": await world.engine(says(b"good"))})
    a = next(e for e in world.table.find("m").route.endpoints if e.name == "a")
    for _ in range(3):
        world.loads.note_failure(a.row, a.generation, time.monotonic(), False)
    world.loads.eject(a.row, a.generation, time.monotonic())  # half-open at once
    while not engine.requests:
        wire = await world.client()
        await wire.send(ask())
        answering = asyncio.create_task(wire.answer())
        await until(lambda: answering.done() or engine.requests)  # noqa: B023 (awaited here)
    answering.cancel()
    wire.reset()
    await world.at_rest()
    world.loads.recover(a.row, a.generation)  # as another worker would
    engine.script = failing(503)
    wire = await world.client()
    while len(engine.requests) < 2:
        await wire.send(ask())
        assert (await wire.answer()).body == b"good"
    assert not world.ejected("m")
