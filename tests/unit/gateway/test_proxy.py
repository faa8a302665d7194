"""Which engine gets a request, and what is counted meanwhile."""

import asyncio
import json
import random
import socket

import pytest
import uvloop
from fakes.chats import CHAT, ask, error_of, failing
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, post, says, until
from structlog.testing import capture_logs

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


# -- what is asked for -----------------------------------------------------------------------------


async def test_unknown_names_are_a_404(start):
    world = await start()
    world.route("m", {"a": await world.engine(says(b""))}, adapters=("fin",))
    wire = await world.client()
    for model in ("other", "m_other", "m_", "_m"):
        await wire.send(ask(model))
        error = await error_of(wire, 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert model in error["message"]
    assert world.demanded == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"model":1}', b'{"model":"m"}x', b"\xff"]
)
async def test_an_unreadable_body_is_a_400(start, body):
    world = await start()
    engine = await world.engine(says(b""))
    world.route("m", {"a": engine})
    wire = await world.client()
    await wire.send(post(CHAT, body))
    assert (await error_of(wire, 400))["type"] == "invalid_request_error"
    assert engine.requests == []
    await wire.send(ask())
    assert (await wire.answer()).status == 200


async def test_every_selector_must_match(start):
    world = await start()
    world.route("m", {"a": await world.engine(says(b""))}, labels={"team": "a", "tier": "1"})
    wire = await world.client()
    for selectors, status in (
        (["team=a"], 200),
        (["team=a", "tier in (1,2)"], 200),
        (["team=a,tier=1"], 200),
        (["team=a", "tier=2"], 404),
        (["team=b", "tier=1"], 404),
        (["team="], 404),
        (["team in"], 400),
    ):
        await wire.send(ask("m", *(f"x-label-SELECTOR: {each}" for each in selectors)))
        assert (await wire.answer()).status == status, selectors


@pytest.mark.parametrize(
    "path",
    ["chat/completions", "completions", "embeddings", "rerank", "responses", "messages"],
)
async def test_the_engine_receives_its_own_path_and_the_unchanged_body(start, path):
    world = await start()
    engine = await world.engine(says(b""))
    world.route("m", {"a": engine})
    wire = await world.client()
    body = b'{ "x":[1,{"y":null}] ,"model" : "m", "messages":null,"prompt":"\\u00e9" }'
    await wire.send(post(f"/openai/v1/{path}?api-version=1", body))
    assert (await wire.answer()).status == 200
    (got,) = engine.requests
    assert got.target == f"/v1/{path}?api-version=1"
    assert got.body == body


@pytest.mark.parametrize("size", [(1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5_000_000, 9_000_000])
async def test_a_large_body_arrives_unchanged(start, size):
    world = await start()
    engine = await world.engine(says(b""))
    world.route("m", {"a": engine})
    wire = await world.client()
    text = random.Random(size).randbytes(size // 2).hex()
    request = ask(messages=[{"role": "user", "content": text}])
    await wire.send(request)
    assert (await wire.answer()).status == 200
    (got,) = engine.requests
    assert request.endswith(got.body)
    assert json.loads(got.body)["messages"][0]["content"] == text


async def test_the_engine_receives_the_adapters_own_name(start):
    world = await start()
    plain = await world.engine(says(b"plain"))
    tuned = await world.engine(says(b"tuned"))
    world.route("m", {"a": plain, "b": (tuned, ["fin"])}, adapters=("fin",))
    wire = await world.client()
    for _ in range(4):
        await wire.send(post(CHAT, b'{"x": 1, "model": "m_fin", "y": {"model": "m_fin"}}'))
        assert (await wire.answer()).body == b"tuned"
    assert plain.requests == []
    assert tuned.requests[0].body == b'{"x": 1, "model": "fin", "y": {"model": "m_fin"}}'


# -- what is counted -------------------------------------------------------------------------------


async def test_a_request_is_in_flight_from_its_last_byte_to_the_end_of_its_response(start):
    world = await start()
    go_on = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"x"))
        await go_on.wait()
        await wire.send(b"0\r\n\r\n")

    world.route("m", {"a": await world.engine(script)})
    wire = await world.client()
    request = ask()
    await wire.send(request[:-1])
    await until(lambda: world.server.relay.exchanges == 1)
    assert (world.active("m"), world.in_flight("m")) == (0, 0)
    await wire.send(request[-1:])
    head = await wire.head()
    assert (world.active("m"), world.in_flight("m"), world.held("m")) == (1, 1, 0)
    assert world.endpoint_loads("m") == {"a": 1}
    go_on.set()
    await wire.body(head)
    await world.at_rest()


async def test_requests_are_spread_by_load(start):
    world = await start()
    both = asyncio.Barrier(4)

    async def script(wire: Wire, request: Message) -> None:
        await both.wait()
        await wire.send(answer())

    world.route("m", {name: await world.engine(script) for name in "abcd"})
    wires = [await world.client() for _ in range(4)]
    for wire in wires:
        await wire.send(ask())
    for wire in wires:
        assert (await wire.answer()).status == 200
    assert [len(engine.requests) for engine in world.engines.values()] == [1, 1, 1, 1]


@pytest.mark.parametrize(("budget", "spread"), [(3, False), (100, True)])
async def test_the_models_prefix_length_determines_the_hash_key(start, budget, spread):
    world = await start()
    engines = {name: await world.engine(says(b"")) for name in "abcdefgh"}
    world.route("m", engines, strategy="PrefixHash", prefix_char_length=budget)
    wire = await world.client()
    for number in range(20):
        await wire.send(ask(path="/openai/v1/completions", prompt=f"the {number}"))
        assert (await wire.answer()).status == 200
    used = [engine for engine in engines.values() if engine.requests]
    assert (len(used) > 1) is spread


async def test_a_hashed_request_sent_to_another_endpoint_is_logged_with_the_loads(start):
    world = await start()
    go_on = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        await go_on.wait()
        await wire.send(answer())

    world.route(
        "m",
        {name: await world.engine(script) for name in "abcd"},
        strategy="PrefixHash",
        mean_load_factor=100,
    )
    wires = [await world.client() for _ in range(12)]
    with capture_logs() as logs:
        for wire in wires:
            await wire.send(ask(messages=[{"role": "user", "content": "same"}]))
        await until(lambda: world.in_flight("m") == 12)
    go_on.set()
    for wire in wires:
        await wire.answer()
    moved = [entry for entry in logs if entry["event"] == "request moved off its first endpoint"]
    assert moved
    counts = sorted(len(engine.requests) for engine in world.engines.values())
    assert sum(counts) - counts[-1] == len(moved)
    for entry in moved:
        assert entry["model"] == "m"
        assert entry["endpoint"] != entry["first"]
        assert entry["first_load"] + entry["own_load"] > entry["bound"]
        assert entry["log_level"] == "info"


# -- held requests ---------------------------------------------------------------------------------


async def test_a_request_for_a_cold_model_is_held_until_it_is_ready(start):
    world = await start()
    engine = await world.engine(says(b"warm"))
    world.route("m", {})
    wires = [await world.client() for _ in range(5)]
    for wire in wires:
        await wire.send(ask())
    await until(lambda: world.held("m") == 5)
    assert world.active("m") == 5
    assert world.in_flight("m") == 0
    assert set(world.demanded) == {"m"}
    world.route("m", {"a": engine})
    for wire in wires:
        assert (await wire.answer()).body == b"warm"
    assert len(engine.requests) == 5


async def test_a_held_request_is_dropped_when_its_client_disconnects(start):
    world = await start()
    engine = await world.engine(says(b""))
    world.route("m", {})
    for leave in (Wire.close, Wire.reset):
        wire = await world.client()
        await wire.send(ask())
        await until(lambda: world.held("m") == 1)
        leave(wire)
        await until(lambda: world.held("m") == 0)
        await world.at_rest()
    world.route("m", {"a": engine})
    other = await world.client()
    await other.send(ask())
    await other.answer()
    assert len(engine.requests) == 1


async def test_the_wait_for_an_endpoint_times_out(start):
    world = await start(hold_timeout_s=0.05)
    world.route("m", {})
    wire = await world.client()
    await wire.send(ask())
    assert (await error_of(wire, 504))["type"] == "server_error"
    await wire.send(ask())
    await error_of(wire, 504)


async def test_the_number_of_held_requests_per_model_is_limited(start):
    world = await start(hold_max_requests=2)
    world.route("m", {})
    world.route("n", {})
    wires = [await world.client() for _ in range(2)]
    for wire in wires:
        await wire.send(ask())
    await until(lambda: world.held("m") == 2)
    third = await world.client()
    await third.send(ask())
    answered = await third.answer()
    assert answered.status == 503
    assert int(answered.one("retry-after")) > 0
    await third.send(ask("n"))
    await until(lambda: world.held("n") == 1)
    world.route("m", {"a": await world.engine(says(b""))})
    for wire in wires:
        assert (await wire.answer()).status == 200


async def test_deleting_a_model_ends_the_wait(start):
    world = await start()
    world.route("m", {})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: world.held("m") == 1)
    world.unroute("m")
    assert (await error_of(wire, 404))["code"] == "model_not_found"


async def test_a_request_for_an_adapter_waits_for_an_endpoint_that_has_it(start):
    world = await start()
    engine = await world.engine(says(b""))
    world.route("m", {"a": engine}, adapters=("fin",))
    wire = await world.client()
    await wire.send(ask("m_fin"))
    await until(lambda: world.held("m") == 1)
    world.route("m", {"a": (engine, ["fin"])}, adapters=("fin",))
    assert (await wire.answer()).status == 200
    assert json.loads(engine.requests[0].body)["model"] == "fin"


# -- counts ----------------------------------------------------------------------------------------


async def test_outcomes_are_counted(start):
    world = await start(retries=1, eject_after_failures=0)
    script = {"value": says(b"good")}
    engine = await world.engine(lambda wire, request: script["value"](wire, request))
    world.route("m", {"a": engine})
    wire = await world.client()
    for each in (says(b""), failing(404), failing(503)):
        script["value"] = each
        await wire.send(ask())
        await wire.answer()
    await wire.send(ask("other"))
    await wire.answer()

    async def waits(wire: Wire, request: Message) -> None:
        await wire.reader.read()

    script["value"] = waits
    await wire.send(ask())
    await until(lambda: world.in_flight("m") == 1)
    wire.close()
    await world.at_rest()
    counted = {name: count for name, count in world.outcomes("m").items() if count}
    assert counted == {"2xx": 1, "4xx": 1, "5xx": 1, "retried": 1, "left": 1}


async def test_there_is_no_retry_after_the_first_byte(start):
    world = await start()

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED)
        wire.close()

    bad = await world.engine(script)
    good = await world.engine(says(b"good"))
    world.route("m", {"a": bad})
    wire = await world.client()
    await wire.send(ask())
    head = await wire.head()
    world.route("m", {"a": bad, "b": good})
    with pytest.raises(Broken):
        await wire.body(head)
    assert good.requests == []


async def test_a_first_byte_timeout_is_a_504_and_not_retried(start):
    world = await start(first_byte_timeout_s=0.5)  # long enough for the request to reach an engine

    async def script(wire: Wire, request: Message) -> None:
        await wire.reader.read()

    engines = {name: await world.engine(script) for name in "ab"}
    world.route("m", engines)
    wire = await world.client()
    await wire.send(ask())
    await error_of(wire, 504)
    assert sum(len(engine.requests) for engine in engines.values()) == 1
    await until(lambda: not any(engine.open for engine in engines.values()))


async def test_connecting_times_out(start):
    world = await start(connect_timeout_s=0.05, retries=0)
    # A listener whose backlog is full does not respond to a SYN.
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = []
        for _ in range(3):
            each = socket.socket()
            each.setblocking(False)
            each.connect_ex(full.getsockname())
            waiting.append(each)
        world.route("m", {"a": "{}:{}".format(*full.getsockname())})
        wire = await world.client()
        await wire.send(ask())
        await error_of(wire, 502)
        for each in waiting:
            each.close()


async def test_a_client_may_disconnect_while_connecting(start):
    world = await start()
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = []
        for _ in range(3):
            each = socket.socket()
            each.setblocking(False)
            each.connect_ex(full.getsockname())
            waiting.append(each)
        world.route("m", {"a": "{}:{}".format(*full.getsockname())})
        wire = await world.client()
        await wire.send(ask())
        await until(lambda: world.in_flight("m") == 1)
        wire.reset()
        await world.at_rest()
        for each in waiting:
            each.close()


async def test_connections_to_a_removed_endpoint_are_closed(start):
    world = await start()
    engine = await world.engine(says(b""))
    world.route("m", {"a": engine})
    wire = await world.client()
    await wire.send(ask())
    await wire.answer()
    assert len(engine.open) == 1
    world.route("m", {})
    await until(lambda: not engine.open)


async def test_an_exception_in_the_gateway_fails_one_request_only(start, monkeypatch):
    world = await start()
    world.route("m", {"a": await world.engine(says(b"fine"))})
    wire = await world.client()
    with monkeypatch.context() as patch:
        patch.setattr(world.table, "find", lambda *_: 1 / 0)
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        await wire.send(ask("m", "X-Label-Selector: a=b"))
        assert (await error_of(wire, 500))["type"] == "server_error"
        assert await wire.ended() is False
    other = await world.client()
    await other.send(ask())
    assert (await other.answer()).body == b"fine"
