"""Which failed attempts are retried, where, and how often."""

import asyncio
import json

import pytest
import uvloop
from fakes.chats import ask, error_of, failing, lose, nonsense, reset
from fakes.wire import Engine, Message, Wire, answer, says, until

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


@pytest.mark.parametrize(
    "script", [failing(500), failing(502), failing(503), failing(504), lose, reset, nonsense]
)
async def test_a_failed_attempt_is_retried_on_another_endpoint(start, script):
    world = await start()
    bad = await world.engine(script)
    good = await world.engine(says(b"good"))
    world.route("m", {"a": bad, "b": good}, strategy="PrefixHash")
    wire = await world.client()
    for number in range(20):
        body = {"messages": [{"role": "user", "content": f"text {number}"}]}
        await wire.send(ask(**body))
        assert (await wire.answer()).body == b"good"
    assert len(bad.requests) > 0, "the bad engine received no request"
    assert len(good.requests) == 20


async def test_a_refused_connection_is_retried_on_another_endpoint(start):
    world = await start()
    gone = await world.engine(says(b""))
    await gone.stop()
    good = await world.engine(says(b"good"))
    world.route("m", {"a": gone, "b": good})
    wire = await world.client()
    for _ in range(5):
        await wire.send(ask())
        assert (await wire.answer()).body == b"good"


async def test_no_endpoint_is_tried_twice_while_another_is_left(start):
    world = await start(retries=3)
    engines = {name: await world.engine(failing(503)) for name in "abcd"}
    world.route("m", engines)
    wire = await world.client()
    await wire.send(ask())
    answered = await wire.answer()
    assert (answered.status, answered.line, answered.body) == (503, "HTTP/1.1 503 Bad", b"failed")
    assert [len(engine.requests) for engine in engines.values()] == [1, 1, 1, 1]


async def test_the_only_endpoint_is_retried_after_a_back_off(start):
    world = await start(retries=2)

    async def script(wire: Wire, request: Message) -> None:
        times.append(asyncio.get_running_loop().time())
        assert world.in_flight("m") == 1
        await wire.send(answer(200 if len(times) == 3 else 503, b"third"))

    times: list[float] = []
    world.route("m", {"a": await world.engine(script)})
    wire = await world.client()
    await wire.send(ask())
    answered = await wire.answer()
    assert (answered.status, answered.body) == (200, b"third")
    assert times[1] - times[0] > 0.045
    assert times[2] - times[1] > 0.09


async def test_a_client_may_disconnect_during_the_back_off(start):
    world = await start()
    engine = await world.engine(failing(503))
    world.route("m", {"a": engine})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: engine.requests and world.in_flight("m") == 0)
    assert world.active("m") == 1
    wire.reset()
    await world.at_rest()
    assert len(engine.requests) == 1


async def test_all_endpoints_may_be_removed_during_a_retry(start):
    world = await start()
    bad = await world.engine(failing(503))
    world.route("m", {"a": bad})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: bad.requests)
    world.route("m", {})
    await until(lambda: world.held("m") == 1)
    world.route("m", {"b": await world.engine(says(b"new"))})
    assert (await wire.answer()).body == b"new"


async def test_a_500_is_retried_once(start):
    world = await start(retries=3)
    engines = {name: await world.engine(failing(500)) for name in "abcd"}
    world.route("m", engines)
    wire = await world.client()
    await wire.send(ask())
    assert (await wire.answer()).status == 500
    assert sum(len(engine.requests) for engine in engines.values()) == 2


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 501, 505])
async def test_other_responses_pass_through(start, status):
    world = await start()
    engines = {name: await world.engine(failing(status)) for name in "ab"}
    world.route("m", engines)
    wire = await world.client()
    await wire.send(ask())
    answered = await wire.answer()
    assert (answered.status, answered.body) == (status, b"failed")
    assert sum(len(engine.requests) for engine in engines.values()) == 1


async def test_if_no_endpoint_is_reachable_it_is_a_502(start):
    world = await start(retries=3, eject_after_failures=0)
    engines = {name: await world.engine(lose) for name in "abcde"}
    world.route("m", engines)
    wire = await world.client()
    await wire.send(ask())
    assert (await error_of(wire, 502))["type"] == "server_error"
    assert sum(len(engine.requests) for engine in engines.values()) == 4
    await wire.send(ask())
    await error_of(wire, 502)


async def test_a_failed_attempt_is_not_in_flight_during_the_next(start):
    world = await start()
    loads = []

    async def look(wire: Wire, request: Message) -> None:
        loads.append((world.in_flight("m"), sorted(world.endpoint_loads("m").values())))
        await wire.send(answer(503))

    world.route("m", {name: await world.engine(look) for name in "abc"})
    wire = await world.client()
    await wire.send(ask())
    assert (await wire.answer()).status == 503
    assert set(map(repr, loads)) == {"(1, [0, 0, 1])"}


async def test_if_every_endpoint_fails_retries_are_few_despite_earlier_successes(start):
    world = await start(retry_budget_min=4, retry_budget_percent=50, eject_after_failures=0)
    engines = {name: await world.engine(failing(503)) for name in "ab"}
    world.route("m", engines)
    world.route("n", engines)
    wire = await world.client()
    for _ in range(10):
        await wire.send(ask())
        assert (await wire.answer()).status == 503
    assert sum(len(engine.requests) for engine in engines.values()) == 10 + 4
    for engine in engines.values():
        engine.script = says(b"good")
    for _ in range(20):
        await wire.send(ask())
        assert (await wire.answer()).status == 200
    for engine in engines.values():
        engine.script = failing(503)
        engine.requests.clear()
    for _ in range(30):
        await wire.send(ask())
        assert (await wire.answer()).status == 503
    # The minimum of 4, and those that were likely to succeed: at most half of 20.
    assert 30 + 4 <= sum(len(engine.requests) for engine in engines.values()) <= 30 + 10
    await wire.send(ask("n"))
    await wire.answer()
    assert world.outcomes("n")["retried"] == 3, "each model has its own budget"


async def test_a_request_that_killed_its_engine_is_not_retried(start):
    """The engine was serving no other request and does not come back at once."""
    world = await start()

    def fatal(name):
        async def script(wire: Wire, request: Message) -> None:
            if b"poison" in request.body:
                engines[name].die()
            else:
                await wire.send(answer(200, b"good"))

        return script

    engines = {name: await world.engine(fatal(name)) for name in "abc"}
    world.route("m", engines)
    wire = await world.client()
    await wire.send(ask(poison=True))
    answered = await wire.answer()
    assert answered.status == 502
    assert answered.one("x-should-retry") == "false", "OpenAI's clients would retry a 502"
    assert answered.one("x-kubeai-crashed-engines") == "1"
    error = json.loads(answered.body)["error"]
    assert (error["code"], error["type"]) == ("engine_died", "server_error")
    assert sum(len(engine.requests) for engine in engines.values()) == 1
    await wire.send(ask())
    assert (await wire.answer()).body == b"good"


async def test_a_request_that_kills_its_engine_when_it_is_sent_again_is_to_blame_too(start):
    """It was first written to an idle connection, which might be closed for other reasons."""
    world = await start()
    has_other = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        if b"poison" not in request.body:
            await wire.send(answer(200, b"good"))
        elif len(engine.requests) == 2:
            await has_other.wait()
            wire.close()
        else:
            engine.die()

    engine, other = await world.engine(script), await world.engine(says(b"good"))
    world.route("m", {"a": engine})
    wire = await world.client()
    await wire.send(ask())
    assert (await wire.answer()).body == b"good"
    await wire.send(ask(poison=True))
    await until(lambda: len(engine.requests) == 2)
    world.route("m", {"a": engine, "b": other})
    has_other.set()
    assert (await error_of(wire, 502))["code"] == "engine_died"
    assert not other.requests


async def test_requests_on_a_crashed_engine_are_each_retried_elsewhere_once(start):
    """If one of them is to blame, it may crash a second engine, but not a third."""
    world = await start(retries=5, eject_after_failures=0)

    both = asyncio.Event()

    async def dies(engine: Engine, wire: Wire) -> None:
        if engine is not engines["a"] or len(engine.requests) == 2:
            await both.wait()
            engine.die()
        await wire.reader.read()

    engines: dict[str, Engine] = {}
    for name in "abc":
        engines[name] = await world.engine(
            lambda wire, request, name=name: dies(engines[name], wire)
        )
    world.route("m", {"a": engines["a"]})
    wires = [await world.client() for _ in range(2)]
    for wire in wires:
        await wire.send(ask())
    await until(lambda: len(engines["a"].requests) == 2)
    world.route("m", engines)
    both.set()
    for wire in wires:
        answered = await wire.answer()
        assert json.loads(answered.body)["error"]["code"] == "engine_died"
        assert answered.one("x-kubeai-crashed-engines") == "2"
    assert [len(engine.requests) for engine in engines.values()] == [2, 1, 1]


async def test_an_engine_that_dies_after_it_left_the_routes_is_not_blamed_on_its_request(start):
    world = await start()

    async def script(wire: Wire, request: Message) -> None:
        world.route("m", {"b": good})
        going.die()

    going = await world.engine(script)
    good = await world.engine(says(b"good"))
    world.route("m", {"a": going})
    wire = await world.client()
    await wire.send(ask())
    assert (await wire.answer()).body == b"good"


async def test_a_request_that_loses_two_terminating_engines_is_not_blamed_for_it(start):
    """As in a node drain: both engines end, and neither because of the request."""
    world = await start()
    routes = [({"b": "b"}, ("a",)), ({"c": "c"}, ("a", "b"))]

    async def script(wire: Wire, request: Message) -> None:
        names, draining = routes.pop(0)
        world.route("m", {name: engines[name] for name in names}, draining=draining)
        next(engine for engine in engines.values() if wire in engine.open).die()

    engines = {name: await world.engine(script) for name in "ab"}
    engines["c"] = await world.engine(says(b"good"))
    world.route("m", {"a": engines["a"]})
    wire = await world.client()
    await wire.send(ask())
    assert (await wire.answer()).body == b"good"
