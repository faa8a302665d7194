"""Amazon SQS, by aiobotocore.

A URL is that of the Go CDK: ``awssqs://`` and the URL of the queue without its scheme, such as
``awssqs://sqs.us-east-2.amazonaws.com/123456789012/requests?region=us-east-2``. Credentials, and
what else the AWS SDKs configure, come from the SDK's default chain: the environment, the files in
``~/.aws``, a web identity, the instance. ``messages.py`` has the encoding of messages.

Requests to SQS cost money, so an empty receive waits for 20 s unless the option ``waittime`` says
otherwise, and messages are sent, deleted and extended in batches of up to 10 that collect for
``LINGER_S``.

There is no connection whose end returns the messages: each is invisible to other receivers for the
queue's visibility timeout, which ``extend`` restarts, up to 12 hours after it was received. A
receiver that is later than that has lost the message; ``acknowledge``, ``release`` and ``extend``
then log a warning, and SQS delivers the message again.

On a FIFO queue, a response is in a message group of its own and deduplicated by the id of its
request, unless it has the attributes ``MessageGroupId`` and ``DeduplicationId``, which the Go CDK
reads as well. SQS thereby drops the second response to a request within 5 minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from aiobotocore.config import AioConfig
from aiobotocore.session import AioSession
from botocore import UNSIGNED
from botocore.exceptions import BotoCoreError, ClientError

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
from kubeai.brokers.sqs.batch import Batch, Entry, Refused
from kubeai.brokers.sqs.messages import decode, encode, fifo_id, size_bytes
from kubeai.brokers.urls import BrokerUrl
from kubeai.logs import get_logger

log = get_logger(__name__)

WAIT_MAX_S = 20.0  # of SQS, for one receive
EMPTY_PAUSE_S = 0.25  # after an empty receive that did not wait
RECEIVE_MAX_COUNT = 10  # of SQS, in one receive
ATTRIBUTES_MAX_COUNT = 10  # of SQS, in one message
MESSAGE_MAX_BYTES = 1 << 20  # of SQS; a queue may have a lower limit
# Of SQS. Used when the queue's attributes may not be read, or when it hides no messages.
VISIBILITY_DEFAULT_S = 30
CONNECT_TIMEOUT_S = 10.0
ATTEMPTS_MAX_COUNT = 3  # of a request, in botocore
CONNECTIONS_MAX_COUNT = 16
OPTIONS = (
    *("region", "endpoint", "profile", "waittime", "raw", "snstopicarn", "nacklazy"),
    *("anonymous", "dualstack", "fips"),
    # Without an effect here, and accepted for URLs that KubeAI in Go reads.
    *("awssdk", "hostname_immutable", "rate_limiter_capacity"),
    *("request_checksum_calculation", "response_checksum_validation"),
)
_BOOLEANS = dict.fromkeys(("1", "t", "T", "true", "TRUE", "True"), True) | dict.fromkeys(
    ("0", "f", "F", "false", "FALSE", "False"), False
)
_HOST_REGION = re.compile(r"(?:sqs|queue)\.([a-z0-9-]+)\.amazonaws\.com(?:\.cn)?(?::\d+)?", re.I)
# That the message is no longer this receiver's, or that its 12 hours are over.
_LOST = {
    "ReceiptHandleIsInvalid",
    "MessageNotInflight",
    "AWS.SimpleQueueService.MessageNotInflight",
    "InvalidParameterValue",
}
_DENIED = {"AccessDenied", "AccessDeniedException", "AWS.SimpleQueueService.AccessDenied"}
_FAILURES = (BotoCoreError, ClientError, aiohttp.ClientError, OSError, TimeoutError)


class SQS(Broker):
    """A queue of SQS, which is both where requests come from and where responses go to."""

    def __init__(self, url: BrokerUrl) -> None:
        url.check_options(*OPTIONS)
        self._url = url
        queue = re.sub("/{2,}", "/", url.parts.path).rstrip("/")
        host = url.parts.netloc.rpartition("@")[2]
        if not host or not queue.strip("/"):
            raise url.error("does not have the form awssqs://HOST/ACCOUNT/QUEUE")
        self._queue_url = f"https://{host}{queue}"
        self._wait_s = self._wait_time()
        self._raw = self._boolean("raw")
        self._release_lazily = self._boolean("nacklazy")
        self._profile = url.options.get("profile") or None
        try:
            # Has the credentials and the description of the API, for all connections.
            self._session = AioSession(profile=self._profile)
            configured = self._session.get_config_variable("region")
        except BotoCoreError as error:
            raise url.error(f"cannot be used: {error}") from None
        named = _HOST_REGION.fullmatch(host)
        self._region = (
            url.options.get("region")
            or url.environment.get("AWS_REGION")
            or url.environment.get("AWS_DEFAULT_REGION")
            or configured
            or (named[1].lower() if named else "")
        )
        if not self._region:
            raise url.error("needs the option region, or the environment variable AWS_REGION")
        self._endpoint = self._endpoint_url()
        self._config = AioConfig(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=WAIT_MAX_S + CONNECT_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS_MAX_COUNT},
            max_pool_connections=CONNECTIONS_MAX_COUNT,
            use_dualstack_endpoint=self._boolean("dualstack") or None,
            use_fips_endpoint=self._boolean("fips") or None,
            **({"signature_version": UNSIGNED} if self._boolean("anonymous") else {}),
        )

    async def subscribe(self) -> Subscription:
        """Connect to receive messages."""
        async with self._connected() as (client, attributes):
            options = SubscriptionOptions(
                wait_s=self._wait_s,
                raw=self._raw,
                topic_arn=self._url.options.get("snstopicarn", ""),
                release_lazily=self._release_lazily,
            )
            visibility_s = int(attributes.get("VisibilityTimeout", 0)) or VISIBILITY_DEFAULT_S
            return SqsSubscription(client, visibility_s, options)

    async def open_topic(self) -> Topic:
        """Connect to publish messages."""
        async with self._connected() as (client, attributes):
            limit_bytes = int(attributes.get("MaximumMessageSize") or MESSAGE_MAX_BYTES)
            return SqsTopic(client, limit_bytes)

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[tuple[Client, Mapping[str, str]]]:
        """A client and the queue's attributes, which are empty where they may not be read."""
        client = Client(self._queue_url)
        try:
            await client.open(self._session, self._client_arguments())
            yield client, await client.attributes("VisibilityTimeout", "MaximumMessageSize")
        except BaseException:
            await client.close()
            raise

    def _client_arguments(self) -> dict[str, Any]:
        environment = self._url.environment
        arguments: dict[str, Any] = {"region_name": self._region, "config": self._config}
        if self._endpoint:
            arguments["endpoint_url"] = self._endpoint
        key, secret = environment.get("AWS_ACCESS_KEY_ID"), environment.get("AWS_SECRET_ACCESS_KEY")
        if key and secret and not self._profile:  # a profile that is named comes first
            arguments["aws_access_key_id"] = key
            arguments["aws_secret_access_key"] = secret
            arguments["aws_session_token"] = environment.get("AWS_SESSION_TOKEN") or None
        return arguments

    def _endpoint_url(self) -> str:
        """Where requests go to instead of AWS; empty: to AWS."""
        variables = "AWS_ENDPOINT_URL_SQS", "AWS_ENDPOINT_URL"
        named = [("the option endpoint", self._url.options.get("endpoint"))]
        named += [(variable, self._url.environment.get(variable)) for variable in variables]
        for name, text in named:
            if text:
                parts = urlsplit(text)
                if parts.scheme not in ("http", "https") or not parts.netloc:
                    raise self._url.error(f"needs an http:// or https:// URL in {name}")
                return text
        return ""

    def _boolean(self, option: str) -> bool:
        text = self._url.options.get(option) or "false"
        if text not in _BOOLEANS:
            raise self._url.error(f"has {text!r} for the option {option}, not true or false")
        return _BOOLEANS[text]

    def _wait_time(self) -> float:
        text = self._url.options.get("waittime")
        if not text:
            return WAIT_MAX_S
        try:
            wait_s = parse_duration(text)
        except ValueError as error:
            raise self._url.error(f"has an invalid waittime: {error}") from None
        if not 0 <= wait_s <= WAIT_MAX_S:
            raise self._url.error(f"has a waittime that is not between 0s and {WAIT_MAX_S:.0f}s")
        return wait_s


class SubscriptionOptions(NamedTuple):
    """What the URL of a subscription says about it."""

    wait_s: float  # of one receive, in SQS
    raw: bool  # bodies are never envelopes of SNS
    topic_arn: str  # of the only envelopes that are opened; empty: any
    release_lazily: bool  # a released message waits for its visibility timeout


class Client:
    """The requests about one queue. After ``close``, and for every failure: BrokerUnavailable."""

    def __init__(self, queue_url: str) -> None:
        self.queue_url = queue_url
        self._stack = AsyncExitStack()
        self._client: Any = None

    async def open(self, session: AioSession, arguments: dict[str, Any]) -> None:
        """Load the credentials. No request to the queue yet."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                context = session.create_client("sqs", **arguments)
                self._client = await self._stack.enter_async_context(context)
        except (*_FAILURES, ValueError) as error:  # ValueError: an invalid endpoint
            raise self._unavailable("connect", error) from error

    async def attributes(self, *names: str) -> Mapping[str, str]:
        """Attributes of the queue; empty if they may not be read."""
        try:
            answer = await self.request("get_queue_attributes", AttributeNames=list(names))
        except Refused as refused:
            if refused.code in _DENIED:
                return {}
            raise
        found: Mapping[str, str] = answer.get("Attributes", {})
        return found

    async def request(
        self, operation: str, timeout_s: float = TIMEOUT_S, **parameters: Any
    ) -> dict[str, Any]:
        """A request about the queue. :class:`Refused` if SQS answers with an error."""
        if self._client is None:
            raise BrokerUnavailable(f"SQS: {operation}: the connection is closed")
        try:
            async with asyncio.timeout(timeout_s):
                method = getattr(self._client, operation)
                answer: dict[str, Any] = await method(QueueUrl=self.queue_url, **parameters)
                return answer
        except ClientError as error:
            details = error.response.get("Error", {})
            raise Refused(operation, details.get("Code", ""), details.get("Message", "")) from error
        except _FAILURES as error:
            raise self._unavailable(operation, error) from error

    def _unavailable(self, operation: str, error: Exception) -> BrokerUnavailable:
        return BrokerUnavailable(f"SQS: {operation}: {str(error) or type(error).__name__}")

    async def close(self) -> None:
        """Close the connections. Does not raise."""
        self._client = None
        with contextlib.suppress(*_FAILURES, RuntimeError):
            async with asyncio.timeout(TIMEOUT_S):
                await self._stack.aclose()


class SqsDelivery(Delivery):
    """A message that is invisible to other receivers until its visibility timeout."""

    def __init__(
        self,
        subscription: SqsSubscription,
        message: Mapping[str, Any],
        options: SubscriptionOptions,
    ) -> None:
        self.id = message["MessageId"]
        self.body, self.attributes = decode(message, options.raw, options.topic_arn)
        self.deliveries = int(message.get("Attributes", {}).get("ApproximateReceiveCount", 0))
        self._receipt: str = message["ReceiptHandle"]
        self._subscription = subscription
        self._release_lazily = options.release_lazily

    async def acknowledge(self) -> None:
        """Delete the message."""
        await self._own(self._subscription.deletions.add({"ReceiptHandle": self._receipt}))

    async def release(self) -> None:
        """Make the message visible, unless the URL says to wait for its visibility timeout."""
        if not self._release_lazily:
            await self._own(self._set_visibility(0))

    async def extend(self) -> None:
        """Restart the visibility timeout."""
        await self._own(self._set_visibility(self._subscription.visibility_s))

    def _set_visibility(self, seconds: int) -> asyncio.Future[None]:
        entry = {"ReceiptHandle": self._receipt, "VisibilityTimeout": seconds}
        return self._subscription.visibilities.add(entry)

    async def _own(self, change: asyncio.Future[None]) -> None:
        """Wait for a change of the message; a warning if it is no longer this receiver's."""
        try:
            await change
        except Refused as refused:
            if refused.code not in _LOST:
                raise
            log.warning("lost a message of SQS", id=self.id, reason=str(refused))


class SqsSubscription(Subscription):
    """Receives from a queue by long polls, one at a time."""

    def __init__(self, client: Client, visibility_s: int, options: SubscriptionOptions) -> None:
        self._client = client
        self.visibility_s = visibility_s
        self.ack_deadline_s = float(visibility_s)
        self._options = options
        self.deletions = Batch(client, "delete_message_batch")
        self.visibilities = Batch(client, "change_message_visibility_batch")
        self._poller = Poller(self._poll)

    async def receive(self, count_max: int) -> list[Delivery]:
        """Wait for messages. At most 10 of them, as many as SQS returns at once."""
        return await self._poller.receive(min(count_max, RECEIVE_MAX_COUNT))

    async def _poll(self, count: int) -> list[SqsDelivery]:
        answer = await self._client.request(
            "receive_message",
            timeout_s=self._options.wait_s + TIMEOUT_S,
            MaxNumberOfMessages=count,
            WaitTimeSeconds=int(self._options.wait_s),
            VisibilityTimeout=self.visibility_s,
            MessageAttributeNames=["All"],
            AttributeNames=["ApproximateReceiveCount"],
        )
        messages = answer.get("Messages", [])
        if not messages and self._options.wait_s < 1:
            await asyncio.sleep(EMPTY_PAUSE_S)
        return [SqsDelivery(self, message, self._options) for message in messages]

    async def lag(self) -> int | None:
        """SQS's approximate count of visible messages."""
        waiting = (await self._client.attributes("ApproximateNumberOfMessages")).values()
        return int(next(iter(waiting))) if waiting else None

    async def close(self) -> None:
        """Release what no ``receive`` has taken, and close the connections."""
        await self._poller.close()
        await asyncio.gather(self.deletions.close(), self.visibilities.close())
        await self._client.close()


class SqsTopic(Topic):
    """Sends to a queue in batches."""

    def __init__(self, client: Client, limit_bytes: int) -> None:
        self._client = client
        self._limit_bytes = limit_bytes
        self._is_fifo = client.queue_url.endswith(".fifo")
        self._messages = Batch(client, "send_message_batch")

    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        """Publish a message; returns once SQS has stored it."""
        text, encoded = encode(body, attributes)
        size = size_bytes(text, encoded)
        if size > self._limit_bytes:
            raise MessageTooLarge(
                f"SQS: the message has {size} bytes; the queue's limit is {self._limit_bytes}"
            )
        if len(encoded) > ATTRIBUTES_MAX_COUNT:
            raise MessageTooLarge(
                f"SQS: the message has {len(encoded)} attributes; the limit is"
                f" {ATTRIBUTES_MAX_COUNT}"
            )
        entry: Entry = {"MessageBody": text, "MessageAttributes": encoded}
        if self._is_fifo:
            identity = fifo_id(attributes.get(REQUEST_MESSAGE_ID) or str(uuid.uuid4()))
            entry["MessageGroupId"] = attributes.get("MessageGroupId") or identity
            entry["MessageDeduplicationId"] = attributes.get("DeduplicationId") or identity
        try:
            await self._messages.add(entry, size)
        except Refused as refused:
            if refused.is_about_size:
                raise MessageTooLarge(str(refused)) from refused
            raise

    async def close(self) -> None:
        """Close the connections."""
        await self._messages.close()
        await self._client.close()
