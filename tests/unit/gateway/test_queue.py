"""Requests of a saturated model: they wait in the gateway, in the order of priority and tenant."""

from __future__ import annotations

import asyncio
import json

import pytest
import uvloop
from fakes.chats import CHAT, ask, error_of, failing
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, post, until

from kubeai.api.config.system import QueueConfig

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
TENANT = "X-Gateway-Inference-Fairness-ID"
OBJECTIVE = "X-Gateway-Inference-Objective"
QUEUE = QueueConfig(objectives={"batch": -10, "urgent": 10})

LONG = b'{"usage":{"prompt_tokens":9,"total_tokens":2009,"completion_tokens":2000}}'


class Busy:
    """An engine that answers when the test says so, in the order in which requests came."""

    def __init__(self):
        self.came: list[Message] = []
        self._left: list[asyncio.Event] = []

    async def __call__(self, wire: Wire, request: Message) -> None:
        done = asyncio.Event()
        self.came.append(request)
        self._left.append(done)
        await done.wait()
        body = LONG if request.one(TENANT) == "talks" else b"ok"
        await wire.send(answer(200, body))

    async def finish_one(self):
        """Answer the oldest request; return once it and the next one are there."""
        came = len(self.came)
        self._left.pop(0).set()
        return came

    async def serve_all(self, count: int) -> list[str]:
        """The tenants in the order in which their requests came."""
        while len(self.came) < count:
            came = await self.finish_one()
            await until(lambda came=came: len(self.came) > came, "the next request has come")
        for done in self._left:
            done.set()
        return [request.one(TENANT) or "-" for request in self.came]


@pytest.fixture
async def busy(start):
    async def make(capacity=1, **config):
        world = await start(**{"hold_comment_after_s": 0.0, **config})
        engine = Busy()
        world.route("m", {"a": await world.engine(engine)}, capacity=capacity)
        return world, engine

    return make


async def send(world, request: bytes, held: int) -> Wire:
    """Send a request; return once this number of requests is held."""
    wire = await world.client()
    await wire.send(request)
    await until(lambda: world.held("m") == held, f"{held} are held")
    return wire


async def test_a_full_model_holds_requests_and_the_answer_says_how_long_they_waited(busy):
    world, engine = await busy(capacity=2)
    wires = [await send(world, ask(), held) for held in (0, 0, 1, 2)]
    await until(lambda: len(engine.came) == 2)
    assert world.in_flight("m") == 2
    assert world.active("m") == 4  # what the autoscaler sees
    assert world.demanded == []  # it has a replica
    await engine.serve_all(4)
    answers = [await wire.answer() for wire in wires]
    assert [each.status for each in answers] == [200] * 4
    assert [each.one("x-kubeai-waited") is not None for each in answers] == [False] * 2 + [True] * 2


async def test_without_a_capacity_nothing_is_held(busy):
    world, engine = await busy(capacity=0)
    wires = [await send(world, ask(), 0) for _ in range(20)]
    await until(lambda: len(engine.came) == 20)
    await engine.serve_all(20)
    for wire in wires:
        assert (await wire.answer()).one("x-kubeai-waited") is None


async def test_tenants_named_by_llm_ds_header_take_turns(busy):
    world, engine = await busy()
    wires = [await send(world, ask("m", f"{TENANT}: many"), held) for held in range(6)]
    wires.append(await send(world, ask("m", f"{TENANT}: one"), 6))
    tenants = await engine.serve_all(7)
    assert tenants.index("one") == 1  # after the request that was being served
    for wire in wires:
        assert (await wire.answer()).status == 200


async def test_a_tenant_pays_for_the_output_that_its_engine_reports(busy):
    world, engine = await busy()
    tenants = ["talks", "talks", "brief", "brief", "brief"]
    wires = [
        await send(world, ask("m", f"{TENANT}: {tenant}"), held)
        for held, tenant in enumerate(tenants)
    ]
    assert await engine.serve_all(5) == ["talks", "brief", "brief", "brief", "talks"]
    for wire in wires:
        assert (await wire.answer()).status == 200


async def test_llm_ds_objectives_are_priorities(busy):
    world, engine = await busy(queue=QUEUE)
    lines = ["batch", "none such", "urgent"]
    wires = [await send(world, ask("m", f"{TENANT}: first"), 0)]
    for held, name in enumerate(lines, 1):
        wires.append(await send(world, ask("m", f"{TENANT}: {name}", f"{OBJECTIVE}: {name}"), held))
    assert await engine.serve_all(4) == ["first", "urgent", "none such", "batch"]
    for wire in wires:
        assert (await wire.answer()).status == 200


async def test_a_full_queue_refuses_the_newest_of_the_lowest_priority_with_429(busy):
    world, engine = await busy(hold_max_requests=2, queue=QUEUE)
    wires = [await send(world, ask("m"), 0)]
    old = await send(world, ask("m", f"{OBJECTIVE}: batch"), 1)
    new = await send(world, ask("m", f"{OBJECTIVE}: batch"), 2)
    wires.append(await send(world, ask("m", f"{OBJECTIVE}: urgent"), 2))
    refused = await new.answer()
    assert refused.status == 429
    assert int(refused.one("retry-after")) > 0
    error = json.loads(refused.body)["error"]
    assert error["code"] == "queue_full"
    wires.append(await send(world, ask("m", f"{OBJECTIVE}: urgent"), 2))
    assert (await old.answer()).status == 429
    last = await world.client()
    await last.send(ask("m", f"{OBJECTIVE}: urgent"))  # none has a lower priority
    assert (await error_of(last, 503))["code"] == "overloaded"
    await engine.serve_all(3)
    for wire in wires:
        assert (await wire.answer()).status == 200


async def test_a_tenant_that_fills_the_queue_keeps_no_other_out(busy):
    world, engine = await busy(hold_max_requests=3)
    wires = [await send(world, ask("m", f"{TENANT}: many"), held) for held in range(4)]
    wires.append(await send(world, ask("m", f"{TENANT}: one"), 3))
    assert (await error_of(wires.pop(3), 429))["code"] == "queue_full"
    last = await world.client()
    await last.send(ask("m", f"{TENANT}: many"))
    assert (await error_of(last, 503))["code"] == "overloaded"
    assert await engine.serve_all(4) == ["many", "one", "many", "many"]
    for wire in wires:
        assert (await wire.answer()).status == 200


async def test_a_429_has_the_shape_of_anthropics_api(busy):
    world, engine = await busy(hold_max_requests=1, queue=QUEUE)
    wires = [await send(world, ask("m"), 0)]
    body = json.dumps({"model": "m", "max_tokens": 1, "messages": []}).encode()
    low = await send(world, post("/openai/v1/messages", body, f"{OBJECTIVE}: batch"), 1)
    wires.append(await send(world, ask("m"), 1))
    refused = await low.answer()
    assert refused.status == 429
    assert json.loads(refused.body)["error"]["type"] == "rate_limit_error"
    await engine.serve_all(2)
    for wire in wires:
        assert (await wire.answer()).status == 200


async def test_a_request_that_waits_longer_than_its_client_wants_gets_504(busy):
    world, engine = await busy()
    wire = await send(world, ask("m"), 0)
    late = await world.client()
    await late.send(ask("m", "X-KubeAI-Max-Wait: 10ms"))
    refused = await late.answer()
    assert refused.status == 504
    assert int(refused.one("retry-after")) > 0
    assert "busy" in json.loads(refused.body)["error"]["message"]
    await engine.serve_all(1)
    assert (await wire.answer()).status == 200


async def test_a_client_that_leaves_the_queue_frees_its_place(busy):
    world, engine = await busy()
    wires = [await send(world, ask("m"), 0)]
    leaves = await send(world, ask("m"), 1)
    wires.append(await send(world, ask("m"), 2))
    leaves.close()
    await until(lambda: world.held("m") == 1)
    await engine.serve_all(2)
    for wire in wires:
        assert (await wire.answer()).status == 200
    assert len(engine.came) == 2


async def test_comments_tell_a_stream_its_place_in_the_queue(busy):
    world, engine = await busy(hold_comment_after_s=0.01, hold_comment_interval_s=0.01)
    body = json.dumps({"model": "m", "stream": True}).encode()
    wires = [await send(world, ask("m"), 0), await send(world, ask("m"), 1)]
    stream = await send(world, post(CHAT, body), 2)
    head = await stream.head()
    assert head.status == 200
    comment = await stream.reader.readuntil(b"\n\n\r\n")
    assert b": waiting for a replica: all replicas are busy, place 2 of 2 in the queue" in comment
    await engine.finish_one()
    async with asyncio.timeout(5):
        while b"all replicas are busy\n" not in await stream.reader.readuntil(b"\n\n\r\n"):
            pass
    await engine.serve_all(3)
    stream.close()
    for wire in wires:
        assert (await wire.answer()).status == 200


async def test_new_requests_wait_behind_waiting_ones(busy):
    world, engine = await busy(capacity=1)
    first = await send(world, ask("m"), 0)
    await until(lambda: len(engine.came) == 1)
    waits = await send(world, ask("m", f"{TENANT}: waits"), 1)
    late = await world.client()
    await late.send(ask("m", f"{TENANT}: late"))
    await until(lambda: world.held("m") == 2)
    assert await engine.serve_all(3) == ["-", "waits", "late"]
    for wire in (first, waits, late):
        assert (await wire.answer()).status == 200


async def test_retries_fill_no_endpoint_beyond_its_capacity(start):
    world = await start(hold_comment_after_s=0.0)
    engine = Busy()
    fails = asyncio.Event()

    async def failing_later(wire: Wire, request: Message) -> None:
        await fails.wait()
        await failing(503)(wire, request)

    bad = await world.engine(failing_later)
    good = await world.engine(engine)
    world.route("m", {"bad": bad, "good": good}, capacity=1)
    wires = [await send(world, ask("m"), 0), await send(world, ask("m"), 0)]
    await until(lambda: len(engine.came) == 1)
    fails.set()
    await until(lambda: world.outcomes("m")["retried"] >= 1, "the failed attempt is retried")
    assert world.endpoint_loads("m")["good"] == 1
    world.route("m", {"good": good}, capacity=1)
    await until(lambda: world.held("m") == 1)
    await engine.serve_all(2)
    for wire in wires:
        assert (await wire.answer()).status == 200


async def test_requests_of_a_lost_endpoint_wait_for_room_when_the_retry_budget_is_used_up(start):
    world = await start(
        hold_comment_after_s=0.0,
        retry_budget_percent=0,
        retry_budget_min=0,
        eject_after_failures=1,
        eject_time_s=60.0,
    )
    engine, dies = Busy(), asyncio.Event()

    async def lose_later(wire: Wire, request: Message) -> None:
        await dies.wait()
        wire.close()

    lost = await world.engine(lose_later)
    good = await world.engine(engine)
    world.route("m", {"lost": lost, "good": good}, capacity=2)
    wires = [await send(world, ask("m"), 0) for _ in range(4)]
    await until(lambda: len(engine.came) == len(lost.requests) == 2)
    dies.set()
    await until(lambda: world.held("m") == 2, "the lost requests wait")
    assert world.endpoint_loads("m")["good"] == 2
    await engine.serve_all(4)
    for wire in wires:
        assert (await wire.answer()).status == 200


async def test_a_form_and_a_stream_wait_their_turn_too(busy):
    world, engine = await busy()
    first = await send(world, ask("m"), 0)
    form = (
        b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--b--\r\n'
    )
    upload = await send(
        world,
        post(
            "/openai/v1/audio/transcriptions", form, "Content-Type: multipart/form-data; boundary=b"
        ),
        1,
    )
    await engine.serve_all(2)
    for wire in (first, upload):
        assert (await wire.answer()).status == 200


async def test_a_stream_that_ends_frees_its_place_at_its_last_byte(start):
    world = await start(hold_comment_after_s=0.0)
    go_on = asyncio.Event()

    async def streams(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"data: 1\n\n"))
        await go_on.wait()
        await wire.send(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")

    world.route("m", {"a": await world.engine(streams)}, capacity=1)
    first = await send(world, ask("m"), 0)
    second = await send(world, ask("m"), 1)
    await first.head()
    assert world.held("m") == 1
    go_on.set()
    head = await second.head()
    assert head.status == 200
    assert (await second.body(head)).body.endswith(b"[DONE]\n\n")
    first.close()
