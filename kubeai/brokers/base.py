"""What a message broker must do for KubeAI.

A :class:`Subscription` receives requests, a :class:`Topic` publishes responses. Each has one
connection. When the connection ends, every method raises :class:`BrokerUnavailable`; the caller
then closes the object and opens another one, with back-off, for as long as it takes. An
implementation therefore never reconnects by itself, and never waits longer than ``TIMEOUT_S`` for
a broker that does not answer, except in ``receive``.

Delivery is at least once: a broker redelivers each message that was not acknowledged, in particular
the unacknowledged ones of a connection that has ended.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping

from kubeai.errors import KubeAIError

TIMEOUT_S = 30.0  # of one operation, connecting included
# The attribute of a response that has the id of the request's message, as in KubeAI in Go.
REQUEST_MESSAGE_ID = "request_message_id"


class BrokerUnavailable(KubeAIError):
    """The broker cannot be reached, has ended the connection, or refuses what was asked.

    It may be available again later, so the caller retries. A subject, topic or queue that does not
    exist is unavailable as well. The message says what failed, without credentials.
    """


class MessageTooLarge(KubeAIError):
    """The broker will never accept a message of this size. The message gives the limit."""


def is_library_cancellation(error: BaseException) -> bool:
    """Whether a client library has raised CancelledError although nobody has cancelled the task.

    A library may await a task that it has itself cancelled. Passed on, the error would end the
    caller's task without a trace.
    """
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and not task.cancelling()


class Delivery(ABC):
    """A received message. The receiver calls ``acknowledge`` or ``release``, once.

    After the connection has ended, both raise :class:`BrokerUnavailable`: the broker will deliver
    the message again.
    """

    id: str  # of the message; the same in every delivery of it, and unique in the subscription
    # False: another message may have the same ID. The messenger then answers redeliveries again,
    # rather than recognise them by it.
    id_is_unique: bool = True
    body: bytes
    attributes: Mapping[str, str]  # also called headers, metadata or properties
    deliveries: int  # of this message so far, this one included; 0: the broker does not count

    @abstractmethod
    async def acknowledge(self) -> None:
        """Acknowledge the message. Returns once the acknowledgement has been sent.

        The broker must not deliver the message again once it has processed the acknowledgement. The
        exception is a message that the broker has already given to another receiver, because its
        deadline has passed or its partition has moved: then neither this nor ``release`` has an
        effect.
        """

    @abstractmethod
    async def release(self) -> None:
        """Give the message back, so that the broker delivers it again soon, to any receiver."""

    @abstractmethod
    async def extend(self) -> None:
        """Restart the time after which the broker redelivers the message. No effect without one."""


class Subscription(ABC):
    """A connection that receives messages."""

    # The time after which an unacknowledged message is redelivered, unless it is extended; None:
    # there is none as long as the connection lasts. The receiver calls ``Delivery.extend`` on
    # every message that it has, at intervals of a third of this.
    ack_deadline_s: float | None = None

    @abstractmethod
    async def receive(self, count_max: int) -> list[Delivery]:
        """Wait for messages; returns 1 to ``count_max`` of them.

        The broker must not be asked for more than ``count_max`` messages, because what is received
        here is not available to other KubeAI replicas. It may be cancelled without
        losing a message.
        """

    @abstractmethod
    async def lag(self) -> int | None:
        """Number of messages that wait for delivery; None if it does not report it."""

    @abstractmethod
    async def close(self) -> None:
        """Close the connection; its unacknowledged messages are redelivered. Does not raise."""


class Topic(ABC):
    """A connection that publishes messages. Publishing is safe from several tasks at once."""

    @abstractmethod
    async def publish(self, body: bytes, attributes: Mapping[str, str]) -> None:
        """Publish a message; returns once the broker has confirmed that it has it.

        MessageTooLarge if it will never take it.
        """

    @abstractmethod
    async def close(self) -> None:
        """Close the connection. Does not raise."""


class Broker(ABC):
    """A kind of broker: how to read its URLs, and how to connect.

    The constructor reads the URL and the environment: ConfigError if they are invalid, with the
    key or variable that is. It imports the library, and does no I/O.
    """

    @abstractmethod
    async def subscribe(self) -> Subscription:
        """Connect to receive messages."""

    @abstractmethod
    async def open_topic(self) -> Topic:
        """Connect to publish messages."""
