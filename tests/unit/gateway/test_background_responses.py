"""Responses that engines compute in the background are active, and counted when they are done."""

import asyncio
import json
from typing import Any

import pytest
import uvloop
from fakes.api_keys import REQUIRED
from fakes.limited_keys import KeyedWorld, bearer, digest_of, key_for
from fakes.storing_engine import DELTA, TEXT, Storing
from fakes.wire import Broken, Message, Wire, answer, post, until
from fakes.world import World

from kubeai._key_table import Use
from kubeai._keys import Key
from kubeai._limits import live
from kubeai.gateway import background_responses
from kubeai.gateway.background_responses import asks_for_background, is_background

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
PATH = "/openai/v1/responses"


def usage(prompt: int, output: int, cached: int = 0) -> dict[str, Any]:
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": output,
    }


class Keyed(KeyedWorld):
    """A World with one key that has limits, and an engine that stores responses."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.engine = Storing()

    async def begin(self) -> None:
        self.world.route("m", {"a": await self.world.engine(self.engine)})
        self.add("k", tokens_per_minute=100_000, in_flight_max=10)

    @property
    def key(self) -> Key:
        return self.world.context.keys[digest_of("sk-k")]

    @property
    def following(self) -> int:
        return len(self.world.context.background_responses)

    async def ask(self, **fields: Any) -> Wire:
        wire = await self.world.client()
        body = {"model": "m", "input": TEXT, "background": True, **fields}
        await wire.send(post(PATH, json.dumps(body).encode(), bearer("k")))
        return wire

    async def start(self, **fields: Any) -> None:
        """Have the engine compute a response in the background."""
        wire = await self.ask(**fields)
        assert json.loads((await wire.answer()).body)["status"] == "queued"
        await until(lambda: self.world.server.relay.exchanges == 0, "the request has ended")

    async def counted(self) -> tuple[int, ...]:
        """Requests, estimated requests, prompt, cached and completion tokens, in the end."""
        await until(lambda: self.following == 0, "the response is settled")
        await self.world.at_rest()
        (row,) = self.world.context.meter.take()
        assert (row.key, row.tenant, row.model) == ("k", "k", "m")
        return row[3:]


@pytest.fixture
async def keyed(start, monkeypatch):
    monkeypatch.setattr(background_responses, "PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(background_responses, "PAUSE_MAX_S", 0.01)
    keyed = Keyed(await start(keys=REQUIRED))
    await keyed.begin()
    yield keyed
    await keyed.world.context.background_responses.close()
    await keyed.world.at_rest()
    assert keyed.use("k").in_flight == 0
    assert live() == 0
    keyed.close()


async def test_the_tokens_that_the_engine_reports_in_the_end_are_charged_and_counted(keyed):
    await keyed.start(max_output_tokens=5000)
    assert keyed.use("k").in_flight == 1
    assert keyed.use("k").tokens > 5000
    assert keyed.world.context.meter.take() == ()
    keyed.engine.end(status="completed", usage=usage(110, 4000, cached=64))
    assert await keyed.counted() == (1, 0, 110, 64, 4000)
    assert keyed.use("k") == Use(0, 1, 4110)
    assert keyed.key.mean_output_tokens == 4000


async def test_with_all_requests_in_flight_used_responses_can_be_read_and_cancelled(keyed):
    keyed.add("k", requests_per_minute=100, in_flight_max=1)
    await keyed.start(max_output_tokens=300)
    refused = await (await keyed.ask()).answer()
    assert (refused.status, json.loads(refused.body)["error"]["type"]) == (429, "requests")
    for method, path in (("GET", ""), ("POST", "/cancel")):
        wire = await keyed.world.client()
        head = f"{method} {PATH}/{keyed.engine.id}{path} HTTP/1.1\r\nHost: x\r\n{bearer('k')}\r\n"
        await wire.send(f"{head}Content-Length: 0\r\n\r\n".encode())
        assert (await wire.answer()).status == 200
    await until(lambda: keyed.following == 0, "the response is settled")
    assert keyed.use("k").requests == 3, "they count as requests"


async def test_it_is_an_active_request_at_its_endpoint_until_it_is_done(keyed):
    await keyed.start()
    assert (keyed.world.active("m"), keyed.world.in_flight("m")) == (1, 1)
    assert keyed.world.endpoint_loads("m") == {"a": 1}
    assert keyed.world.pending("m") == 0  # no prompt is to be computed twice
    keyed.engine.end(status="completed", usage=usage(110, 40))
    await keyed.counted()  # and at rest


@pytest.mark.parametrize(
    ("end", "output", "estimated"),
    [
        ({"status": "incomplete", "usage": usage(110, 300)}, 300, 0),
        ({"status": "cancelled", "usage": usage(110, 20)}, 20, 0),
        ({"status": "cancelled"}, 300, 1),
        ({"status": "completed"}, 300, 1),
        ({"status": "failed"}, 0, 1),
    ],
)
async def test_without_a_report_the_reserved_tokens_are_used_unless_the_engine_has_failed(
    keyed, end, output, estimated
):
    await keyed.start(max_output_tokens=300)
    keyed.engine.end(**end)
    requests, how_many, prompt, _, completion = await keyed.counted()
    assert (requests, how_many, completion) == (1, estimated, output)
    assert keyed.use("k") == Use(0, 1, prompt + output)
    assert keyed.key.mean_output_tokens == (0 if estimated else output)


async def test_a_response_that_is_lost_with_its_engine_is_charged_its_prompt(keyed, monkeypatch):
    await keyed.start(max_output_tokens=300)
    await until(lambda: keyed.engine.asked, "the engine is asked")
    keyed.engine.responses.clear()
    monkeypatch.setattr(background_responses, "SILENT_MAX_S", 0.02)
    requests, estimated, prompt, _, completion = await keyed.counted()
    assert (requests, estimated, completion) == (1, 1, 0)
    assert keyed.use("k") == Use(0, 1, prompt)


async def test_an_engine_that_misses_a_response_is_asked_again(keyed):
    await keyed.start()
    lost, keyed.engine.responses = keyed.engine.responses, {}
    asked = keyed.engine.asked
    await until(lambda: keyed.engine.asked > asked, "the engine says that it has no such response")
    keyed.engine.responses = lost
    keyed.engine.end(status="completed", usage=usage(110, 4))
    assert await keyed.counted() == (1, 0, 110, 0, 4)


@pytest.mark.parametrize("limit", ["SILENT_MAX_S", "FOLLOW_MAX_S"])
async def test_an_engine_that_does_not_say_in_time_costs_the_reserved_tokens(
    keyed, monkeypatch, limit
):
    await keyed.start(max_output_tokens=300)
    keyed.engine.fails = limit == "SILENT_MAX_S"
    monkeypatch.setattr(background_responses, limit, 0.02)
    requests, estimated, prompt, _, completion = await keyed.counted()
    assert (requests, estimated, completion) == (1, 1, 300)
    assert keyed.use("k") == Use(0, 1, prompt + 300)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"status": "completed", "usage": usage(-1, 5)},
        {"status": "completed", "usage": usage(5, 1 << 40)},
        {"status": 7},
    ],
)
async def test_an_unreadable_state_is_no_answer(keyed, nonsense):
    await keyed.start()
    keyed.engine.end(**nonsense)
    asked = keyed.engine.asked
    await until(lambda: keyed.engine.asked > asked + 1, "the engine is asked again")
    keyed.engine.end(status="completed", usage=usage(110, 4))
    assert await keyed.counted() == (1, 0, 110, 0, 4)


async def test_a_stream_that_goes_on_without_its_client_is_counted_when_it_is_done(keyed):
    wire = await keyed.ask(stream=True)
    await wire.head()
    await wire.reader.readuntil(DELTA)
    wire.reset()
    await until(lambda: keyed.following, "the response is followed")
    assert keyed.use("k").in_flight == 1
    keyed.engine.end(status="completed", usage=usage(110, 900))
    assert await keyed.counted() == (1, 0, 110, 0, 900)
    assert keyed.use("k") == Use(0, 1, 1010)


async def test_a_cancelled_stream_costs_what_its_client_was_sent_if_that_is_more(keyed):
    wire = await keyed.ask(stream=True, max_output_tokens=1)
    await wire.head()
    await wire.reader.readuntil(DELTA * 10)
    wire.reset()
    await until(lambda: keyed.following, "the response is followed")
    keyed.engine.end(status="cancelled")
    *_, completion = await keyed.counted()
    assert completion >= len(DELTA) * 10 // 220 > 1


async def test_a_client_that_leaves_before_the_answer_is_charged_what_the_engine_computes(keyed):
    engine, begun = keyed.engine, asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        if request.method == "GET":
            await engine(wire, request)
            return
        made = json.loads(request.body)["request_id"]
        engine.responses[made] = {"id": made, "status": "in_progress"}
        begun.set()
        await wire.reader.read()

    keyed.world.route("m", {"a": await keyed.world.engine(script)})
    wire = await keyed.ask()
    await begun.wait()
    wire.reset()
    await until(lambda: keyed.following, "the response is followed")
    engine.end(status="completed", usage=usage(110, 900))
    assert await keyed.counted() == (1, 0, 110, 0, 900)


async def test_a_response_in_the_foreground_is_not_followed(keyed):
    wire = await keyed.ask(stream=True, background=False)
    await wire.head()
    await wire.reader.readuntil(DELTA)
    wire.reset()
    await keyed.world.at_rest()
    assert (keyed.following, keyed.use("k").in_flight) == (0, 0)
    (row,) = keyed.world.context.meter.take()
    assert (row.requests, row.estimated_requests) == (1, 1)
    assert keyed.engine.asked == 0


async def test_a_response_that_the_engine_refuses_is_not_followed(keyed):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(400, b'{"error":{"message":"no store"}}'))

    keyed.world.route("m", {"a": await keyed.world.engine(script)})
    wire = await keyed.ask()
    assert (await wire.answer()).status == 400
    await keyed.world.at_rest()
    assert keyed.following == 0
    assert keyed.use("k") == Use(0, 1, 0)


async def test_responses_in_the_background_are_in_flight_for_the_limit(keyed):
    key = key_for(keyed.rows, "k", in_flight_max=2)
    keyed.world.context.keys[key.digest] = key
    await keyed.start()
    await keyed.start()
    wire = await keyed.ask()
    refused = await wire.answer()
    assert refused.status == 429
    assert "2 requests in flight" in json.loads(refused.body)["error"]["message"]
    keyed.engine.end(status="completed", usage=usage(110, 4))
    await until(lambda: keyed.use("k").in_flight == 0)
    await keyed.start()
    keyed.engine.end(status="completed", usage=usage(110, 4))
    assert await keyed.counted() == (3, 0, 330, 0, 12)


async def test_a_client_that_asks_has_it_settled_at_once_and_is_not_charged_again(
    keyed, monkeypatch
):
    monkeypatch.setattr(background_responses, "PAUSE_MIN_S", 3600.0)
    monkeypatch.setattr(background_responses, "PAUSE_MAX_S", 3600.0)
    await keyed.start(max_output_tokens=300)
    keyed.engine.end(status="completed", usage=usage(110, 40))
    wire = await keyed.world.client()
    lines = f"GET {PATH}/{keyed.engine.id} HTTP/1.1\r\nHost: x\r\n{bearer('k')}\r\n\r\n"
    for _ in range(3):
        await wire.send(lines.encode())
        assert json.loads((await wire.answer()).body)["status"] == "completed"
    assert await keyed.counted() == (4, 0, 110, 0, 40)
    assert keyed.use("k") == Use(0, 4, 150)


@pytest.mark.parametrize("turns", [0, 20])
async def test_a_worker_that_ends_counts_the_reserved_tokens(keyed, monkeypatch, turns):
    monkeypatch.setattr(background_responses, "PAUSE_MIN_S", 3600.0)
    monkeypatch.setattr(background_responses, "PAUSE_MAX_S", 3600.0)
    await keyed.start(max_output_tokens=300)
    for _ in range(turns):
        await asyncio.sleep(0)
    await keyed.world.context.background_responses.close()
    *_, completion = await keyed.counted()
    assert completion == 300
    await keyed.start(max_output_tokens=200)  # the last request of the worker
    *_, completion = await keyed.counted()
    assert completion == 200


async def test_beyond_the_limit_of_followed_responses_the_reserved_tokens_are_counted(
    keyed, monkeypatch
):
    monkeypatch.setattr(background_responses, "FOLLOWED_MAX_COUNT", 1)
    await keyed.start(max_output_tokens=300)
    await keyed.start(max_output_tokens=300)
    assert keyed.following == 1
    (row,) = keyed.world.context.meter.take()
    assert (row.estimated_requests, row.completion_tokens) == (1, 300)
    keyed.engine.end(status="completed", usage=usage(110, 4))
    assert await keyed.counted() == (1, 0, 110, 0, 4)


async def test_a_response_of_a_key_that_is_gone_is_counted_as_usage_but_for_no_other_key(keyed):
    await keyed.start(max_output_tokens=300)
    row, _ = keyed.rows.rows["k"]
    keyed.table.open_row(row)  # the next key's
    keyed.engine.end(status="completed", usage=usage(110, 40))
    assert await keyed.counted() == (1, 0, 110, 0, 40)
    assert keyed.use("k") == Use(0, 0, 0)


# -- without keys ----------------------------------------------------------------------------------


@pytest.fixture
async def keyless(start, monkeypatch):
    """A World with an engine that stores responses, and the engine."""
    monkeypatch.setattr(background_responses, "PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(background_responses, "PAUSE_MAX_S", 0.01)
    world, engine = await start(), Storing()
    world.route("m", {"a": await world.engine(engine)})
    yield world, engine
    await world.context.background_responses.close()
    await world.at_rest()
    assert live() == 0


async def ask(world, **fields):
    wire = await world.client()
    await wire.send(post(PATH, json.dumps({"model": "m", "input": TEXT, **fields}).encode()))
    response = await wire.answer()
    await until(lambda: world.server.relay.exchanges == 0, "the request has ended")
    return response


async def test_without_keys_a_response_in_the_background_is_an_active_request(keyless):
    world, engine = keyless
    await ask(world, background=True)
    assert (world.active("m"), world.endpoint_loads("m")) == (1, {"a": 1})
    engine.end(status="completed", usage=usage(110, 40))
    await until(lambda: world.active("m") == 0, "the response is done")


async def test_an_id_that_the_client_has_chosen_is_kept(keyless):
    world, engine = keyless
    await ask(world, background=True, request_id="resp_mine")
    assert (engine.id, world.active("m")) == ("resp_mine", 1)
    engine.end(status="failed")
    await until(lambda: world.active("m") == 0, "the response is done")


async def test_a_second_response_with_the_same_id_is_not_followed(keyless):
    world, engine = keyless
    for _ in range(2):
        await ask(world, background=True, request_id="resp_mine")
    assert world.active("m") == 1
    engine.end(status="completed", usage=usage(110, 40))
    await until(lambda: world.active("m") == 0, "the response is done")


async def test_the_engine_is_asked_with_the_credentials_of_its_client(keyless):
    world, engine = keyless
    wire = await world.client()
    body = json.dumps({"model": "m", "input": TEXT, "background": True}).encode()
    await wire.send(post(PATH, body, bearer("engine")))
    await wire.answer()
    await until(lambda: engine.asked, "the engine is asked")
    assert engine.credentials == {"Bearer sk-engine"}
    engine.end(status="completed")
    await until(lambda: world.active("m") == 0, "the response is done")


async def test_a_response_counts_at_its_endpoint_after_that_has_left_the_route(keyless):
    """A client disconnects while its pod drains: the pod must not look idle."""
    world, engine = keyless
    wire = await world.client()
    body = json.dumps({"model": "m", "input": TEXT, "background": True, "stream": True}).encode()
    await wire.send(post(PATH, body))
    await wire.reader.readuntil(DELTA)
    rows = world.publisher.endpoint_rows("m")
    world.route("m", {})
    wire.reset()
    await until(lambda: len(world.context.background_responses) == 1, "the response is followed")
    assert (world.active("m"), world.loads.in_flight(rows["a"])) == (1, 1)
    engine.end(status="completed", usage=usage(110, 40))
    await until(lambda: world.active("m") == 0, "the response is done")


async def test_the_id_of_a_failed_attempt_is_not_asked_for_at_a_fallback(start):
    async def breaks(wire: Wire, request: Message) -> None:
        raise Broken(b"", False)

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, b'{"id":"resp_1","status":"completed"}'))

    world = await start()
    world.route("m", {"a": await world.engine(breaks)}, fallbacks=("other",))
    world.route("other", {"b": await world.engine(script)}, engine="OLlama")
    response = await ask(world, background=True)
    assert response.status == 200
    await world.at_rest()


@pytest.mark.parametrize(
    ("engine", "fields"),
    [
        ("VLLM", {}),
        ("VLLM", {"background": False}),
        ("VLLM", {"background": True, "request_id": "mine"}),  # not an ID to ask for
        ("OLlama", {"background": True}),
    ],
)
async def test_other_bodies_are_not_changed_and_their_responses_not_followed(start, engine, fields):
    seen = []

    async def script(wire: Wire, request: Message) -> None:
        seen.append(json.loads(request.body))
        await wire.send(answer(200, b'{"id":"resp_1","status":"completed"}'))

    world = await start()
    world.route("m", {"a": await world.engine(script)}, engine=engine)
    await ask(world, **fields)
    assert seen == [{"model": "m", "input": TEXT, **fields}]
    await world.at_rest()
    assert len(world.context.background_responses) == 0


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"background":true}', True),
        (b'{"b\\u0061ckground":true}', True),
        (b'{"background":false,"background":true}', True),
        (b'{"background":"yes"}', True),
        (b'{"background":1}', True),
        (b'{"background":false}', False),
        (b'{"background":null}', False),
        (b'{"input":"\\"background\\":true"}', False),
        (b'{"metadata":{"background":true}}', False),
        (b'{"temperature":NaN}', True),  # unreadable here; the engine may read it
    ],
)
def test_a_body_may_ask_for_the_background(payload, expected):
    assert is_background(payload) is expected


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b'{"background":true}', True),
        (b'{"background":false}', False),
        (b'{"input":"x"}', False),
        (b'{"metadata":{"background":true}}', False),
        (b'{"background":true,"temperature":NaN}', False),  # unreadable here
        (b'\x1f\x8b"background"', False),  # compressed
    ],
)
def test_without_a_key_only_a_body_that_can_be_read_asks_for_it(payload, expected):
    assert asks_for_background(payload) is expected
