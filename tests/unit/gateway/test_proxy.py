"""Which engine gets a request, how often, and what is counted meanwhile."""

import asyncio
import itertools
import json
import random
import socket
import threading
import time

import pytest
import uvloop
from fakes.wire import (
    CHUNKED,
    WAIT_S,
    Broken,
    Engine,
    Message,
    Script,
    Wire,
    answer,
    chunk,
    post,
    says,
    until,
)
from fakes.world import World
from structlog.testing import capture_logs

from kubeai.gateway.health import TRUST_ANSWERS
from kubeai.openai import request as openai

CHAT = "/openai/v1/chat/completions"

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers


@pytest.fixture
async def start():
    worlds = []

    async def start(**config) -> World:
        worlds.append(await World.start(**config))
        return worlds[-1]

    yield start
    for world in worlds:
        await world.close()


def ask(model: str = "m", *headers: str, path: str = CHAT, **fields: object) -> bytes:
    return post(path, json.dumps({"model": model, **fields}).encode(), *headers)


async def error_of(wire: Wire, status: int) -> dict:
    answered = await wire.answer()
    assert answered.status == status, answered
    assert answered.one("content-type") == "application/json"
    error = json.loads(answered.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def naming(name: str):
    return says(name.encode())


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


# -- large bodies, which are parsed in a thread ----------------------------------------------------

LARGE = b'{"model":"%s","x":"' + b"x" * openai.LARGE_BYTES + b'"}'


class Slow:
    """Stands in for a slow function of openai.py: it returns when the test lets it."""

    def __init__(self, monkeypatch, name: str) -> None:
        self._real = getattr(openai, name)
        self.begun, self.may_end = threading.Event(), threading.Event()
        monkeypatch.setattr(openai, name, self)

    def __call__(self, *args):
        self.begun.set()
        assert self.may_end.wait(5)
        return self._real(*args)


@pytest.mark.parametrize("path", [CHAT, CHAT + "?a=b"])
async def test_a_large_body_is_parsed_like_a_small_one(start, path):
    world = await start()
    plain, tuned = await world.engine(says(b"plain")), await world.engine(says(b"tuned"))
    world.route("m", {"a": plain, "b": (tuned, ["fin"])}, adapters=("fin",))
    wire = await world.client()
    await wire.send(post(path, LARGE % b"m_fin"))
    assert (await wire.answer()).body == b"tuned"
    assert tuned.requests[0].body == LARGE % b"fin"
    for body, status, param in (
        (LARGE % b"m_other", 404, "model"),
        (LARGE % b"other", 404, "model"),
        (LARGE % b'm","model":"m', 400, "model"),
        (LARGE % b'm","Model":"m', 400, "model"),
        (LARGE % b"", 400, "model"),
        (LARGE.replace(b'"%s"', b"1"), 400, "model"),
        (LARGE.replace(b"model", b"other") % b"", 400, "model"),
        (LARGE % b"m" + b"x", 400, None),
        (LARGE % b"m\xff", 400, None),
        (b"[" + LARGE % b"m" + b"]", 400, None),
        (b'{"a":' + b"[" * openai.LARGE_BYTES, 400, None),
        (b"{" + b'"a":1,' * openai.LARGE_BYTES, 400, None),
    ):
        await wire.send(post(path, body))
        error = await error_of(wire, status)
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
    await wire.send(post(path, LARGE % b"m"))
    assert (await wire.answer()).status == 200
    assert len(plain.requests) + len(tuned.requests) == 2


async def test_a_conversation_keeps_its_endpoint_as_it_becomes_large(start):
    world = await start()
    engines = {name: await world.engine(says(b"")) for name in "abcdefgh"}
    world.route("m", engines, strategy="PrefixHash")
    wire = await world.client()
    first = {"role": "user", "content": "same"}
    for size in (1, 1000, openai.LARGE_BYTES, 2 * openai.LARGE_BYTES):
        await wire.send(ask(messages=[first, {"role": "user", "content": "x" * size}]))
        assert (await wire.answer()).status == 200
    assert sorted(len(engine.requests) for engine in engines.values())[-2:] == [0, 4]


async def test_other_requests_proceed_while_a_large_body_is_parsed(start, monkeypatch):
    world = await start()
    world.route("m", {"a": await world.engine(says(b"fine"))})
    slow = Slow(monkeypatch, "read")
    wire, other = await world.client(), await world.client()
    await wire.send(post(CHAT, LARGE % b"m"))
    await until(slow.begun.is_set)
    await other.send(ask())
    assert (await other.answer()).body == b"fine"
    assert world.active("m") == 0
    slow.may_end.set()
    assert (await wire.answer()).body == b"fine"


@pytest.mark.parametrize("during", ["read", "key_of", "body_for"])
async def test_a_client_may_disconnect_while_its_large_body_is_parsed(start, monkeypatch, during):
    world = await start()
    engine = await world.engine(says(b""))
    world.route("m", {"a": engine})
    slow = Slow(monkeypatch, during)
    wire = await world.client()
    await wire.send(post(CHAT, LARGE % b"m"))
    await until(slow.begun.is_set)
    wire.close()
    await world.at_rest()
    slow.may_end.set()
    await asyncio.sleep(0.05)
    assert engine.requests == []
    await world.at_rest()


async def test_a_model_may_be_deleted_or_recreated_while_a_large_body_is_parsed(start, monkeypatch):
    world = await start()
    world.route("m", {"a": await world.engine(says(b"old"))})
    for recreated in (False, True):
        slow = Slow(monkeypatch, "key_of")
        wire = await world.client()
        await wire.send(post(CHAT, LARGE % b"m"))
        await until(slow.begun.is_set)
        world.unroute("m")
        if recreated:
            world.route("m", {"a": await world.engine(says(b"new"))})
        slow.may_end.set()
        if recreated:
            assert (await wire.answer()).body == b"new"
        else:
            await error_of(wire, 404)
            world.route("m", {"a": await world.engine(says(b"other"))})


async def test_a_large_body_for_a_cold_model_is_held(start):
    world = await start()
    world.route("m", {})
    wire = await world.client()
    await wire.send(post(CHAT, LARGE % b"m"))
    await until(lambda: world.held("m") == 1)
    assert world.demanded == ["m"]
    world.route("m", {"a": await world.engine(says(b"warm"))})
    assert (await wire.answer()).body == b"warm"


async def test_an_exception_in_the_parsing_thread_fails_one_request(start, monkeypatch):
    world = await start()
    world.route("m", {"a": await world.engine(says(b"fine"))})
    wire = await world.client()
    with monkeypatch.context() as patch:
        patch.setattr(openai, "read", lambda *_: 1 / 0)
        await wire.send(post(CHAT, LARGE % b"m"))
        assert (await error_of(wire, 500))["type"] == "server_error"
    await wire.send(post(CHAT, LARGE % b"m"))
    assert (await wire.answer()).body == b"fine"


@pytest.mark.parametrize("piece", [1_000, 300_000, 3_000_000])
async def test_a_large_chunked_body_arrives_complete(start, piece):
    world = await start()
    engine = await world.engine(says(b""))
    world.route("m", {"a": engine})
    wire = await world.client()
    text = random.Random(piece).randbytes(3_500_000).hex().encode()
    body = b'{"model":"m","x":"%s"}' % text
    chunks = [chunk(body[at : at + piece]) for at in range(0, len(body), piece)]
    for _ in range(2):
        await wire.send(
            b"POST %s HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode()
            + b"".join(chunks)
            + b"0\r\n\r\n"
        )
        assert (await wire.answer()).status == 200
    assert [got.body for got in engine.requests] == [body, body]


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
        assert entry["first_load"] + 1 > entry["bound"]
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


# -- retries ---------------------------------------------------------------------------------------


def failing(status: int):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(status, b"failed", reason="Bad"))

    return script


async def lose(wire: Wire, request: Message) -> None:
    wire.close()


async def reset(wire: Wire, request: Message) -> None:
    wire.reset()


async def nonsense(wire: Wire, request: Message) -> None:
    await wire.send(b"nonsense\r\n\r\n")


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
        assert (await error_of(wire, 502))["code"] == "engine_died"
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


# -- health ----------------------------------------------------------------------------------------


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


# -- requests that wait for the first byte of an answer --------------------------------------------


async def hang(wire: Wire, request: Message) -> None:
    await wire.reader.read()


async def test_a_waiting_request_moves_when_its_endpoint_leaves_the_routes(start):
    world = await start()
    hung, good = await world.engine(hang), await world.engine(says(b"good"))
    world.route("m", {"a": hung})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: hung.requests)
    world.route("m", {"b": good})
    assert (await wire.answer()).body == b"good"
    assert world.outcomes("m")["retried"] == 1
    await until(lambda: not hung.open, "the engine's connection is closed")


async def test_a_waiting_request_moves_to_an_endpoint_added_later(start):
    world = await start()
    hung, good = await world.engine(hang), await world.engine(says(b"good"))
    world.route("m", {"a": hung})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: hung.requests)
    world.route("m", {})
    await asyncio.sleep(0)
    assert world.in_flight("m") == 1, "it still waits there: its engine may yet respond"
    world.route("m", {"b": good})
    assert (await wire.answer()).body == b"good"


async def test_a_waiting_request_stays_while_its_endpoint_drains(start):
    world = await start()
    answers = asyncio.Event()

    async def slow(wire: Wire, request: Message) -> None:
        await answers.wait()
        await wire.send(answer(200, b"slow"))

    draining, good = await world.engine(slow), await world.engine(says(b"good"))
    world.route("m", {"a": draining})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: draining.requests)
    world.route("m", {"b": good}, draining=("a",))
    world.route("m", {"b": good}, draining=("a",), owner="another change")
    answers.set()
    assert (await wire.answer()).body == b"slow"


async def test_a_waiting_request_stays_when_its_endpoint_is_taken_back_from_a_drain(start):
    world = await start()
    answers = asyncio.Event()

    async def slow(wire: Wire, request: Message) -> None:
        await answers.wait()
        await wire.send(answer(200, b"slow"))

    slow_engine, good = await world.engine(slow), await world.engine(says(b"good"))
    world.route("m", {"a": slow_engine})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: slow_engine.requests)
    world.route("m", {"b": good}, draining=("a",))
    world.route("m", {"a": slow_engine, "b": good})
    answers.set()
    assert (await wire.answer()).body == b"slow"
    assert len(slow_engine.requests) == 1


async def test_a_waiting_request_moves_if_its_endpoint_disappears_during_its_drain(start):
    world = await start()
    hung, good = await world.engine(hang), await world.engine(says(b"good"))
    world.route("m", {"a": hung})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: hung.requests)
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

    async def slow(wire: Wire, request: Message) -> None:
        await answers.wait()
        await wire.send(answer(200, b"slow"))

    engine = await world.engine(slow)
    world.route("m", {"a": engine})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: engine.requests)
    world.route("m", {})  # it is not ready
    world.route("m", {"a": engine, "b": await world.engine(says(b"other"))})
    answers.set()
    assert (await wire.answer()).body == b"slow"
    assert len(engine.requests) == 1


async def test_a_request_moves_off_a_pod_that_comes_back_and_leaves_for_good(start):
    world = await start()
    hung, good = await world.engine(hang), await world.engine(says(b"good"))
    world.route("m", {"a": hung})
    wire = await world.client()
    await wire.send(ask())
    await until(lambda: hung.requests)
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
        await wire.send(ask())
        assert (await error_of(wire, 500))["type"] == "server_error"
        assert await wire.ended() is False
    other = await world.client()
    await other.send(ask())
    assert (await other.answer()).body == b"fine"


# -- draining --------------------------------------------------------------------------------------


def slow_until(go_on: asyncio.Event) -> Script:
    """Respond at once, except to a slow request: in two parts, the second on a signal."""

    async def script(wire: Wire, request: Message) -> None:
        if b"slow" in request.body:
            await wire.send(CHUNKED + chunk(b"1"))
            await go_on.wait()
            await wire.send(chunk(b"2") + b"0\r\n\r\n")
        else:
            await wire.send(answer(200, b"quick"))

    return script


async def test_draining_serves_new_requests_then_closes_and_finishes_open_ones(start):
    world = await start()
    go_on = asyncio.Event()
    world.route("m", {"a": await world.engine(slow_until(go_on))})
    world.route("cold", {})
    streaming = await world.client()
    await streaming.send(ask(slow=1))
    head = await streaming.head()
    held = await world.client()
    await held.send(ask("cold"))
    await until(lambda: world.held("cold") == 1)
    idle = await world.client()
    await idle.send(ask())
    assert (await idle.answer()).one("connection") is None
    silent = await world.client()
    await until(lambda: world.server.relay.connections == 4)

    drained = asyncio.create_task(world.server.drain(accept_s=1.0, timeout_s=5))
    await until(lambda: world.context.draining)
    new = await world.client()
    await new.send(ask())
    answered = await new.answer()
    assert (answered.body, answered.one("connection")) == (b"quick", "close")
    assert await new.ended() is False

    assert await idle.ended() is False
    assert await silent.ended() is False
    with pytest.raises(ConnectionError):
        await world.client()
    assert not drained.done()
    go_on.set()
    assert (await streaming.body(head)).body == b"12"
    assert await streaming.ended() is False
    world.route("cold", {"c": await world.engine(says(b"warm"))})
    answered = await held.answer()
    assert (answered.body, answered.one("connection")) == (b"warm", "close")
    await drained


async def test_a_keep_alive_connection_accepts_one_more_request_while_draining(start):
    """The response's head announced no close, so its client may send another request."""
    world = await start()
    go_on = asyncio.Event()
    world.route("m", {"a": await world.engine(slow_until(go_on))})
    wire = await world.client()
    await wire.send(ask(slow=1))
    head = await wire.head()
    fresh = await world.client()
    await fresh.send(ask())
    assert (await fresh.answer()).one("connection") is None
    drained = asyncio.create_task(world.server.drain(accept_s=0, timeout_s=5))
    await until(lambda: world.server.relay.draining)
    while await listens(world):
        pass
    go_on.set()
    assert (await wire.body(head)).body == b"12"
    for one in (wire, fresh):
        await one.send(ask())
        answered = await one.answer()
        assert (answered.body, answered.one("connection")) == (b"quick", "close")
        assert await one.ended() is False
    await drained


async def listens(world) -> bool:
    try:
        (await world.client()).close()
    except ConnectionError:
        return False
    return True


async def test_draining_times_out(start):
    world = await start()

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED)
        await wire.reader.read()

    world.route("m", {"a": await world.engine(script)})
    wire = await world.client()
    await wire.send(ask())
    head = await wire.head()
    await world.server.drain(accept_s=0, timeout_s=0.05)
    world.server.close()
    with pytest.raises(Broken):
        await wire.body(head)


# -- chaos -----------------------------------------------------------------------------------------


class Chaos:
    """Clients and engines that close, reset, stall and fail at random, reproducibly by seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.answered = 0

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def end(self, wire: Wire) -> None:
        self.random.choice([wire.close, wire.reset])()

    async def engine(self, wire: Wire, request: Message) -> None:
        what = self.random.randrange(12)
        if what == 0:
            self.end(wire)
        elif what == 1:
            await wire.send(answer(self.random.choice([500, 503, 404]), b"failed"))
        elif what == 2:
            await wire.send(b"HTTP/1.1 200")
            self.end(wire)
        elif what == 3:
            await wire.reader.read()  # sends nothing
        elif what == 4:
            await wire.send(b"HTTP/1.1 200 OK\r\n\r\nsome")
            self.end(wire)
        elif what < 8:
            await wire.send(answer(200, b"y" * self.random.randrange(200_000)))
        else:
            await wire.send(CHUNKED)
            for _ in range(self.random.randrange(10)):
                await wire.send(chunk(b"z" * self.random.randrange(1, 20_000)))
                if self.chance(0.05):
                    return self.end(wire)
                await asyncio.sleep(0)
            await wire.send(b"0\r\n\r\n")
        return None

    def request(self) -> bytes:
        what = self.random.randrange(10)
        if what == 0:
            return b"GET /page HTTP/1.1\r\nHost: h\r\n\r\n"
        if what == 1:
            upload = b"POST /page HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n"
            return upload + chunk(b"s" * 30_000) + b"0\r\n\r\n"
        model = self.random.choice(["m", "m", "m", "m", "cold", "none"])
        request = ask(model, prompt="q" * self.random.randrange(100_000))
        return request * 2 if what == 2 else request

    async def client(self, world: World) -> None:
        for _ in range(15):
            wire = await world.client()
            try:
                while await self.exchange(wire):
                    pass
            except (Broken, ConnectionError):
                pass
            self.end(wire)

    async def exchange(self, wire: Wire) -> bool:
        request = self.request()
        if self.chance(0.2):
            await wire.send(request[: self.random.randrange(len(request))])
            await asyncio.sleep(self.random.random() * 0.01)
            return False
        await wire.send(request)
        if self.chance(0.15):
            await asyncio.sleep(self.random.random() * 0.01)
            return False
        head = await wire.head()
        if self.chance(0.1):
            return False
        await wire.body(head, until_close=True)
        self.answered += 1
        return self.chance(0.6)


@pytest.mark.parametrize("seed", range(3))
async def test_every_count_returns_to_zero_after_random_failures(start, seed):
    short = 0.15
    world = await start(
        hold_timeout_s=short,
        head_timeout_s=short,
        body_timeout_s=short,
        first_byte_timeout_s=short,
        between_bytes_timeout_s=short,
    )
    chaos = Chaos(seed)
    engines = {name: await world.engine(chaos.engine) for name in "abcd"}
    world.route("m", engines, strategy="PrefixHash" if seed else "LeastLoad")
    world.route("cold", {})
    await asyncio.gather(*(chaos.client(world) for _ in range(16)))
    assert chaos.answered > 100
    await world.at_rest()
