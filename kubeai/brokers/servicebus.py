"""Azure Service Bus, by azure-servicebus.

A URL is that of the Go CDK: ``azuresb://topic`` for responses, and for requests
``azuresb://topic?subscription=name``. ``azuresb://queue`` is a queue, for both. The namespace and
the credentials come from ``SERVICEBUS_CONNECTION_STRING``, or else the namespace from
``AZURE_SERVICEBUS_HOSTNAME`` and the credentials from azure-identity's default chain (workload
identity, managed identity, environment).

Messages are locked for the entity's lock duration (peek-lock), which ``extend`` restarts. When the
lock is lost, ``acknowledge``, ``release`` and ``extend`` log a warning, and the service delivers
the message again. It counts a release and a lost lock as failed deliveries, and moves a message to
the dead-letter queue after the entity's maximum delivery count. Entities with sessions are refused
by the service. ``lag`` is unknown, because only clients that may manage the entity can read it.

The library states that its clients are not to be used from several tasks at once. Its receivers do
allow settling and renewing during a receive (its own lock renewal does that); senders do not, so
one task sends what others publish meanwhile, as one batch.

A response has its request's id as message id, so that duplicate detection, where the entity has it,
drops the second response to a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from azure.servicebus import (
    ServiceBusMessage,
    ServiceBusMessageBatch,
    ServiceBusReceivedMessage,
    parse_connection_string,
)
from azure.servicebus.aio import ServiceBusClient, ServiceBusReceiver, ServiceBusSender
from azure.servicebus.amqp import AmqpMessageBodyType
from azure.servicebus.exceptions import (
    MessageAlreadySettled,
    MessageLockLostError,
    MessageNotFoundError,
    MessageSizeExceededError,
)

from kubeai.api.config.duration import parse_duration
from kubeai.brokers.base import (
    REQUEST_MESSAGE_ID,
    TIMEOUT_S,
    Broker,
    BrokerUnavailable,
    Delivery,
    MessageTooLarge,
    Subscription,
    Topic,
)
from kubeai.brokers.polling import Poller
from kubeai.brokers.urls import BrokerUrl
from kubeai.errors import install_hint
from kubeai.logs import get_logger

log = get_logger(__name__)
# The library reports each failure at warning level with a traceback, and raises it as well.
logging.getLogger("azure").setLevel(logging.ERROR)

CONNECTION_STRING, HOSTNAME = "SERVICEBUS_CONNECTION_STRING", "AZURE_SERVICEBUS_HOSTNAME"
LISTENER_TIMEOUT_S = 2.0  # of one poll; the Go CDK's default
BATCH_MAX_COUNT = 50  # messages of one poll or one batch; the Go CDK's default
LOCK_MIN_S = 5.0  # of the service, whose default is 60 s
MESSAGE_ID_MAX_CHARS = 128  # of the service
CLOSE_TIMEOUT_S = 5.0
ERROR_MAX_CHARS = 300

T = TypeVar("T")
_LOST = (MessageLockLostError, MessageNotFoundError, MessageAlreadySettled)


class ServiceBus(Broker):
    """A queue, a topic, or a subscription of a topic."""

    def __init__(self, url: BrokerUrl) -> None:
        url.check_options("subscription", "listener_timeout", "max_recv_batch_size")
        self._url = url
        self._entity = (url.parts.netloc.rpartition("@")[2] + url.parts.path).strip("/")
        if not self._entity:
            raise url.error("names no topic or queue")
        self._subscription = url.options.get("subscription", "")
        if "subscription" in url.options and not self._subscription:
            raise url.error("has an empty option subscription")
        self._poll_s = self._listener_timeout()
        self._batch_max_count = self._count_option("max_recv_batch_size", BATCH_MAX_COUNT)
        self._connection_string = url.environment.get(CONNECTION_STRING, "")
        self._hostname = url.environment.get(HOSTNAME, "")
        if self._connection_string:
            try:
                parse_connection_string(self._connection_string)
            except ValueError as error:
                raise url.error(f"needs a valid {CONNECTION_STRING}: {error}") from None
        elif not self._hostname:
            raise url.error(f"needs the environment variable {CONNECTION_STRING} or {HOSTNAME}")
        else:
            self._credential_class()  # a ConfigError now if it is not installed

    async def subscribe(self) -> Subscription:
        """Connect to receive messages."""
        client, credential = self._client()
        if self._subscription:
            receiver = client.get_subscription_receiver(self._entity, self._subscription)
        else:
            receiver = client.get_queue_receiver(self._entity)
        link = Link(self._entity, receiver, client, credential)
        await link.open()
        return ServiceBusSubscription(link, receiver, self._poll_s, self._batch_max_count)

    async def open_topic(self) -> Topic:
        """Connect to publish messages."""
        if self._subscription:
            raise self._url.error("names a subscription, which takes no messages")
        client, credential = self._client()
        sender = client.get_queue_sender(self._entity)  # a topic's has the same address
        link = Link(self._entity, sender, client, credential)
        await link.open()
        return ServiceBusTopic(link, sender)

    def _client(self) -> tuple[ServiceBusClient, Closable | None]:
        """A client, and the credential that has to be closed after it."""
        options: dict[str, Any] = {"retry_total": 0}
        if "usedevelopmentemulator=true" not in self._connection_string.lower():
            options["ssl_context"] = ssl.create_default_context()  # the system's authorities
        if self._connection_string:
            client = ServiceBusClient.from_connection_string(self._connection_string, **options)
            return client, None
        credential = self._credential_class()()
        return ServiceBusClient(self._hostname, credential, **options), credential

    def _credential_class(self) -> Any:
        """The class of the default credential."""
        try:
            from azure.identity.aio import DefaultAzureCredential
        except ImportError:
            hint = install_hint("servicebus")
            raise self._url.error(f"needs azure-identity for {HOSTNAME}; run {hint}") from None
        return DefaultAzureCredential

    def _listener_timeout(self) -> float:
        text = self._url.options.get("listener_timeout")
        if text is None:
            return LISTENER_TIMEOUT_S
        try:
            poll_s = parse_duration(text)
        except ValueError as error:
            raise self._url.error(f"has an invalid listener_timeout: {error}") from None
        if not 0 < poll_s <= TIMEOUT_S:
            raise self._url.error(
                f"has a listener_timeout that is not above 0s and up to {TIMEOUT_S:.0f}s"
            )
        return poll_s

    def _count_option(self, option: str, default: int) -> int:
        text = self._url.options.get(option, str(default))
        if not text.isdecimal() or not int(text):
            raise self._url.error(f"has {text!r} for the option {option}, not a number from 1")
        return int(text)


class Closable(Protocol):
    """A client or a credential."""

    async def close(self) -> None:
        """Close its connections."""


class Link:
    """A connection with one receiver or sender, which has failed for good once an operation has.

    The library would connect again by itself, with other locks and delivery tags.
    """

    def __init__(
        self,
        entity: str,
        handler: ServiceBusReceiver | ServiceBusSender,
        *resources: Closable | None,
    ) -> None:
        """``resources``: closed with the link, in this order."""
        self._entity = entity
        self._handler = handler
        self._resources = resources
        self.failure = ""  # empty while the connection lasts
        self._tasks: set[asyncio.Task[Any]] = set()

    async def open(self) -> None:
        """Connect. BrokerUnavailable if that fails."""
        try:
            await self.run(self._handler.__aenter__)
        except BaseException:
            await self.close()
            raise

    async def run(self, operation: Callable[[], Awaitable[T]], timeout_s: float = TIMEOUT_S) -> T:
        """Run an operation of the library, to its end even if this is cancelled.

        BrokerUnavailable if it fails; MessageTooLarge, and the library's errors for a lost lock.
        """
        if self.failure:
            raise BrokerUnavailable(self.failure)
        task = asyncio.create_task(self._attempt(operation, timeout_s))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.wait({task})
        if task.cancelled():
            raise BrokerUnavailable(self.failure)
        return task.result()

    async def _attempt(self, operation: Callable[[], Awaitable[T]], timeout_s: float) -> T:
        try:
            async with asyncio.timeout(timeout_s):
                return await operation()
        except _LOST:
            raise
        except MessageSizeExceededError as error:
            self.failure = self.failure or self._text(error)  # the service detaches the link
            raise MessageTooLarge(self._text(error)) from error
        except Exception as error:  # also AttributeError and the like, when the connection ends
            self.failure = self.failure or self._text(error)
            raise BrokerUnavailable(self.failure) from error
        except asyncio.CancelledError as error:  # by the library, unless `close` has done it
            self.failure = self.failure or self._text(error)
            raise

    def _text(self, error: BaseException) -> str:
        reason = str(error) or type(error).__name__
        return f"Service Bus: {self._entity}: {reason}"[:ERROR_MAX_CHARS]

    async def close(self) -> None:
        """Close the connection. Does not raise."""
        self.failure = self.failure or f"Service Bus: {self._entity}: it is closed"
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for resource in self._resources:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    if resource is not None:
                        await resource.close()


class ServiceBusDelivery(Delivery):
    """A locked message."""

    def __init__(
        self, link: Link, receiver: ServiceBusReceiver, message: ServiceBusReceivedMessage
    ) -> None:
        self.id = message.message_id or str(message.sequence_number)
        self.body = _body(message)
        self.attributes = _attributes(message.application_properties or {})
        self.deliveries = (message.delivery_count or 0) + 1  # the header has the failed ones
        self._link = link
        self._receiver = receiver
        self._message = message
        self._lock_s = self._remaining_s()

    async def acknowledge(self) -> None:
        """Complete the message, and wait for the confirmation."""
        await self._own(self._receiver.complete_message)

    async def release(self) -> None:
        """Abandon the message."""
        await self._own(self._receiver.abandon_message)

    async def extend(self) -> None:
        """Renew the lock, if half of it is over."""
        if self._remaining_s() < self._lock_s / 2 + LOCK_MIN_S / 3:
            await self._own(self._receiver.renew_message_lock)
        elif self._link.failure:
            raise BrokerUnavailable(self._link.failure)

    def _remaining_s(self) -> float:
        """Until the lock expires, by this machine's clock."""
        end = self._message.locked_until_utc
        return (end - datetime.now(UTC)).total_seconds() if end is not None else 0.0

    async def _own(self, operation: Callable[[ServiceBusReceivedMessage], Awaitable[Any]]) -> None:
        try:
            await self._link.run(partial(operation, self._message))
        except _LOST as error:
            log.warning("lost a message of Service Bus", id=self.id, reason=str(error))


class ServiceBusSubscription(Subscription):
    """Receives by granting credit for as many messages as are asked for."""

    def __init__(
        self, link: Link, receiver: ServiceBusReceiver, poll_s: float, batch_max_count: int
    ) -> None:
        self._link = link
        self._receiver = receiver
        self._poll_s = poll_s
        self._batch_max_count = batch_max_count
        self._poller = Poller(self._poll)
        # Only a message has the lock duration, but the caller needs it before the first one. So
        # this is the shortest that there is, and `extend` does nothing until it is needed.
        self.ack_deadline_s = LOCK_MIN_S

    async def receive(self, count_max: int) -> list[Delivery]:
        """Wait for messages."""
        return await self._poller.receive(min(count_max, self._batch_max_count))

    async def _poll(self, count: int) -> list[ServiceBusDelivery]:
        messages = await self._link.run(
            partial(self._receiver.receive_messages, count, max_wait_time=self._poll_s),
            self._poll_s + TIMEOUT_S,
        )
        return [ServiceBusDelivery(self._link, self._receiver, message) for message in messages]

    async def lag(self) -> int | None:
        """Unknown."""
        return None

    async def close(self) -> None:
        """Abandon what no ``receive`` has taken, and close the connection."""
        await self._poller.close()
        await self._link.close()


class _Publication(NamedTuple):
    message: ServiceBusMessage
    done: asyncio.Future[None]


class ServiceBusTopic(Topic):
    """Sends to a topic or a queue: one batch at a time, with what was published meanwhile."""

    def __init__(self, link: Link, sender: ServiceBusSender) -> None:
        self._link = link
        self._sender = sender
        self._waiting: list[_Publication] = []  # bounded by the callers, which wait
        self._sending: asyncio.Task[None] | None = None

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        """Publish a message; returns once Service Bus has accepted it."""
        size = len(body) + sum(len(name) + len(value) for name, value in attributes.items())
        # What the service states about the link. The library has no public name for it.
        if 0 < (limit := self._sender._max_message_size_on_link) < size:
            raise MessageTooLarge(
                f"Service Bus: the message has more than {size} bytes; the limit is {limit}"
            )
        properties = cast("dict[str | bytes, Any]", dict(attributes))
        message = ServiceBusMessage(body, application_properties=properties)
        identity = attributes.get(REQUEST_MESSAGE_ID, "")
        if identity and len(identity) <= MESSAGE_ID_MAX_CHARS:
            message.message_id = identity
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Publication(message, done))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_all())
        await done

    async def _send_all(self) -> None:
        while self._waiting:
            publications: list[_Publication] = []
            try:
                content = await self._take(publications)
                await self._link.run(partial(self._sender.send_messages, content))
            except MessageTooLarge as error:  # of a batch, it says nothing about a message
                alone = len(publications) == 1
                outcome: Exception | None = error if alone else BrokerUnavailable(str(error))
            except Exception as error:  # whatever it is, the callers raise it
                outcome = error
            else:
                outcome = None
            for publication in publications:
                if publication.done.done():
                    continue  # the caller was cancelled
                if outcome is None:
                    publication.done.set_result(None)
                else:
                    publication.done.set_exception(outcome)
        self._sending = None

    async def _take(
        self, publications: list[_Publication]
    ) -> ServiceBusMessage | ServiceBusMessageBatch:
        """Move the first publications that fit into one batch to ``publications``."""
        publications.append(self._waiting.pop(0))
        if not self._waiting:
            return publications[0].message
        batch = await self._link.run(self._sender.create_message_batch)
        with contextlib.suppress(MessageSizeExceededError):
            batch.add_message(publications[0].message)
            while self._waiting and len(publications) < BATCH_MAX_COUNT:
                batch.add_message(self._waiting[0].message)
                publications.append(self._waiting.pop(0))
        # A message that fits into no batch may still be sent alone.
        return batch if len(publications) > 1 else publications[0].message

    async def close(self) -> None:
        """Close the connection."""
        await self._link.close()
        if self._sending is not None:
            await asyncio.wait({self._sending})


def _body(message: ServiceBusReceivedMessage) -> bytes:
    """The body; empty if it is a structure of AMQP other than a text."""
    if message.body_type is AmqpMessageBodyType.DATA:
        return b"".join(cast("list[bytes]", message.body))
    body = message.body if message.body_type is AmqpMessageBodyType.VALUE else b""
    if isinstance(body, str):
        return body.encode()
    return body if isinstance(body, bytes) else b""


def _attributes(properties: Mapping[str | bytes, Any]) -> dict[str, str]:
    """The properties with a text, as in the Go CDK."""
    return {
        _decoded(name): _decoded(value)
        for name, value in properties.items()
        if isinstance(value, (str, bytes))
    }


def _decoded(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode(errors="replace")
