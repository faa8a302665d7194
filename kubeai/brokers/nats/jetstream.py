"""JetStream, the persistent part of NATS: a durable pull consumer, and confirmed publishing.

    nats://SUBJECT?jetstream[&queue=CONSUMER][&stream=STREAM]

The stream has to exist, as every topic and queue of KubeAI's: how long it keeps messages, and on
how many servers, is its owner's decision. Without the option ``stream``, it is the one that has the
subject. The durable consumer (``queue``, "kubeai" by default) is created if it does not exist, with
an acknowledgement deadline of CREATED_ACK_WAIT_S, without a limit on deliveries; one that exists is
used as it is. Processes with the same consumer share its messages.

A message is acknowledged with a confirmation of the server. Its id is made of the stream's name,
the message's sequence number and its time, because a stream that is deleted and created again
begins at 1. A response is published with the request's id and a digest of its body in the header
Nats-Msg-Id: a stream drops a response that is published again because its confirmation was lost,
within the stream's duplicate window (2 minutes by default). It keeps a response that was generated
again, with another body, because the ids of other brokers need not be unique.

A server that stands alone confirms messages before they are on its disk, unless its configuration
has ``sync_interval: always``.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping
from urllib.parse import quote_plus

import nats.errors
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as LibrarySubscription
from nats.js.api import AckPolicy, ConsumerConfig, ConsumerInfo
from nats.js.client import JetStreamContext
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError, ServiceUnavailableError

from kubeai.brokers.base import (
    REQUEST_MESSAGE_ID,
    TIMEOUT_S,
    BrokerUnavailable,
    Delivery,
    MessageTooLarge,
    Subscription,
)
from kubeai.brokers.inbox import Inbox
from kubeai.brokers.nats.connection import Connection
from kubeai.brokers.nats.core import MESSAGE_ID, CoreTopic, Headers
from kubeai.logs import get_logger

log = get_logger(__name__)

CONSUMER = "kubeai"
CREATED_ACK_WAIT_S = 60.0
PULL_EXPIRES_S = 60.0
HEARTBEAT_S = 5.0  # of a waiting pull request; the server is silent after three
_TOO_LARGE = 10054  # JetStream's error code
_NANOSECONDS = 1_000_000_000


class _JetStreamDelivery(Delivery):
    """A message of a consumer."""

    def __init__(self, subscription: JetStreamSubscription, message: Msg) -> None:
        self._connection = subscription.connection
        self._message = message
        self.attributes, self.body = subscription.headers.decode(message)
        metadata = message.metadata
        self.id = f"{metadata.stream}.{metadata.sequence.stream}.{metadata.timestamp.timestamp():f}"
        self.deliveries = metadata.num_delivered

    async def acknowledge(self) -> None:
        """Acknowledge, and wait for the server's confirmation."""
        await self._reply(Msg.Ack.Ack)

    async def release(self) -> None:
        """Give the message back, for an immediate redelivery."""
        await self._reply(Msg.Ack.Nak)

    async def extend(self) -> None:
        """Restart the consumer's ack_wait."""
        await self._reply(Msg.Ack.Progress)

    async def _reply(self, text: bytes) -> None:
        client = self._connection.client
        request = client.request(self._message.reply, text, timeout=TIMEOUT_S)
        await self._connection.lifetime.run("acknowledge", request)


class JetStreamSubscription(Subscription):
    """A durable pull consumer.

    The server sends messages for a pull request until it has sent as many as that asks for, so
    what one call of ``receive`` has asked for may arrive during the next one, or without one.
    """

    def __init__(
        self, connection: Connection, headers: Headers, js: JetStreamContext, info: ConsumerInfo
    ) -> None:
        self.connection = connection
        self.headers = headers
        self.ack_deadline_s = _deadline_of(info)
        self._js = js
        self._stream, self._consumer = info.stream_name, info.name
        self._requests = f"{js._prefix}.CONSUMER.MSG.NEXT.{info.stream_name}.{info.name}"
        self._reply_subject = connection.client.new_inbox()
        self._inbox = Inbox()
        self._subscription: LibrarySubscription | None = None
        self._requested = 0  # messages that the server may still send
        self._requests_end_s = 0.0  # time of the loop; when the last request has expired
        self._problem = ""  # that the server has reported instead of messages
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        connection.lifetime.on_end(self._arrived.set)

    @classmethod
    async def open(
        cls, connection: Connection, headers: Headers, subject: str, consumer: str, stream: str
    ) -> JetStreamSubscription:
        """Find or create the consumer. BrokerUnavailable without a stream or with an unfit one."""
        js = connection.client.jetstream(timeout=TIMEOUT_S)
        finding = _find_or_create(js, subject, consumer or CONSUMER, stream)
        try:
            info = await connection.lifetime.run("find the consumer", finding, raises=(APIError,))
        except NotFoundError:
            wanted = f"named {stream}" if stream else f"with the subject {subject}"
            raise BrokerUnavailable(f"JetStream: there is no stream {wanted}") from None
        except ServiceUnavailableError:
            raise BrokerUnavailable("JetStream: it is not enabled, or has no leader") from None
        except APIError as error:
            raise BrokerUnavailable(f"JetStream: {error.description}") from None
        self = cls(connection, headers, js, info)
        subscribing = connection.client.subscribe(
            self._reply_subject,
            cb=self._on_message,
            # What arrives is bounded by what has been requested.
            pending_msgs_limit=0,
            pending_bytes_limit=0,
        )
        self._subscription = await connection.lifetime.run("subscribe", subscribing)
        return self

    async def _on_message(self, message: Msg) -> None:
        headers = message.headers or {}
        status = headers.get("Status")
        if status is None or message.reply:
            self._requested = max(0, self._requested - 1)
            self._inbox.add([_JetStreamDelivery(self, message)])
        elif status == "408":  # the request has expired
            self._requested = max(0, self._requested - _int(headers.get("Nats-Pending-Messages")))
        elif status != "100":  # a heartbeat
            self._problem = f"{status} {headers.get('Description', 'no responders')}"
        self._arrived.set()

    async def receive(self, count_max: int) -> list[Delivery]:
        """Wait for messages; a heartbeat shows that the server still has the request."""
        self.connection.lifetime.check()
        with self._inbox.receiving():
            await self._wait_for_messages(count_max)
            return self._inbox.take(count_max)

    async def _wait_for_messages(self, count_max: int) -> None:
        while not self._inbox:
            if self._problem:
                raise BrokerUnavailable(f"JetStream consumer {self._consumer}: {self._problem}")
            if self._loop.time() > self._requests_end_s:
                self._requested = 0
            if self._requested < count_max:
                await self._request(count_max - self._requested)
            self._arrived.clear()
            self.connection.lifetime.check()  # it may have ended during the request
            if self._inbox or self._problem:
                continue
            try:
                async with asyncio.timeout(3 * HEARTBEAT_S):
                    await self._arrived.wait()
            except TimeoutError:
                self.connection.lifetime.end(f"no heartbeat within {3 * HEARTBEAT_S:g} s")
            self.connection.lifetime.check()

    async def _request(self, count: int) -> None:
        self._requested += count
        self._requests_end_s = self._loop.time() + PULL_EXPIRES_S
        request = {
            "batch": count,
            "expires": int(PULL_EXPIRES_S * _NANOSECONDS),
            "idle_heartbeat": int(HEARTBEAT_S * _NANOSECONDS),
        }
        publishing = self.connection.client.publish(
            self._requests, json.dumps(request).encode(), self._reply_subject
        )
        await self.connection.lifetime.run("request messages", publishing)

    async def lag(self) -> int | None:
        """Messages of the stream that the consumer has not delivered yet."""
        reading = self._js.consumer_info(self._stream, self._consumer)
        info: ConsumerInfo = await self.connection.lifetime.run("read the consumer", reading)
        return info.num_pending

    async def close(self) -> None:
        """Give back what has not been received, and close the connection."""
        if self._subscription is not None:
            await self.connection.drain(self._subscription)
        await self._inbox.close()
        await self.connection.close()


def _int(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0


async def _find_or_create(
    js: JetStreamContext, subject: str, consumer: str, stream: str
) -> ConsumerInfo:
    if not stream:
        stream = await js.find_stream_name_by_subject(subject)
    await js.stream_info(stream)  # so that what is not found below is the consumer
    try:
        found: ConsumerInfo = await js.consumer_info(stream, consumer)
        return found
    except NotFoundError:
        config = ConsumerConfig(
            name=consumer,
            durable_name=consumer,
            ack_policy=AckPolicy.EXPLICIT,
            ack_wait=CREATED_ACK_WAIT_S,
            max_deliver=-1,
            max_ack_pending=-1,
            filter_subject=subject,
        )
        return await js.add_consumer(stream, config)


def _deadline_of(info: ConsumerInfo) -> float:
    """The consumer's shortest acknowledgement deadline; BrokerUnavailable if it does not fit."""
    config, name = info.config, f"JetStream consumer {info.name} of {info.stream_name}"
    if config.deliver_subject:
        raise BrokerUnavailable(f"{name}: it is a push consumer; KubeAI needs a pull consumer")
    if config.ack_policy != AckPolicy.EXPLICIT:
        raise BrokerUnavailable(f"{name}: KubeAI needs explicit acknowledgements (ack policy)")
    if (config.max_deliver or 0) > 0:
        log.warning(
            "consumer limits deliveries",
            consumer=info.name,
            max_deliver=config.max_deliver,
            message="JetStream drops a message after max_deliver attempts: its request then "
            "gets no response",
        )
    return min(config.backoff or [config.ack_wait or CREATED_ACK_WAIT_S])


class JetStreamTopic(CoreTopic):
    """Publishes to the stream that has the subject."""

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        """Publish, and wait until the stream has stored the message."""
        headers = self._headers.encode(attributes)
        if request_id := attributes.get(REQUEST_MESSAGE_ID):
            digest = hashlib.sha256(body).hexdigest()[:16]
            headers.setdefault(MESSAGE_ID, f"{quote_plus(request_id)}.{digest}")
        self._check_size(body, headers)
        js = self._connection.client.jetstream()
        publishing = js.publish(self._subject, body, timeout=TIMEOUT_S, headers=headers or None)
        try:
            await self._connection.lifetime.run("publish", publishing, raises=(nats.errors.Error,))
        except NoStreamResponseError:
            raise BrokerUnavailable(
                f"JetStream: there is no stream with the subject {self._subject}"
            ) from None
        except APIError as error:
            if error.err_code == _TOO_LARGE:
                raise MessageTooLarge(
                    f"the message has {len(body)} bytes, more than the stream's max_msg_size"
                ) from None
            raise BrokerUnavailable(f"JetStream: {error.description}") from None
        except nats.errors.Error as error:
            raise BrokerUnavailable(f"JetStream: {error}") from None
