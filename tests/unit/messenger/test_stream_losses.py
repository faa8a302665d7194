"""Losses of the broker, and messages that it delivers again, on virtual time."""

import asyncio

import pytest
from fakes.broker import Connection, MemoryBroker, faults
from fakes.messenger import Scene, ok
from fakes.time import FAKE_TIME

from kubeai.brokers.base import BrokerUnavailable
from kubeai.messenger import stream as streams

pytestmark = FAKE_TIME


def now():
    return asyncio.get_running_loop().time()


async def test_a_lost_connection_costs_a_redelivery_but_no_second_request():
    async with Scene(MemoryBroker()).running() as scene:
        cold = scene.gateway.cold["cold"] = asyncio.Event()
        message = scene.ask("cold")
        await scene.until("it is held", lambda: scene.stream.report().held)
        scene.broker.cut()
        await scene.until("it came again", lambda: scene.stream.report().redelivered == 1)
        cold.set()
        await scene.done(1)
        assert len(scene.gateway.requests) == 1
        assert scene.answered == {message: 1}
        await asyncio.sleep(60)
        assert scene.stream.report().requests.connections == 2, "the old delivery is forgotten"


async def test_a_response_that_was_computed_while_the_broker_was_away_is_published_then():
    away = False

    def fault(operation):
        if away:
            raise BrokerUnavailable("away")

    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.fault = fault
        scene.ask()
        await scene.until("it is served", lambda: scene.gateway.serving)
        away = True
        scene.broker.cut()
        await asyncio.sleep(3600)
        assert not scene.answers
        report = scene.stream.report()
        assert not report.requests.connected
        assert not report.responses.connected
        assert report.requests.problem == "away"
        away = False
        await scene.done(1, within_s=60)
        assert len(scene.gateway.requests) == 1


async def test_an_idle_stream_reports_that_the_broker_has_gone_on_both_sides():
    def away(_):
        raise BrokerUnavailable("away")

    async with Scene(MemoryBroker()).running() as scene:
        await scene.until("it is connected", lambda: scene.stream.report().responses.connected)
        scene.broker.fault = away
        scene.broker.cut()
        await asyncio.sleep(5)
        report = scene.stream.report()
        assert not report.requests.connected
        assert (report.responses.connected, report.responses.problem) == (False, "away")
        scene.broker.fault = lambda _: None
        scene.ask()
        await scene.done(1, within_s=60)
        assert scene.stream.report().publish_failures == 0


@pytest.mark.parametrize(
    "operation",
    ["subscribe", "open_topic", "receive", "publish", "confirm", "acknowledge", "extend", "lag"],
)
async def test_a_cancellation_that_a_library_makes_up_is_an_error_like_others(operation):
    """aiokafka, for one, awaits a task that it has itself cancelled."""
    left = [operation] * 3

    def fault(current):
        if current in left:
            left.remove(current)
            raise asyncio.CancelledError

    broker = MemoryBroker(ack_deadline_s=3)
    broker.fault = fault
    async with Scene(broker).running() as scene:
        scene.gateway.serves["slow"] = lambda *_: asyncio.sleep(60, ok())
        for number in range(5):
            scene.ask("slow", number)
        await scene.done(5, within_s=600)
        assert not left


async def test_a_cancellation_that_a_library_makes_up_in_close_is_ignored(monkeypatch):
    async def close(connection):
        connection.end()
        raise asyncio.CancelledError

    monkeypatch.setattr(Connection, "close", close)
    async with Scene(MemoryBroker()).running() as scene:
        for number in range(3):
            scene.ask(prompt=number)
            await scene.done(number + 1, within_s=60)
            scene.broker.cut()


async def test_a_message_whose_acknowledgement_was_lost_is_not_served_again():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.fault = faults("acknowledge")
        scene.ask()
        await scene.done(1)
        await scene.until("it came again", lambda: scene.stream.report().received == 2)
        await scene.until("it is acknowledged", lambda: scene.broker.is_empty("requests"))
        assert len(scene.gateway.requests) == 1
        assert list(scene.answered.values()) == [1]


async def test_a_lost_confirmation_leads_to_a_second_response_with_the_same_id():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.fault = faults("confirm")
        message = scene.ask()
        await scene.until("it is answered twice", lambda: scene.answered[message] == 2)
        await scene.until("it is acknowledged", lambda: scene.broker.is_empty("requests"))
        assert len(scene.gateway.requests) == 1


async def test_a_message_is_not_acknowledged_before_its_response_is_confirmed():
    async with Scene(MemoryBroker()).running() as scene:
        scene.broker.fault = faults(*["publish"] * 20)
        scene.ask()
        while not scene.answers:
            assert not scene.broker.is_empty("requests")
            await asyncio.sleep(0.1)
        assert scene.stream.report().publish_failures == 20
        await scene.done(1)


async def test_nothing_is_received_while_responses_cannot_be_published():
    def fault(operation):
        if operation == "open_topic":
            raise BrokerUnavailable("no such topic")

    broker = MemoryBroker()
    broker.fault = fault
    async with Scene(broker).running() as scene:
        scene.ask()
        await asyncio.sleep(600)
        assert len(broker.queue("requests").waiting) == 1
        broker.fault = lambda _: None
        await scene.done(1, within_s=60)


async def test_it_reconnects_with_back_off_for_ever():
    attempts = []

    def fault(operation):
        if operation == "subscribe":
            attempts.append(now())
            raise BrokerUnavailable("away")

    broker = MemoryBroker()
    broker.fault = fault
    async with Scene(broker).running() as scene:
        await asyncio.sleep(3600)
        assert 3600 / 30 <= len(attempts) < 300
        broker.fault = lambda _: None
        scene.ask()
        await scene.done(1, within_s=60)


async def test_a_librarys_own_exception_is_survived_and_its_text_is_not_shown():
    def fault(operation):
        if operation in ("subscribe", "open_topic"):
            raise ValueError("password=secret")

    broker = MemoryBroker()
    broker.fault = fault
    async with Scene(broker).running() as scene:
        scene.ask()
        await asyncio.sleep(10)
        assert scene.stream.report().requests.problem == "ValueError"
        broker.fault = lambda _: None
        await scene.done(1)


async def test_an_answered_id_that_is_used_again_is_a_new_message():
    async with Scene(MemoryBroker()).running() as scene:
        for _ in range(2):
            scene.broker.put("requests", b'{"body":{"model":"m"}}', id="same")
            await scene.until("it is acknowledged", lambda: scene.broker.is_empty("requests"))
        assert scene.answered == {"same": 2}


async def test_an_id_that_is_used_again_while_it_is_in_hand_is_a_new_message():
    async with Scene(MemoryBroker()).running() as scene:
        for _ in range(2):
            scene.broker.put("requests", b'{"body":{"model":"m"}}', id="same")
        await scene.until("both are answered", lambda: scene.answered == {"same": 2})
        await scene.until("both are acknowledged", lambda: scene.broker.is_empty("requests"))


async def test_equal_messages_of_a_broker_without_ids_are_all_answered():
    async with Scene(MemoryBroker(unique_ids=False)).running() as scene:
        for _ in range(3):
            scene.broker.put("requests", b'{"body":{"model":"m"}}', id="hash")
        await scene.until("all are answered", lambda: scene.answered["hash"] == 3)
        await scene.until("all are acknowledged", lambda: scene.broker.is_empty("requests"))


async def test_a_redelivery_is_recognised_where_the_broker_does_not_count():
    async with Scene(MemoryBroker(counts=False)).running() as scene:
        scene.broker.fault = faults("acknowledge")
        scene.ask()
        await scene.until("it came again", lambda: scene.stream.report().received == 2)
        await scene.until("it is acknowledged", lambda: scene.broker.is_empty("requests"))
        assert len(scene.gateway.requests) == 1


async def test_the_memory_of_answered_messages_is_limited(monkeypatch):
    monkeypatch.setattr(streams, "ANSWERED_MAX_COUNT", 5)
    async with Scene(MemoryBroker()).running() as scene:
        for number in range(20):
            scene.ask(prompt=number)
        await scene.done(20)
        assert len(scene.stream._answered) == 5
