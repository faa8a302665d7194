"""Apache Kafka: a consumer group receives requests, a producer publishes responses.

Kafka delivers partitions, not messages. Each partition belongs to one member of the group, so at
most as many KubeAI replicas take part as there are partitions. Within a partition, messages are
acknowledged in any order; ``progress`` describes what is stored. At most ``WINDOW_MAX_COUNT``
messages of a partition follow one that is not acknowledged; then the partition is paused.

- ``release`` gives a message back to this subscription, which returns it from ``receive`` again, or
  to the next owner of its partition.
- When the group rebalances, partitions stay where they are if possible (sticky assignment), and so
  do their messages in hand. The messages of a partition that has moved are delivered again by its
  new owner.
- There is no deadline: heartbeats keep the partitions, however long a message is in hand.
- A group that has never committed an offset starts, as in gocloud, at the newest message, or at the
  oldest one with ``offset=oldest``. The first offset is committed at once, so that no message is
  skipped later, except those that are published to a partition before KubeAI knows that it has been
  added: ``offset=oldest`` includes them. If Kafka has deleted messages that were waiting, it goes
  on with the oldest one.
- The client fails over between the brokers of a cluster by itself. BrokerUnavailable means that
  the group's coordinator has not answered for ``UNREACHABLE_S``.
- Topics are not created. Kafka itself may create one that is deleted while it is in use.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import MessageSizeTooLargeError

from kubeai.brokers.base import (
    TIMEOUT_S,
    Broker,
    BrokerUnavailable,
    MessageTooLarge,
    Subscription,
    Topic,
    is_library_cancellation,
)
from kubeai.brokers.kafka.client import (
    REQUEST_TIMEOUT_S,
    attempt,
    check_topics,
    close_producer,
    collect_failures,
    milliseconds,
    reason_of,
)
from kubeai.brokers.kafka.group import GroupSubscription
from kubeai.brokers.urls import BrokerUrl
from kubeai.errors import KubeAIError

PUBLISH_TIMEOUT_S = 15.0  # enough for the election of a partition's new leader
PUBLISH_MAX_BYTES = 64 << 20  # the broker's limit is usually 1 MiB; it closes the connection at 100
_NAME = re.compile(r"[a-zA-Z0-9._-]{1,249}")  # of a topic
_OFFSETS = "newest", "oldest"
_PROTOCOLS = "PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"
_MECHANISMS = "PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"


class Kafka(Broker):
    """``kafka://group?topic=…`` (repeatable, ``offset``) or ``kafka://topic`` (``key_name``).

    The brokers are in KAFKA_BROKERS. TLS and SASL are configured by the variables of
    :func:`_security`, which gocloud lacks.
    """

    def __init__(self, url: BrokerUrl) -> None:
        url.check_options("topic", "offset", "key_name")
        self._url = url
        self._name = unquote(url.parts.netloc + url.parts.path).rstrip("/")
        if not self._name:
            raise url.error("has no name: write kafka://group?topic=… or kafka://topic")
        self._topics = url.values("topic")
        if self._topics and "key_name" in url.options:
            raise url.error("has the options topic (of a subscription) and key_name (of a topic)")
        self._offset = url.options.get("offset", "newest")
        if self._offset not in _OFFSETS:
            raise url.error(f"has the option offset={self._offset}; it is {' or '.join(_OFFSETS)}")
        if url.options.get("key_name") == "":
            raise url.error("has an empty option key_name")
        for topic in self._topics or ([] if "offset" in url.options else [self._name]):
            if not _NAME.fullmatch(topic):
                raise url.error(
                    f"names the topic {topic!r}; a name has at most 249 letters, digits, and ._-"
                )
        self._client = {"bootstrap_servers": _brokers(url), **_security(url)}

    async def subscribe(self) -> Subscription:
        """Join the consumer group."""
        if not self._topics:
            raise self._url.error("receives nothing: write kafka://group?topic=…")
        subscription = GroupSubscription(self._client, self._name, self._topics, self._offset)
        await _open(subscription.open, subscription.close, f"Kafka's group {self._name}")
        return subscription

    async def open_topic(self) -> Topic:
        """Connect a producer."""
        if self._topics or "offset" in self._url.options:
            raise self._url.error("is a subscription; to publish, write kafka://topic")
        topic = _Topic(self._client, self._name, self._url.options.get("key_name"))
        await _open(topic.open, topic.close, f"Kafka's topic {self._name}")
        return topic


def _brokers(url: BrokerUrl) -> list[str]:
    brokers = [broker.strip() for broker in url.variable("KAFKA_BROKERS").split(",")]
    for broker in brokers:
        host, colon, port = broker.rpartition(":")
        if (colon and not (host and port.isdigit())) or not broker:
            raise url.error(f"needs KAFKA_BROKERS as host:port,host:port; {broker!r} is not one")
    return brokers


def _security(url: BrokerUrl) -> dict[str, Any]:
    """The client's settings from KAFKA_SECURITY_PROTOCOL (default PLAINTEXT), for TLS
    KAFKA_TLS_CA_FILE (default: the system's), KAFKA_TLS_CERT_FILE and KAFKA_TLS_KEY_FILE, and for
    SASL KAFKA_SASL_MECHANISM (default PLAIN), KAFKA_SASL_USERNAME and KAFKA_SASL_PASSWORD.
    """
    environment = url.environment
    protocol = _one_of(url, "KAFKA_SECURITY_PROTOCOL", _PROTOCOLS)
    settings: dict[str, Any] = {"security_protocol": protocol}
    if protocol.endswith("SSL"):
        ca, cert, key = (
            environment.get(f"KAFKA_TLS_{name}_FILE") or None for name in ("CA", "CERT", "KEY")
        )
        try:
            context = ssl.create_default_context(cafile=ca)
            if cert:
                context.load_cert_chain(cert, key)
        except OSError as error:  # ssl.SSLError is one
            files = ", ".join(file for file in (ca, cert, key) if file)
            raise url.error(f"cannot use the TLS files {files}: {error}") from None
        settings["ssl_context"] = context
    if protocol.startswith("SASL"):
        settings["sasl_mechanism"] = _one_of(url, "KAFKA_SASL_MECHANISM", _MECHANISMS)
        settings["sasl_plain_username"] = url.variable("KAFKA_SASL_USERNAME")
        settings["sasl_plain_password"] = url.variable("KAFKA_SASL_PASSWORD")
    return settings


def _one_of(url: BrokerUrl, name: str, values: tuple[str, ...]) -> str:
    value = url.environment.get(name) or values[0]
    if value not in values:
        raise url.error(f"needs {name} to be one of {', '.join(values)}; it is {value!r}")
    return value


async def _open(
    connect: Callable[[], Awaitable[None]], close: Callable[[], Awaitable[None]], what: str
) -> None:
    collect_failures()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await connect()
    except BaseException as error:
        await close()
        if isinstance(error, KubeAIError) or not (
            isinstance(error, Exception) or is_library_cancellation(error)
        ):
            raise
        timed_out = f"no answer within {TIMEOUT_S:g} s"
        reason = reason_of(timed_out if isinstance(error, TimeoutError) else error)
        raise BrokerUnavailable(f"{what}: {reason}") from None


class _Topic(Topic):
    def __init__(self, client: Mapping[str, Any], name: str, key_name: str | None) -> None:
        self._name = name
        self._key_name = key_name
        common = {**client, "request_timeout_ms": milliseconds(REQUEST_TIMEOUT_S)}
        self._admin = AIOKafkaAdminClient(**common)
        self._producer = AIOKafkaProducer(
            **common, acks="all", enable_idempotence=True, max_request_size=PUBLISH_MAX_BYTES
        )
        self._limits: set[asyncio.Timeout] = set()  # of the messages on the way
        self._ended = ""  # why
        self._closing: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self._admin.start()
        await check_topics(self._admin, [self._name])
        await attempt(self._admin.close())
        await self._producer.start()

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        self._check()
        key = attributes.get(self._key_name) if self._key_name else None
        headers = [
            (name, value.encode()) for name, value in attributes.items() if name != self._key_name
        ]
        try:
            async with self._limit():
                await self._producer.send_and_wait(
                    self._name, body, key=key.encode() if key else None, headers=headers
                )
        except MessageSizeTooLargeError:
            raise MessageTooLarge(
                f"a message of {len(body)} bytes is larger than max.message.bytes of Kafka's topic "
                f"{self._name}, or than {PUBLISH_MAX_BYTES} bytes"
            ) from None
        except TimeoutError:
            self._ended = self._ended or reason_of(f"no answer within {PUBLISH_TIMEOUT_S:g} s")
            self._check()
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and not is_library_cancellation(error):
                raise
            self._ended = self._ended or reason_of(error)
            self._check()

    @contextlib.asynccontextmanager
    async def _limit(self) -> AsyncIterator[None]:
        """TimeoutError after PUBLISH_TIMEOUT_S, or when the topic is closed."""
        async with asyncio.timeout(PUBLISH_TIMEOUT_S) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)

    def _check(self) -> None:
        if self._ended:
            raise BrokerUnavailable(f"Kafka's topic {self._name}: {self._ended}")

    async def close(self) -> None:
        if self._closing is None:
            self._ended = self._ended or "it is closed"
            for limit in self._limits:
                if not limit.expired():
                    limit.reschedule(0)
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await close_producer(self._producer)
        await attempt(self._admin.close())
