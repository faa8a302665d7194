"""RabbitMQ, by AMQP 0-9-1.

URLs as of the Go CDK's rabbitpubsub, with the server in the environment variable RABBIT_SERVER_URL
(``amqp://user:password@host:port/vhost``; ``amqps://`` for TLS, with the options ``cacertfile``,
``certfile`` and ``keyfile`` of RabbitMQ's URIs)::

    rabbit://QUEUE?prefetch_count=N     receive; N limits the messages that a process has in hand
    rabbit://EXCHANGE?key_name=NAME     publish; the attribute NAME becomes the routing key

The queue, the exchange and its bindings have to exist. Use a durable queue and exchange; of the
kinds of queues, quorum queues are replicated, and count deliveries.

- A response is published as a persistent message, and confirmed once the broker has stored it in
  every queue that it is routed to. One that is routed to no queue is not confirmed, and published
  again later: bind a queue to the exchange. Without ``key_name``, the routing key is empty, so use
  a fanout exchange. The property correlation_id has the id of the request's message.
- AMQP gives messages no identity. A message's id is its property message_id; without one, it is
  a hash of the message, so that equal messages have the same id, and a message that is redelivered
  after its response is answered again. Set message_id on requests.
- Messages are redelivered when the connection ends, and there is no deadline that could be
  extended. But RabbitMQ closes a channel that has a message for longer than its consumer_timeout
  (30 minutes by default), which redelivers all messages in hand. If models take longer to start
  or to respond, raise it in RabbitMQ.
- A quorum queue of RabbitMQ 4 drops a message after 20 deliveries by default (delivery-limit), or
  sends it to its dead letter exchange. KubeAI retries without a redelivery, so that only messages
  that end the process come near it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import posixpath
import re
import ssl
from collections import deque
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractExchange, AbstractIncomingMessage, AbstractQueue
from aio_pika.exceptions import (
    AMQPError,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    DeliveryError,
    PublishError,
)
from aiormq.connection import TCPTransportFactory, TLSTransportFactory, TransportFactory
from yarl import URL

from kubeai.brokers.base import (
    REQUEST_MESSAGE_ID,
    Broker,
    BrokerUnavailable,
    Delivery,
    MessageTooLarge,
    Subscription,
    Topic,
)
from kubeai.brokers.lifetime import Lifetime, text_of
from kubeai.brokers.urls import BrokerUrl

CONNECT_TIMEOUT_S = 20.0
HEARTBEAT_S = 8  # a silent broker is noticed after (HEARTBEAT_S + 1) * 3
SERVER_URL = "RABBIT_SERVER_URL"
PREFETCH_MAX_COUNT = 65_535  # AMQP's
_DELIVERY_COUNT = "x-delivery-count"  # deliveries of a quorum queue before this one
_TOO_LARGE = re.compile(r"message size (\d+) is larger than configured max size (\d+)")
# Of a message without message_id. Not headers that the broker adds.
_HASHED = ("app_id", "content_type", "correlation_id", "reply_to", "timestamp", "type")

for _name in ("aio_pika", "aiormq"):  # they log each failure that they raise
    logging.getLogger(_name).setLevel(logging.CRITICAL)


class RabbitMQ(Broker):
    """A queue to receive from, or an exchange to publish to."""

    def __init__(self, url: BrokerUrl) -> None:
        url.check_options("key_name", "prefetch_count")
        host = url.parts.netloc.rpartition("@")[2]
        self._name = unquote(posixpath.normpath(f"{host}{url.parts.path}"))
        if self._name in ("", "."):
            raise url.error("names neither a queue nor an exchange (rabbit://NAME)")
        self._key_name = url.options.get("key_name")
        if self._key_name == "":
            raise url.error("needs a name for the option key_name")
        count = url.options.get("prefetch_count", "0")
        if not count.isdecimal() or int(count) > PREFETCH_MAX_COUNT:
            limits = f"from 0 (no limit) to {PREFETCH_MAX_COUNT}"
            raise url.error(f"needs a number {limits} for the option prefetch_count")
        self._prefetch_max_count = int(count) or PREFETCH_MAX_COUNT
        self._server = _read_server(url)

    async def subscribe(self) -> Subscription:
        """Connect, and check that the queue exists."""
        connection = await _Connection.open(self._server)
        try:
            return await _RabbitSubscription.open(connection, self._name, self._prefetch_max_count)
        except BaseException:
            await connection.close()
            raise

    async def open_topic(self) -> Topic:
        """Connect, and check that the exchange exists."""
        connection = await _Connection.open(self._server)
        topic = _RabbitTopic(connection, self._name, self._key_name)
        try:
            await topic.open_channel()
        except BaseException:
            await connection.close()
            raise
        return topic


def _read_server(url: BrokerUrl) -> SplitResult:
    """The server's URL. ConfigError, which does not show it, if it is not one of AMQP."""
    try:
        server = urlsplit(url.variable(SERVER_URL))
        valid = server.scheme in ("amqp", "amqps") and server.hostname and server.port != 0
    except ValueError:
        valid = False
    if not valid:
        problem = "a URL of the form amqp://user:password@host:port/vhost"
        raise url.error(f"needs {problem} in the environment variable {SERVER_URL}")
    return server


class _Transports(TransportFactory):
    """Opens sockets, and closes them at once where a silent broker would keep them open."""

    def __init__(self, encrypted: bool) -> None:
        self._factory = TLSTransportFactory() if encrypted else TCPTransportFactory()
        self._writer: asyncio.StreamWriter | None = None

    async def create(
        self, url: URL, **kwargs: Any
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect; called by aiormq."""
        reader, self._writer = await self._factory.create(url, **kwargs)
        return reader, self._writer

    def abort(self) -> None:
        """Close the socket, and forget what is unsent."""
        if self._writer is not None:
            self._writer.transport.abort()


class _Connection:
    """A connection to the server, and its lifetime."""

    def __init__(self, server: SplitResult) -> None:
        encrypted = server.scheme == "amqps"
        address = f"{server.hostname}:{server.port or (5671 if encrypted else 5672)}"
        self.lifetime = Lifetime(f"RabbitMQ at {address}", (AMQPError, RuntimeError))
        self._transports = _Transports(encrypted)
        query = {"heartbeat": str(HEARTBEAT_S), "name": "kubeai"}
        self._library = aio_pika.Connection(
            URL(server._replace(query="", fragment="").geturl()).with_query(query),
            ssl_context=_tls_of(server) if encrypted else None,
        )
        self._library.kwargs["transport_factory"] = self._transports
        self._library.close_callbacks.add(self._on_close)

    @classmethod
    async def open(cls, server: SplitResult) -> _Connection:
        """Connect. BrokerUnavailable if the server does not answer, or refuses."""
        try:
            self = cls(server)
        except OSError as error:
            raise BrokerUnavailable(f"RabbitMQ: {SERVER_URL}: {text_of(error)}") from None
        try:
            await self.lifetime.run("connect", self._library.connect(CONNECT_TIMEOUT_S))
        except BaseException:
            self.lifetime.end("it has not been opened")
            await self.close()
            raise
        return self

    async def channel(self, confirms: bool) -> AbstractChannel:
        """Open a channel. ``confirms``: of published messages."""
        return await self.lifetime.run("open a channel", self._open_channel(confirms))

    async def _open_channel(self, confirms: bool) -> AbstractChannel:
        channel = self._library.channel(publisher_confirms=confirms, on_return_raises=confirms)
        await channel.initialize()
        return channel

    async def _on_close(self, _: Any, error: BaseException | None) -> None:
        self.lifetime.end(text_of(error) if error else "the server has closed the connection")

    async def close(self) -> None:
        """Close the connection. Does not raise."""
        await self.lifetime.close(self._library.close(), self._transports.abort)


def _tls_of(server: SplitResult) -> ssl.SSLContext:
    """OSError if a file cannot be read."""
    options = {name: texts[0] for name, texts in parse_qs(server.query).items()}
    context = ssl.create_default_context(cafile=options.get("cacertfile"))
    if certificate := options.get("certfile"):
        context.load_cert_chain(certificate, options.get("keyfile"))
    return context


# -- receiving -------------------------------------------------------------------------------------


class _RabbitDelivery(Delivery):
    """A message of a queue."""

    def __init__(self, subscription: _RabbitSubscription, message: AbstractIncomingMessage) -> None:
        self._subscription = subscription
        self.message = message
        self.body = message.body
        self.attributes = {name: str(value) for name, value in message.headers.items()}
        self.id = message.message_id or _hash_of(message)
        self.id_is_unique = bool(message.message_id)
        count = message.headers.get(_DELIVERY_COUNT)
        if isinstance(count, int):
            self.deliveries = count + 1
        else:  # a classic queue does not count beyond the first
            self.deliveries = 0 if message.redelivered else 1

    async def acknowledge(self) -> None:
        """Acknowledge. AMQP has no confirmation of this."""
        await self._subscription.settle(self.message, accept=True)

    async def release(self) -> None:
        """Put the message back to its place in the queue."""
        await self._subscription.settle(self.message, accept=False)

    async def extend(self) -> None:
        """Nothing: RabbitMQ's consumer_timeout cannot be extended."""


def _hash_of(message: AbstractIncomingMessage) -> str:
    digest = hashlib.sha256(message.body)
    headers = {name: str(text) for name, text in message.headers.items() if name[:2] != "x-"}
    properties = {name: str(getattr(message, name)) for name in _HASHED}
    digest.update(repr((sorted(headers.items()), sorted(properties.items()))).encode())
    return digest.hexdigest()[:32]


class _RabbitSubscription(Subscription):
    """A consumer, with a limit on what it has unacknowledged (prefetch count).

    The limit is what the caller has in hand and what it asks for together. As long as these move in
    step, it stays as it is; else the consumer is cancelled, and another one is started.
    """

    def __init__(
        self, connection: _Connection, channel: AbstractChannel, queue: str, prefetch_max_count: int
    ) -> None:
        self._connection = connection
        self._lifetime = connection.lifetime
        self._channel = channel
        self._queue_name = queue
        self._prefetch_max_count = prefetch_max_count
        self._ready: deque[AbstractIncomingMessage] = deque()
        self._consumer: str | None = None  # its tag
        self._prefetch_count = 0  # of the consumer
        self._in_hand = 0  # of its messages
        self._in_hand_before = 0  # of messages of earlier consumers
        self._adjusting = asyncio.Lock()
        self._arrived = asyncio.Event()
        self._lifetime.on_end(self._arrived.set)

    @classmethod
    async def open(
        cls, connection: _Connection, queue: str, prefetch_max_count: int
    ) -> _RabbitSubscription:
        """Open a channel. BrokerUnavailable if there is no such queue."""
        channel = await connection.channel(confirms=False)
        self = cls(connection, channel, queue, prefetch_max_count)
        channel.close_callbacks.add(self._on_channel_close)
        underlay = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(self._on_consumer_cancel)
        await self._declared()
        return self

    async def _declared(self) -> AbstractQueue:
        return await self._lifetime.run(
            f"queue {self._queue_name}",
            self._channel.declare_queue(self._queue_name, passive=True),
        )

    async def receive(self, count_max: int) -> list[Delivery]:
        """Wait for messages."""
        self._lifetime.check()
        while not self._ready:
            await self._lifetime.run("consume", self._adjust(count_max))
            self._arrived.clear()
            self._lifetime.check()  # it may have ended in the meantime
            if not self._ready:
                await self._arrived.wait()
                self._lifetime.check()
        deliveries: list[Delivery] = []
        while self._ready and len(deliveries) < count_max:
            message = self._ready.popleft()
            if message.consumer_tag == self._consumer:
                self._in_hand += 1
            else:
                self._in_hand_before += 1
            deliveries.append(_RabbitDelivery(self, message))
        return deliveries

    async def _adjust(self, count: int) -> None:
        """Let the consumer receive up to ``count`` messages more than the caller has in hand."""
        async with self._adjusting:
            limit = min(self._in_hand + count, self._prefetch_max_count - self._in_hand_before)
            starved = self._in_hand >= self._prefetch_count < limit
            if self._ready or (self._prefetch_count <= limit and not starved):
                return
            prefetch_count = limit - self._in_hand
            queue = await self._channel.get_queue(self._queue_name, ensure=False)
            if (tag := self._consumer) is not None:
                self._consumer, self._prefetch_count = None, 0
                self._in_hand_before += self._in_hand
                self._in_hand = 0
                await queue.cancel(tag)
                await asyncio.sleep(0)  # aiormq calls back in tasks
            if self._ready or prefetch_count <= 0:
                return  # the cancelled one had received something; or enough is in hand
            await self._channel.set_qos(prefetch_count=prefetch_count)
            self._prefetch_count = prefetch_count
            self._consumer = await queue.consume(self._on_message)

    async def _on_message(self, message: AbstractIncomingMessage) -> None:
        self._ready.append(message)
        self._arrived.set()

    async def settle(self, message: AbstractIncomingMessage, accept: bool) -> None:
        """Acknowledge a message, or put it back."""
        await self._lifetime.run("acknowledge", self._settle(message, accept))

    async def _settle(self, message: AbstractIncomingMessage, accept: bool) -> None:
        await (message.ack() if accept else message.nack(requeue=True))
        if message.consumer_tag == self._consumer:
            self._in_hand -= 1
        else:
            self._in_hand_before -= 1
            self._arrived.set()  # the consumer may have more now

    async def lag(self) -> int | None:
        """Messages in the queue that no consumer has."""
        return (await self._declared()).declaration_result.message_count

    async def _on_channel_close(self, _: Any, error: BaseException | None) -> None:
        self._lifetime.end(text_of(error) if error else "the channel is closed")

    def _on_consumer_cancel(self, _: Any) -> None:
        self._lifetime.end(f"the server has cancelled the consumer of queue {self._queue_name}")

    async def close(self) -> None:
        """Close the connection; the server puts back all that is unacknowledged."""
        await self._connection.close()


# -- publishing ------------------------------------------------------------------------------------


class _RabbitTopic(Topic):
    """An exchange, and a channel in confirm mode."""

    def __init__(self, connection: _Connection, exchange: str, key_name: str | None) -> None:
        self._connection = connection
        self._lifetime = connection.lifetime
        self._name = exchange
        self._key_name = key_name
        self._channel: AbstractChannel | None = None
        self._exchange: AbstractExchange | None = None
        self._opening = asyncio.Lock()

    async def open_channel(self) -> AbstractExchange:
        """The exchange, on a channel that is open. BrokerUnavailable if it does not exist."""
        async with self._opening:
            if self._exchange is None or self._channel is None or self._channel.is_closed:
                self._channel = await self._connection.channel(confirms=True)
                self._exchange = await self._lifetime.run(
                    f"exchange {self._name}", self._channel.get_exchange(self._name)
                )
            return self._exchange

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        """Publish, and wait until the server has stored the message."""
        self._lifetime.check()
        exchange = await self.open_channel()
        headers: dict[str, Any] = dict(attributes)
        key = headers.pop(self._key_name, "") if self._key_name else ""
        message = aio_pika.Message(
            body,
            headers=headers,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            correlation_id=attributes.get(REQUEST_MESSAGE_ID),
        )
        errors = (DeliveryError, ChannelPreconditionFailed, ChannelNotFoundEntity)
        try:
            await self._lifetime.run("publish", exchange.publish(message, key), raises=errors)
        except PublishError:
            raise self._lifetime.error(
                f"exchange {self._name} routes the routing key {key!r} to no queue; bind one"
            ) from None
        except DeliveryError:
            raise self._lifetime.error(
                f"a queue of exchange {self._name} has refused the message"
            ) from None
        except (ChannelPreconditionFailed, ChannelNotFoundEntity) as error:
            found = _TOO_LARGE.search(str(error))
            if found and len(body) > int(found[2]):
                raise MessageTooLarge(
                    f"the message has {len(body)} bytes, and RabbitMQ's max_message_size is "
                    f"{found[2]}"
                ) from None
            raise self._lifetime.error(f"publish: {text_of(error)}") from None

    async def close(self) -> None:
        """Close the connection."""
        await self._connection.close()
