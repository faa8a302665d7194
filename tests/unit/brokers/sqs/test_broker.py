"""SQS's answers that moto does not give, from a server that is told what to say."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from kubeai.brokers.base import BrokerUnavailable, MessageTooLarge
from kubeai.brokers.sqs.broker import SQS, VISIBILITY_DEFAULT_S
from kubeai.brokers.urls import parse_broker_url
from kubeai.errors import ConfigError

PATH = "messaging.streams[0].requestsURL"
URL = "awssqs://sqs.eu-west-1.amazonaws.com/1/requests"
DENIED = (
    400,
    {
        "__type": "com.amazon.coral.service#AccessDeniedException",
        "message": "User is not authorized to perform: sqs:getqueueattributes",
    },
)
MESSAGE = {
    "MessageId": "id",
    "ReceiptHandle": "receipt",
    "Body": "{}",
    "Attributes": {"ApproximateReceiveCount": "3"},
}


class Scripted:
    """Answers each operation with what is next in its list, or with what it last was."""

    def __init__(self, **answers: list[Any]) -> None:
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.authorizations: list[str] = []
        self._answers = answers

    async def handle(self, request: web.Request) -> web.Response:
        operation = request.headers["X-Amz-Target"].removeprefix("AmazonSQS.")
        self.requests.append((operation, await request.json()))
        self.authorizations.append(request.headers.get("Authorization", ""))
        answers = self._answers[operation]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        return web.Response(
            status=status, body=json.dumps(body), content_type="application/x-amz-json-1.0"
        )


@asynccontextmanager
async def broker_on(server: Scripted, options: str = "", **environment: str) -> AsyncIterator[SQS]:
    application = web.Application()
    application.router.add_post("/", server.handle)
    runner = web.AppRunner(application, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{runner.addresses[0][1]}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        **environment,
    }
    try:
        yield SQS(parse_broker_url(URL + options, PATH, environment))
    finally:
        await runner.cleanup()


def sqs(url: str, **environment: str) -> SQS:
    return SQS(parse_broker_url(url, PATH, environment))


async def test_queue_is_usable_without_the_permission_to_read_its_attributes():
    server = Scripted(
        GetQueueAttributes=[DENIED],
        ReceiveMessage=[{"Messages": [MESSAGE]}],
        SendMessageBatch=[{"Successful": [{"Id": "0"}], "Failed": []}],
    )
    async with broker_on(server) as broker:
        subscription = await broker.subscribe()
        (delivery,) = await subscription.receive(1)
        assert (delivery.id, delivery.deliveries) == ("id", 3)
        assert subscription.ack_deadline_s == VISIBILITY_DEFAULT_S
        assert server.requests[-1][1]["VisibilityTimeout"] == VISIBILITY_DEFAULT_S
        assert await subscription.lag() is None
        await subscription.close()
        topic = await broker.open_topic()
        await topic.publish(b"{}", {})
        await topic.close()


async def test_queue_that_hides_no_messages_is_told_to_hide_them():
    server = Scripted(
        GetQueueAttributes=[{"Attributes": {"VisibilityTimeout": "0"}}],
        ReceiveMessage=[{"Messages": [MESSAGE]}],
    )
    async with broker_on(server) as broker:
        subscription = await broker.subscribe()
        await subscription.receive(1)
        assert server.requests[-1][1]["VisibilityTimeout"] == VISIBILITY_DEFAULT_S
        await subscription.close()


async def test_throttled_request_is_repeated():
    throttled = 400, {"__type": "com.amazonaws.sqs#RequestThrottled", "message": "slow down"}
    attributes = {"Attributes": {"VisibilityTimeout": "30"}}
    server = Scripted(GetQueueAttributes=[throttled, attributes])
    async with broker_on(server) as broker:
        await (await broker.subscribe()).close()
    assert len(server.requests) == 2


async def test_error_is_reported_without_headers():
    message = "The signature does not match.\nx-amz-security-token:session-secret"
    mismatch = 403, {"__type": "com.amazon#SignatureDoesNotMatch", "message": message}
    async with broker_on(Scripted(GetQueueAttributes=[mismatch])) as broker:
        with pytest.raises(BrokerUnavailable, match="signature does not match") as raised:
            await broker.subscribe()
    assert "secret" not in str(raised.value)


async def test_message_that_the_queue_refuses_for_its_size_is_too_large():
    message = "One or more parameters are invalid. Reason: Message must be shorter than 1024 bytes."
    failure = {"Id": "0", "Code": "InvalidParameterValue", "Message": message, "SenderFault": True}
    server = Scripted(GetQueueAttributes=[DENIED], SendMessageBatch=[{"Failed": [failure]}])
    async with broker_on(server) as broker:
        topic = await broker.open_topic()
        with pytest.raises(MessageTooLarge, match="shorter than 1024 bytes"):
            await topic.publish(b"{}", {})
        await topic.close()


async def test_message_with_too_many_attributes_is_not_sent():
    async with broker_on(Scripted(GetQueueAttributes=[DENIED])) as broker:
        topic = await broker.open_topic()
        with pytest.raises(MessageTooLarge, match="11 attributes; the limit is 10"):
            await topic.publish(b"{}", {str(n): "a" for n in range(11)})
        await topic.close()


async def test_short_poll_and_lazy_release_are_as_the_url_says():
    server = Scripted(
        GetQueueAttributes=[{"Attributes": {"VisibilityTimeout": "30"}}],
        ReceiveMessage=[{}, {"Messages": [MESSAGE]}],
    )
    async with broker_on(server, "?waittime=0s&nacklazy=true") as broker:
        subscription = await broker.subscribe()
        (delivery,) = await subscription.receive(1)
        await delivery.release()
        await subscription.close()
    operations = [operation for operation, _ in server.requests]
    assert operations == ["GetQueueAttributes", "ReceiveMessage", "ReceiveMessage"]
    assert server.requests[-1][1]["WaitTimeSeconds"] == 0


@pytest.mark.parametrize(
    ("options", "environment", "region"),
    [
        ("", {}, "eu-west-1"),  # of the host
        ("", {"AWS_DEFAULT_REGION": "a"}, "a"),
        ("", {"AWS_DEFAULT_REGION": "a", "AWS_REGION": "b"}, "b"),
        ("?region=c", {"AWS_REGION": "b"}, "c"),
    ],
)
async def test_region_is_that_of_the_url_then_of_the_environment(options, environment, region):
    server = Scripted(GetQueueAttributes=[{"Attributes": {}}])
    async with broker_on(server, options, **environment) as broker:
        await (await broker.open_topic()).close()
    assert f"/{region}/sqs/aws4_request" in server.authorizations[0]


async def test_anonymous_requests_are_not_signed():
    server = Scripted(GetQueueAttributes=[{"Attributes": {}}])
    async with broker_on(server, "?anonymous=true") as broker:
        await (await broker.open_topic()).close()
    assert server.authorizations == [""]


async def test_endpoint_of_the_url_comes_first():
    server = Scripted(GetQueueAttributes=[{"Attributes": {}}])
    async with broker_on(server) as broker:
        endpoint = broker._url.environment["AWS_ENDPOINT_URL"]
        elsewhere = {**broker._url.environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
        other = sqs(f"{URL}?endpoint={endpoint}", **elsewhere)
        await (await other.open_topic()).close()
    assert server.requests[0][1]["QueueUrl"] == "https://sqs.eu-west-1.amazonaws.com/1/requests"


def test_urls_that_kubeai_in_go_reads_are_accepted():
    sqs(
        "awssqs://sqs.us-east-2.amazonaws.com/123456789012/queue?region=us-east-2&awssdk=v2"
        "&hostname_immutable=true&rate_limiter_capacity=10&dualstack=false&fips=false&raw=1"
        "&snstopicarn=arn:aws:sns:us-east-2:1:topic&waittime=20s"
    )


def test_region_of_a_profile_is_used(tmp_path, monkeypatch):
    config = tmp_path / "config"
    config.write_text("[profile batch]\nregion = ap-south-1\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    assert sqs("awssqs://localhost/1/queue?profile=batch")._region == "ap-south-1"
    with pytest.raises(ConfigError, match="nobody"):
        sqs("awssqs://localhost/1/queue?profile=nobody")
    with pytest.raises(ConfigError, match="AWS_REGION"):
        sqs("awssqs://localhost/1/queue")
