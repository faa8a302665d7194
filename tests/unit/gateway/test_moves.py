"""Requests that wait for a first byte move off endpoints that leave."""

import asyncio
import socket
import time

import uvloop
from fakes.chats import ask, hang, lose
from fakes.wire import (
    CHUNKED,
    WAIT_S,
    Engine,
    Message,
    Script,
    Wire,
    answer,
    chunk,
    says,
    until,
)
from fakes.world import World

from kubeai.gateway.health import TRUST_ANSWERS

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


async def asked(world: World, engine: Engine) -> Wire:
    """A client whose request waits at ``a``, the model's only endpoint."""
    world.route("m", {"a": engine})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: engine.requests)
    return wire


def says_later(answers: asyncio.Event) -> Script:
    """A script that answers once the event is set."""

    async def slow(wire: Wire, request: Message) -> None:
        await answers.wait()
        await wire.send(answer(200, b"slow"))

    return slow


async def test_a_waiting_request_moves_when_its_endpoint_leaves_the_routes(start):
    world = await start()
    hung, good = await world.engine(hang), await world.engine(says(b"good"))
    wire = await asked(world, hung)
    world.route("m", {"b": good})
    assert (await wire.answer()).body == b"good"
    assert world.outcomes("m")["retried"] == 1
    await until(lambda: not hung.open, "the engine's connection is closed")


async def test_a_waiting_request_moves_to_an_endpoint_added_later(start):
    world = await start()
    hung, good = await world.engine(hang), await world.engine(says(b"good"))
    wire = await asked(world, hung)
    world.route("m", {})
    await asyncio.sleep(0)
    assert world.in_flight("m") == 1, "it still waits there: its engine may yet respond"
    world.route("m", {"b": good})
    assert (await wire.answer()).body == b"good"


async def test_a_waiting_request_stays_while_its_endpoint_drains(start):
    world = await start()
    answers = asyncio.Event()
    draining, good = await world.engine(says_later(answers)), await world.engine(says(b"good"))
    wire = await asked(world, draining)
    world.route("m", {"b": good}, draining=("a",))
    world.route("m", {"b": good}, draining=("a",), owner="another change")
    answers.set()
    assert (await wire.answer()).body == b"slow"


async def test_a_waiting_request_stays_when_its_endpoint_is_taken_back_from_a_drain(start):
    world = await start()
    answers = asyncio.Event()
    slow_engine, good = await world.engine(says_later(answers)), await world.engine(says(b"good"))
    wire = await asked(world, slow_engine)
    world.route("m", {"b": good}, draining=("a",))
    world.route("m", {"a": slow_engine, "b": good})
    answers.set()
    assert (await wire.answer()).body == b"slow"
    assert len(slow_engine.requests) == 1


async def test_a_waiting_request_moves_if_its_endpoint_disappears_during_its_drain(start):
    world = await start()
    hung, good = await world.engine(hang), await world.engine(says(b"good"))
    wire = await asked(world, hung)
    world.route("m", {"b": good}, draining=("a",))
    world.route("m", {"b": good})
    assert (await wire.answer()).body == b"good"


async def test_a_started_response_continues_after_its_endpoint_leaves_the_routes(start):
    world = await start()
    ends = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"one"))
        await ends.wait()
        await wire.send(chunk(b"two") + b"0\r\n\r\n")

    world.route("m", {"a": await world.engine(script)})
    wire = await world.client()
    await wire.send(ask())
    head = await wire.head()
    world.route("m", {"b": await world.engine(says(b"good"))})
    ends.set()
    assert (await wire.body(head)).body == b"onetwo"


async def test_waiting_requests_move_off_an_endpoint_ejected_by_any_worker(start):
    world = await start(eject_after_failures=2)
    engines = {name: await world.engine(says(b"good")) for name in "ab"}
    world.route("m", engines)
    engines["a"].script = hang
    wires = [await world.client() for _ in range(4)]
    for wire in wires:
        await wire.send(ask())
    await until(lambda: engines["a"].requests)
    endpoint = next(e for e in world.table.find("m").route.endpoints if e.name == "a")
    for _ in range(2):  # as another worker would
        world.loads.note_failure(endpoint.row, endpoint.generation, time.monotonic(), True)
    world.loads.eject(endpoint.row, endpoint.generation, time.monotonic() + 100)
    for wire in wires:
        assert (await wire.answer()).body == b"good"


async def test_moves_count_against_the_retry_limit(start):
    world = await start(retries=1)
    hung = {name: await world.engine(hang) for name in "ab"}
    good = await world.engine(says(b"good"))
    world.route("m", {"a": hung["a"]})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: hung["a"].requests)
    world.route("m", {"b": hung["b"]})
    await until(lambda: hung["b"].requests)
    world.route("m", {"c": good})
    await asyncio.sleep(0)
    assert not good.requests
    wire.close()


async def test_a_request_stays_on_a_pod_that_is_out_of_service_for_a_moment(start):
    world = await start()
    answers = asyncio.Event()
    engine = await world.engine(says_later(answers))
    wire = await asked(world, engine)
    world.route("m", {})  # it is not ready
    world.route("m", {"a": engine, "b": await world.engine(says(b"other"))})
    answers.set()
    assert (await wire.answer()).body == b"slow"
    assert len(engine.requests) == 1


async def test_a_request_moves_off_a_pod_that_comes_back_and_leaves_for_good(start):
    world = await start()
    hung, good = await world.engine(hang), await world.engine(says(b"good"))
    wire = await asked(world, hung)
    world.route("m", {})
    world.route("m", {"a": hung})
    world.route("m", {"b": good})
    assert (await wire.answer()).body == b"good"


async def test_a_request_that_is_being_connected_moves_when_its_endpoint_leaves(start):
    world = await start(connect_timeout_s=WAIT_S)
    full = socket.create_server(("127.0.0.1", 0), backlog=0)
    port = full.getsockname()[1]
    fillers = [socket.socket() for _ in range(4)]
    for filler in fillers:  # the backlog is full: connections hang
        filler.setblocking(False)
        filler.connect_ex(("127.0.0.1", port))
    world.route("m", {"a": f"127.0.0.1:{port}"})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: world.in_flight("m"))
    world.route("m", {"b": await world.engine(says(b"good"))})
    async with asyncio.timeout(WAIT_S / 2):
        assert (await wire.answer()).body == b"good"
    for each in (full, *fillers):
        each.close()


async def test_a_probe_stays_while_other_endpoints_fail(start):
    world = await start(eject_after_failures=1, eject_time_s=0.01, retries=1)
    answers = asyncio.Event()

    async def slow(wire: Wire, request: Message) -> None:
        await answers.wait()
        await wire.send(answer(200, b"back"))

    ejected = await world.engine(lose)
    world.route("m", {"a": ejected, "b": await world.engine(says(b"good"))})
    world.route("other", {"c": await world.engine(says(b"good"))})
    wire = await world.client()
    while not world.ejected("m"):
        await wire.send(ask())
        assert (await wire.answer()).body == b"good"
    ejected.requests.clear()
    ejected.script = slow
    while not ejected.requests:
        probe = await world.client()
        await probe.send(ask())
        answering = asyncio.create_task(probe.answer())
        await until(lambda: answering.done() or ejected.requests)  # noqa: B023 (awaited here)
    other = world.table.find("other").route.endpoints[0]
    for _ in range(3):
        world.loads.note_failure(other.row, other.generation, time.monotonic(), True)
        await looked_for_ejected(world)
    answers.set()
    assert (await answering).body == b"back"
    await until(lambda: not world.ejected("m"))


async def test_a_request_moves_off_an_ejected_endpoint_as_soon_as_another_is_trusted(start):
    world = await start(eject_after_failures=2)
    engines = {name: await world.engine(says(b"good")) for name in "ab"}
    engines["a"].script = hang
    world.route("m", engines)
    rows = {e.name: e for e in world.table.find("m").route.endpoints}
    stuck = []
    while not stuck:
        wire = await world.client()
        await wire.send(ask())
        waiting = asyncio.create_task(wire.answer())
        await until(lambda: waiting.done() or engines["a"].requests)  # noqa: B023 (awaited here)
        if engines["a"].requests:
            stuck.append(waiting)
    now_s = time.monotonic()
    for name in "ab":
        world.loads.note_failure(rows[name].row, rows[name].generation, now_s, True)
        world.loads.eject(rows[name].row, rows[name].generation, now_s + 100)
    await looked_for_ejected(world)
    assert not stuck[0].done(), "no other endpoint is trusted"
    world.loads.recover(rows["b"].row, rows["b"].generation)
    wire = await world.client()
    for _ in range(TRUST_ANSWERS):
        await wire.send(ask())
        assert (await wire.answer()).body == b"good"
    assert (await stuck[0]).body == b"good"


async def looked_for_ejected(world: World) -> None:
    """The worker has looked for requests that wait on ejected endpoints, once more at least."""
    await asyncio.sleep(0)
    for _ in range(2):
        world.table.move_off_ejected()
