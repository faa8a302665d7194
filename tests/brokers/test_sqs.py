"""SQS against moto's server. `tests/brokers/servers/moto_sqs.py` says what that does not prove."""

from __future__ import annotations

import itertools

import boto3
import pytest

from brokers.conformance import PASSWORD, Conformance, Pair
from brokers.servers.sqs import ACCOUNT, REGION, SqsServer

numbers = itertools.count()
# Of queues whose messages come again in a test, and of those that a slow machine must not redeliver.
VISIBILITY_S, LONG_VISIBILITY_S = 4, 20
RECEIVES_MANY = {
    "test_concurrent_publishing_loses_nothing",
    "test_count_max_leaves_the_rest_to_others",
    "test_competing_subscriptions_share_without_loss",
    "test_lag_counts_waiting_messages",
}


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
    bad_urls = {
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
    unreachable = {
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
