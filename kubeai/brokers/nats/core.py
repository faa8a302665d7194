"""Core NATS, which keeps no messages and knows no acknowledgements.

KubeAI does what is possible:

- A message that a process has received is lost if the process is killed. So is one that arrives
  while no process is connected.
- Messages arrive whether or not KubeAI asks for them. Up to PENDING_MAX_COUNT messages or
  PENDING_MAX_BYTES wait here, across reconnections; more are dropped, with a warning in the log.
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
from collections.abc import Collection, Mapping
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
        headers = dict(message.headers or {})
        if self._go and headers:
            headers = {unquote_plus(key): unquote_plus(text) for key, text in headers.items()}
            return headers, message.data
        # One that was published again has headers as well.
        attributes, body = gob.decode(message.data) or ({}, message.data)
        return {**headers, **attributes}, body


class Backlog:
    """Messages that have arrived and that nobody has received. Only KubeAI has them."""

    def __init__(self) -> None:
        self.messages: deque[Msg] = deque()
        self._size_bytes = 0
        self._dropped = 0

    def add(self, message: Msg) -> None:
        """Add a message; drops it if there are too many."""
        size = self._size_bytes + len(message.data)
        if len(self.messages) >= PENDING_MAX_COUNT or size > PENDING_MAX_BYTES:
            self._dropped += 1
            return
        self.messages.append(message)
        self._size_bytes = size

    def take(self) -> Msg:
        """Remove the first message."""
        message = self.messages.popleft()
        self._size_bytes -= len(message.data)
        return message

    def warn_of_dropped(self) -> None:
        """Log how many messages have been dropped since the last warning."""
        if self._dropped:
            log.warning(
                "NATS messages dropped",
                count=self._dropped,
                message="they arrived faster than they were handled; use JetStream to keep them",
            )
            self._dropped = 0


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

    def __init__(
        self, connection: Connection, headers: Headers, queue: str, backlog: Backlog
    ) -> None:
        self.connection = connection
        self.headers = headers
        self._queue = queue
        self._backlog = backlog
        self._subscription: LibrarySubscription | None = None
        self._arrived = asyncio.Event()
        self._closing = False
        connection.lifetime.on_end(self._arrived.set)

    @classmethod
    async def open(
        cls, connection: Connection, headers: Headers, subject: str, queue: str, backlog: Backlog
    ) -> CoreSubscription:
        """Subscribe. BrokerUnavailable if the server refuses.

        ``backlog``: what arrives is added to it, and what an earlier subscription has left is
        received first.
        """
        self = cls(connection, headers, queue, backlog)
        self._subscription = await connection.lifetime.run(
            "subscribe",
            connection.client.subscribe(
                subject,
                queue=queue,
                cb=self._on_message,
                pending_msgs_limit=0,  # the backlog is limited
                pending_bytes_limit=0,
            ),
        )
        await connection.lifetime.run("subscribe", connection.flush())
        return self

    async def _on_message(self, message: Msg) -> None:
        self._backlog.add(message)
        self._arrived.set()

    async def receive(self, count_max: int) -> list[Delivery]:
        """Wait for messages. After the connection has ended, those that had arrived come first."""
        while not self._backlog.messages or self._closing:
            self.connection.lifetime.check()
            self._arrived.clear()
            await self._arrived.wait()
        self._backlog.warn_of_dropped()
        count = min(count_max, len(self._backlog.messages))
        return [_CoreDelivery(self, self._backlog.take()) for _ in range(count)]

    async def release(self, delivery: _CoreDelivery) -> None:
        """See :meth:`_CoreDelivery.release`."""
        self.connection.lifetime.check()
        message = delivery.message
        message.headers = {**(message.headers or {}), MESSAGE_ID: delivery.id}
        if self._queue and not self._closing:
            await self.connection.lifetime.run("publish again", self._publish_again([message]))
        else:
            self._backlog.add(message)
            self._arrived.set()

    async def _publish_again(self, messages: Collection[Msg]) -> None:
        for message in messages:
            await self.connection.client.publish(
                message.subject, message.data, message.reply, message.headers or None
            )
        await self.connection.flush()

    async def lag(self) -> int | None:
        """None: the server keeps no messages."""
        self.connection.lifetime.check()
        return None

    async def close(self) -> None:
        """Leave the queue group, and publish again for it what has not been received.

        Where that is not possible, it stays in the backlog, for the next subscription.
        """
        if not self._closing:
            self._closing = True
            if self._subscription is not None:
                await self.connection.drain(self._subscription)
            messages = self._backlog.messages
            if self._queue and messages:
                with contextlib.suppress(BrokerUnavailable):
                    publishing = self._publish_again(messages)
                    await self.connection.lifetime.run("publish again", publishing)
                    while messages:
                        self._backlog.take()
        await self.connection.close()


class CoreTopic(Topic):
    """Publishes to a subject. Also the base of JetStream's topic."""

    def __init__(self, connection: Connection, headers: Headers, subject: str) -> None:
        self._connection = connection
        self._headers = headers
        self._subject = subject

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        """Publish, and wait until the server has processed it."""
        headers = self._headers.encode(attributes)
        self._check_size(body, headers)
        await self._connection.lifetime.run("publish", self._publish(body, headers))

    async def _publish(self, body: bytes, headers: dict[str, str]) -> None:
        client = self._connection.client
        await client.publish(self._subject, body, headers=headers or None)
        await self._connection.flush()

    def _check_size(self, body: bytes, headers: dict[str, str]) -> None:
        """MessageTooLarge if the server will not take the message: it would end the connection."""
        size = len(body) + 14  # of "NATS/1.0" and two ends of lines, roughly
        size += sum(len(f"{name}: {text}\r\n".encode()) for name, text in headers.items())
        limit = self._connection.client.max_payload
        if size > limit:
            raise MessageTooLarge(
                f"the message has {size} bytes, and the NATS server's max_payload is {limit}"
            )

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()
