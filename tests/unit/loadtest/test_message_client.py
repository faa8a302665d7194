"""Requests by message: responses are matched, and what goes wrong is counted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import msgspec
import pytest

from kubeai.brokers.base import (
    Broker,
    BrokerUnavailable,
    Delivery,
    MessageTooLarge,
    Subscription,
    Topic,
)
from kubeai.loadtest import arguments, options
from kubeai.loadtest.arguments import OptionError
from kubeai.loadtest.client import EndpointError
from kubeai.loadtest.executor import Executor
from kubeai.loadtest.message_client import (
    GIVEN_UP_MAX_MESSAGES,
    METADATA,
    MessageClient,
)
from kubeai.loadtest.run import Collector
from kubeai.loadtest.scenario import ClosedLoop, MessageStream, RequestLoop, Scenario, Synthetic
from kubeai.simulation.results import Limit
from kubeai.simulation.traffic import Arrivals, Shape

looptime = pytest.mark.looptime(start=0)
COMPLETION = {"choices": [{"message": {"content": "yes"}}], "usage": {"prompt_tokens": 3}}


class FakeDelivery(Delivery):
    def __init__(self, broker: FakeBroker, body: bytes) -> None:
        self.id, self.body, self.attributes, self.deliveries = "1", body, {}, 1
        self._broker = broker

    async def acknowledge(self) -> None:
        self._broker.acknowledged += 1

    async def release(self) -> None: ...

    async def extend(self) -> None: ...


class FakeBroker(Broker, Subscription, Topic):
    """One object for all: ``answer`` maps a published request to the bodies of its responses."""

    def __init__(self, answer: Callable[[Any], list[Any]]) -> None:
        self._answer = answer
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self.published: list[Any] = []
        self.acknowledged = 0
        self.opened = self.closed = 0
        self.down: Exception | None = None

    async def subscribe(self) -> Subscription:
        return await self._open()

    async def open_topic(self) -> Topic:
        return await self._open()

    async def _open(self) -> FakeBroker:
        if self.down:
            raise self.down
        self.opened += 1
        return self

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        if self.down:
            raise self.down
        request = msgspec.json.decode(body)
        self.published.append(request)
        for each in self._answer(request):
            self.deliver(each)

    def deliver(self, response: Any) -> None:
        self._queue.put_nowait(response)

    def cut(self) -> None:
        self.deliver(BrokerUnavailable("the connection has ended"))

    async def receive(self, count_max: int) -> list[Delivery]:
        found = await self._queue.get()
        if isinstance(found, Exception):
            raise found
        body = found if isinstance(found, bytes) else msgspec.json.encode(found)
        return [FakeDelivery(self, body)]

    async def lag(self) -> int | None:
        return None

    async def close(self) -> None:
        self.closed += 1


def response(request: Any, status: int = 200, body: Any = COMPLETION) -> dict[str, Any]:
    return {"metadata": request["metadata"], "status_code": status, "body": body}


@contextlib.asynccontextmanager
async def connected(broker: FakeBroker, timeout_s: float = 60.0) -> AsyncIterator[MessageClient]:
    client = MessageClient(broker, broker, timeout_s=timeout_s, run="r")
    await client.open()
    try:
        yield client
    finally:
        await client.close()
        assert broker.opened == broker.closed, "a connection was left open"


async def until(is_true: Callable[[], bool]) -> None:
    """Turn the loop until it is; the test's own timeout is the deadline."""
    while not is_true():  # noqa: ASYNC110
        await asyncio.sleep(0)


def encoded(client: MessageClient, text: str = "hello") -> bytes:
    return client.request("POST", "/completions", msgspec.json.encode({"prompt": text}))


async def test_responses_are_matched_by_metadata_whatever_their_order():
    broker = FakeBroker(lambda _: [])
    held = broker.published
    async with connected(broker) as client:
        requests = [encoded(client, str(number)) for number in range(3)]
        sending = [asyncio.create_task(client.send(request)) for request in requests]
        await until(lambda: len(held) >= 3)
        for request in reversed(held):
            broker.deliver(response(request, body={"echo": request["body"]["prompt"]}))
        found = [await each for each in sending]
    assert [msgspec.json.decode(each.body) for each in found] == [{"echo": str(n)} for n in "012"]
    assert [request["path"] for request in held] == ["/v1/completions"] * 3
    assert len({request["metadata"][METADATA] for request in held}) == 3
    assert broker.acknowledged == 3


async def test_an_error_status_is_a_failure_with_the_engines_message():
    problem = {"error": {"message": "no such model"}}
    async with connected(FakeBroker(lambda one: [response(one, 404, problem)])) as client:
        found = await client.send(encoded(client))
    assert found.error == "status 404"
    assert "no such model" in found.error_message


@looptime
async def test_a_request_without_a_response_is_lost_and_a_late_response_is_no_duplicate():
    broker = FakeBroker(lambda _: [])
    async with connected(broker, timeout_s=5.0) as client:
        found = await client.send(encoded(client))
        broker.deliver(response(broker.published[0]))
        broker.deliver(response(broker.published[0]))
        await until(lambda: client.counts["duplicates"] >= 1)
        counts = dict(client.counts)
    assert found.error == "lost"
    assert asyncio.get_running_loop().time() == pytest.approx(5.0, abs=0.1)
    assert counts == {"lost": 1, "late": 1, "duplicates": 1, "foreign": 0}


async def test_duplicates_and_responses_of_other_runs_are_counted_and_acknowledged():
    broker = FakeBroker(lambda one: [response(one), response(one)])
    async with connected(broker) as client:
        await client.send(encoded(client))
        for metadata in ({METADATA: "other-0"}, {METADATA: "r-99"}, {METADATA: 7}, {}, None):
            broker.deliver({"metadata": metadata, "status_code": 200, "body": {}})
        broker.deliver(b"not JSON")
        await until(lambda: broker.acknowledged >= 8)
        counts = dict(client.counts)
    assert counts == {"lost": 0, "late": 0, "duplicates": 1, "foreign": 6}


@looptime
async def test_both_connections_are_opened_again_when_the_broker_comes_back():
    broker = FakeBroker(lambda one: [response(one)])
    async with connected(broker) as client:
        broker.down = BrokerUnavailable("is restarting")
        broker.cut()
        failed = [await client.send(encoded(client)) for _ in range(2)]
        await asyncio.sleep(60)
        broker.down = None
        await asyncio.sleep(10)
        found = await client.send(encoded(client))
        assert broker.opened == 4
    assert [each.error for each in failed] == ["broker unavailable"] * 2
    assert [each.error_message for each in failed] == ["is restarting", "reconnecting"]
    assert not found.error


async def test_a_broker_that_cannot_be_reached_is_an_error_before_anything_is_sent():
    broker = FakeBroker(lambda _: [])
    broker.down = BrokerUnavailable("refuses connections")
    client = MessageClient(broker, broker, timeout_s=1.0, run="r")
    with pytest.raises(EndpointError, match=r"--via: refuses connections"):
        await client.open()
    await client.close()


async def test_a_message_that_is_too_large_is_a_failure():
    broker = FakeBroker(lambda _: [])
    async with connected(broker) as client:
        broker.down = MessageTooLarge("at most 1 MB")
        found = await client.send(encoded(client))
    assert (found.error, found.error_message) == ("message too large", "at most 1 MB")


@looptime
async def test_memory_of_requests_without_a_response_is_bounded(monkeypatch):
    monkeypatch.setattr("kubeai.loadtest.message_client.GIVEN_UP_MAX_MESSAGES", 3)
    broker = FakeBroker(lambda _: [])
    async with connected(broker, timeout_s=1.0) as client:
        for _ in range(5):
            await client.send(encoded(client))
        assert len(client._given_up) == 3
        assert not client._waiting
        assert not client._ended_s
    assert GIVEN_UP_MAX_MESSAGES <= 1 << 20


async def test_more_messages_in_flight_than_the_limit_are_failures_and_not_sent(monkeypatch):
    monkeypatch.setattr("kubeai.loadtest.message_client.IN_FLIGHT_MAX_MESSAGES", 1)
    broker = FakeBroker(lambda _: [])
    async with connected(broker) as client:
        first = asyncio.create_task(client.send(encoded(client)))
        await asyncio.sleep(0)
        assert (await client.send(encoded(client))).error == "too many messages in flight"
        broker.deliver(response(broker.published[0]))
        assert not (await first).error
    assert len(broker.published) == 1


# -- loads -----------------------------------------------------------------------------------------

STREAM = MessageStream("nats://requests", "nats://responses")


def scenario(**fields: Any) -> Scenario:
    shape = Shape(conversations=6, turns=2, prompt_tokens=5, turn_tokens=5, think_s=0.0)
    defaults = {"url": "", "model": "m", "via": STREAM, "stream": False}
    return Scenario(
        **(defaults | {"traffic": Synthetic("chat", shape, 1), "load": ClosedLoop(2)} | fields)
    )


@pytest.mark.parametrize(
    "load",
    [ClosedLoop(2), RequestLoop(Arrivals(per_s=2000.0)), RequestLoop()],
    ids=["closed", "open", "at once"],
)
async def test_every_load_is_sent_by_message_and_measured(load):
    statuses = itertools.cycle([200, 200, 500])
    broker = FakeBroker(lambda one: [response(one, next(statuses))] * 2)
    async with connected(broker) as client:
        executor = Executor(scenario(load=load, requests_max=6), client)
        executor.prepare()
        await executor.run(0.0)
        await until(lambda: client.counts["duplicates"] >= 6)
        collector = Collector()
        collector.note(executor.take(last=True))
    assert len(collector.measurements) == 6
    assert {one.error for one in collector.measurements} <= {"", "status 500"}
    assert sum(not one.error for one in collector.measurements) == 4
    assert all(one.ended_s >= one.sent_s for one in collector.measurements)
    assert collector.message_counts == {"lost": 0, "late": 0, "duplicates": 6, "foreign": 0}
    assert {request["path"] for request in broker.published} == {"/v1/chat/completions"}
    assert all("stream" not in request["body"] for request in broker.published)


# -- options ---------------------------------------------------------------------------------------


def sending(**fields: Any) -> arguments.Sending:
    return arguments.Sending(**({"via": "nats://a", "via_responses": "nats://b"} | fields))


@pytest.mark.parametrize(
    ("given", "url", "model", "problem"),
    [
        (sending(via_responses=None), "", "m", "--via: requires --via-responses"),
        (sending(via=None), "http://x/v1", "m", "--via-responses: requires --via"),
        (sending(), "", "", "--via: requires --model"),
    ],
)
def test_both_topics_and_the_model_are_needed(given, url, model, problem):
    with pytest.raises(OptionError, match=problem):
        options.via(url, model, given)


def test_the_endpoint_may_be_given_instead_of_the_model():
    assert options.via("http://x/v1", "", sending()) == MessageStream("nats://a", "nats://b")
    assert options.via("", "m", sending()) == MessageStream("nats://a", "nats://b")
    assert options.via("http://x/v1", "m", arguments.Sending()) is None


@pytest.mark.parametrize(
    ("judging", "limits", "option"),
    [
        (arguments.Judging(goodput=["ttft:500"]), [], "--goodput"),
        (arguments.Judging(goodput=["e2el:2s tpot:5"]), [], "--goodput"),
        (arguments.Judging(percentile_metrics="e2el,itl"), [], "--percentile-metrics"),
        (arguments.Judging(), [Limit("ttft", "p99", most=5.0)], "--slo"),
    ],
)
def test_limits_on_times_within_a_stream_are_refused(judging, limits, option):
    with pytest.raises(OptionError, match=f"{option}: ttft, tpot, itl cannot be measured"):
        options.check_by_message(sending(), judging, 1, limits)
    options.check_by_message(arguments.Sending(), judging, 1, limits)


def test_limits_on_the_whole_latency_are_allowed():
    judging = arguments.Judging(goodput=["e2el:2s"])
    options.check_by_message(sending(), judging, 1, [Limit("e2el", "p99", most=5.0)])
    assert options.selection(judging, by_message=True).metrics == ("e2el",)


@pytest.mark.parametrize(
    ("fields", "processes", "option"),
    [({}, 2, "--processes"), ({"header": ["A: b"]}, 1, "--header")],
)
def test_options_that_messages_do_not_have_are_refused(fields, processes, option):
    with pytest.raises(OptionError, match=option):
        options.check_by_message(sending(**fields), arguments.Judging(), processes)
