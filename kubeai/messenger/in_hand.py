"""A message in hand: the attempts to get its response, and when it has a handler.

:class:`InHand` makes the attempts of one message. A handler is a permit to have an engine serve a
request; a message whose request the gateway holds gives it back, and takes one again before the
request goes to an endpoint. Created by the stream.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from enum import Enum
from typing import NamedTuple
from weakref import WeakValueDictionary

import msgspec
from typing_extensions import override

from kubeai.brokers.base import Delivery
from kubeai.logs import get_logger
from kubeai.messenger.message import Answer, Malformed, Request, read_request, refusal
from kubeai.messenger.policy import DELIVERIES_MAX_COUNT, Attempts, Verdict, judge
from kubeai.messenger.relay_client import Gate, Overloaded
from kubeai.openai.errors import ErrorResponse

log = get_logger(__name__)

Send = Callable[[str, Request, Gate], Awaitable[Answer]]  # see RelayClient.send


class Phase(Enum):
    """What a message does. In the first two, it counts for ``maxHandlers``."""

    READY = "waits for a handler"
    RUNNING = "is being served"
    HELD = "waits for an endpoint of its model, or behind others that do"
    BACKING_OFF = "waits for its next attempt"
    PUBLISHING = "is being answered"
    RELEASING = "is given back to the broker"


class Turns:
    """Limits the requests that the gateway has at a time for each Model of a stream.

    What the gateway holds counts as load of the Model. If it held more requests than the stream has
    handlers, the autoscaler would add replicas that the stream cannot use.
    """

    def __init__(self, max_handlers: int) -> None:
        self._max_handlers = max_handlers
        self._by_model: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    def of(self, model: str) -> asyncio.Semaphore:
        """The semaphore of a Model. It exists as long as a message uses it."""
        turns = self._by_model.get(model)
        if turns is None:
            turns = self._by_model[model] = asyncio.Semaphore(self._max_handlers)
        return turns


class Shared(NamedTuple):
    """What the messages of a stream share."""

    handlers: asyncio.Semaphore
    turns: Turns
    phases: Counter[Phase]  # messages in each phase
    changed: Callable[[], None]  # called when one has changed its phase
    retried: Callable[[], None]  # called before an attempt is repeated because one has failed
    send: Send
    backoff_max_s: float


class InHand(Gate):
    """One message. ``key`` identifies it among the messages in hand.

    The stream sets ``key``, ``response_bytes`` once there is a response, and ``task`` when the task
    that handles the message has begun: cancelled before, it would not give the message back.
    """

    def __init__(self, delivery: Delivery, shared: Shared) -> None:
        self.id = delivery.id
        self.id_is_unique = delivery.id_is_unique
        self.key: object = self
        self.task: asyncio.Task[None] | None = None
        self.response_bytes = 0
        # Usually one. The broker has delivered the message again if there are more.
        self.deliveries = [delivery]
        self._request_bytes = len(delivery.body)
        self.metadata = msgspec.Raw(b"null")  # of the request
        self.path = ""
        self.given_up = False  # the response is the last attempt's error
        self.phase = Phase.READY
        self._shared = shared
        self._count = delivery.deliveries
        self._attempts = 0  # that have ended
        self._counted_s = 0.0  # until when the time in the current phase is counted
        self._ran_s = 0.0  # in the current attempt
        self._held_s = 0.0  # in the current attempt
        self._body = delivery.body
        shared.phases[self.phase] += 1

    def enter(self, phase: Phase) -> None:
        """Change the phase."""
        self._count_time()
        self._shared.phases[self.phase] -= 1
        self._shared.phases[phase] += 1
        self.phase = phase
        self._shared.changed()

    def leave(self) -> None:
        """The message is no longer in hand."""
        self._shared.phases[self.phase] -= 1
        self._shared.changed()

    @property
    def size_bytes(self) -> int:
        """Of its request and its response."""
        return self._request_bytes + self.response_bytes

    @property
    def can_be_released(self) -> bool:
        """Whether no work is lost if another process serves the message instead."""
        return self.phase in (Phase.READY, Phase.HELD, Phase.BACKING_OFF)

    async def respond(self, attributes: dict[str, str]) -> Answer:
        """Get the response. ``attributes``: the message's."""
        try:
            request = read_request(self._body, attributes)
        except Malformed as malformed:
            self.metadata = malformed.metadata
            return malformed.answer
        self.metadata, self.path = request.metadata, request.path
        self._body = b""
        if self._count > DELIVERIES_MAX_COUNT:
            self.given_up = True
            message = f"The message was delivered {self._count} times without being answered."
            return refusal(
                ErrorResponse(message, status=500, code="delivered_too_often"), self.path
            )
        try:
            return await self._try(request)
        except Exception:
            log.exception("message failed", message_id=self.id)
            message = "Internal error in the messenger. See its log."
            return refusal(ErrorResponse(message, status=500), self.path)

    async def _try(self, request: Request) -> Answer:
        """Attempt the request until its answer is final, each time when its Model has a turn free.

        ``_attempt`` notes how long the attempt ran and was held.
        """
        attempts = Attempts(self._shared.backoff_max_s)
        turns = self._shared.turns.of(request.model)
        request_id = uuid.uuid4().hex
        while True:
            self._ran_s = self._held_s = 0.0
            if turns.locked():
                self.enter(Phase.HELD)
            async with turns:
                answer, verdict = await self._attempt(request_id, request)
            if verdict is Verdict.DONE:
                return answer
            wait_s = attempts.next_s(verdict, answer, self._ran_s, self._held_s)
            if wait_s is None:
                self.given_up = True
                return answer
            if verdict is Verdict.FAILED:
                self._shared.retried()
            self.enter(Phase.BACKING_OFF)
            await asyncio.sleep(wait_s)
            self.enter(Phase.READY)

    async def _attempt(self, request_id: str, request: Request) -> tuple[Answer, Verdict]:
        self.enter(Phase.READY)
        await self._shared.handlers.acquire()
        self.enter(Phase.RUNNING)
        was_sent = True
        try:
            answer = await self._shared.send(request_id, request, self)
        except Overloaded as overloaded:
            was_sent, answer = False, overloaded.answer
        finally:
            held = self._end_attempt()
        return answer, judge(answer, held or not was_sent)

    def _end_attempt(self) -> bool:
        """Give back what the attempt has. Returns whether it ended while it was held."""
        self._attempts += 1
        self._count_time()
        if self.phase is Phase.RUNNING:
            self._shared.handlers.release()
            return False
        return True

    def _count_time(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self.phase is Phase.RUNNING:
            self._ran_s += now_s - self._counted_s
        elif self.phase is Phase.HELD:
            self._held_s += now_s - self._counted_s
        self._counted_s = now_s

    # -- called by the gateway ---------------------------------------------------------------------

    @override
    def on_hold(self) -> None:
        if self.phase is Phase.RUNNING:
            self._shared.handlers.release()
        self.enter(Phase.HELD)

    @override
    async def on_endpoint(self) -> None:
        if self.phase is Phase.RUNNING:
            return  # it has a handler
        attempts = self._attempts
        self.enter(Phase.READY)
        await self._shared.handlers.acquire()
        if self._attempts != attempts:  # it has ended meanwhile, without this handler
            self._shared.handlers.release()
        else:
            self.enter(Phase.RUNNING)
