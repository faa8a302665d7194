"""What KubeAI does about answers of Pub/Sub that Google's fake does not give."""

import asyncio
from types import SimpleNamespace

import pytest
from google.api_core.exceptions import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ServiceUnavailable,
)
from google.pubsub_v1.types import PubsubMessage, ReceivedMessage
from google.rpc.error_details_pb2 import ErrorInfo

from kubeai.brokers.base import BrokerUnavailable, MessageTooLarge
from kubeai.brokers.inbox import UNCLAIMED_S
from kubeai.brokers.pubsub import broker as module
from kubeai.brokers.pubsub.batches import BATCH_MAX_BYTES
from kubeai.brokers.pubsub.broker import (
    ACK_DEADLINE_MIN_S,
    MESSAGE_MAX_BYTES,
    PULL_TIMEOUT_S,
    RETRY_S,
    _Subscription,
    _Topic,
)
from kubeai.brokers.urls import open_broker

PATH = "messaging.streams[0].requestsURL"


class Channel:
    async def close(self):
        pass


class Service:
    """The methods of both clients. ``answers``: method → what its next calls raise, or None."""

    def __init__(self) -> None:
        self.answers: dict[str, list[BaseException | None]] = {}
        self.calls: list[tuple[str, dict]] = []
        self.messages: list[ReceivedMessage] = []

    def __getattr__(self, name):
        async def method(request, retry, timeout):
            async def call():
                self.calls.append((name, request))
                await asyncio.sleep(0)
                answers = self.answers.get(name, [])
                if answers and (answer := answers.pop(0) if len(answers) > 1 else answers[0]):
                    raise answer
                if name != "pull":
                    return SimpleNamespace(ack_deadline_seconds=30)
                if not self.messages:
                    await asyncio.sleep(timeout)
                    raise DeadlineExceeded("no messages")
                received, self.messages = self.messages, []
                return SimpleNamespace(received_messages=received)

            return await (retry(call)() if retry else call())

        return method

    def called(self, name):
        return [request for each, request in self.calls if each == name]


@pytest.fixture
def service():
    return Service()


@pytest.fixture
async def subscription(service):
    subscription = _Subscription(Channel(), service, "projects/p/subscriptions/s", 1000, False)
    await subscription.open()
    yield subscription
    await subscription.close()


@pytest.fixture
async def topic(service):
    topic = _Topic(Channel(), service, "projects/p/topics/t", 1000)
    yield topic
    await topic.close()


async def received(service, subscription, count=1):
    service.messages += [
        ReceivedMessage(ack_id=f"a{at}", message=PubsubMessage(data=b"{}", message_id=f"m{at}"))
        for at in range(count)
    ]
    return await subscription.receive(count)


def exactly_once(**reasons):
    """The error of a call in which some acknowledgements have failed."""
    return FailedPrecondition(
        "some have failed", error_info=ErrorInfo(reason="", domain="", metadata=reasons)
    )


async def test_deadline_is_the_subscriptions(service, subscription):
    assert subscription.ack_deadline_s == 30
    (delivery,) = await received(service, subscription)
    await delivery.extend()
    assert service.called("modify_ack_deadline")[0]["ack_deadline_seconds"] == 30


async def test_deadline_that_must_not_be_read_is_taken_as_the_shortest(service):
    service.answers["get_subscription"] = [PermissionDenied("no")]
    subscription = _Subscription(Channel(), service, "projects/p/subscriptions/s", 1000, False)
    await subscription.open()
    assert subscription.ack_deadline_s == ACK_DEADLINE_MIN_S
    await subscription.close()


async def test_missing_subscription_is_unavailable(service):
    service.answers["get_subscription"] = [NotFound("no such subscription")]
    subscription = _Subscription(Channel(), service, "projects/p/subscriptions/s", 1000, False)
    with pytest.raises(BrokerUnavailable, match="projects/p/subscriptions/s: 404 no such"):
        await subscription.open()
    await subscription.close()


async def test_acknowledgements_at_once_share_calls(service, subscription):
    deliveries = await received(service, subscription, 500)
    await asyncio.gather(*(each.acknowledge() for each in deliveries))
    calls = [request["ack_ids"] for request in service.called("acknowledge")]
    assert calls == [[each.ack_id for each in deliveries]]


@pytest.mark.looptime
async def test_acknowledgement_that_fails_for_now_is_repeated(service, subscription):
    deliveries = await received(service, subscription, 3)
    service.answers["acknowledge"] = [
        exactly_once(
            a0="TRANSIENT_FAILURE_UNORDERED_ACK_ID", a1="PERMANENT_FAILURE_INVALID_ACK_ID"
        ),
        None,
    ]
    await subscription._acknowledge([each.ack_id for each in deliveries])
    assert [each["ack_ids"] for each in service.called("acknowledge")] == [
        ["a0", "a1", "a2"],
        ["a0"],
    ]


async def test_acknowledgement_after_its_deadline_has_no_effect(service, subscription):
    (delivery,) = await received(service, subscription)
    service.answers["acknowledge"] = [exactly_once(a0="PERMANENT_FAILURE_INVALID_ACK_ID")]
    await delivery.acknowledge()
    assert len(service.called("acknowledge")) == 1
    await delivery.release()  # the connection is still there


@pytest.mark.looptime
async def test_acknowledgement_that_never_succeeds_ends_the_subscription(service, subscription):
    (delivery,) = await received(service, subscription)
    service.answers["acknowledge"] = [exactly_once(a0="TRANSIENT_FAILURE_INTERNAL")]
    with pytest.raises(BrokerUnavailable, match="acknowledgements fail for 30 s"):
        await delivery.acknowledge()


async def test_refused_acknowledgement_ends_the_subscription(service, subscription):
    (delivery,) = await received(service, subscription)
    service.answers["acknowledge"] = [PermissionDenied("no")]
    with pytest.raises(BrokerUnavailable, match="403 no"):
        await delivery.acknowledge()
    with pytest.raises(BrokerUnavailable, match="403 no"):
        await subscription.receive(1)


@pytest.mark.looptime
async def test_service_without_messages_is_asked_again(service, subscription):
    receiving = asyncio.create_task(subscription.receive(1))
    await asyncio.sleep(10 * PULL_TIMEOUT_S)
    assert not receiving.done()
    service.messages.append(ReceivedMessage(ack_id="a", message=PubsubMessage(data=b"{}")))
    assert (await receiving)[0].ack_id == "a"


@pytest.mark.looptime
async def test_service_that_answers_nothing_is_noticed(service, subscription):
    service.answers["get_subscription"] = [DeadlineExceeded("no answer")]
    with pytest.raises(BrokerUnavailable, match="no answer"):
        await subscription.receive(1)


@pytest.mark.looptime
async def test_failures_for_a_moment_are_bridged(service, subscription):
    service.answers["pull"] = [ServiceUnavailable("soon"), None]
    (delivery,) = await received(service, subscription)
    service.answers["acknowledge"] = [ServiceUnavailable("soon"), ServiceUnavailable("soon"), None]
    await delivery.acknowledge()
    assert len(service.called("acknowledge")) == 3


async def test_failures_for_long_end_the_subscription(service, subscription, monkeypatch):
    assert module._RETRY.timeout == RETRY_S
    monkeypatch.setattr(module, "_RETRY", module._RETRY.with_timeout(0.01))
    (delivery,) = await received(service, subscription)
    service.answers["acknowledge"] = [ServiceUnavailable("gone")]
    with pytest.raises(BrokerUnavailable, match="gone"):
        await delivery.acknowledge()


@pytest.mark.looptime
@pytest.mark.parametrize("closed", [False, True])
async def test_message_that_nobody_receives_is_given_back(service, subscription, closed):
    service.messages.append(ReceivedMessage(ack_id="a", message=PubsubMessage(data=b"{}")))
    receiving = asyncio.create_task(subscription.receive(1))
    while not service.called("pull"):  # noqa: ASYNC110
        await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.gather(receiving, return_exceptions=True)
    await asyncio.sleep(UNCLAIMED_S / 2)
    assert not service.called("modify_ack_deadline")
    if closed:
        await subscription.close()
    else:
        await asyncio.sleep(UNCLAIMED_S)
    (released,) = service.called("modify_ack_deadline")
    assert (released["ack_ids"], released["ack_deadline_seconds"]) == (["a"], 0)


async def test_messages_at_once_share_calls_up_to_their_size(service, topic):
    body = b"x" * 2_000_000
    await asyncio.gather(*(topic.publish(body, {}) for _ in range(9)))
    batches = [request["messages"] for request in service.called("publish")]
    assert [len(batch) for batch in batches] == [4, 4, 1]
    assert all(sum(len(each.data) for each in batch) <= BATCH_MAX_BYTES for batch in batches)


async def test_message_beyond_the_limit_is_not_sent(service, topic):
    with pytest.raises(MessageTooLarge, match=str(MESSAGE_MAX_BYTES)):
        await topic.publish(b"x" * MESSAGE_MAX_BYTES, {"a": "b"})
    assert not service.called("publish")


async def test_message_that_is_refused_does_not_fail_others(service, topic):
    refused = InvalidArgument("an attribute is too long")
    # They go together, and then each one alone.
    service.answers["publish"] = [refused, None, refused, None]
    results = await asyncio.gather(
        *(topic.publish(b"%d" % at, {}) for at in range(3)), return_exceptions=True
    )
    assert [type(result) for result in results].count(MessageTooLarge) == 1
    assert results.count(None) == 2


async def test_without_credentials_the_service_is_unavailable(monkeypatch, tmp_path):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    broker = open_broker("gcppubsub://p/t", PATH, {})
    with pytest.raises(BrokerUnavailable, match="no credentials"):
        await broker.open_topic()


async def test_call_that_grpc_cancels_ends_the_connection(service, subscription):
    (delivery,) = await received(service, subscription)
    service.answers["acknowledge"] = [asyncio.CancelledError()]
    async with asyncio.timeout(10):
        with pytest.raises(BrokerUnavailable, match="gRPC has cancelled the call"):
            await delivery.acknowledge()
        with pytest.raises(BrokerUnavailable, match="gRPC has cancelled the call"):
            await subscription.receive(1)
