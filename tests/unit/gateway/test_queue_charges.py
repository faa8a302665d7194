"""What tenants are charged in the fair queue for output that no engine has reported."""

import json

import pytest
import uvloop
from fakes.api_keys import REQUIRED
from fakes.chats import CHAT
from fakes.limited_keys import KeyedWorld, bearer
from fakes.storing_engine import TEXT, Storing
from fakes.wire import CHUNKED, Message, Wire, answer, chunk, post, until
from fakes.world import World

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
TENANT = "X-Gateway-Inference-Fairness-ID"
EVENT = b'data: {"choices":[{"delta":{"content":"word "}}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"total_tokens":4009,'
    b'"completion_tokens":4000}}\n\ndata: [DONE]\n\n'
)
RESPONSES = "/openai/v1/responses"
REPORT = {"input_tokens": 9, "output_tokens": 4000}


async def talks(wire: Wire, request: Message) -> None:
    """Stream 4,000 tokens, and their usage unless the client leaves before."""
    await wire.send(CHUNKED + chunk(EVENT * 4000))
    if request.one("x-leaves"):
        await wire.reader.read()
    else:
        await wire.send(chunk(USAGE if request.one("x-silent") is None else b"data: [DONE]\n\n"))
        await wire.send(chunk(b""))


def paid(world: World, tenant: str) -> int:
    """Until when the tenant has been served at the Model, in virtual time."""
    row, generation = world.publisher.row("m"), world.publisher.route("m").generation
    return world.queues.start(row, world.queues.account(row, generation, tenant), 0)


async def stream(world: World, *headers: str) -> None:
    wire = await world.client()
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "b"}]}
    if "X-Asks: 1" in headers:
        body["stream_options"] = {"include_usage": True}
    await wire.send(post(CHAT, json.dumps(body).encode(), *headers))
    if "X-Leaves: 1" in headers:
        got = 0
        while got < 4000 * len(EVENT):
            got += len(await wire.reader.read(1 << 16))
        wire.close()
    else:
        assert (await wire.answer()).status == 200
    await until(lambda: world.server.relay.exchanges == 0, "the request has ended")


@pytest.fixture
async def keyed(start):
    keyed = KeyedWorld(await start(keys=REQUIRED))
    for name in ("stays", "leaves"):
        keyed.add(name)
    yield keyed
    await keyed.world.context.background_responses.close()
    await keyed.world.at_rest()
    keyed.close()


async def test_a_tenant_that_leaves_before_the_usage_pays_for_the_output_it_was_sent(keyed):
    world = keyed.world
    world.route("m", {"a": await world.engine(talks)}, capacity=8)
    await stream(world, bearer("stays"))
    stays = paid(world, "stays")
    assert 4000 < stays < 4300
    await stream(world, bearer("leaves"), "X-Leaves: 1")
    assert paid(world, "leaves") == pytest.approx(stays, rel=0.1)


async def test_without_keys_too(start):
    world = await start()
    world.route("m", {"a": await world.engine(talks)}, capacity=8)
    await stream(world, f"{TENANT}: stays", "X-Asks: 1")
    assert 4000 < paid(world, "stays") < 4300
    await stream(world, f"{TENANT}: leaves", "X-Leaves: 1")
    await stream(world, f"{TENANT}: asks not", "X-Silent: 1")
    # Nothing is known of the bytes for each token: it is estimated.
    estimate = 4000 * len(EVENT) / 220
    assert paid(world, "leaves") == pytest.approx(estimate, rel=0.1)
    assert paid(world, "asks not") == pytest.approx(estimate, rel=0.1)


async def test_without_a_capacity_nobody_pays(start):
    world = await start()
    world.route("m", {"a": await world.engine(talks)})
    await stream(world, f"{TENANT}: leaves", "X-Leaves: 1")
    assert paid(world, "leaves") == 0


async def test_a_response_in_the_background_is_paid_once_when_it_is_done(keyed):
    world, engine = keyed.world, Storing()
    world.route("m", {"a": await world.engine(engine)}, capacity=8)
    wire = await world.client()
    body = {"model": "m", "input": TEXT, "background": True, "max_output_tokens": 9000}
    await wire.send(post(RESPONSES, json.dumps(body).encode(), bearer("stays")))
    assert (await wire.answer()).status == 200
    assert paid(world, "stays") < 1000
    engine.end(status="completed", usage=REPORT)
    for _ in range(3):  # reading it costs nothing
        lines = f"GET {RESPONSES}/{engine.id} HTTP/1.1\r\nHost: x\r\n{bearer('stays')}\r\n\r\n"
        await wire.send(lines.encode())
        assert (await wire.answer()).status == 200
    await until(lambda: len(world.context.background_responses) == 0, "it is settled")
    assert 4000 < paid(world, "stays") < 4500


async def test_a_response_in_the_background_that_is_cancelled_is_paid(keyed):
    world, engine = keyed.world, Storing()
    world.route("m", {"a": await world.engine(engine)}, capacity=8)
    wire = await world.client()
    body = {"model": "m", "input": TEXT, "background": True, "max_output_tokens": 9000}
    await wire.send(post(RESPONSES, json.dumps(body).encode(), bearer("leaves")))
    assert (await wire.answer()).status == 200
    engine.end(status="cancelled")
    await until(lambda: len(world.context.background_responses) == 0, "it is settled")
    assert 9000 < paid(world, "leaves") < 9500


async def test_an_answer_without_usage_is_estimated_from_its_size(keyed):
    async def silent(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, b"{%b}" % (b"x" * 20_000)))

    world = keyed.world
    world.route("m", {"a": await world.engine(silent)}, capacity=8)
    wire = await world.client()
    await wire.send(post(CHAT, b'{"model":"m"}', bearer("stays")))
    assert (await wire.answer()).status == 200
    await until(lambda: world.server.relay.exchanges == 0, "the request has ended")
    assert paid(world, "stays") == pytest.approx(4000, rel=0.1)
