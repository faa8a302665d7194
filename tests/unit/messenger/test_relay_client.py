"""Requests of the messenger, through a real server in this process."""

import asyncio
import errno
import json

import pytest
import uvloop
from fakes.wire import CHUNKED, answer, chunk, says, until
from fakes.world import World

from kubeai.messenger import relay_client
from kubeai.messenger.message import NULL, Request
from kubeai.messenger.relay_client import Overloaded, RelayClient

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the messenger


class Gate:
    """Notes what it is told. Lets requests go on once ``open`` is set."""

    def __init__(self, *, is_open=True):
        self.told = []
        self.open = asyncio.Event()
        if is_open:
            self.open.set()

    def on_hold(self):
        self.told.append("hold")

    async def on_endpoint(self):
        self.told.append("endpoint")
        await self.open.wait()


@pytest.fixture
async def start():
    worlds = {}

    async def start(**config):
        world = await World.start(**config)
        worlds[world] = RelayClient(world.server)
        world.context.request_type = "message"
        world.context.hold_watcher = worlds[world]
        return world

    yield start
    for world, client in worlds.items():
        await world.close()
        assert not client._gates


def request(model="m", path="/v1/completions", prompt="hi", **headers):
    body = json.dumps({"model": model, "prompt": prompt}).encode()
    return Request(NULL, path, body, {k.replace("_", "-"): v for k, v in headers.items()})


async def send(world, asked=None, gate=None, request_id="id-1"):
    async with asyncio.timeout(5):
        return await world.context.hold_watcher.send(request_id, asked or request(), gate or Gate())


def sending(*arguments, **named):
    return asyncio.create_task(send(*arguments, **named))


def active(world, kind):
    return world.loads.active(world.publisher.row("m"), kind)


async def test_a_request_takes_the_gateways_path_to_an_engine(start):
    world = await start()
    engine = await world.engine(says(b'{"ok":1}'))
    world.route("m", {"pod": engine})
    got = await send(world)
    assert (got.status, got.body) == (200, b'{"ok":1}')
    (message,) = engine.requests
    assert message.body == request().body
    assert message.one("x-request-id") == "id-1"
    assert message.one("content-type") == "application/json"
    assert world.outcomes("m")["2xx"] == 1


@pytest.mark.parametrize("prompt", ["hi", "x" * (1 << 20)], ids=["small", "large"])
async def test_it_is_counted_as_a_message(start, prompt):
    """Small bodies take the fast path; large ones are read in a task."""
    world = await start()
    counts = []

    async def script(wire, message):
        counts.append((active(world, "http"), active(world, "message")))
        await wire.send(answer())

    world.route("m", {"pod": await world.engine(script)})
    await send(world, request(prompt=prompt))
    assert counts == [(0, 1)]


async def test_headers_and_query_are_passed_on(start):
    world = await start()
    engine = await world.engine(says(b"{}"))
    world.route("m", {"pod": engine}, labels={"tier": "batch"})
    asked = request(path="/v1/completions?a=b", x_label_selector="tier=batch", traceparent="00-x")
    assert (await send(world, asked)).status == 200
    assert engine.requests[0].target == "/v1/completions?a=b"
    assert engine.requests[0].one("traceparent") == "00-x"
    assert (await send(world, request(x_label_selector="tier=other"))).status == 404


async def test_an_adapters_name_is_replaced(start):
    world = await start()

    async def script(wire, message):
        await wire.send(answer(200, b'{"model":"fin"}', "Content-Type: application/json"))

    engine = await world.engine(script)
    world.route("m", {"pod": (engine, ["fin"])}, adapters=("fin",))
    assert (await send(world, request("m_fin"))).body == b'{"model":"m_fin"}'
    assert json.loads(engine.requests[0].body)["model"] == "fin"


async def test_an_unknown_model_is_a_404_in_json(start):
    got = await send(await start(), request("nope"))
    assert got.status == 404
    assert json.loads(got.body)["error"]["code"] == "model_not_found"


async def test_the_gateways_retries_apply(start):
    world = await start()

    async def broken(wire, message):
        wire.close()

    world.route("m", {"a": await world.engine(broken), "b": await world.engine(says(b"{}"))})
    answers = [await send(world) for _ in range(4)]
    assert [got.status for got in answers] == [200] * 4


async def test_the_gateways_limit_on_bodies_applies(start):
    world = await start(body_max_bytes=1000)
    world.route("m", {"pod": await world.engine(says(b"{}"))})
    assert (await send(world, request(prompt="x" * 2000))).status == 413


@pytest.mark.parametrize("mib", [1, 8])
async def test_a_body_beyond_the_limit_is_a_413_even_if_most_of_it_was_not_read(start, mib):
    world = await start(body_max_bytes=1000)
    assert (await send(world, request(prompt="x" * (mib << 20)))).status == 413


async def test_a_request_for_which_the_gateway_has_no_connection_left_was_not_sent(start):
    world = await start(connections_max=1)
    world.route("m", {"pod": await world.engine(lambda wire, message: asyncio.sleep(60))})
    first = sending(world)
    await until(lambda: active(world, "message") == 1)
    with pytest.raises(Overloaded) as caught:
        await send(world, request_id="id-2")
    assert caught.value.answer.status == 503
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_a_request_that_the_gateway_cannot_buffer_was_not_sent(start):
    world = await start(buffer_max_bytes=300_000)
    world.route("m", {})
    first = sending(world, request(prompt="x" * 200_000))
    await until(lambda: world.held("m") == 1)
    with pytest.raises(Overloaded):
        await send(world, request(prompt="x" * 200_000), request_id="id-2")
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


async def test_an_engines_503_is_an_answer(start):
    world = await start(retries=0)

    async def script(wire, message):
        await wire.send(answer(503, b"{}", "Connection: close"))
        wire.close()

    world.route("m", {"pod": await world.engine(script)})
    assert (await send(world)).status == 503


async def test_a_request_that_cannot_connect_was_not_sent(start, monkeypatch):
    world = await start()

    async def connect(_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(world.server, "connect", connect)
    with pytest.raises(Overloaded) as caught:
        await send(world)
    assert b"Too many open files" in caught.value.answer.body


async def test_the_engine_is_asked_for_a_response_without_compression(start):
    world = await start()
    engine = await world.engine(says(b"{}"))
    world.route("m", {"pod": engine})
    await send(world)
    assert engine.requests[0].one("accept-encoding") == "identity"


async def test_a_response_in_chunks_is_collected(start):
    world = await start()

    async def script(wire, message):
        await wire.send(CHUNKED, *(chunk(b"%d," % i) for i in range(100)), b"0\r\n\r\n")

    world.route("m", {"pod": await world.engine(script)})
    got = await send(world)
    assert got.body == b"".join(b"%d," % i for i in range(100))
    assert got.headers["content-type"] == "text/event-stream"


async def test_a_response_that_is_cut_off_is_a_502(start):
    world = await start()

    async def script(wire, message):
        await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        wire.close()

    world.route("m", {"pod": await world.engine(script)})
    got = await send(world)
    assert got.status == 502
    assert json.loads(got.body)["error"]["code"] == "bad_gateway"


async def test_a_response_has_a_limit(start, monkeypatch):
    monkeypatch.setattr(relay_client, "RESPONSE_MAX_BYTES", 1000)
    world = await start()
    world.route("m", {"pod": await world.engine(says(b"x" * 2000))})
    got = await send(world)
    assert got.status == 502
    assert json.loads(got.body)["error"]["code"] == "response_too_large"


async def test_the_gate_is_told_of_a_hold_and_of_its_end(start):
    world = await start()
    world.route("m", {})
    gate = Gate(is_open=False)
    task = sending(world, gate=gate)
    await until(lambda: gate.told == ["hold"])
    assert active(world, "message") == 1
    assert world.demanded == ["m"]
    engine = await world.engine(says(b"{}"))
    world.route("m", {"pod": engine})
    await until(lambda: gate.told == ["hold", "endpoint"])
    assert engine.requests == []
    gate.open.set()
    assert (await task).status == 200


async def test_an_endpoint_that_goes_away_before_the_gate_opens_leads_to_another_hold(start):
    world = await start()
    world.route("m", {})
    gate = Gate(is_open=False)
    task = sending(world, gate=gate)
    await until(lambda: gate.told == ["hold"])
    engine = await world.engine(says(b"{}"))
    world.route("m", {"pod": engine})
    await until(lambda: len(gate.told) == 2)
    world.route("m", {})
    gate.open.set()
    await until(lambda: gate.told == ["hold", "endpoint", "hold"])
    world.route("m", {"pod": engine})
    assert (await task).status == 200


async def test_a_hold_that_ends_in_time_out_or_block_was_announced(start):
    world = await start(hold_timeout_s=0.05)
    world.route("m", {})
    gate = Gate()
    got = await send(world, gate=gate)
    assert (got.status, gate.told) == (504, ["hold"])


async def test_a_cancellation_ends_the_request_at_the_engine(start):
    world = await start()
    engine = await world.engine(lambda wire, message: asyncio.sleep(60))
    world.route("m", {"pod": engine})
    task = sending(world)
    await until(lambda: engine.requests)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await world.at_rest()


async def test_a_message_for_a_saturated_model_keeps_its_handler_while_it_waits(start):
    """So a stream takes no more messages from its broker than it has handlers."""
    world = await start()
    answering = asyncio.Event()

    async def script(wire, message):
        await answering.wait()
        await wire.send(answer())

    world.route("m", {"pod": await world.engine(script)}, capacity=1)
    gates = [Gate(), Gate()]
    tasks = [sending(world, gate=gate, request_id=f"id-{n}") for n, gate in enumerate(gates)]
    await until(lambda: world.held("m") == 1)
    answering.set()
    assert [(await task).status for task in tasks] == [200, 200]
    assert [gate.told for gate in gates] == [[], []]


async def test_messages_held_for_a_cold_model_wait_for_places_too(start):
    world = await start()
    most = []

    async def script(wire, message):
        most.append(world.in_flight("m"))
        await wire.send(answer())

    world.route("m", {}, capacity=1)
    tasks = [sending(world, request_id=f"id-{n}") for n in range(3)]
    await until(lambda: world.held("m") == 3)
    world.route("m", {"pod": await world.engine(script)}, capacity=1)
    assert [(await task).status for task in tasks] == [200] * 3
    assert most == [1, 1, 1]


async def test_a_cancellation_ends_a_hold(start):
    world = await start()
    world.route("m", {})
    gate = Gate(is_open=False)
    task = sending(world, gate=gate)
    await until(lambda: world.held("m") == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await world.at_rest()


async def test_the_connection_is_closed_after_each_request(start):
    world = await start()
    world.route("m", {"pod": await world.engine(says(b"{}"))})
    for _ in range(3):
        await send(world)
    await until(lambda: world.server.relay.connections == 0)
