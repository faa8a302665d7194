"""Service Bus against an AMQP 1.0 peer. `servers/amqp_peer.py` says what that does not prove."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from typing import Any, ClassVar

import pytest
from azure.servicebus.aio import ServiceBusClient
from azure.servicebus.amqp import AmqpAnnotatedMessage
from brokers.conformance import PASSWORD, RECEIVES_MANY, Conformance, Pair
from brokers.servers.servicebus import ServiceBusServer
from brokers.subscriptions import receive, receive_one, subscribed, topic_of
from structlog.testing import capture_logs

from kubeai.brokers.base import REQUEST_MESSAGE_ID, BrokerUnavailable

broker_test = pytest.mark.broker
numbers = itertools.count()
LOCK_S, EXTENDED_LOCK_S = 3, 6  # the client extends each 5 s / 3


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    queues = [f"short-{number},lock_s={LOCK_S}" for number in range(40)]
    queues += [f"extended,lock_s={EXTENDED_LOCK_S}", "brief,lock_s=3", "with-sessions,sessions=1"]
    queues += [f"topic/Subscriptions/{name}" for name in ("one", "other")]
    server = ServiceBusServer(tmp_path_factory.mktemp("servicebus"), *queues)
    server.start()
    yield server
    server.end()


class TestServiceBus(Conformance):
    cannot: ClassVar = {
        "lag_counts_waiting_messages": "the service tells only clients that may manage the entity",
    }
    too_large_bytes = (1 << 20) + 1
    redelivery_s = LOCK_S + 2
    bad_urls: ClassVar = {
        "azuresb://": "names no topic",
        "azuresb://topic?subscription=": "empty option subscription",
        "azuresb://topic?session=a": "unknown option session",
        "azuresb://topic?subscription=a&listener_timeout=2": "listener_timeout",
        "azuresb://topic?subscription=a&listener_timeout=0s": "listener_timeout",
        "azuresb://topic?subscription=a&max_recv_batch_size=0": "max_recv_batch_size",
    }
    variables = ("SERVICEBUS_CONNECTION_STRING",)
    unreachable: ClassVar = {
        "SERVICEBUS_CONNECTION_STRING": "Endpoint=sb://127.0.0.1:9;SharedAccessKeyName=a;"
        f"SharedAccessKey={PASSWORD};UseDevelopmentEmulator=true"
    }

    @pytest.fixture
    def pair(self, server, request):
        name = request.function.__name__
        if name == "test_extended_message_stays_beyond_the_deadline":
            return Pair("azuresb://extended", "azuresb://extended")
        url = f"azuresb://{'long' if name in RECEIVES_MANY else 'short'}-{next(numbers)}"
        return Pair(url, url)


# -- what only Service Bus has ---------------------------------------------------------------------


@pytest.fixture
def url():
    return f"azuresb://own-{next(numbers)}"


@contextlib.asynccontextmanager
async def library(server: ServiceBusServer):
    """Microsoft's own client, as other programs use it."""
    text = server.environment["SERVICEBUS_CONNECTION_STRING"]
    async with ServiceBusClient.from_connection_string(text) as client:
        yield client


@broker_test
async def test_message_without_an_id_is_known_by_its_sequence_number(server, url):
    async with library(server) as client, subscribed(url, server.environment) as subscription:
        async with client.get_queue_sender(url.removeprefix("azuresb://")) as sender:
            plain = AmqpAnnotatedMessage(data_body=[b"{}"])
            await sender.send_messages(plain)
        (delivery,) = await subscription.receive(1)
        assert delivery.id == "1"
        assert delivery.body == b"{}"
        await delivery.acknowledge()


@broker_test
async def test_body_may_be_a_text_and_properties_of_other_types_are_left_out(server, url):
    async with library(server) as client, subscribed(url, server.environment) as subscription:
        async with client.get_queue_sender(url.removeprefix("azuresb://")) as sender:
            properties = {"text": "a", "number": 1}
            await sender.send_messages(
                AmqpAnnotatedMessage(value_body='{"é": 1}', application_properties=properties)
            )
            await sender.send_messages(AmqpAnnotatedMessage(value_body={"a": "b"}))
        text, structure = await receive(subscription, 2)
        assert text.body == '{"é": 1}'.encode()
        assert text.attributes == {"text": "a"}
        assert structure.body == b""
        await asyncio.gather(text.acknowledge(), structure.acknowledge())


@broker_test
async def test_response_has_the_id_of_its_request(server, url):
    async with (
        subscribed(url, server.environment) as subscription,
        topic_of(url, server.environment) as topic,
    ):
        await topic.publish(b"{}", {REQUEST_MESSAGE_ID: "of-the-request"})
        await topic.publish(b"{}", {REQUEST_MESSAGE_ID: "x" * 129})
        first, second = await receive(subscription, 2)
        assert first.id == "of-the-request"
        assert second.id != "x" * 129
        assert second.attributes == {REQUEST_MESSAGE_ID: "x" * 129}


@broker_test
async def test_each_subscription_gets_what_is_published_to_the_topic(server):
    one, other = "azuresb://topic?subscription=one", "azuresb://topic?subscription=other"
    async with (
        subscribed(one, server.environment) as first,
        subscribed(other, server.environment) as second,
        topic_of("azuresb://topic", server.environment) as topic,
    ):
        await topic.publish(b"{}", {})
        for subscription in (first, second):
            (delivery,) = await subscription.receive(1)
            await delivery.acknowledge()


@broker_test
async def test_release_counts_as_a_failed_delivery(server, url):
    async with (
        subscribed(url, server.environment) as subscription,
        topic_of(url, server.environment) as topic,
    ):
        await topic.publish(b"{}", {})
        for count in (1, 2, 3):
            (delivery,) = await subscription.receive(1)
            assert delivery.deliveries == count
            await delivery.release()


@broker_test
async def test_lost_lock_is_reported_and_does_no_harm(server):
    url = "azuresb://brief"
    async with (
        subscribed(url, server.environment) as subscription,
        topic_of(url, server.environment) as topic,
    ):
        await topic.publish(b"{}", {})
        (lost,) = await subscription.receive(1)
        (again,) = await subscription.receive(1)  # after the lock has expired
        assert again.id == lost.id
        with capture_logs() as logs:
            await lost.acknowledge()
            await lost.release()
            await lost.extend()
        assert [entry["event"] for entry in logs] == ["lost a message of Service Bus"] * 3
        await again.extend()
        with capture_logs() as logs:
            await again.acknowledge()
        assert logs == []


@broker_test
async def test_lock_that_the_service_has_taken_back_is_reported(server, url):
    """The lock is not over by the client's clock, so the service has to say it."""
    async with (
        subscribed(url, server.environment) as subscription,
        topic_of(url, server.environment) as topic,
    ):
        await topic.publish(b"{}", {})
        (delivery,) = await subscription.receive(1)
        server.break_locks()
        (again,) = await subscription.receive(1)
        with capture_logs() as logs:
            await delivery.acknowledge()
        assert [entry["event"] for entry in logs] == ["lost a message of Service Bus"]
        await again.acknowledge()


@broker_test
async def test_lock_is_renewed_only_when_half_of_it_is_over(server, url):
    async with (
        subscribed(url, server.environment) as subscription,
        topic_of(url, server.environment) as topic,
    ):
        await topic.publish(b"{}", {})
        delivery: Any = await receive_one(subscription)
        end = delivery._message.locked_until_utc
        await delivery.extend()
        assert delivery._message.locked_until_utc == end
        delivery._lock_s *= 4  # as if most of it were over
        await delivery.extend()
        assert delivery._message.locked_until_utc > end


@broker_test
@pytest.mark.parametrize(
    ("name", "reason"), [("missing", "is not there"), ("with-sessions", "requires sessions")]
)
async def test_entity_that_is_missing_or_has_sessions_is_unavailable(server, name, reason):
    with pytest.raises(BrokerUnavailable, match=reason):
        async with subscribed(f"azuresb://{name}", server.environment) as subscription:
            await subscription.receive(1)


@broker_test
async def test_publishing_to_an_entity_that_is_missing_fails(server):
    with pytest.raises(BrokerUnavailable, match="Service Bus: missing: "):
        async with topic_of("azuresb://missing", server.environment) as topic:
            await topic.publish(b"{}", {})


@broker_test
async def test_many_messages_that_fit_into_no_single_batch_are_all_sent(server, url):
    body = b"x" * 300_000
    async with (
        subscribed(url, server.environment) as subscription,
        topic_of(url, server.environment) as topic,
    ):
        await asyncio.gather(*(topic.publish(body, {}) for _ in range(10)))
        deliveries = await receive(subscription, 10)
        assert [delivery.body for delivery in deliveries] == [body] * 10
        await asyncio.gather(*(delivery.acknowledge() for delivery in deliveries))
