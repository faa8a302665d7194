"""Kafka, against a real broker in KRaft mode."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from brokers.conformance import PASSWORD, Conformance, Pair, numbered
from brokers.servers.kafka import MESSAGE_MAX_BYTES, SASL_PASSWORD, KafkaServer
from brokers.subscriptions import (
    CONFIG_PATH,
    WAIT_S,
    assert_nothing_arrives,
    receive,
    receive_one,
    subscribed,
    topic_of,
)
from harness import until

from kubeai.brokers.base import BrokerUnavailable, Delivery, Subscription
from kubeai.brokers.kafka import progress
from kubeai.brokers.urls import open_broker
from kubeai.errors import ConfigError

names = (f"requests-{number}" for number in itertools.count())


async def create_topic(server: KafkaServer, partitions: int = 2) -> str:
    """A new topic's name."""
    name = next(names)
    admin = AIOKafkaAdminClient(bootstrap_servers=server.environment["KAFKA_BROKERS"])
    await admin.start()

    async def created() -> bool:
        await admin.create_topics([NewTopic(name, partitions, 1)])
        (topic,) = [each for each in await admin.describe_topics() if each["topic"] == name] or [{}]
        leaders = [each["leader"] for each in topic.get("partitions", ())]
        return len(leaders) == partitions and min(leaders) >= 0

    try:
        # A broker that was suspended does not take part for a while.
        await until(f"{name} has leaders", created, WAIT_S)
    finally:
        await admin.close()
    return name


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = KafkaServer(tmp_path_factory.mktemp("kafka"))
    server.start()
    yield server
    server.stop()


class TestKafka(Conformance):
    cannot: ClassVar = {
        "extended_message_stays_beyond_the_deadline": "Kafka has no deadline",
        "message_comes_again_after_its_deadline": "Kafka has no deadline",
        "count_max_leaves_the_rest_to_others": "the messages of a partition have one receiver",
    }
    too_large_bytes = MESSAGE_MAX_BYTES + 1
    bad_urls: ClassVar = {
        "kafka://": "has no name",
        "kafka://group?topic=a&topic=": "names the topic ''",
        "kafka://group?topic=a&offset=middle": "offset=middle",
        "kafka://group?topic=a&offset=newest&offset=oldest": "offset twice",
        "kafka://group?topic=a&partition=1": "partition",
        "kafka://group?topic=a&key_name=b": "key_name",
        "kafka://topic?key_name=": "key_name",
        "kafka://a/topic": "names the topic 'a/topic'",
    }
    variables = ("KAFKA_BROKERS",)
    unreachable: ClassVar = {
        "KAFKA_BROKERS": "127.0.0.1:1",
        "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
        "KAFKA_SASL_USERNAME": "kubeai",
        "KAFKA_SASL_PASSWORD": PASSWORD,
    }

    async def make(self, server):
        topic = await create_topic(server)
        return Pair(f"kafka://{topic}", f"kafka://group-{topic}?topic={topic}&offset=oldest")


# -- what only Kafka has ---------------------------------------------------------------------------

pytestmark = [pytest.mark.broker, pytest.mark.timeout(240)]


@pytest.fixture
def environment(server):
    return server.environment


@contextlib.asynccontextmanager
async def admin_of(server: KafkaServer) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=server.environment["KAFKA_BROKERS"])
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


def partition_of(delivery: Delivery) -> str:
    """The partition that a message's id names."""
    return delivery.id.rsplit("/", 1)[0]


async def receive_of_both_partitions(subscription: Subscription) -> list[Delivery]:
    """Receive until there is a message of each of two partitions."""
    deliveries = []
    while len({partition_of(delivery) for delivery in deliveries}) < 2:
        deliveries += await receive(subscription, 1)
    return deliveries


async def publish_all(url: str, environment: dict[str, str], bodies: list[bytes]) -> None:
    async with topic_of(url, environment) as topic:
        await asyncio.gather(*(topic.publish(body, {}) for body in bodies))


async def test_acknowledgements_out_of_order_survive_a_new_subscription(server, environment):
    topic = await create_topic(server, 1)
    url = f"kafka://group-{topic}?topic={topic}&offset=oldest"
    bodies = numbered(10)
    await publish_all(f"kafka://{topic}", environment, bodies)
    async with subscribed(url, environment) as subscription:
        deliveries = await receive(subscription, 10)
        for at in (1, 2, 5, 9):
            await deliveries[at].acknowledge()
    async with subscribed(url, environment) as subscription:
        again = await receive(subscription, 6)
        assert {each.id for each in again} == {deliveries[at].id for at in (0, 3, 4, 6, 7, 8)}
        assert {each.deliveries for each in again} == {2}
        await asyncio.gather(*(each.acknowledge() for each in again))
        assert await subscription.lag() == 0
    async with subscribed(url, environment) as subscription:
        await assert_nothing_arrives(subscription, 1.0)


async def test_one_slow_message_holds_up_its_own_partition_only_after_a_limit(
    server, environment, monkeypatch
):
    monkeypatch.setattr(progress, "WINDOW_MAX_COUNT", 10)
    topic = await create_topic(server, 2)
    url = f"kafka://group-{topic}?topic={topic}&offset=oldest"
    await publish_all(f"kafka://{topic}", environment, numbered(200))
    async with subscribed(url, environment) as subscription:
        slow = await receive_one(subscription)
        counts = {partition_of(slow): 1}
        async with asyncio.timeout(WAIT_S):
            # The other partition has about 100 messages.
            while sum(counts.values()) < 60 or counts[partition_of(slow)] < 10:
                for delivery in await subscription.receive(3):
                    key = partition_of(delivery)
                    counts[key] = counts.get(key, 0) + 1
                    await delivery.acknowledge()
        assert 10 <= counts[partition_of(slow)] <= 12  # the last call may have returned three
        await slow.acknowledge()
        for delivery in await receive(subscription, 200 - sum(counts.values())):
            await delivery.acknowledge()
        assert await subscription.lag() == 0


async def test_messages_in_hand_of_partitions_that_stay_remain_ours(server, environment):
    topic = await create_topic(server, 2)
    url = f"kafka://group-{topic}?topic={topic}&offset=oldest"
    await publish_all(f"kafka://{topic}", environment, numbered(20))
    async with subscribed(url, environment) as one:
        mine = await receive_of_both_partitions(one)
        mine += await receive(one, 20 - len(mine))
        async with subscribed(url, environment) as two:
            moved = await receive_one(two)
            stayed = [each for each in mine if partition_of(each) != partition_of(moved)]
            gone = [each for each in mine if partition_of(each) == partition_of(moved)]
            assert stayed
            assert moved.id in {each.id for each in gone}
            again = [moved, *await receive(two, len(gone) - 1)]
            assert {each.id for each in again} == {each.id for each in gone}
            # No effect, and no error: the connection is still there.
            await gone[0].acknowledge()
            await gone[1].release()
            await asyncio.gather(*(each.acknowledge() for each in (*stayed, *again)))
            assert await one.lag() == 0
    async with subscribed(url, environment) as three:
        await assert_nothing_arrives(three, 1.0)


async def test_consumers_that_come_and_go_under_load_lose_nothing(server, environment):
    topic_name = await create_topic(server, 4)
    url = f"kafka://group-{topic_name}?topic={topic_name}&offset=oldest"
    bodies = numbered(400)
    done: list[bytes] = []
    shuffled = random.Random(1)

    async def consume(subscription: Subscription) -> None:
        while True:
            deliveries = await subscription.receive(4)
            shuffled.shuffle(deliveries)
            for delivery in deliveries:
                done.append(delivery.body)  # first, because the acknowledgement may be cancelled
                await delivery.acknowledge()

    async def come_and_go() -> None:
        for _ in range(3):
            async with subscribed(url, environment) as subscription:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await consume(subscription)

    async with subscribed(url, environment) as steady:
        consuming = asyncio.create_task(consume(steady))
        others = asyncio.gather(come_and_go(), come_and_go())
        try:
            async with topic_of(f"kafka://{topic_name}", environment) as topic:
                for body in bodies:
                    await topic.publish(body, {})
            await others
            await until(
                "all are done", lambda: set(done) == set(bodies) or consuming.done(), WAIT_S
            )
            assert not consuming.done()
            assert await steady.lag() == 0
        finally:
            others.cancel()
            consuming.cancel()
            await asyncio.gather(others, consuming, return_exceptions=True)
    assert len(done) < 1.5 * len(bodies)  # few come twice


async def test_broker_that_stands_still_for_a_moment_is_bridged(server, environment):
    topic_name = await create_topic(server, 1)
    url = f"kafka://group-{topic_name}?topic={topic_name}&offset=oldest"
    async with (
        topic_of(f"kafka://{topic_name}", environment) as topic,
        subscribed(url, environment) as subscription,
    ):
        await topic.publish(b'{"n": 1}', {})
        delivery = await receive_one(subscription)
        server.suspend()
        acknowledging = asyncio.create_task(delivery.acknowledge())
        publishing = asyncio.create_task(topic.publish(b'{"n": 2}', {}))
        await asyncio.sleep(1)  # so that both are on the way
        server.resume()
        await asyncio.gather(acknowledging, publishing)
        second = await receive_one(subscription)
        assert second.body == b'{"n": 2}'
        await second.acknowledge()


async def test_group_that_begins_with_the_newest_message_skips_nothing_later(server, environment):
    topic_name = await create_topic(server, 1)
    url = f"kafka://group-{topic_name}?topic={topic_name}"
    async with topic_of(f"kafka://{topic_name}", environment) as topic:
        await topic.publish(b'{"n": "before the group"}', {})
        async with subscribed(url, environment):
            pass
        await topic.publish(b'{"n": "while nobody listens"}', {})
        async with subscribed(url, environment) as subscription:
            delivery = await receive_one(subscription)
            assert delivery.body == b'{"n": "while nobody listens"}'
            await delivery.acknowledge()


async def test_several_topics_are_received(server, environment):
    one, two = await create_topic(server, 1), await create_topic(server, 1)
    for topic in (one, two):
        await publish_all(f"kafka://{topic}", environment, [topic.encode()])
    url = f"kafka://group-{one}?topic={one}&topic={two}&offset=oldest"
    async with subscribed(url, environment) as subscription:
        deliveries = await receive(subscription, 2)
        assert {each.body.decode() for each in deliveries} == {one, two}
        await asyncio.gather(*(each.acknowledge() for each in deliveries))


async def test_missing_topic_is_named_and_not_created(server, environment):
    for url, method in (
        ("kafka://group?topic=nowhere", "subscribe"),
        ("kafka://nowhere", "open_topic"),
    ):
        with pytest.raises(BrokerUnavailable, match="no topic nowhere"):
            await getattr(open_broker(url, CONFIG_PATH, environment), method)()
    async with admin_of(server) as admin:
        assert "nowhere" not in await admin.list_topics()


async def test_url_of_the_other_kind_is_a_config_error(environment):
    with pytest.raises(ConfigError, match=r"topic=…"):
        await open_broker("kafka://requests", CONFIG_PATH, environment).subscribe()
    with pytest.raises(ConfigError, match="is a subscription"):
        await open_broker("kafka://group?topic=a", CONFIG_PATH, environment).open_topic()


async def test_attribute_becomes_the_key_of_the_message(server, environment):
    name = await create_topic(server, 1)
    async with topic_of(f"kafka://{name}?key_name=user", environment) as topic:
        await topic.publish(b"{}", {"user": "a", "other": "b"})
    record = await first_record(server, name)
    assert record.key == b"a"
    assert record.headers == (("other", b"b"),)


async def first_record(server: KafkaServer, topic: str) -> Any:
    """The first message of a topic's only partition, as another client reads it."""
    consumer = AIOKafkaConsumer(bootstrap_servers=server.environment["KAFKA_BROKERS"])
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, 0)])
        await consumer.seek_to_beginning()
        async with asyncio.timeout(WAIT_S):
            return await consumer.getone()
    finally:
        await consumer.stop()


async def test_group_with_members_of_another_kind_is_reported(server, environment):
    topic = await create_topic(server, 1)
    consumer = AIOKafkaConsumer(
        topic, bootstrap_servers=server.environment["KAFKA_BROKERS"], group_id=f"group-{topic}"
    )
    await consumer.start()
    try:
        broker = open_broker(f"kafka://group-{topic}?topic={topic}", CONFIG_PATH, environment)
        with pytest.raises(BrokerUnavailable, match="sticky"):
            await broker.subscribe()
    finally:
        await consumer.stop()


async def test_sasl_user_is_let_in(server):
    topic = await create_topic(server, 1)
    await publish_all(f"kafka://{topic}", server.sasl_environment, [b"{}"])
    url = f"kafka://group-{topic}?topic={topic}&offset=oldest"
    async with subscribed(url, server.sasl_environment) as subscription:
        await (await receive_one(subscription)).acknowledge()


async def test_wrong_password_is_the_reason_that_is_reported(server):
    environment = {**server.sasl_environment, "KAFKA_SASL_PASSWORD": "wrong"}
    with pytest.raises(BrokerUnavailable, match="Authentication failed") as raised:
        await open_broker("kafka://requests", CONFIG_PATH, environment).open_topic()
    assert SASL_PASSWORD not in str(raised.value)
    assert "wrong" not in str(raised.value)
