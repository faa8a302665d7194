"""Kafka, against a real broker in KRaft mode."""

from __future__ import annotations

import itertools
from typing import ClassVar

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from brokers.conformance import PASSWORD, WAIT_S, Conformance, Pair
from brokers.servers.kafka import MESSAGE_MAX_BYTES, KafkaServer
from harness import until

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
