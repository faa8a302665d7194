"""Google Cloud Pub/Sub, by unary pulls, so that no more is received than was asked for.

- The acknowledgement deadline is the subscription's. Without the permission to read it, it is
  assumed to be the shortest one that Pub/Sub allows.
- Deliveries are counted by Pub/Sub only if the subscription has a dead-letter policy.
- Pub/Sub does not report how many messages wait; Cloud Monitoring does.
- gRPC reconnects by itself, and failed calls are retried for ``RETRY_S``; after that,
  BrokerUnavailable is raised. Unacknowledged messages are then redelivered after their deadline.
- Without exactly-once delivery, Pub/Sub confirms every acknowledgement, also one that comes after
  the deadline and has no effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it writes to stderr; failed calls are errors here

import google.auth
import grpc
from google.api_core.exceptions import (
    Aborted,
    DeadlineExceeded,
    GoogleAPICallError,
    InternalServerError,
    InvalidArgument,
    PermissionDenied,
    ServiceUnavailable,
    TooManyRequests,
)
from google.api_core.retry import AsyncRetry
from google.auth.exceptions import GoogleAuthError
from google.pubsub_v1 import PublisherAsyncClient, SubscriberAsyncClient
from google.pubsub_v1.services.publisher.transports import PublisherGrpcAsyncIOTransport
from google.pubsub_v1.services.subscriber.transports import SubscriberGrpcAsyncIOTransport
from google.pubsub_v1.types import PubsubMessage, ReceivedMessage

from kubeai.brokers.base import (
    TIMEOUT_S,
    Broker,
    BrokerUnavailable,
    Delivery,
    MessageTooLarge,
    Subscription,
    Topic,
    is_library_cancellation,
)
from kubeai.brokers.polling import Poller
from kubeai.brokers.pubsub.batches import BATCH_MAX_COUNT, Batches
from kubeai.brokers.urls import BrokerUrl

RETRY_S = 10.0  # in which a call that fails is repeated
CALL_TIMEOUT_S = 12.0
PULL_TIMEOUT_S = 15.0
CLOSE_TIMEOUT_S = 5.0  # to release the messages that were pulled but not received
PULL_PAUSE_S = 1.0  # after a pull that has failed
ACK_DEADLINE_MIN_S = 10.0  # the shortest that Pub/Sub allows
MESSAGE_MAX_BYTES = 10_000_000
_ENDPOINT = "pubsub.googleapis.com:443"
_NAME = re.compile(r"projects/([^/]+)/(topics|subscriptions)/([^/]+)|([^/]+)/([^/]+)")
_BOOLEANS = {  # as Go's strconv.ParseBool
    **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
    **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
}
_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),  # the service has limits
    # A new channel must not wait because earlier ones have failed.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
_TRANSIENT = Aborted, InternalServerError, ServiceUnavailable, TooManyRequests

logging.getLogger("google").setLevel(logging.WARNING)


class PubSub(Broker):
    """``gcppubsub://projects/p/subscriptions/s`` or ``…/topics/t``, or ``gcppubsub://p/name``.

    Credentials are Google's Application Default Credentials. With PUBSUB_EMULATOR_HOST, an emulator
    without credentials is used instead.
    """

    def __init__(self, url: BrokerUrl) -> None:
        url.check_options("max_recv_batch_size", "max_send_batch_size", "nacklazy")
        self._url = url
        match = _NAME.fullmatch((url.parts.netloc + url.parts.path).rstrip("/"))
        if not match:
            raise url.error(
                "is not gcppubsub://projects/PROJECT/topics/TOPIC, "
                "gcppubsub://projects/PROJECT/subscriptions/SUBSCRIPTION, "
                "or gcppubsub://PROJECT/NAME"
            )
        self._project, self._kind = match[1] or match[4], match[2]
        self._name = match[3] or match[5]
        self._receive_max_count = self._batch_size("max_recv_batch_size")
        self._send_max_count = self._batch_size("max_send_batch_size")
        lazy = url.options.get("nacklazy", "false")
        if lazy not in _BOOLEANS:
            raise url.error(f"has an invalid option nacklazy={lazy}; use true or false")
        self._release_by_deadline = _BOOLEANS[lazy]
        self._emulator = url.environment.get("PUBSUB_EMULATOR_HOST", "")

    def _batch_size(self, option: str) -> int:
        text = self._url.options.get(option, str(BATCH_MAX_COUNT))
        if not text.isdecimal() or not 1 <= int(text) <= BATCH_MAX_COUNT:
            raise self._url.error(
                f"has an invalid option {option}={text}; use 1 to {BATCH_MAX_COUNT}"
            )
        return int(text)

    async def subscribe(self) -> Subscription:
        """Connect, and read the subscription's deadline."""
        if self._kind == "topics":
            raise self._url.error("is a topic; to receive, name a subscription")
        if "max_send_batch_size" in self._url.options:
            raise self._url.error("has the option max_send_batch_size, which only topics have")
        path = f"projects/{self._project}/subscriptions/{self._name}"
        channel = await self._channel(SubscriberGrpcAsyncIOTransport)
        client = SubscriberAsyncClient(transport=SubscriberGrpcAsyncIOTransport(channel=channel))
        subscription = _Subscription(
            channel, client, path, self._receive_max_count, self._release_by_deadline
        )
        await _open(subscription)
        return subscription

    async def open_topic(self) -> Topic:
        """Connect."""
        options = self._url.options
        if self._kind == "subscriptions" or {"max_recv_batch_size", "nacklazy"} & options.keys():
            raise self._url.error("is a subscription; to publish, name a topic")
        path = f"projects/{self._project}/topics/{self._name}"
        channel = await self._channel(PublisherGrpcAsyncIOTransport)
        client = PublisherAsyncClient(transport=PublisherGrpcAsyncIOTransport(channel=channel))
        topic = _Topic(channel, client, path, self._send_max_count)
        await _open(topic)
        return topic

    async def _channel(self, transport: Any) -> grpc.aio.Channel:
        if self._emulator:
            return grpc.aio.insecure_channel(self._emulator, options=_CHANNEL_OPTIONS)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                # It may read files, run programs, or ask the machine's metadata server.
                credentials, _ = await asyncio.to_thread(
                    google.auth.default, scopes=transport.AUTH_SCOPES
                )
        except (GoogleAuthError, TimeoutError) as error:
            raise BrokerUnavailable(f"Pub/Sub: no credentials: {error}") from None
        channel: grpc.aio.Channel = transport.create_channel(
            _ENDPOINT, credentials=credentials, options=_CHANNEL_OPTIONS
        )
        return channel


async def _open(opened: _Subscription | _Topic) -> None:
    try:
        await opened.open()
    except BaseException:
        await opened.close()
        raise


def _failures(error: BaseException) -> Mapping[str, str]:
    """Map each ack ID that failed to its reason. Empty without exactly-once delivery."""
    return (isinstance(error, GoogleAPICallError) and error.metadata) or {}


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, _TRANSIENT) and not _failures(error)


_RETRY = AsyncRetry(predicate=_is_transient, initial=0.1, maximum=2.0, timeout=RETRY_S)


class _Connection:
    """A gRPC channel and the resource that it is for.

    ``path``: the subscription or topic, ``projects/PROJECT/…/NAME``. The first error ends the
    connection: from then on, each use raises BrokerUnavailable with that error.
    """

    def __init__(self, channel: grpc.aio.Channel, path: str) -> None:
        self.path = path
        self._channel = channel
        self._end_reason: str | None = None
        self._closed = False

    async def call(
        self,
        method: Callable[..., Awaitable[Any]],
        *,
        raises: tuple[type[GoogleAPICallError], ...] = (),
        retry: bool = True,
        **fields: Any,
    ) -> Any:
        """Call a method of the service. Errors other than ``raises`` end the connection."""
        self.check()
        try:
            return await method(
                request=fields, retry=_RETRY if retry else None, timeout=CALL_TIMEOUT_S
            )
        except raises:
            raise
        except Exception as error:  # of the service, of credentials, of gRPC
            raise self.end(str(error)) from None
        except asyncio.CancelledError as error:
            if is_library_cancellation(error):
                raise self.end("gRPC has cancelled the call") from None
            raise

    def end(self, reason: str) -> BrokerUnavailable:
        """End the connection. Returns the BrokerUnavailable that each later use raises."""
        self._end_reason = self._end_reason or reason
        return BrokerUnavailable(f"Pub/Sub, {self.path}: {self._end_reason}")

    def check(self) -> None:
        """Raise BrokerUnavailable if the connection has ended."""
        if self._end_reason:
            raise self.end(self._end_reason)

    async def close(self) -> None:
        """Cancel all calls, and close the channel."""
        self.end("it is closed")
        if not self._closed:
            self._closed = True
            await self._channel.close()


class _Delivery(Delivery):
    def __init__(self, subscription: _Subscription, received: ReceivedMessage) -> None:
        self._subscription = subscription
        self.ack_id: str = received.ack_id
        message = received.message
        self.id = message.message_id
        self.body = message.data
        self.attributes = dict(message.attributes)
        self.deliveries = received.delivery_attempt

    async def acknowledge(self) -> None:
        await self._subscription.acknowledgements.add(self.ack_id)

    async def release(self) -> None:
        await self._subscription.release(self)

    async def extend(self) -> None:
        await self._subscription.extensions.add(self.ack_id)


class _Subscription(Subscription):
    """A subscription, read with unary pulls of up to ``receive_max_count`` messages.

    ``release_by_deadline``: the option ``nacklazy``. A released message is delivered again when its
    ack deadline passes, rather than at once.
    """

    ack_deadline_s: float = ACK_DEADLINE_MIN_S

    def __init__(
        self,
        channel: grpc.aio.Channel,
        client: SubscriberAsyncClient,
        path: str,
        receive_max_count: int,
        release_by_deadline: bool,
    ) -> None:
        self._connection = _Connection(channel, path)
        self._client = client
        self._receive_max_count = receive_max_count
        self._release_by_deadline = release_by_deadline
        self._poller = Poller(self._pull)
        self.acknowledgements = Batches(self._acknowledge)
        self.extensions = Batches(self._extend)
        self._releases = Batches(self._release)

    async def open(self) -> None:
        with contextlib.suppress(PermissionDenied):
            info = await self._describe(retry=False)
            self.ack_deadline_s = float(info.ack_deadline_seconds)

    async def _describe(self, **settings: Any) -> Any:
        return await self._connection.call(
            self._client.get_subscription,
            raises=(PermissionDenied,),
            subscription=self._connection.path,
            **settings,
        )

    async def receive(self, count_max: int) -> list[Delivery]:
        self._connection.check()
        return await self._poller.receive(min(count_max, self._receive_max_count))

    async def _pull(self, count: int) -> list[_Delivery]:
        connection = self._connection
        connection.check()
        try:
            response = await self._client.pull(
                request={"subscription": connection.path, "max_messages": count},
                retry=None,
                timeout=PULL_TIMEOUT_S,
            )
        except DeadlineExceeded:
            await self._probe()  # there are no messages, or there is no answer
        except _TRANSIENT:
            await asyncio.sleep(PULL_PAUSE_S)
            await self._probe()
        except Exception as error:
            raise connection.end(str(error)) from None
        else:
            return [_Delivery(self, each) for each in response.received_messages]
        return []

    async def _probe(self) -> None:
        """End the connection if the service does not answer."""
        with contextlib.suppress(BrokerUnavailable, PermissionDenied):
            await self._describe()

    async def _acknowledge(self, ack_ids: list[str]) -> None:
        await self._confirm(self._client.acknowledge, ack_ids)

    async def _extend(self, ack_ids: list[str]) -> None:
        seconds = round(self.ack_deadline_s)
        await self._confirm(self._client.modify_ack_deadline, ack_ids, ack_deadline_seconds=seconds)

    async def _release(self, ack_ids: list[str]) -> None:
        await self._confirm(self._client.modify_ack_deadline, ack_ids, ack_deadline_seconds=0)

    async def release(self, delivery: _Delivery) -> None:
        self._connection.check()
        if not self._release_by_deadline:
            await self._releases.add(delivery.ack_id)

    async def _confirm(self, method: Any, ack_ids: list[str], **fields: Any) -> None:
        """Call a method with ack IDs, and retry those that fail transiently.

        An ID that fails permanently has expired: its message has been delivered again.
        """
        connection = self._connection
        left = ack_ids
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while left:
                    try:
                        await connection.call(
                            method,
                            raises=(GoogleAPICallError,),
                            subscription=connection.path,
                            ack_ids=left,
                            **fields,
                        )
                        left = []
                    except GoogleAPICallError as error:
                        reasons = _failures(error)
                        if not reasons:
                            raise connection.end(str(error)) from None
                        left = [each for each in left if "TRANSIENT" in reasons.get(each, "")]
                        await asyncio.sleep(PULL_PAUSE_S if left else 0)
        except TimeoutError:
            raise connection.end(f"acknowledgements fail for {TIMEOUT_S:g} s") from None

    async def lag(self) -> int | None:
        self._connection.check()
        return None

    async def close(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._poller.close()
        await self._connection.close()
        for batches in (self.acknowledgements, self.extensions, self._releases):
            await batches.wait()


class _Topic(Topic):
    def __init__(
        self,
        channel: grpc.aio.Channel,
        client: PublisherAsyncClient,
        path: str,
        send_max_count: int,
    ) -> None:
        self._connection = _Connection(channel, path)
        self._client = client
        self._messages = Batches(self._send, send_max_count, _size_of)

    async def open(self) -> None:
        with contextlib.suppress(PermissionDenied):  # a publisher need not read the topic
            await self._connection.call(
                self._client.get_topic,
                raises=(PermissionDenied,),
                retry=False,
                topic=self._connection.path,
            )

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        self._connection.check()
        message = PubsubMessage(data=body, attributes=dict(attributes))
        size = _size_of(message)
        if size > MESSAGE_MAX_BYTES:
            raise _too_large(size, f"Pub/Sub takes {MESSAGE_MAX_BYTES} bytes")
        try:
            await self._messages.add(message)
        except InvalidArgument:  # of some message of the batch
            try:
                await self._send([message])
            except InvalidArgument as error:
                raise _too_large(size, str(error)) from None

    async def _send(self, messages: list[PubsubMessage]) -> None:
        await self._connection.call(
            self._client.publish,
            raises=(InvalidArgument,),
            topic=self._connection.path,
            messages=messages,
        )

    async def close(self) -> None:
        await self._connection.close()
        await self._messages.wait()


def _too_large(size_bytes: int, reason: str) -> MessageTooLarge:
    return MessageTooLarge(f"a message of {size_bytes} bytes with its attributes: {reason}")


def _size_of(message: PubsubMessage) -> int:
    return int(PubsubMessage.pb(message).ByteSize())
