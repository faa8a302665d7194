"""Stored responses are read and cancelled at the replica that has them."""

import asyncio
import gc
import json
import time

import openai
import pytest
from fakes.mock_engine import FAST, serving
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, post, until
from fakes.world import World

from kubeai.gateway import stored_responses
from kubeai.gateway.local_routes import make_app
from kubeai.gateway.stored_responses import LOOKUPS_MAX_COUNT

GET = b"GET /openai/v1/responses/%s HTTP/1.1\r\nHost: h\r\nAuthorization: Bearer k\r\n\r\n"
CANCEL = b"POST /v1/responses/%s/cancel HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n"
MISSING = answer(404, b'{"error":{"message":"engine"}}')


@pytest.fixture
async def world(start):
    return await start(local_routes=make_app)


def stores(*ids: str, body: bytes = b'{"id":"stored"}'):
    """A script of a replica that has these responses."""

    async def script(wire: Wire, request: Message) -> None:
        response_id = request.target.partition("?")[0].split("/")[3]
        stored = answer(200, body, "Content-Type: application/json")
        await wire.send(stored if response_id in ids else MISSING)

    return script


async def ask(world: World, request: bytes) -> Message:
    client = await world.client()
    await client.send(request)
    return await client.answer()


async def test_the_request_goes_to_the_replica_that_has_the_response(world):
    engines = [await world.engine(stores(f"resp_{n}")) for n in range(5)]
    world.route("a", {"a0": engines[0], "a1": engines[1]})
    world.route("b", {"b0": engines[2], "b1": engines[3], "b2": engines[4]})
    for n, engine in enumerate(engines):
        before = len(engine.requests)
        assert (await ask(world, GET % f"resp_{n}?stream=false".encode())).status == 200
        asked, sent = engine.requests[before:]
        assert (asked.method, asked.target) == ("GET", f"/v1/responses/resp_{n}")
        assert (sent.method, sent.target) == ("GET", f"/v1/responses/resp_{n}?stream=false")
        assert asked.one("authorization") == sent.one("authorization") == "Bearer k"
    assert world.outcomes("a")["2xx"] == 2
    assert world.outcomes("b")["2xx"] == 3


async def test_a_cancellation_reaches_only_the_replica_that_has_the_response(world):
    engines = [await world.engine(stores("resp_x" if n == 1 else "")) for n in range(3)]
    world.route("m", {str(n): engine for n, engine in enumerate(engines)})
    assert (await ask(world, CANCEL % b"resp_x")).status == 200
    posts = [[r.target for r in engine.requests if r.method == "POST"] for engine in engines]
    assert posts == [[], ["/v1/responses/resp_x/cancel"], []]


@pytest.mark.parametrize(
    ("stored", "sent"),
    [
        (b'{"id":"resp_x","model":"a"}', b'{"id":"resp_x","model":"m_a"}'),
        (b'{"id":"resp_x","model":"m"}', b'{"id":"resp_x","model":"m"}'),
        (b'{"id":"resp_x","model":"other"}', b'{"id":"resp_x","model":"other"}'),
        (b"not JSON", b"not JSON"),
    ],
)
async def test_a_response_made_by_an_adapter_names_it_as_clients_do(world, stored, sent):
    engine = await world.engine(stores("resp_x", body=stored))
    world.route("m", {"0": (engine, ["a"])}, adapters=("a",))
    assert (await ask(world, GET % b"resp_x")).body == sent
    assert (await ask(world, CANCEL % b"resp_x")).body == sent


async def test_a_long_response_of_an_adapter_is_passed_on_unchanged(world, monkeypatch):
    monkeypatch.setattr(stored_responses, "MODEL_IN_MAX_BYTES", 20)
    body = b'{"id":"resp_x","model":"a"}'
    engine = await world.engine(stores("resp_x", body=body))
    world.route("m", {"0": (engine, ["a"])}, adapters=("a",))
    assert (await ask(world, GET % b"resp_x")).body == body


async def test_a_response_that_no_replica_has_is_not_found(world):
    world.route("m", {"0": await world.engine(stores()), "1": await world.engine(stores())})
    found = await ask(world, GET % b"resp_x")
    assert found.status == 404
    error = json.loads(found.body)["error"]
    assert error["type"] == "invalid_request_error"
    assert "resp_x" in error["message"]
    assert sum(world.outcomes("m").values()) == 0
    world.unroute("m")
    assert (await ask(world, GET % b"resp_x")).status == 404


async def test_models_that_the_client_may_not_see_are_not_asked(world):
    engine, other = await world.engine(stores("resp_x")), await world.engine(stores())
    world.route("m", {"0": engine}, labels={"team": "a"})
    world.route("n", {"0": other}, labels={"team": "b"})
    selector = GET.replace(b"Authorization: Bearer k", b"X-Label-Selector: team=b")
    assert (await ask(world, selector % b"resp_x")).status == 404
    assert engine.requests == []
    assert len(other.requests) == 1
    bad = GET.replace(b"Authorization: Bearer k", b"X-Label-Selector: team in")
    assert (await ask(world, bad % b"resp_x")).status == 400


async def test_only_engines_that_store_responses_are_asked(world):
    engine = await world.engine(stores("resp_x"))
    world.route("m", {"0": engine}, engine="OLlama")
    assert (await ask(world, GET % b"resp_x")).status == 404
    assert engine.requests == []


async def test_a_replica_that_fails_makes_a_missing_response_unavailable(world):
    async def drop(wire: Wire, request: Message) -> None:
        raise Broken(b"", False)

    world.route("m", {"0": await world.engine(stores()), "1": await world.engine(drop)})
    found = await ask(world, GET % b"resp_x")
    assert (found.status, found.one("retry-after")) == (503, "5")
    assert json.loads(found.body)["error"]["code"] == "model_unavailable"
    world.route("n", {"0": await world.engine(stores("resp_x"))})
    assert (await ask(world, GET % b"resp_x")).status == 200


async def test_a_replica_that_does_not_answer_in_time_is_not_waited_for(world, monkeypatch):
    async def silent(wire: Wire, request: Message) -> None:
        await wire.reader.read()

    monkeypatch.setattr(stored_responses, "ASK_TIMEOUT_S", 0.05)
    world.route("m", {"0": await world.engine(stores()), "1": await world.engine(silent)})
    assert (await ask(world, GET % b"resp_x")).status == 503


async def test_a_failed_attempt_is_not_retried_at_another_replica(world):
    async def once(wire: Wire, request: Message) -> None:
        if "?" in request.target:
            raise Broken(b"", False)
        await wire.send(answer())

    engine, other = await world.engine(once), await world.engine(stores())
    world.route("m", {"0": engine, "1": other})
    assert (await ask(world, GET % b"resp_x?starting_after=3")).status == 502
    assert [request.target for request in other.requests] in ([], ["/v1/responses/resp_x"])


async def test_the_engines_own_error_passes_through(world):
    async def script(wire: Wire, request: Message) -> None:
        status = 200 if request.method == "GET" else 400
        await wire.send(answer(status, b'{"error":"completed"}'))

    world.route("m", {"0": await world.engine(script)})
    found = await ask(world, CANCEL % b"resp_x")
    assert (found.status, found.body) == (400, b'{"error":"completed"}')


async def test_a_stored_stream_is_relayed_and_counted_until_it_ends(world):
    async def script(wire: Wire, request: Message) -> None:
        if "stream" not in request.target:
            await wire.send(answer())
            return
        await wire.send(CHUNKED, chunk(b"data: 1\n\n"))
        await until(lambda: done, "the test has seen the first event")
        await wire.send(b"0\r\n\r\n")

    done = False
    world.route("m", {"0": await world.engine(script)})
    client = await world.client()
    await client.send(GET % b"resp_x?stream=true")
    head = await client.head()
    assert head.status == 200
    await client.reader.readuntil(b"data: 1\n\n")
    assert (world.active("m"), world.in_flight("m")) == (1, 1)
    done = True
    await client.reader.readuntil(b"0\r\n\r\n")


async def test_lookups_are_limited(world):
    world.route("m", {"0": await world.engine(stores("resp_x"))})
    world.context.stored_responses.lookups = LOOKUPS_MAX_COUNT
    found = await ask(world, GET % b"resp_x")
    assert (found.status, found.one("retry-after")) == (503, "5")
    world.context.stored_responses.lookups = 0
    assert (await ask(world, GET % b"resp_x")).status == 200


async def test_endpoints_are_asked_a_few_at_a_time(world, monkeypatch):
    monkeypatch.setattr(stored_responses, "ASKED_AT_ONCE_MAX_COUNT", 3)
    asking = most = 0

    async def script(wire: Wire, request: Message) -> None:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        await until(lambda: most == 3, "three are asked")
        asking -= 1
        await wire.send(MISSING)

    engines = [await world.engine(script) for _ in range(8)]
    world.route("m", {str(n): engine for n, engine in enumerate(engines)})
    assert (await ask(world, GET % b"resp_x")).status == 404
    assert most == 3
    assert [len(engine.requests) for engine in engines] == [1] * 8


async def test_one_silent_replica_does_not_keep_the_others_from_being_asked(world, monkeypatch):
    async def silent(wire: Wire, request: Message) -> None:
        await wire.reader.read()

    monkeypatch.setattr(stored_responses, "ASKED_AT_ONCE_MAX_COUNT", 1)
    monkeypatch.setattr(stored_responses, "ASK_TIMEOUT_S", 0.05)
    world.route("m", {"0": await world.engine(silent), "1": await world.engine(stores("resp_x"))})
    assert (await ask(world, GET % b"resp_x")).status == 200


async def test_the_lookups_that_a_found_response_ends_are_not_reported_as_errors(world, caplog):
    waiting = asyncio.Event()

    async def silent(wire: Wire, request: Message) -> None:
        waiting.set()
        await wire.reader.read()

    async def has(wire: Wire, request: Message) -> None:
        await waiting.wait()
        await stores("resp_x")(wire, request)

    world.route("m", {"0": await world.engine(silent), "1": await world.engine(has)})
    assert (await ask(world, GET % b"resp_x")).status == 200
    await asyncio.sleep(0)
    gc.collect()  # asyncio reports the exception of a future when it is freed
    assert [record.message for record in caplog.records if record.name == "asyncio"] == []


async def test_a_response_that_was_found_is_not_looked_up_again(world):
    engine, other = await world.engine(stores("resp_x")), await world.engine(stores())
    world.route("m", {"0": engine, "1": other})
    for _ in range(3):
        assert (await ask(world, GET % b"resp_x")).status == 200
    assert len(engine.requests) == 4
    assert len(other.requests) <= 1


async def test_a_response_that_was_found_stays_hidden_from_clients_that_may_not_see_its_model(
    world,
):
    engine, other = await world.engine(stores("resp_x")), await world.engine(stores())
    world.route("m", {"0": engine}, labels={"team": "a"})
    world.route("n", {"0": other}, labels={"team": "b"})
    assert (await ask(world, GET % b"resp_x")).status == 200
    selector = GET.replace(b"Authorization: Bearer k", b"X-Label-Selector: team=b")
    assert (await ask(world, selector % b"resp_x")).status == 404
    assert (await ask(world, GET % b"resp_x")).status == 200


async def test_a_response_is_looked_up_again_when_its_replica_is_gone(world):
    engine, other = await world.engine(stores("resp_x")), await world.engine(stores("resp_x"))
    world.route("m", {"0": engine})
    assert (await ask(world, GET % b"resp_x")).status == 200
    world.route("m", {"1": other})
    assert (await ask(world, GET % b"resp_x")).status == 200
    assert len(other.requests) == 2
    world.unroute("m")
    assert (await ask(world, GET % b"resp_x")).status == 404


async def test_only_the_responses_used_last_are_remembered(world, monkeypatch):
    monkeypatch.setattr(stored_responses, "REMEMBERED_MAX_COUNT", 2)
    engine = await world.engine(stores("resp_1", "resp_2", "resp_3"))
    world.route("m", {"0": engine})
    asked = []
    for n in (1, 2, 1, 3, 1, 2):  # 3 displaces 2, which was not used since
        before = len(engine.requests)
        assert (await ask(world, GET % f"resp_{n}".encode())).status == 200
        asked.append(len(engine.requests) - before)
    assert asked == [2, 2, 1, 2, 1, 2]


async def test_cookies_of_an_engine_are_not_kept_for_the_next_lookup(world):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(200, b"{}", "Set-Cookie: session=1"))

    engine = await world.engine(script)
    world.route("m", {"0": engine})
    for n in range(2):
        assert (await ask(world, GET % f"resp_{n}".encode())).status == 200
    assert all(request.all("cookie") == [] for request in engine.requests)


# -- requests that continue a stored response ------------------------------------------------------


def following(response_id: object, model: str = "m", padding: str = "") -> bytes:
    body = {"model": model, "input": "more" + padding, "previous_response_id": response_id}
    return post("/v1/responses", json.dumps(body).encode())


def continues(*ids: str):
    """A script of a replica that has these responses, and answers requests that continue them."""

    async def script(wire: Wire, request: Message) -> None:
        if request.method == "GET":
            await stores(*ids)(wire, request)
            return
        wanted = json.loads(request.body).get("previous_response_id")
        known = wanted is None or wanted in ids
        await wire.send(answer(200, b'{"id":"new"}') if known else MISSING)

    return script


@pytest.mark.parametrize("padding", ["", "x" * (1 << 20)])
async def test_a_request_that_continues_a_response_goes_to_its_replica(world, padding):
    engines = [await world.engine(continues(f"resp_{n}")) for n in range(3)]
    world.route("m", {str(n): engine for n, engine in enumerate(engines)}, strategy="LeastLoad")
    for n in (2, 0, 0, 1, 2):
        assert (await ask(world, following(f"resp_{n}", padding=padding))).body == b'{"id":"new"}'
        assert engines[n].requests[-1].method == "POST"
    assert world.outcomes("m")["2xx"] == 5


async def test_a_request_that_continues_nothing_is_not_looked_up(world):
    engine, other = await world.engine(continues()), await world.engine(continues())
    world.route("m", {"0": engine, "1": other})
    for nothing in (None, "", 7, ["resp_x"]):
        assert (await ask(world, following(nothing))).status in (200, 404)  # the engine judges
    assert {request.method for request in engine.requests + other.requests} == {"POST"}


async def test_a_model_with_one_replica_is_not_asked(world):
    engine = await world.engine(continues("resp_x"))
    world.route("m", {"0": engine})
    assert (await ask(world, following("resp_x"))).status == 200
    assert [request.method for request in engine.requests] == ["POST"]


async def test_only_the_replicas_of_the_requested_model_are_asked(world):
    engines = [await world.engine(continues()) for _ in range(2)]
    other = await world.engine(continues("resp_x"))
    world.route("m", {str(n): engine for n, engine in enumerate(engines)})
    world.route("other", {"0": other})
    assert (await ask(world, following("resp_x"))).status == 404
    assert other.requests == []


@pytest.mark.parametrize("engine_of_m", ["VLLM", "OLlama"])
async def test_a_response_that_the_only_replica_of_a_fallback_made_is_continued_there(
    world, engine_of_m
):
    world.route("m", {}, fallbacks=("other",), engine=engine_of_m)
    world.route("other", {"0": await world.engine(continues("resp_x"))})
    found = await ask(world, following("resp_x"))
    assert (found.status, found.one("x-kubeai-model")) == (200, "other")


async def test_the_engine_says_that_no_replica_has_the_response_to_continue(world):
    engines = [await world.engine(continues()) for _ in range(2)]
    world.route("m", {str(n): engine for n, engine in enumerate(engines)})
    found = await ask(world, following("resp_x"))
    assert (found.status, found.body) == (404, b'{"error":{"message":"engine"}}')
    assert world.active("m") == 0


async def test_a_response_whose_replica_may_be_silent_cannot_be_continued_for_now(world):
    async def drop(wire: Wire, request: Message) -> None:
        raise Broken(b"", False)

    world.route("m", {"0": await world.engine(continues()), "1": await world.engine(drop)})
    found = await ask(world, following("resp_x"))
    assert (found.status, found.one("retry-after")) == (503, "5")


async def test_a_request_that_continues_a_response_is_not_retried_at_another_replica(world):
    async def fails(wire: Wire, request: Message) -> None:
        if request.method == "POST":
            raise Broken(b"", False)
        await wire.send(answer())

    engine, other = await world.engine(fails), await world.engine(continues())
    world.route("m", {"0": engine, "1": other})
    assert (await ask(world, following("resp_x"))).status == 502
    assert all(request.method == "GET" for request in other.requests)


@pytest.mark.parametrize(
    "response_id", ["../../metrics", "a/b", "a?b", "a b", "a\n", "é", "x" * 300]
)
async def test_an_id_that_no_engine_makes_is_left_to_the_engine(world, response_id):
    engines = [await world.engine(continues()) for _ in range(2)]
    world.route("m", {str(n): engine for n, engine in enumerate(engines)})
    assert (await ask(world, following(response_id))).status == 404
    assert [request.method for engine in engines for request in engine.requests] == ["POST"]


async def test_a_client_that_leaves_ends_the_lookup(world):
    asked = 0

    async def silent(wire: Wire, request: Message) -> None:
        nonlocal asked
        asked += 1
        await wire.reader.read()

    world.route("m", {"0": await world.engine(silent)})
    client = await world.client()
    await client.send(GET % b"resp_x")
    await until(lambda: asked, "the replica is asked")
    client.close()
    await until(lambda: world.context.stored_responses.lookups == 0, "no lookup in progress")


async def test_the_openai_client_retrieves_what_a_replica_has_made(world):
    async with serving(*FAST) as one, serving(*FAST) as other:
        world.route("m", {"0": one.url.removeprefix("http://"), "1": other.url[7:]})
        client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{world.port}/openai/v1", api_key="none", max_retries=0
        )
        async with client:
            made = [await client.responses.create(model="m", input=f"{n}") for n in range(4)]
            for each in made:
                assert (await client.responses.retrieve(each.id)).output == each.output
                new = await client.responses.create(
                    model="m", input="more", previous_response_id=each.id
                )
                assert (await client.responses.retrieve(new.id)).output == new.output
            with pytest.raises(openai.BadRequestError, match="synchronous"):
                await client.responses.cancel(made[0].id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve("resp_unknown")
        assert len(one.mock.stored) + len(other.mock.stored) == 8


async def test_an_ejected_replica_still_serves_its_stored_responses(world):
    world.route("m", {"0": await world.engine(stores("resp_x")), "1": await world.engine(stores())})
    assert world.server.routes.find("m").eject("0", time.monotonic() + 60)
    assert (await ask(world, GET % b"resp_x")).status == 200
