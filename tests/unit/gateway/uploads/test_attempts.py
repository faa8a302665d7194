"""The attempts of an upload: retries, blame and ejection are those of a JSON request."""

import asyncio
import json
import time

import pytest
import uvloop
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, post, says, until

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nw\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n--b--\r\n'
)
ASK = post("/openai/v1/audio/transcriptions", FORM, "Content-Type: multipart/form-data; boundary=b")


def failing(status: int):
    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(status, b"failed"))

    return script


async def drop(wire: Wire, request: Message) -> None:
    wire.close()


async def break_off(wire: Wire, request: Message) -> None:
    await wire.send(CHUNKED + chunk(b"one"))
    wire.close()


@pytest.mark.parametrize("script", [failing(503), drop], ids=["503", "drop"])
async def test_an_endpoint_that_keeps_failing_is_ejected(start, script):
    world = await start(eject_after_failures=3)
    bad = await world.engine(script)
    world.route("w", {"a": bad, "b": await world.engine(says(b"good"))})
    wire = await world.client()
    for _ in range(10):
        await wire.send(ASK)
        assert (await wire.answer()).body == b"good"
    assert len(bad.requests) == 3
    assert world.ejected("w") == {"a"}


async def test_truncated_responses_count_as_failures(start):
    world = await start(eject_after_failures=2)
    bad = await world.engine(break_off)
    world.route("w", {"a": bad, "b": await world.engine(says(b"good"))})
    broken = 0
    for _ in range(8):
        wire = await world.client()
        await wire.send(ASK)
        try:
            assert (await wire.answer()).body == b"good"
        except Broken:
            broken += 1
    assert broken == len(bad.requests) == 2
    assert world.ejected("w") == {"a"}
    assert world.outcomes("w")["broken"] == 2


async def test_a_complete_response_returns_the_endpoint_to_service(start):
    world = await start(eject_after_failures=1, eject_time_s=0.01, retries=1)
    flaky = await world.engine(failing(503))
    world.route("w", {"a": flaky, "b": await world.engine(says(b"good"))})
    wire = await world.client()
    while not world.ejected("w"):
        await wire.send(ASK)
        assert (await wire.answer()).body == b"good"
    flaky.script = says(b"back")
    while world.ejected("w"):
        await wire.send(ASK)
        assert (await wire.answer()).body in (b"good", b"back")
    # One failure sets it aside again as soon as the first time, not for longer.
    assert world.table.find("w").ejection_count("a") == 0


async def hang(wire: Wire, request: Message) -> None:
    await wire.reader.read()


async def test_a_waiting_upload_moves_when_its_endpoint_leaves_the_routes(start):
    world = await start()
    hung, good = await world.engine(hang), await world.engine(says(b"good"))
    world.route("w", {"a": hung})
    wire = await world.client()
    await wire.send(ASK)
    await until(lambda: hung.requests)
    world.route("w", {})
    await asyncio.sleep(0)
    assert world.in_flight("w") == 1, "it still waits there: its engine may yet respond"
    world.route("w", {"b": good})
    assert (await wire.answer()).body == b"good"
    assert good.requests[0].body == hung.requests[0].body
    assert world.outcomes("w")["retried"] == 1
    await until(lambda: not hung.open, "the engine's connection is closed")


@pytest.mark.parametrize("script", [failing(503), drop], ids=["503", "drop"])
async def test_an_upload_to_a_model_that_is_deleted_meanwhile_is_a_404(start, script):
    world = await start()

    async def deleted(wire: Wire, request: Message) -> None:
        world.unroute("w")
        await script(wire, request)

    world.route("w", {name: await world.engine(deleted) for name in "ab"})
    wire = await world.client()
    await wire.send(ASK)
    assert (await wire.answer()).status == 404


async def test_an_upload_reaches_an_endpoint_that_leaves_just_after_the_pick(start, monkeypatch):
    world = await start()
    world.route("w", {"a": await world.engine(says(b"good"))})
    routed = world.table.find("w")
    pick = routed.pick

    def pick_and_leave(*args):
        reservation = pick(*args)
        world.route("w", {}, draining=("a",))
        return reservation

    monkeypatch.setattr(routed, "pick", pick_and_leave)
    wire = await world.client()
    await wire.send(ASK)
    assert (await wire.answer()).body == b"good"


async def test_a_client_that_disconnects_while_its_upload_waits_leaves_nothing_behind(start):
    world = await start()
    hung = await world.engine(hang)
    world.route("w", {"a": hung})
    wire = await world.client()
    await wire.send(ASK)
    await until(lambda: hung.requests)
    wire.close()
    await until(lambda: world.active("w") == 0)
    world.route("w", {"b": await world.engine(says(b"good"))})
    await world.at_rest()


@pytest.mark.parametrize("retried", [True, False])
async def test_a_first_byte_timeout_is_retried_elsewhere_if_configured(start, retried):
    world = await start(first_byte_timeout_s=0.1, retry_first_byte_timeout=retried)
    world.route("w", {"a": await world.engine(hang), "b": await world.engine(says(b"good"))})
    wire = await world.client()
    statuses = set()
    for _ in range(2):
        await wire.send(ASK)
        statuses.add((await wire.answer()).status)
    assert statuses == ({200} if retried else {200, 504})


async def test_retries_are_limited_to_a_share_of_the_responses(start):
    world = await start(retry_budget_min=4, eject_after_failures=0)
    engines = [await world.engine(failing(503)) for _ in range(2)]
    world.route("w", dict(zip("ab", engines, strict=True)))
    wire = await world.client()
    for _ in range(10):
        await wire.send(ASK)
        assert (await wire.answer()).status == 503
    assert sum(len(engine.requests) for engine in engines) == 10 + 4
    assert world.outcomes("w")["retried"] == 4


async def test_a_request_that_killed_its_engine_is_not_retried(start):
    world = await start()

    async def die(wire: Wire, request: Message) -> None:
        next(engine for engine in engines.values() if wire in engine.open).die()

    engines = {name: await world.engine(die) for name in "abc"}
    world.route("w", engines)
    wire = await world.client()
    await wire.send(ASK)
    answered = await wire.answer()
    assert answered.status == 502
    assert answered.one("x-should-retry") == "false"
    assert json.loads(answered.body)["error"]["code"] == "engine_died"
    assert sum(len(engine.requests) for engine in engines.values()) == 1


async def test_a_client_disconnect_does_not_count_as_an_engine_failure(start):
    world = await start(eject_after_failures=1)

    async def long_answer(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED)
        while True:
            await wire.send(chunk(b"x" * 60_000))

    engine = await world.engine(long_answer)
    world.route("w", {"a": engine, "b": engine})
    wire = await world.client(receive_buffer_bytes=4096)
    await wire.send(ASK)
    await wire.head()
    wire.reset()
    await until(lambda: world.active("w") == 0)
    assert world.ejected("w") == set()
    assert world.outcomes("w")["left"] == 1


async def test_a_client_disconnect_at_the_end_of_a_response_is_no_error(start, caplog):
    """Either may be noticed first, in any turn of the loop."""
    world = await start()
    end = asyncio.Event()

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(CHUNKED + chunk(b"one"))
        await end.wait()
        await wire.send(chunk(b"two"), b"0\r\n\r\n")

    world.route("w", {"a": await world.engine(script)})
    for turns in range(-8, 9):
        wire = await world.client()
        await wire.send(ASK)
        await wire.head()
        first, then = (wire.reset, end.set) if turns < 0 else (end.set, wire.reset)
        first()
        for _ in range(abs(turns)):
            await asyncio.sleep(0)
        then()
        await until(lambda: world.active("w") == 0)
        end.clear()
    assert caplog.records == []


async def test_a_client_that_leaves_while_its_upload_moves_leaves_nothing(start):
    world = await start()
    hung, other = await world.engine(hang), await world.engine(hang)
    world.route("w", {"a": hung})
    wire = await world.client()
    await wire.send(ASK)
    await until(lambda: hung.requests)
    world.route("w", {"b": other})
    wire.reset()
    await until(lambda: world.active("w") == 0)
    await world.at_rest()
    assert not other.requests


async def test_an_upload_whose_endpoint_leaves_just_before_it_is_sent_goes_elsewhere(start):
    world = await start()
    hung = [await world.engine(hang) for _ in range(2)]
    good = await world.engine(says(b"good"))
    world.route("w", {"a": hung[0]})
    wire = await world.client()
    await wire.send(ASK)
    await until(lambda: hung[0].requests)
    world.route("w", {"b": hung[1]})  # it moves there, but leaves in the same moment
    world.route("w", {"c": good})
    assert (await wire.answer()).body == b"good"


async def test_failures_are_consecutive_over_all_workers(start):
    world = await start(eject_after_failures=3)
    world.route("w", {"a": await world.engine(says(b"good"))})
    endpoint = world.table.find("w").route.endpoints[0]
    world.loads.note_failure(endpoint.row, endpoint.generation, time.monotonic(), False)
    wire = await world.client()
    await wire.send(ASK)
    assert (await wire.answer()).body == b"good"
    assert world.loads.failures(endpoint.row) == 0
