"""A revoked key: its running requests end at once, others are not disturbed."""

import asyncio
import contextlib
import json
from collections import Counter
from random import Random

import pytest
from fakes.api_keys import ALICE, BOB, ask, bearer, change, error, keyed, record
from fakes.storing_engine import Storing
from fakes.websocket import echo, handshake
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, post, says, until

from kubeai.gateway import background_responses

NONCE = "dGhlIHNhbXBsZSBub25jZQ=="  # a valid one, because the gateway itself accepts


@pytest.fixture
async def world(start):
    return await keyed(start, record("alice", ALICE), record("bob", BOB))


async def stream(wire: Wire, request: Message) -> None:
    await wire.send(CHUNKED + chunk(b"data: 1\n\n"))
    await asyncio.Event().wait()


async def never(wire: Wire, request: Message) -> None:
    await asyncio.Event().wait()


def revoke(world, name="alice"):
    change(world, name, None)


async def begun(world, key: str) -> Wire:
    wire = await world.client()
    await wire.send(post("/v1/chat/completions", b'{"model":"m","stream":true}', bearer(key)))
    assert (await wire.head()).status == 200
    await wire.reader.readuntil(b"data: 1\n\n")
    return wire


async def test_a_stream_is_cut_and_those_of_other_keys_continue(world):
    world.route("m", {"pod-1": await world.engine(stream)})
    alices, bobs = [await begun(world, ALICE) for _ in range(3)], await begun(world, BOB)
    assert world.in_flight("m") == 4
    revoke(world)
    for wire in alices:
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await wire.reader.readuntil(b"0\r\n\r\n")
    assert world.in_flight("m") == 1
    assert len(world.server.relay.upstreams) == 1
    assert not bobs.reader.at_eof()
    response = await ask(await world.client(), bearer(ALICE))
    assert response.status == 401


async def test_a_request_that_waits_for_a_response_gets_401(world):
    world.route("m", {"pod-1": await world.engine(never)})
    wire = await world.client()
    await wire.send(post("/v1/messages", b'{"model":"m"}', f"x-api-key: {ALICE}"))
    await until(lambda: world.in_flight("m") == 1)
    revoke(world)
    response = await wire.answer()
    assert response.status == 401
    assert error(response)["type"] == "authentication_error"
    assert world.in_flight("m") == 0


async def test_a_response_in_the_background_is_cancelled_at_its_engine(world, monkeypatch):
    monkeypatch.setattr(background_responses, "PAUSE_MIN_S", 3600.0)
    monkeypatch.setattr(background_responses, "PAUSE_MAX_S", 3600.0)
    engine = Storing()
    world.route("m", {"pod-1": await world.engine(engine)})
    for key in (ALICE, BOB):
        wire = await world.client()
        body = json.dumps({"model": "m", "input": "hi", "background": True})
        await wire.send(post("/v1/responses", body.encode(), bearer(key)))
        assert (await wire.answer()).status == 200
    await until(lambda: world.active("m") == 2, "both are computed")
    revoke(world)
    await until(lambda: world.active("m") == 1, "one is not computed any more")
    assert [each["status"] for each in engine.responses.values()] == ["cancelled", "queued"]
    await world.context.background_responses.close()


async def test_a_held_request_gets_401_and_is_held_no_more(world):
    world.route("m", {})
    wire = await world.client()
    await wire.send(post("/v1/chat/completions", b'{"model":"m"}', bearer(ALICE)))
    await until(lambda: world.held("m") == 1)
    revoke(world)
    assert (await wire.answer()).status == 401
    await until(lambda: world.held("m") == 0)


async def test_a_held_stream_that_has_begun_ends_with_an_error_event(start):
    world = await keyed(start, record("alice", ALICE), hold_comment_after_s=0.01)
    world.route("m", {})
    wire = await world.client()
    await wire.send(post("/v1/chat/completions", b'{"model":"m","stream":true}', bearer(ALICE)))
    head = await wire.head()
    revoke(world)
    body = (await wire.body(head)).body
    event = json.loads(body[body.rindex(b"data: ") + 6 :])
    assert event["error"]["code"] == "invalid_api_key"


async def test_a_body_that_is_being_received_gets_401(world):
    world.route("m", {"pod-1": await world.engine(says(b"served"))})
    wire = await world.client()
    request = post("/v1/chat/completions", b'{"model":"m"}', bearer(ALICE))
    await wire.send(request[:-3])
    await until(lambda: world.server.relay.exchanges == 1)
    revoke(world)
    assert (await wire.answer()).status == 401


async def test_a_form_that_is_being_received_gets_401(world):
    world.route("m", {"pod-1": await world.engine(says(b"served"))}, engine="FasterWhisper")
    wire = await world.client()
    multipart = "Content-Type: multipart/form-data; boundary=b"
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    form += b"x" * 100_000 + b"\r\n--b--\r\n"
    request = post("/v1/audio/transcriptions", form, bearer(ALICE), multipart)
    await wire.send(request[:-300])
    await until(lambda: world.context.spooled_bytes > 0)
    revoke(world)
    assert (await wire.answer()).status == 401
    await until(lambda: world.context.spooled_bytes == 0)


async def test_a_websocket_is_cut(world):
    engine = await world.engine(echo)
    world.route("m", {"pod-1": engine})
    wires = {}
    for key in (ALICE, BOB):
        wires[key] = await world.client()
        await wires[key].send(handshake("/v1/realtime?model=m", bearer(key)))
        assert (await wires[key].head()).status == 101
    assert all(ALICE not in str(request.headers) for request in engine.requests)
    revoke(world)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await wires[ALICE].reader.readexactly(1)
    await wires[BOB].send(b"still here")
    assert await wires[BOB].reader.readexactly(10) == b"still here"
    await until(lambda: world.in_flight("m") == 1)
    wires[BOB].close()


async def test_a_websocket_that_waits_for_its_model_ends_with_an_error(world):
    wire = await world.client()
    await wire.send(handshake("/v1/realtime", bearer(ALICE), key=NONCE))
    await wire.head()
    await wire.reader.readuntil(b"}")  # session.created
    revoke(world)
    assert b"invalid_api_key" in await wire.reader.read()


async def test_a_new_key_in_the_secret_revokes_the_former_one(world):
    world.route("m", {"pod-1": await world.engine(stream)})
    wire = await begun(world, ALICE)
    change(world, "alice", record("alice", "sk-rotated"))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await wire.reader.readuntil(b"0\r\n\r\n")
    assert (await ask(await world.client(), bearer(ALICE))).status == 401
    await begun(world, "sk-rotated")


async def test_changed_limits_and_an_end_in_the_past_leave_running_requests_alone(world):
    world.route("m", {"pod-1": await world.engine(stream)})
    wire = await begun(world, ALICE)
    change(world, "alice", record("alice", ALICE, models="no=thing", expires_s=1.0))
    assert world.in_flight("m") == 1
    assert (await ask(await world.client(), bearer(ALICE))).status == 401
    assert not wire.reader.at_eof()


async def test_a_response_without_an_end_of_its_own_does_not_look_complete(world):
    async def until_close(wire: Wire, request: Message) -> None:
        await wire.send(b"HTTP/1.1 200 OK\r\n\r\nsome")
        await asyncio.Event().wait()

    world.route("m", {"pod-1": await world.engine(until_close)})
    wire = await world.client()
    await wire.send(post("/v1/completions", b'{"model":"m"}', bearer(ALICE), version="1.0"))
    head = await wire.head()
    await wire.reader.readexactly(4)
    revoke(world)
    with pytest.raises(Broken) as broken:
        await wire.body(head, until_close=True)
    assert broken.value.reset


async def test_revoking_an_idle_key_disturbs_nobody(world):
    world.route("m", {"pod-1": await world.engine(says(b"served"))})
    wire = await world.client()
    assert (await ask(wire, bearer(ALICE))).status == 200
    revoke(world)
    assert (await ask(wire, bearer(BOB))).status == 200  # on the same connection
    revoke(world, "bob")
    await wire.send(answer(200))  # not a request
    assert (await wire.answer()).status == 400


async def test_keys_that_change_under_load_leave_nothing_behind(world):
    """Streams, held requests and bodies end in all ways while keys come and go."""
    random = Random(7)
    world.route("m", {"pod-1": await world.engine(stream), "pod-2": await world.engine(never)})
    world.route("cold", {})
    statuses: Counter[int] = Counter()

    async def client(key: str) -> None:
        while True:
            wire = await world.client()
            model = random.choice(("m", "m", "cold"))
            request = post("/v1/chat/completions", b'{"model":"%b"}' % model.encode(), bearer(key))
            await wire.send(request[: random.choice((None, None, -3))])
            with contextlib.suppress(Broken, ConnectionError):
                head = await wire.head()
                statuses[head.status] += 1
                await wire.body(head)
            wire.close()

    clients = [asyncio.create_task(client(key)) for key in (ALICE, BOB) * 6]
    for _ in range(60):
        name, key = random.choice((("alice", ALICE), ("bob", BOB)))
        fields = {"priority": random.randrange(3), "models": random.choice(("", "x=1"))}
        change(world, name, random.choice((None, record(name, key), record(name, key, **fields))))
        changed = statuses.total()
        with contextlib.suppress(TimeoutError):  # until requests have gone on, if any can
            async with asyncio.timeout(0.02):
                await until(lambda: statuses.total() > changed)  # noqa: B023 (awaited here)
    for task in clients:
        task.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    revoke(world)
    revoke(world, "bob")
    await world.at_rest()
    assert {401, 200} <= set(statuses)
