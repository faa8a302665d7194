"""RabbitMQ against a real server, with classic and with quorum queues."""

import asyncio
import contextlib
import itertools
from typing import ClassVar

import aio_pika
import pytest
from brokers.conformance import ABSENCE_S, PASSWORD, Conformance, Pair, numbered
from brokers.servers import free_port
from brokers.servers.rabbitmq import MAX_MESSAGE_BYTES, RabbitServer
from brokers.subscriptions import CONFIG_PATH, assert_nothing_arrives, receive, subscribed, topic_of
from harness import until

from kubeai.brokers.base import REQUEST_MESSAGE_ID, BrokerUnavailable
from kubeai.brokers.urls import open_broker

NO_DEADLINE = "RabbitMQ redelivers only when a connection ends"
_numbers = itertools.count()
pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = RabbitServer(tmp_path_factory.mktemp("rabbitmq"))
    server.start()
    yield server
    server.kill()


@contextlib.asynccontextmanager
async def channel_of(server):
    """A channel of a client that knows nothing of KubeAI."""
    async with await aio_pika.connect(server.environment["RABBIT_SERVER_URL"]) as connection:
        yield await connection.channel()


class TestQuorumQueues(Conformance):
    kind: ClassVar = "quorum"
    too_large_bytes = MAX_MESSAGE_BYTES + 1
    keeps_acknowledgements = False  # AMQP does not confirm them
    variables = ("RABBIT_SERVER_URL",)
    bad_urls: ClassVar = {
        "rabbit://queue?prefetch=1": "unknown option prefetch",
        "rabbit://queue?prefetch_count=-1": "prefetch_count",
        "rabbit://exchange?key_name=": "key_name",
        "rabbit://": "names neither a queue nor an exchange",
    }
    unreachable: ClassVar = {
        "RABBIT_SERVER_URL": f"amqp://user:{PASSWORD}@127.0.0.1:{free_port()}/vhost"
    }
    cannot: ClassVar = {
        "extended_message_stays_beyond_the_deadline": NO_DEADLINE,
        "message_comes_again_after_its_deadline": NO_DEADLINE,
    }

    async def make(self, server):
        name = f"{self.kind}-{next(_numbers)}"
        async with channel_of(server) as channel:
            exchange = await channel.declare_exchange(
                name, aio_pika.ExchangeType.FANOUT, durable=True
            )
            queue = await channel.declare_queue(
                name, durable=True, arguments={"x-queue-type": self.kind}
            )
            await queue.bind(exchange)
        return Pair(f"rabbit://{name}", f"rabbit://{name}")

    async def test_killed_broker_is_noticed_and_loses_nothing(self, server, pair, environment):
        if self.kind == "quorum":
            # RabbitMQ 3.10 registers a new quorum queue on its disk up to 3 minutes later, or when
            # it stops. A node that is killed earlier loses the queue.
            server.stop()
            server.start()
        await super().test_killed_broker_is_noticed_and_loses_nothing(server, pair, environment)


class TestClassicQueues(TestQuorumQueues):
    kind = "classic"
    test_silent_broker_is_noticed = None  # same as with quorum queues
    cannot: ClassVar = TestQuorumQueues.cannot | {
        "deliveries_are_counted": "a classic queue only marks a message as redelivered",
    }


@pytest.fixture
async def queue(server):
    """The name of a new queue, and of a topic exchange that it is bound to by the key "key"."""
    name = f"queue-{next(_numbers)}"
    async with channel_of(server) as channel:
        exchange = await channel.declare_exchange(name, aio_pika.ExchangeType.TOPIC)
        await (await channel.declare_queue(name)).bind(exchange, "key")
    return name


class TestOptions:
    @pytest.mark.parametrize("method", ["subscribe", "open_topic"])
    async def test_missing_queue_or_exchange_is_named(self, server, method):
        broker = open_broker("rabbit://missing", CONFIG_PATH, server.environment)
        with pytest.raises(BrokerUnavailable, match=r"NOT_FOUND.*'missing'"):
            await getattr(broker, method)()

    async def test_login_is_refused_without_showing_it(self, server):
        url = f"amqp://user:{PASSWORD}@127.0.0.1:{server.port}"
        broker = open_broker("rabbit://queue", CONFIG_PATH, {"RABBIT_SERVER_URL": url})
        with pytest.raises(BrokerUnavailable, match="ACCESS_REFUSED") as raised:
            await broker.subscribe()
        assert PASSWORD not in str(raised.value)

    async def test_unroutable_message_is_not_confirmed(self, server, queue):
        async with topic_of(f"rabbit://{queue}", server.environment) as topic:
            with pytest.raises(BrokerUnavailable, match="routes the routing key '' to no queue"):
                await topic.publish(b"{}", {})

    async def test_attribute_becomes_the_routing_key(self, server, queue):
        url = f"rabbit://{queue}?key_name=route"
        async with (
            topic_of(url, server.environment) as topic,
            subscribed(url, server.environment) as subscription,
        ):
            await topic.publish(b"{}", {"route": "key", REQUEST_MESSAGE_ID: "1"})
            (delivery,) = await receive(subscription, 1)
            assert delivery.attributes == {REQUEST_MESSAGE_ID: "1"}
            message: aio_pika.abc.AbstractIncomingMessage = vars(delivery)["message"]
            assert message.correlation_id == "1"
            assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT

    async def test_id_is_the_message_id_and_attributes_are_texts(self, server, queue):
        message = aio_pika.Message(b"{}", message_id="mine", headers={"number": 1})
        async with channel_of(server) as channel:
            await channel.default_exchange.publish(message, queue)
        async with subscribed(f"rabbit://{queue}", server.environment) as subscription:
            (delivery,) = await receive(subscription, 1)
        assert delivery.id == "mine"
        assert delivery.attributes == {"number": "1"}

    async def test_prefetch_count_limits_what_a_process_has_in_hand(self, server, queue):
        async with (
            channel_of(server) as channel,
            subscribed(f"rabbit://{queue}?prefetch_count=2", server.environment) as subscription,
        ):
            for body in numbered(5):
                await channel.default_exchange.publish(aio_pika.Message(body), queue)
            deliveries = [*await receive(subscription, 1), *await receive(subscription, 1)]
            await assert_nothing_arrives(subscription, ABSENCE_S)
            for delivery in deliveries:
                await delivery.acknowledge()
            await receive(subscription, 2)
            await assert_nothing_arrives(subscription, ABSENCE_S)
            assert await subscription.lag() == 1

    async def test_deleted_queue_ends_the_subscription(self, server, queue):
        async with (
            channel_of(server) as channel,
            subscribed(f"rabbit://{queue}", server.environment) as subscription,
        ):
            waiting = asyncio.create_task(subscription.receive(1))
            await until("it consumes", consumers_of(channel, queue))
            await channel.queue_delete(queue)
            with pytest.raises(BrokerUnavailable, match=f"cancelled the consumer of queue {queue}"):
                await waiting

    async def test_channel_that_the_server_closes_ends_the_subscription(self, server, queue):
        """As it does after consumer_timeout."""
        async with (
            channel_of(server) as channel,
            subscribed(f"rabbit://{queue}", server.environment) as subscription,
        ):
            await channel.default_exchange.publish(aio_pika.Message(b"{}"), queue)
            (delivery,) = await receive(subscription, 1)
            message: aio_pika.abc.AbstractIncomingMessage = vars(delivery)["message"]
            await message.channel.basic_ack(message.delivery_tag + 1)
            with pytest.raises(BrokerUnavailable, match="PRECONDITION_FAILED"):
                await subscription.receive(1)
            with pytest.raises(BrokerUnavailable):
                await delivery.acknowledge()


def consumers_of(channel, queue):
    async def check() -> bool:
        declared = await channel.declare_queue(queue, passive=True)
        return declared.declaration_result.consumer_count == 1

    return check
