"""Core NATS, which keeps no messages and knows no acknowledgements.

KubeAI does what is possible:

- A message that a process has received is lost if the process is killed. So is one that arrives
  while no process is connected.
- Messages arrive whether or not KubeAI asks for them. Up to PENDING_MAX_COUNT messages or
  PENDING_MAX_BYTES wait here; more are dropped, with a warning in the log.
- A process that shuts down publishes what it has received and not handled once more, for the other
  members of its queue group. The same holds for a released message. Without a queue group, every
  process receives every message.
- A published message is confirmed when the server has it. It is lost if nobody subscribes to it.

Without ``natsv2``, the Go CDK publishes metadata in an encoding that only Go reads. KubeAI reads it
too, but publishes a plain body with headers: every client can read that, and the Go CDK reads the
body.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections import deque
from collections.abc import Mapping
from urllib.parse import quote_plus, unquote_plus

from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as LibrarySubscription

from kubeai.brokers.base import (
    BrokerUnavailable,
    Delivery,
    MessageTooLarge,
    Subscription,
    Topic,
)
from kubeai.brokers.nats import gob
from kubeai.brokers.nats.connection import Connection
from kubeai.logs import get_logger

log = get_logger(__name__)

PENDING_MAX_COUNT = 65_536
PENDING_MAX_BYTES = 64 << 20
BUFFER_MAX_COUNT = 64  # received messages between nats-py's queue and `receive`
MESSAGE_ID = "Nats-Msg-Id"  # the header that identifies a message, for NATS as well


class Headers:
    """Attributes as headers, and back. ``go``: escaped as in a query, as natspubsub does."""

    def __init__(self, go: bool) -> None:
        self._go = go

    def encode(self, attributes: Mapping[str, str]) -> dict[str, str]:
        """The headers of a message with the attributes."""
        if not self._go:
            return dict(attributes)
        return {quote_plus(name): quote_plus(text) for name, text in attributes.items()}

    def decode(self, message: Msg) -> tuple[dict[str, str], bytes]:
        """The attributes and the body of a message."""
        if message.headers:
            headers = dict(message.headers)
            if self._go:
                headers = {unquote_plus(key): unquote_plus(text) for key, text in headers.items()}
            return headers, message.data
        return gob.decode(message.data) or ({}, message.data)


class _CoreDelivery(Delivery):
    """A message that the server has forgotten already."""

    def __init__(self, subscription: CoreSubscription, message: Msg) -> None:
        self._subscription = subscription
        self.attributes, self.body = subscription.headers.decode(message)
        self.id = self.attributes.get(MESSAGE_ID) or uuid.uuid4().hex
        self.deliveries = 0
        self.message = message

    async def acknowledge(self) -> None:
        """Check the connection; there is nothing to acknowledge."""
        self._subscription.connection.lifetime.check()

    async def release(self) -> None:
        """Publish the message again, for the queue group; without one, receive it again here."""
        await self._subscription.release(self)

    async def extend(self) -> None:
        """Nothing: there is no deadline."""


class CoreSubscription(Subscription):
    """A member of a queue group, or a subscriber of its own if ``queue`` is empty."""

    def __init__(self, connection: Connection, headers: Headers, queue: str) -> None:
        self.connection = connection
        self.headers = headers
        self._queue = queue
        self._subscription: LibrarySubscription | None = None
        self._ready: deque[_CoreDelivery] = deque()
        self._arrived = asyncio.Event()
        self._room = asyncio.Event()
        self._dropped = 0
        self._closing = False
        connection.lifetime.on_end(self._arrived.set)

    @classmethod
    async def open(
        cls, connection: Connection, headers: Headers, subject: str, queue: str
    ) -> CoreSubscription:
        """Subscribe. BrokerUnavailable if the server refuses."""
        self = cls(connection, headers, queue)
        self._subscription = await connection.lifetime.run(
            "subscribe",
            connection.client.subscribe(
                subject,
                queue=queue,
                cb=self._on_message,
                pending_msgs_limit=PENDING_MAX_COUNT,
                pending_bytes_limit=PENDING_MAX_BYTES,
            ),
        )
        await connection.lifetime.run("subscribe", connection.flush())
        if connection.refusal:
            raise connection.lifetime.error(connection.refusal)
        return self

    async def _on_message(self, message: Msg) -> None:
        while len(self._ready) >= BUFFER_MAX_COUNT and not self._closing:
            self._room.clear()
            await self._room.wait()
        self._ready.append(_CoreDelivery(self, message))
        self._arrived.set()

    async def receive(self, count_max: int) -> list[Delivery]:
        """Wait for messages. After the connection has ended, those that had arrived come first."""
        while not self._ready or self._closing:
            self.connection.lifetime.check()
            self._arrived.clear()
            await self._arrived.wait()
        self._warn_of_dropped()
        self._room.set()
        return [self._ready.popleft() for _ in range(min(count_max, len(self._ready)))]

    def _warn_of_dropped(self) -> None:
        if (dropped := self.connection.dropped - self._dropped) > 0:
            self._dropped += dropped
            log.warning(
                "NATS messages dropped",
                count=dropped,
                message="they arrived faster than they were handled; use JetStream to keep them",
            )

    async def release(self, delivery: _CoreDelivery) -> None:
        """See :meth:`_CoreDelivery.release`."""
        self.connection.lifetime.check()
        if self._queue and not self._closing:
            await self._publish_again(delivery)
            return
        self._ready.append(delivery)
        self._arrived.set()

    async def _publish_again(self, delivery: _CoreDelivery) -> None:
        message, client = delivery.message, self.connection.client
        headers = {**(message.headers or {}), MESSAGE_ID: delivery.id}
        publishing = client.publish(message.subject, message.data, message.reply, headers)
        await self.connection.lifetime.run("publish again", publishing)
        await self.connection.lifetime.run("publish again", self.connection.flush())

    async def lag(self) -> int | None:
        """None: the server keeps no messages."""
        self.connection.lifetime.check()
        return None

    async def close(self) -> None:
        """Leave the queue group, publish again what has arrived and not been received."""
        if not self._closing:
            self._closing = True
            self._room.set()
            if self._subscription is not None:
                await self.connection.drain(self._subscription)
            with contextlib.suppress(BrokerUnavailable):
                while self._queue and self._ready:
                    await self._publish_again(self._ready.popleft())
        await self.connection.close()


class CoreTopic(Topic):
    """Publishes to a subject. Also the base of JetStream's topic."""

    def __init__(self, connection: Connection, headers: Headers, subject: str) -> None:
        self._connection = connection
        self._headers = headers
        self._subject = subject

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        """Publish, and wait until the server has processed it."""
        await self._connection.lifetime.run(
            "publish", self._publish(body, self._encode(body, attributes))
        )
        if self._connection.refusal:
            raise self._connection.lifetime.error(self._connection.refusal)

    async def _publish(self, body: bytes, headers: dict[str, str]) -> None:
        client = self._connection.client
        await client.publish(self._subject, body, headers=headers or None)
        await self._connection.flush()

    def _encode(self, body: bytes, attributes: Mapping[str, str]) -> dict[str, str]:
        """The headers. MessageTooLarge if the server will not take the message with them."""
        headers = self._headers.encode(attributes)
        size = len(body) + 14  # of "NATS/1.0" and two ends of lines, roughly
        size += sum(len(f"{name}: {text}\r\n".encode()) for name, text in headers.items())
        limit = self._connection.client.max_payload
        if size > limit:
            raise MessageTooLarge(
                f"the message has {size} bytes, and the NATS server's max_payload is {limit}"
            )
        return headers

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()
