"""Sends requests as messages through a broker and receives their responses.

Has the interface of `client.Client` that an executor uses. Each request's metadata has the run and
the request's number, by which its response is found, whatever the order. Responses of other runs
are acknowledged and ignored, so the subscription must not be shared with other consumers. Messages
carry whole responses: there is no time to the first token, and no endpoint is known.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from time import monotonic
from typing import Any, TypeVar

import msgspec

from kubeai.brokers.base import (
    Broker,
    BrokerUnavailable,
    Delivery,
    MessageTooLarge,
    Subscription,
    Topic,
)
from kubeai.loadtest.client import EndpointError, Response, one_line
from kubeai.loadtest.sse import Reader

T = TypeVar("T")

METADATA = "kubeai_bench"  # the key of a request's id in its metadata
RECEIVE_MAX_MESSAGES = 256
IN_FLIGHT_MAX_MESSAGES = 1 << 17
# Requests without a response whose numbers are kept, to tell a late response from a duplicate.
GIVEN_UP_MAX_MESSAGES = 1 << 17
REOPEN_INITIAL_S, REOPEN_MAX_S = 0.1, 5.0  # pauses before another connection to the broker
LOST = "lost"


class MessageResponse(msgspec.Struct):
    """The body of a response message."""

    status_code: int
    metadata: dict[str, Any] | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class MessageClient:
    """A topic for requests and a subscription to their responses.

    Call `open` before the first request and `close` at the end. ``run`` must differ between runs
    whose responses may arrive at the same subscription.
    """

    def __init__(self, requests: Broker, responses: Broker, *, timeout_s: float, run: str) -> None:
        self.readers: set[Reader] = set()  # no streams
        self.counts = Counter[str](dict.fromkeys((LOST, "duplicates", "late", "foreign"), 0))
        self._requests, self._responses = requests, responses
        self._timeout_s, self._run = timeout_s, run
        # None while there is no connection:
        self._topic: Topic | None = None
        self._subscription: Subscription | None = None
        self._numbers = itertools.count()
        self._sent = 0
        self._waiting: dict[int, asyncio.Future[MessageResponse]] = {}
        self._ended_s: dict[int, float] = {}  # of responses that `send` has not returned yet
        self._given_up: dict[int, None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Connect; EndpointError if that fails."""
        try:
            self._subscription = await self._responses.subscribe()
            self._topic = await self._requests.open_topic()
        except BrokerUnavailable as error:
            await self.close()
            raise EndpointError(f"--via: {error}") from None
        self._start(self._receive())

    async def close(self) -> None:
        """Close the connections. Requests in flight remain without a response."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in (self._topic, self._subscription):
            if connection is not None:
                await connection.close()
        self._topic = self._subscription = None

    def request(self, _method: str, path: str, body: bytes = b"") -> bytes:
        """Encode a message without its metadata; ``path`` is relative to ``/v1``."""
        return b'"path":%b,"body":%b}' % (msgspec.json.encode(f"/v1{path}"), body or b"null")

    async def send(self, request: bytes, _reader: Reader | None = None) -> Response:
        """Publish a request and wait for its response or failure, which `Response.error` reports.

        A request is lost if it was published and no response arrives within the timeout.
        """
        response = Response(None, b"")
        if len(self._waiting) >= IN_FLIGHT_MAX_MESSAGES:
            response.error, response.ended_s = "too many messages in flight", monotonic()
            return response
        number = next(self._numbers)
        self._sent = number + 1
        metadata = msgspec.json.encode({METADATA: f"{self._run}-{number}"})
        answered = self._waiting[number] = asyncio.get_running_loop().create_future()
        published = False
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._publish(b'{"metadata":%b,%b' % (metadata, request))
                published = True
                self._note_answer(response, await answered)
        except TimeoutError:
            response.error = LOST if published else "timeout"
            self.counts[LOST] += published
        except BrokerUnavailable as error:
            response.error, response.error_message = "broker unavailable", str(error)
        except MessageTooLarge as error:
            response.error, response.error_message = "message too large", str(error)
        finally:
            del self._waiting[number]
            response.ended_s = self._ended_s.pop(number, 0.0) or monotonic()
            if not answered.done() or answered.cancelled():
                self._give_up(number)
        return response

    @staticmethod
    def _note_answer(response: Response, message: MessageResponse) -> None:
        response.status, response.body = message.status_code, bytes(message.body)
        if message.status_code >= 300:
            response.error = f"status {message.status_code}"
            response.error_message = one_line(response.body)

    def _give_up(self, number: int) -> None:
        if len(self._given_up) >= GIVEN_UP_MAX_MESSAGES:
            del self._given_up[next(iter(self._given_up))]
        self._given_up[number] = None

    # -- responses ---------------------------------------------------------------------------------

    async def _receive(self) -> None:
        while True:
            subscription = self._subscription
            assert subscription is not None
            try:
                deliveries = await subscription.receive(RECEIVE_MAX_MESSAGES)
                now_s = monotonic()
                for delivery in deliveries:
                    self._note(delivery.body, now_s)
                await _acknowledge(deliveries)
            except BrokerUnavailable:
                self._subscription = None
                await subscription.close()
                self._subscription = await _retry(self._responses.subscribe)

    def _note(self, body: bytes, now_s: float) -> None:
        try:
            message = msgspec.json.decode(body, type=MessageResponse)
        except msgspec.DecodeError:
            self.counts["foreign"] += 1
            return
        run, _, digits = str((message.metadata or {}).get(METADATA, "")).rpartition("-")
        number = int(digits) if digits.isdecimal() else self._sent
        if run != self._run or number >= self._sent:
            self.counts["foreign"] += 1
            return
        answered = self._waiting.get(number)
        if answered is not None and not answered.done():
            answered.set_result(message)
            self._ended_s[number] = now_s
        elif number in self._given_up:
            del self._given_up[number]
            self.counts["late"] += 1
        else:
            self.counts["duplicates"] += 1

    # -- requests ----------------------------------------------------------------------------------

    async def _publish(self, message: bytes) -> None:
        topic = self._topic
        if topic is None:
            raise BrokerUnavailable("reconnecting")
        try:
            await topic.publish(message, {})
        except BrokerUnavailable:
            if self._topic is topic:
                self._topic = None
                self._start(self._reopen(topic))
            raise

    async def _reopen(self, topic: Topic) -> None:
        await topic.close()
        self._topic = await _retry(self._requests.open_topic)

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _acknowledge(deliveries: Iterable[Delivery]) -> None:
    """Acknowledge all; BrokerUnavailable if that fails for one."""
    results = await asyncio.gather(
        *(delivery.acknowledge() for delivery in deliveries), return_exceptions=True
    )
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def _retry(connect: Callable[[], Awaitable[T]]) -> T:
    """Connect, however long it takes."""
    pause_s = REOPEN_INITIAL_S
    while True:
        try:
            return await connect()
        except BrokerUnavailable:
            await asyncio.sleep(pause_s)
            pause_s = min(REOPEN_MAX_S, 2 * pause_s)
