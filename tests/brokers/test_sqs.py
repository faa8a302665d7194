"""SQS against moto's server. `tests/brokers/servers/moto_sqs.py` says what that does not prove.

The tests after the class wait for no deadline, so `make test` runs them.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any, ClassVar

import boto3
import pytest
from brokers.conformance import PASSWORD, RECEIVES_MANY, Conformance, Pair
from brokers.servers.sqs import REGION, SqsServer
from brokers.subscriptions import CONFIG_PATH, receive_one, subscribed, topic_of
from harness import until
from structlog.testing import capture_logs

from kubeai.brokers.base import REQUEST_MESSAGE_ID, BrokerUnavailable, MessageTooLarge
from kubeai.brokers.sqs.broker import SqsSubscription
from kubeai.brokers.urls import open_broker

numbers = itertools.count()
VISIBILITY_S, LONG_VISIBILITY_S = 4, 20  # the second for RECEIVES_MANY


def client(server: SqsServer):
    """Amazon's own client, blocking."""
    return boto3.client(
        "sqs",
        region_name=REGION,
        endpoint_url=server.environment["AWS_ENDPOINT_URL_SQS"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def new_queue(server: SqsServer, suffix: str = "", **attributes: object) -> str:
    name = f"queue-{next(numbers)}{suffix}"
    texts = {name: str(value) for name, value in attributes.items()}
    client(server).create_queue(QueueName=name, Attributes=texts)
    return name


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = SqsServer(tmp_path_factory.mktemp("sqs"))
    server.start()
    yield server
    server.end()


class TestSQS(Conformance):
    body_bytes = 900_000
    too_large_bytes = (1 << 20) + 1
    redelivery_s = VISIBILITY_S + 3
    bad_urls: ClassVar = {
        "awssqs://sqs.us-east-1.amazonaws.com": "awssqs://HOST/ACCOUNT/QUEUE",
        "awssqs:///123456789012/queue": "awssqs://HOST/ACCOUNT/QUEUE",
        "awssqs://localhost/1/queue": "AWS_REGION",
        "awssqs://localhost/1/queue?region=a&raw=maybe": "raw",
        "awssqs://localhost/1/queue?region=a&waittime=1": "waittime",
        "awssqs://localhost/1/queue?region=a&waittime=21s": "between 0s and 20s",
        "awssqs://localhost/1/queue?region=a&endpoint=localhost:4566": "endpoint",
        "awssqs://localhost/1/queue?region=a&role=arn:aws:iam::1:role/a": "unknown option role",
        "awssqs://localhost/1/queue?profile=nobody": "nobody",
    }
    unreachable: ClassVar = {
        "AWS_ENDPOINT_URL_SQS": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": PASSWORD,
    }

    @pytest.fixture
    def pair(self, server, request):
        visibility_s = (
            LONG_VISIBILITY_S if request.function.__name__ in RECEIVES_MANY else VISIBILITY_S
        )
        name = new_queue(server, VisibilityTimeout=visibility_s)
        return Pair(server.url(name, ""), server.url(name))


# -- what only SQS has -----------------------------------------------------------------------------


@pytest.fixture
def queue(server):
    return new_queue(server, VisibilityTimeout=LONG_VISIBILITY_S)


def queue_url(server: SqsServer, name: str) -> str:
    return client(server).get_queue_url(QueueName=name)["QueueUrl"]


def waiting_and_hidden(server: SqsServer, name: str) -> tuple[int, int]:
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    attributes = client(server).get_queue_attributes(
        QueueUrl=queue_url(server, name), AttributeNames=names
    )["Attributes"]
    return int(attributes[names[0]]), int(attributes[names[1]])


async def test_message_of_another_client_is_read_as_the_go_cdk_reads_it(server, queue):
    sent = client(server).send_message(
        QueueUrl=queue_url(server, queue),
        MessageBody="/wBh",
        MessageAttributes={
            "base64encoded": {"DataType": "String", "StringValue": "true"},
            "a__0x2f__b": {"DataType": "String", "StringValue": "c%20d"},
        },
    )
    async with subscribed(server.url(queue), server.environment) as subscription:
        (delivery,) = await subscription.receive(1)
        assert delivery.id == sent["MessageId"]
        assert delivery.body == b"\xff\0a"
        assert delivery.attributes == {"a/b": "c d"}
        assert delivery.deliveries == 1
        await delivery.acknowledge()
    assert waiting_and_hidden(server, queue) == (0, 0)


async def test_published_message_is_what_the_go_cdk_writes(server, queue):
    async with topic_of(server.url(queue), server.environment) as topic:
        await topic.publish(b"\xff\0a", {REQUEST_MESSAGE_ID: "1", "a/b": "c d"})
    (message,) = client(server).receive_message(
        QueueUrl=queue_url(server, queue), MessageAttributeNames=["All"]
    )["Messages"]
    assert message["Body"] == "/wBh"
    texts = {name: value["StringValue"] for name, value in message["MessageAttributes"].items()}
    assert texts == {REQUEST_MESSAGE_ID: "1", "a__0x2f__b": "c%20d", "base64encoded": "true"}


async def test_responses_to_the_same_request_are_one_message_on_a_fifo_queue(server):
    name = new_queue(server, ".fifo", FifoQueue="true")
    async with topic_of(server.url(name), server.environment) as topic:
        for _ in range(2):
            await topic.publish(b'{"n": 1}', {REQUEST_MESSAGE_ID: "1"})
        await topic.publish(b'{"n": 2}', {REQUEST_MESSAGE_ID: "2"})
        await topic.publish(b'{"n": 2}', {})
        own = {"MessageGroupId": "group", "DeduplicationId": "3"}
        await topic.publish(b'{"n": 3}', {REQUEST_MESSAGE_ID: "1", **own})
    messages = client(server).receive_message(
        QueueUrl=queue_url(server, name), MaxNumberOfMessages=10, AttributeNames=["All"]
    )["Messages"]
    assert [json.loads(message["Body"])["n"] for message in messages] == [1, 2, 2, 3]
    groups = [message["Attributes"]["MessageGroupId"] for message in messages]
    assert groups[:2] == ["1", "2"]
    assert groups[3] == "group"
    assert len(set(groups)) == 4


async def test_requests_of_a_fifo_group_come_in_order(server):
    name = new_queue(server, ".fifo", FifoQueue="true")
    async with topic_of(server.url(name), server.environment) as topic:
        for n in range(3):
            own = {"MessageGroupId": "group", "DeduplicationId": str(n)}
            await topic.publish(json.dumps(n).encode(), own)
    async with subscribed(server.url(name), server.environment) as subscription:
        for n in range(3):
            (delivery,) = await subscription.receive(1)
            assert json.loads(delivery.body) == n
            await delivery.acknowledge()


async def test_message_that_is_no_longer_ours_is_reported_and_does_no_harm(server, queue):
    async with (
        topic_of(server.url(queue), server.environment) as topic,
        subscribed(server.url(queue), server.environment) as subscription,
    ):
        await topic.publish(b"{}", {})
        delivery: Any = await receive_one(subscription)
        delivery._receipt = "of-another-delivery"
        with capture_logs() as logs:
            await delivery.acknowledge()
            await delivery.extend()
            await delivery.release()
        assert [entry["event"] for entry in logs] == ["lost a message of SQS"] * 3
        assert {entry["id"] for entry in logs} == {delivery.id}
        assert waiting_and_hidden(server, queue) == (0, 1)


async def test_message_cannot_be_extended_beyond_twelve_hours(server, queue):
    async with (
        topic_of(server.url(queue), server.environment) as topic,
        subscribed(server.url(queue), server.environment) as subscription,
    ):
        await topic.publish(b"{}", {})
        delivery = await receive_one(subscription)
        assert isinstance(subscription, SqsSubscription)
        subscription.visibility_s = 12 * 60 * 60
        with capture_logs() as logs:
            await delivery.extend()
        assert "beyond the limit" in logs[0]["reason"]
        await delivery.acknowledge()


async def test_messages_that_no_receive_has_taken_are_visible_after_closing(server, queue):
    async with topic_of(server.url(queue), server.environment) as topic:
        async with subscribed(server.url(queue), server.environment) as subscription:
            receiving = asyncio.create_task(subscription.receive(3))
            await asyncio.sleep(0)
            receiving.cancel()
            await asyncio.gather(*(topic.publish(b"{}", {}) for _ in range(3)))
            await until("a poll has them", lambda: waiting_and_hidden(server, queue)[1] == 3)
            assert len(await subscription.receive(1)) == 1
        await until("two are back", lambda: waiting_and_hidden(server, queue) == (2, 1))


async def test_lower_limit_of_the_queue_is_respected(server):
    name = new_queue(server, MaximumMessageSize=1024)
    async with topic_of(server.url(name), server.environment) as topic:
        with pytest.raises(MessageTooLarge, match="the queue's limit is 1024"):
            await topic.publish(b"x" * 1000, {"a": "b" * 20})
        await topic.publish(b"x" * 1000, {"a": "b"})


async def test_queue_that_does_not_exist_is_unavailable(server):
    broker = open_broker(server.url("missing"), CONFIG_PATH, server.environment)
    with pytest.raises(BrokerUnavailable, match="does not exist"):
        await broker.subscribe()
    with pytest.raises(BrokerUnavailable, match="does not exist"):
        await broker.open_topic()
