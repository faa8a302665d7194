"""One message stream: receives requests, has them served, publishes responses, acknowledges.

A message is in hand from its delivery until it has been acknowledged. Its response is published
first, and only when the broker has confirmed that is the message acknowledged: whatever fails in
between, the broker delivers it again. A stream has at most ``maxHandlers`` messages that an engine
serves or that only wait for a handler, and at most ``PARKED_MAX_COUNT`` others: those that the
gateway holds until a replica of their model is ready, that wait for another attempt, or whose
response cannot be published yet. They have no handler, so messages of other models go on.

The broker and the gateway are given, and time is the event loop's, so that tests need neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

from kubeai._rate_limit import RateLimit
from kubeai.brokers.base import (
    REQUEST_MESSAGE_ID,
    Broker,
    Delivery,
    MessageTooLarge,
    Subscription,
)
from kubeai.kube.backoff import Backoff
from kubeai.logs import get_logger
from kubeai.messenger.counts import Counts, SideState, outcome_of
from kubeai.messenger.in_hand import InHand, Phase, Send, Shared, Turns
from kubeai.messenger.message import NULL, Answer, refusal, write_response
from kubeai.messenger.operation import close_quietly, operate
from kubeai.messenger.publisher import RECONNECT_FIRST_S, Publisher
from kubeai.openai.errors import ErrorResponse
from kubeai.routing.channel import StreamReport

log = get_logger(__name__)

PARKED_MAX_COUNT = 256  # messages in hand beyond maxHandlers
# Of their requests and responses; then no more are received. The process takes about three times as
# much: the broker's library, the messenger and the gateway each have a copy of a request.
IN_HAND_MAX_BYTES = 64 << 20
RECEIVE_MAX_COUNT = 32  # at once: by as much may these limits be exceeded
EXTEND_MAX_COUNT = 32  # deadlines that are extended at once
REDELIVERIES_MAX_COUNT = 8  # of one message that are remembered, to be acknowledged too
ANSWERED_MAX_COUNT = 10_000  # answered messages that are recognised when they are redelivered
LAG_INTERVAL_S = 15.0
# After this many errors in a row, receiving slows down: each further one doubles the pause.
ERRORS_FREE_COUNT = 10
ERROR_PAUSE_FIRST_S = 0.1

_warnings = RateLimit(burst_max=20, per_s=1)


class StreamSettings(NamedTuple):
    """A stream of the config, with its brokers."""

    name: str  # in logs
    requests: Broker
    responses: Broker
    max_handlers: int
    backoff_max_s: float
    in_hand_max_bytes: int = IN_HAND_MAX_BYTES


class _Connection:
    """A subscription in use, until it fails."""

    def __init__(self, subscription: Subscription, state: SideState) -> None:
        self.subscription = subscription
        self.failed = asyncio.Event()
        self._state = state

    def fail(self, error: Exception) -> None:
        """Stop using it."""
        if not self.failed.is_set():
            self.failed.set()
            self._state.note_problem(error)


class Stream:
    """See the module. :meth:`run` runs until it is cancelled, after :meth:`drain`."""

    def __init__(self, settings: StreamSettings, send: Send) -> None:
        self._settings = settings
        requests, responses = (SideState(settings.name, side) for side in ("requests", "responses"))
        self.counts = Counts(requests, responses)
        self._changed = asyncio.Event()
        self._publisher = Publisher(
            settings.responses, self.counts, settings.backoff_max_s, self._changed.set
        )
        self._shared = Shared(
            asyncio.Semaphore(settings.max_handlers),
            Turns(settings.max_handlers),
            Counter(),
            self._changed.set,
            self._count_retry,
            send,
            settings.backoff_max_s,
        )
        self._in_hand: dict[object, InHand] = {}  # by key
        self._tasks: set[asyncio.Task[None]] = set()
        self._answered: OrderedDict[str, None] = OrderedDict()
        self._connection: _Connection | None = None
        self._receiving: asyncio.Task[None] | None = None
        self._stopping = False
        self._drained = asyncio.Event()
        self._errors = 0  # in a row
        self._succeeded = asyncio.Event()
        self._backoff = Backoff(RECONNECT_FIRST_S, settings.backoff_max_s)

    def report(self) -> StreamReport:
        """The counts and the state."""
        return self.counts.report(len(self._in_hand), self._shared.phases[Phase.HELD])

    def _count_retry(self) -> None:
        self.counts.retried += 1

    # -- the connections ---------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep both connections, and receive messages until :meth:`drain`."""
        loop = asyncio.get_running_loop()
        publishing = asyncio.create_task(self._publisher.run())
        try:
            while not self._stopping:
                connection = await self._connect()
                began_s = loop.time()
                await self._use(connection)
                if loop.time() - began_s > self._settings.backoff_max_s:
                    self._backoff.reset()
                await asyncio.sleep(self._backoff.next_s())
            # The connection has failed during the drain. Responses can still be published.
            await self._drained.wait()
        finally:
            tasks = [publishing, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _connect(self) -> _Connection:
        while True:
            try:
                subscription = await operate(self._settings.requests.subscribe())
                self.counts.requests.note_connected()
                return _Connection(subscription, self.counts.requests)
            except Exception as error:  # a library's, too: nothing may end the stream
                self.counts.requests.note_problem(error)
            await asyncio.sleep(self._backoff.next_s())

    async def _use(self, connection: _Connection) -> None:
        """Use a connection until it fails. What it has delivered will come again."""
        works = [asyncio.create_task(work(connection)) for work in (self._extend, self._measure)]
        if not self._stopping:
            self._receiving = asyncio.create_task(self._receive(connection))
            works.append(self._receiving)
        self._connection = connection
        try:
            await connection.failed.wait()
            self._publisher.check()
        finally:
            self.counts.requests.note_closed()
            self._connection = None
            for work in works:
                work.cancel()
            for message in self._in_hand.values():
                message.deliveries.clear()
            await asyncio.gather(*works, return_exceptions=True)
            await close_quietly(connection.subscription)

    async def _extend(self, connection: _Connection) -> None:
        """Extend the deadlines of all messages in hand, as long as the connection lasts."""
        deadline_s = connection.subscription.ack_deadline_s
        if deadline_s is None:
            return
        limit = asyncio.Semaphore(EXTEND_MAX_COUNT)

        async def extend(message: InHand, delivery: Delivery) -> None:
            async with limit:
                if delivery not in message.deliveries:
                    return
                try:
                    await operate(delivery.extend())
                except Exception as error:
                    if delivery in message.deliveries:  # not acknowledged meanwhile
                        connection.fail(error)

        while True:
            await asyncio.sleep(deadline_s / 3)
            messages = list(self._in_hand.values())
            await asyncio.gather(*(extend(m, d) for m in messages for d in m.deliveries))

    async def _measure(self, connection: _Connection) -> None:
        """Ask the broker for its lag, as long as the connection lasts."""
        while True:
            try:
                self.counts.lag = await operate(connection.subscription.lag())
            except Exception as error:  # receiving notices if the connection has failed
                self.counts.lag = None
                log.debug("lag unknown", stream=self._settings.name, error=str(error))
            await asyncio.sleep(LAG_INTERVAL_S)

    # -- receiving ---------------------------------------------------------------------------------

    async def _receive(self, connection: _Connection) -> None:
        # A library may return a result although it was cancelled, as asyncio.wait_for does in
        # Python 3.11. So the cancellation alone does not end this loop.
        while not self._stopping:
            await self._wait_for_room()
            await self._pause_after_errors()
            count = await self._wait_for_room()
            try:
                deliveries = await operate(connection.subscription.receive(count), None)
            except Exception as error:
                connection.fail(error)
                return
            if connection.failed.is_set():
                return  # they come again
            self._backoff.reset()
            for delivery in deliveries:
                self._take(connection, delivery)

    def _room(self) -> int:
        """How many more messages may be received now."""
        if not self._publisher.connected:
            return 0  # other KubeAI replicas may be able to answer
        phases, max_handlers = self._shared.phases, self._settings.max_handlers
        free = max_handlers - phases[Phase.READY] - phases[Phase.RUNNING]
        left = max_handlers + PARKED_MAX_COUNT - len(self._in_hand)
        count = min(free, left, RECEIVE_MAX_COUNT)
        if count <= 0:
            return 0
        in_hand_bytes = sum(message.size_bytes for message in self._in_hand.values())
        return count if in_hand_bytes < self._settings.in_hand_max_bytes else 0

    async def _wait_for_room(self) -> int:
        while (count := self._room()) <= 0:
            self._changed.clear()
            await self._changed.wait()
        return count

    async def _pause_after_errors(self) -> None:
        """Slow down while no message succeeds: millions of malformed ones should wait for a human,
        and failing ones should not burn through a queue overnight."""
        errors = self._errors - ERRORS_FREE_COUNT
        if errors >= 0:
            pause_s = ERROR_PAUSE_FIRST_S * 2.0 ** min(errors, 32)
            self._succeeded.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(pause_s, self._settings.backoff_max_s)):
                    await self._succeeded.wait()

    def _take(self, connection: _Connection, delivery: Delivery) -> None:
        self.counts.received += 1
        if delivery.deliveries > 1:
            self.counts.redelivered += 1
        known = self._in_hand.get(delivery.id)
        # The first delivery is of another message, whose publisher has used the ID again.
        if delivery.id_is_unique and delivery.deliveries != 1:
            if known is not None:
                known.deliveries.append(delivery)
                del known.deliveries[:-REDELIVERIES_MAX_COUNT]
                return
            if delivery.id in self._answered:
                self._start(self._acknowledge(connection, delivery))
                return
        message = InHand(delivery, self._shared)
        if delivery.id_is_unique and known is None:
            message.key = delivery.id
        self._in_hand[message.key] = message
        self._start(self._handle(message, dict(delivery.attributes)))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- one message -------------------------------------------------------------------------------

    async def _handle(self, message: InHand, attributes: dict[str, str]) -> None:
        message.task = asyncio.current_task()
        try:
            if self._stopping:  # it was received while the drain began
                await self._release(message)
                return
            answer = await message.respond(attributes)
            if answer.status < 400:
                self._errors = 0
                self._succeeded.set()
            else:
                self._errors += 1
            if message.given_up:
                self._note_dead(message, answer)
            message.enter(Phase.PUBLISHING)
            await self._publish(message, answer)
            self.counts.answered[outcome_of(answer.status)] += 1
            self._remember(message)
            while message.deliveries:
                connection, delivery = self._connection, message.deliveries.pop(0)
                assert connection is not None, "deliveries are dropped with their connection"
                await self._acknowledge(connection, delivery)
        except asyncio.CancelledError:
            await self._release(message)
        except Exception:
            log.exception("message failed, releasing it", message_id=message.id)
            self._errors += 1
            await self._release(message)
        finally:
            del self._in_hand[message.key]
            message.leave()

    def _note_dead(self, message: InHand, answer: Answer) -> None:
        self.counts.dead += 1
        self._warn("message given up", message, path=message.path, status=answer.status)

    def _warn(self, event: str, message: InHand, **fields: object) -> None:
        suppressed = _warnings.take(time.monotonic())
        if suppressed is not None:
            name = self._settings.name
            log.warning(event, stream=name, message_id=message.id, suppressed=suppressed, **fields)

    async def _publish(self, message: InHand, answer: Answer) -> None:
        """Publish the response, or an error that says why it cannot be published."""
        attributes = {REQUEST_MESSAGE_ID: message.id}
        metadata = message.metadata
        replaced = False
        while True:
            body = write_response(metadata, answer)
            message.response_bytes = len(body)
            try:
                await self._publisher.publish(body, attributes)
            except MessageTooLarge as error:
                self._warn("response too large", message, size_bytes=len(body), error=str(error))
                if metadata is NULL and replaced:  # the limit is below the size of an error
                    await asyncio.sleep(self._settings.backoff_max_s)
                if replaced:
                    metadata = NULL
                replaced = True
                problem = f"The response has {len(body)} bytes and cannot be published: {error}"
                answer = refusal(
                    ErrorResponse(problem, status=500, code="response_too_large"), message.path
                )
            else:
                return

    def _remember(self, message: InHand) -> None:
        if message.id_is_unique:
            self._answered[message.id] = None
            if len(self._answered) > ANSWERED_MAX_COUNT:
                self._answered.popitem(last=False)

    async def _acknowledge(self, connection: _Connection, delivery: Delivery) -> None:
        """Acknowledge a delivery. If that fails, the message comes again, and is recognised."""
        try:
            await operate(delivery.acknowledge())
        except Exception as error:
            connection.fail(error)

    async def _release(self, message: InHand) -> None:
        """Give a message back to the broker."""
        message.enter(Phase.RELEASING)
        while message.deliveries:
            with contextlib.suppress(Exception):  # then the end of the connection releases it
                await operate(message.deliveries.pop().release())

    # -- drain -------------------------------------------------------------------------------------

    async def drain(self, timeout_s: float) -> None:
        """Stop receiving, and finish what is in hand.

        Messages that no engine is serving are given back to the broker at once, for other KubeAI
        replicas; those that are served or answered have ``timeout_s`` to finish.
        """
        self._stopping = True
        if self._receiving is not None:
            self._receiving.cancel()
        try:
            async with asyncio.timeout(timeout_s):
                while self._in_hand:
                    self._cancel(lambda message: message.can_be_released)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            log.warning("drain timed out", stream=self._settings.name, in_hand=len(self._in_hand))
            self._cancel(lambda message: message.phase is not Phase.RELEASING)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._drained.set()

    def _cancel(self, select: Callable[[InHand], bool]) -> None:
        for message in self._in_hand.values():
            if message.task is not None and select(message):
                message.task.cancel()
