"""Pub/Sub, against Google's fake (pstest), behind a proxy.

The fake keeps everything in memory. Where another broker is killed and started again, here the
network is cut and healed. It proves nothing about exactly-once delivery, credentials and limits of
the real service; tests/unit/brokers/pubsub/test_broker.py covers what KubeAI does about them.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import ClassVar

import grpc
import pytest
from brokers.conformance import ABSENCE_S, RECEIVES_MANY, Conformance, Pair
from brokers.servers.proxy import Proxy
from brokers.servers.pstest import PstestServer
from brokers.subscriptions import assert_nothing_arrives, receive, receive_one, subscribed, topic_of
from google.pubsub_v1 import PublisherAsyncClient, SubscriberAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport

from kubeai.brokers.pubsub.broker import MESSAGE_MAX_BYTES

ACK_DEADLINE_S, LONG_ACK_DEADLINE_S = 2, 20  # the second for RECEIVES_MANY
numbers = itertools.count()


class Behind:
    """The fake behind a proxy, with the methods of a server that is killed and suspended."""

    def __init__(self, proxy: Proxy) -> None:
        self.environment = {"PUBSUB_EMULATOR_HOST": f"127.0.0.1:{proxy.port}"}
        self.kill, self.start = proxy.cut, proxy.heal
        self.suspend, self.resume = proxy.stall, proxy.heal


@pytest.fixture(scope="module")
def pstest(tmp_path_factory):
    server = PstestServer(tmp_path_factory.mktemp("pstest"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
async def server(pstest):
    proxy = Proxy(pstest.port)
    await proxy.start()
    yield Behind(proxy)
    await proxy.close()


async def create(port: int, **settings) -> tuple[str, str]:
    """The paths of a new topic and its subscription."""
    name = f"requests-{next(numbers)}"
    topic, dead = f"projects/tests/topics/{name}", f"projects/tests/topics/{name}-dead"
    subscription = f"projects/tests/subscriptions/{name}"
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        publisher = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))
        subscriber = SubscriberAsyncClient(
            transport=SubscriberGrpcAsyncIOTransport(channel=channel)
        )
        for path in (topic, dead):
            await publisher.create_topic(request={"name": path})
        # Only with a dead-letter policy are deliveries counted.
        policy = {"dead_letter_topic": dead, "max_delivery_attempts": 100}
        await subscriber.create_subscription(
            request={
                "name": subscription,
                "topic": topic,
                "ack_deadline_seconds": ACK_DEADLINE_S,
                "dead_letter_policy": policy,
                **settings,
            }
        )
    return topic, subscription


class TestPubSub(Conformance):
    cannot: ClassVar = {
        "lag_counts_waiting_messages": "Pub/Sub does not report it",
        "missing_variables_are_named": "without variables, credentials may come from the machine",
    }
    body_bytes = 3_900_000  # the fake takes 4 MiB; the real service 10 MB
    too_large_bytes = MESSAGE_MAX_BYTES + 1
    redelivery_s = ACK_DEADLINE_S + 1.0
    bad_urls: ClassVar = {
        "gcppubsub://": "projects/PROJECT/topics/TOPIC",
        "gcppubsub://project": "projects/PROJECT/topics/TOPIC",
        "gcppubsub://projects/p/queues/q": "projects/PROJECT/topics/TOPIC",
        "gcppubsub://p/s?max_recv_batch_size=0": "max_recv_batch_size=0",
        "gcppubsub://p/s?max_recv_batch_size=1001": "1 to 1000",
        "gcppubsub://p/t?max_send_batch_size=x": "max_send_batch_size=x",
        "gcppubsub://p/s?nacklazy=yes": "nacklazy=yes",
        "gcppubsub://p/s?order=1": "order",
    }
    unreachable: ClassVar = {"PUBSUB_EMULATOR_HOST": "127.0.0.1:1"}

    @pytest.fixture
    async def pair(self, server, request):
        if request.function.__name__ in RECEIVES_MANY:
            return await self.make(server, ack_deadline_seconds=LONG_ACK_DEADLINE_S)
        return await self.make(server)

    async def make(self, server, **settings):
        port = int(server.environment["PUBSUB_EMULATOR_HOST"].rpartition(":")[2])
        topic, subscription = await create(port, **settings)
        return Pair(f"gcppubsub://{topic}", f"gcppubsub://{subscription}")

    async def test_short_urls_name_the_same(self, pair, environment):
        topic = pair.topic.replace("projects/tests/topics", "tests")
        subscription = pair.subscription.replace("projects/tests/subscriptions", "tests")
        async with (
            topic_of(topic, environment) as publisher,
            subscribed(subscription, environment) as subscriber,
        ):
            await publisher.publish(b"{}", {})
            await (await receive_one(subscriber)).acknowledge()

    async def test_lazily_released_message_comes_again_after_its_deadline(self, pair, environment):
        async with (
            topic_of(pair.topic, environment) as topic,
            subscribed(f"{pair.subscription}?nacklazy=true", environment) as subscription,
        ):
            await topic.publish(b"{}", {})
            first = await receive_one(subscription)
            await first.release()
            await assert_nothing_arrives(subscription, ABSENCE_S)
            second = await receive_one(subscription)
            assert second.id == first.id
            await second.acknowledge()

    async def test_batch_size_limits_what_is_received_at_once(self, pair, environment):
        async with (
            topic_of(pair.topic, environment) as topic,
            subscribed(f"{pair.subscription}?max_recv_batch_size=2", environment) as subscription,
        ):
            await asyncio.gather(*(topic.publish(b"{}", {}) for _ in range(5)))
            assert len(await subscription.receive(5)) <= 2

    async def test_short_cut_of_the_network_is_bridged(self, server, pair, environment):
        async with (
            topic_of(pair.topic, environment) as topic,
            subscribed(pair.subscription, environment) as subscription,
        ):
            await topic.publish(b'{"n": 1}', {})
            (delivery,) = await receive(subscription, 1)
            server.kill()
            acknowledging = asyncio.create_task(delivery.acknowledge())
            publishing = asyncio.create_task(topic.publish(b'{"n": 2}', {}))
            server.start()
            await asyncio.gather(acknowledging, publishing)
            assert (await receive_one(subscription)).body == b'{"n": 2}'
