"""Follows responses that an engine computes in the background, until it is done.

With ``"background": true``, an engine that stores responses answers at once, or goes on when the
client of a stream leaves. The request has then ended, but the engine is at work, its tokens are not
known, and the client need not ask for them. Therefore :class:`BackgroundResponses` of the worker
that has sent the request asks the engine, which knows the response by the ID that the gateway has
chosen. Until the response is done, it is an active request of its Model, for the autoscaler, and in
flight at its endpoint, and for its key's limits, and its tokens are reserved. Usage is counted
once, because only that worker does it.

What the engine does not report is estimated: the tokens that were reserved if the response has
been cancelled, or if this worker cannot learn its end; those that the client was sent if the
response has failed or is lost.

An engine is asked after ``PAUSE_MIN_S``, then at growing intervals up to ``PAUSE_MAX_S``, and when
the client asks for the response. A response is cancelled if its key is revoked, or if the gateway
has given up the attempt that may have begun it, so that the client does not learn its ID.

Limits: ``FOLLOWED_MAX_COUNT`` responses at a time, each for ``FOLLOW_MAX_S``, and
``ASKS_PER_ENGINE_MAX_COUNT`` requests to an engine at a time. Each has a connection of its own. An
engine is silent about a response if it answers none of the requests that it is sent in
``SILENT_MAX_S``. Requests that wait for their turn do not count, so that engines with many
responses, or other engines that hang, do not make one look silent.

Created by context.py, called by attempts.py, proxy.py and server.py, closed by the worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal
from weakref import WeakValueDictionary

import aiohttp
import msgspec

from kubeai._limits import TOKENS_MAX
from kubeai.gateway._key_limits import learn_output
from kubeai.gateway._metering import counted
from kubeai.logs import get_logger

if TYPE_CHECKING:
    from kubeai._counts import Admission, Reservation
    from kubeai._keys import Key
    from kubeai._limits import Charge
    from kubeai.gateway._metering import Meter
    from kubeai.routing.table import RoutedModel

log = get_logger(__name__)

FOLLOWED_MAX_COUNT = 4096
FOLLOW_MAX_S = 6 * 3600.0
SILENT_MAX_S = 60.0  # an engine that has been restarted has lost its responses
PAUSE_MIN_S, PAUSE_MAX_S = 0.5, 10.0
PAUSE_SHARE = 0.125  # of the time that the response has taken so far
ASK_TIMEOUT_S = 5.0
ASKS_PER_ENGINE_MAX_COUNT = 32  # at a time, by one worker
RESPONSE_MAX_BYTES = 16 << 20
_UNFINISHED = frozenset(("queued", "in_progress"))


# Other numbers, like anything else that is unreadable, are no answer.
Tokens = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]


class _Asked(msgspec.Struct):
    background: Any = None


class _Details(msgspec.Struct):
    cached_tokens: Tokens | None = None


class _Usage(msgspec.Struct):
    input_tokens: Tokens
    output_tokens: Tokens
    input_tokens_details: _Details | None = None


class _Response(msgspec.Struct):
    status: str
    usage: _Usage | None = None


_asked_decoder = msgspec.json.Decoder(_Asked)
_MEMBER = b'"background"'
_response_decoder = msgspec.json.Decoder(_Response)

Missing = Literal["missing"]


def is_background(payload: bytes) -> bool:
    """Whether an engine may compute a response in the background.

    A payload that cannot be read may ask for it as well: :class:`BackgroundResponses` then finds
    that there is no response.
    """
    return _background(payload) is not False


def asks_for_background(payload: bytes) -> bool:
    """Whether a payload can be read, and asks for a response in the background."""
    return _MEMBER in payload and _background(payload) is True  # cheap for most payloads


def _background(payload: bytes) -> bool | None:
    """What a payload says; None: it cannot be read. Engines take other values for ``true``, too."""
    try:
        background = _asked_decoder.decode(payload).background
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return background is not None and background is not False


@dataclass(slots=True)
class BackgroundResponse:
    """A response that is not done yet. It is settled once."""

    id: str
    address: str  # of the engine that has it
    routed: RoutedModel
    headers: Mapping[str, str]  # to ask with: the client's credentials for the engine
    # The request's, as the Reservation: closed once it is settled. None: the attempt was given up,
    # so that the response is cancelled, and nothing is counted.
    admission: Admission | None = None
    reservation: Reservation | None = None
    key: Key | None = None  # None: usage is not counted
    charge: Charge | None = None  # None: there is no key, or it has no limits
    tenant: str = ""
    prompt_tokens: int = 0  # estimated, as all of these
    sent_tokens: int = 0  # of a stream, to its client
    reserved_tokens: int = 0  # of the output
    wake: asyncio.Event = field(default_factory=asyncio.Event)  # to ask the engine at once

    @property
    def is_unwanted(self) -> bool:
        """Whether the engine must not go on: its attempt was given up, or its key is revoked."""
        return self.admission is None or (self.key is not None and self.key.is_revoked)


class BackgroundResponses:
    """The responses that one worker follows. ``meter``: None if there are no keys."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter
        self._session: aiohttp.ClientSession | None = None  # made for the first response
        self._followed: dict[str, BackgroundResponse] = {}  # by ID
        self._tasks: set[asyncio.Task[None]] = set()
        # By address, as long as a response of that engine is followed.
        self._turns: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._is_closed = False

    def __len__(self) -> int:
        """The number of responses that are followed."""
        return len(self._followed)

    def follow(self, response: BackgroundResponse) -> None:
        """Settle a response when the engine has computed it."""
        is_full = len(self._followed) >= FOLLOWED_MAX_COUNT
        # An ID that a client has chosen may be in use. The engine has one response for it at most.
        if self._is_closed or is_full or response.id in self._followed:
            self._settle(response, None)
            return
        self._followed[response.id] = response
        task = asyncio.get_running_loop().create_task(self._follow(response))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def asked(self, response_id: str) -> None:
        """The client asks for a response: it may be done."""
        response = self._followed.get(response_id)
        if response is not None:
            response.wake.set()

    def end_revoked(self) -> None:
        """Cancel the responses whose keys have been revoked."""
        for response in self._followed.values():
            if response.is_unwanted:
                response.wake.set()

    async def close(self) -> None:
        """Settle what is not done with the tokens that were reserved, and close the connections."""
        self._is_closed = True
        if self._followed:
            log.info("background responses are no longer followed", responses=len(self))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for response in list(self._followed.values()):  # whose task had not begun
            self._end(response, None)
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _follow(self, response: BackgroundResponse) -> None:
        answer = None
        try:
            answer = await self._end_of(response)
        finally:
            self._end(response, answer)

    def _end(self, response: BackgroundResponse, answer: _Response | Missing | None) -> None:
        del self._followed[response.id]
        self._settle(response, answer)

    async def _end_of(self, response: BackgroundResponse) -> _Response | Missing | None:
        """What the engine says about a response in the end; None: nothing, or too late."""
        now_s = asyncio.get_running_loop().time
        began_s = now_s()
        silent_since_s = math.inf  # when the first ask without an answer was sent
        turns = asyncio.Semaphore(ASKS_PER_ENGINE_MAX_COUNT)
        turns = self._turns.setdefault(response.address, turns)
        answer: _Response | Missing | None = None
        while now_s() - began_s < FOLLOW_MAX_S:
            pause_s = min(max(PAUSE_MIN_S, PAUSE_SHARE * (now_s() - began_s)), PAUSE_MAX_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(response.wake.wait(), pause_s)
            response.wake.clear()
            due_s = now_s()
            async with turns:
                sent_s = now_s()
                silent_since_s += sent_s - due_s  # the wait for the turn is not the engine's
                if response.is_unwanted:
                    await self._ask(response, cancels=True)
                answer = await self._ask(response)
            if not isinstance(answer, _Response):
                silent_since_s = min(silent_since_s, sent_s)
                if now_s() - silent_since_s >= SILENT_MAX_S:
                    break
            elif answer.status in _UNFINISHED:
                silent_since_s = math.inf
            else:
                return answer
        return answer if answer == "missing" else None

    async def _ask(
        self, response: BackgroundResponse, *, cancels: bool = False
    ) -> _Response | Missing | None:
        """The state of a response; None: the engine does not say. ``cancels``: cancel it first."""
        if self._session is None:
            self._session = _new_session()
        url = f"http://{response.address}/v1/responses/{response.id}"
        method = "GET"
        if cancels:
            method, url = "POST", f"{url}/cancel"
        try:
            async with self._session.request(
                method, url, headers=response.headers, allow_redirects=False
            ) as found:
                if found.status == 404:
                    return "missing"
                if found.status != 200:
                    return None
                body = bytearray()
                async for piece in found.content.iter_any():
                    body += piece
                    if len(body) > RESPONSE_MAX_BYTES:
                        return None
            return _response_decoder.decode(body)
        except (
            *(aiohttp.ClientError, TimeoutError),
            *(msgspec.DecodeError, UnicodeDecodeError, RecursionError),
        ):
            return None

    def _settle(self, response: BackgroundResponse, answer: _Response | Missing | None) -> None:
        """Count a response with what the engine has said about it in the end; None: nothing."""
        usage = answer.usage if isinstance(answer, _Response) else None
        if usage is None:
            output = response.sent_tokens
            if not (answer == "missing" or (answer is not None and answer.status == "failed")):
                output = max(output, response.reserved_tokens)
            tokens = response.prompt_tokens, 0, output
        else:
            details = usage.input_tokens_details
            cached = 0 if details is None else details.cached_tokens or 0
            tokens = usage.input_tokens, cached, usage.output_tokens
            if response.key is not None:
                learn_output(response.key, usage.output_tokens)
        if response.admission is not None:
            response.admission.close()
            response.routed.picker.settle(response.tenant, tokens[2])
        if response.reservation is not None:
            response.reservation.release()
        if response.charge is not None:
            response.charge.end(tokens[0] + tokens[2])
        if self._meter is not None and response.key is not None:
            model = response.routed.route.model
            counted(self._meter, response.key, model, *tokens, is_estimated=usage is None)


def _new_session() -> aiohttp.ClientSession:
    # Each request has a connection of its own: an engine with several API servers may have the
    # response in any of them. They have no limit together: engines that hang would hold up others.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=ASK_TIMEOUT_S),
    )
