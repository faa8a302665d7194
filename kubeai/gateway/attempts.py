"""The attempts of an admitted request, until an endpoint's response or the gateway's own error.

:class:`AdmittedRequest` waits for an endpoint, sends the request there, and does so again when the
attempt fails before anything has reached the client. retries.py decides which attempts are retried
and where, holding.py how long a request waits. The Reservation of a failed attempt is released
before the next pick. Its subclass Proxy, in proxy.py, reads and admits requests.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override

from kubeai.gateway._credentials import Problem
from kubeai.gateway._fast_path import FastPath
from kubeai.gateway._key_limits import expected_tokens
from kubeai.gateway.background_responses import (
    BackgroundResponse,
    asks_for_background,
    is_background,
)
from kubeai.gateway.console import is_console
from kubeai.gateway.denials import no_valid_key
from kubeai.gateway.endpoint_pool import EndpointPool
from kubeai.gateway.explanation import explanation, log_move
from kubeai.gateway.holding import WAITED, HoldComments, advice, hold, progress
from kubeai.gateway.realtime import last_event
from kubeai.gateway.relay._exchange import CONNECT, INVALID, LOST, TIMEOUT
from kubeai.gateway.retries import TIMED_OUT, Retries, check_loss
from kubeai.gateway.stored_responses import (
    STORING_ENGINES,
    chosen_id,
    lookup_headers,
    new_id,
    with_id,
)
from kubeai.logs import get_logger
from kubeai.openai.errors import ErrorResponse, engine_error, error_answer, header_lines
from kubeai.openai.routes import Kind
from kubeai.routing.queueing import Waiting

if TYPE_CHECKING:
    from kubeai._counts import Reservation
    from kubeai._prompt import Prompt
    from kubeai.gateway.relay._exchange import Pool
    from kubeai.gateway.uploads.upload import Upload

log = get_logger(__name__)
REFUSED_BODY = (400, 422)  # statuses of an engine that does not know a field
_FAILURES = {
    CONNECT: "cannot connect",
    LOST: "connection lost",
    INVALID: "invalid HTTP response",
    TIMEOUT: "response timeout",
}
# The engine may have accepted the request nevertheless.
_UNANSWERED = (LOST, INVALID, TIMEOUT)


class AdmittedRequest(FastPath):
    """See the module docstring."""

    __slots__ = ()

    # -- attempts ----------------------------------------------------------------------------------

    @override
    def wants_retry(self, failure: int, status: int) -> bool:
        reservation = self._reservation
        assert reservation is not None, "an attempt has a reservation"
        if status in REFUSED_BODY:
            return self._forgo_usage()
        if self._is_pinned:
            return False
        self._lost = failure == LOST
        self._is_unanswered = failure in _UNANSWERED
        if failure == TIMEOUT:
            status = TIMED_OUT
        return self._attempts.wants(status, reservation.name, self._routed, self._request.adapter)

    def _forgo_usage(self) -> bool:
        """Restore the client's body after an engine has rejected it; False if it was not changed.

        The engine may not know the field that asks for the usage of a stream.
        """
        if self._unmetered is None or self._payload is not self._metered:
            return False
        self._payload = self._unmetered
        self._refusing = self._routed
        self.usage_filter = None
        return True

    @override
    def retry(self) -> None:
        if self._refusing is self._routed and self._unmetered is not None:
            assert self._reservation is not None, "an attempt has a reservation"
            self._unmetered = None
            self._attempt(self._reservation)
            return
        reservation = self._end_attempt("attempt failed, retrying")
        if self._lost:
            alone = cast(EndpointPool, reservation.target).lost_one_alone
            self._wait(partial(self._try_after_loss, reservation, alone))
        else:
            self._try_elsewhere()

    @override
    def attempt_elsewhere(self) -> None:
        if self.answered or self._reservation is None or self._is_pinned:
            return
        other = self._attempts.move(
            self._reservation, self._routed, self._prompt, self._request.adapter
        )
        if other is not None:
            self.detach()
            self._is_unanswered = True
            self._end_attempt("endpoint does not respond, moving the request")
            self._attempt(other)

    @property
    def _attempts(self) -> Retries:
        if self._retries is None:
            self._retries = self.context.retries(self._routed)
        return self._retries

    def _end_attempt(self, event: str) -> Reservation:
        reservation, admission = self._reservation, self._admission
        assert reservation is not None, "an attempt has a reservation"
        assert admission is not None, "only admitted requests are attempted"
        self._reservation = None
        self._abandon_response(reservation)
        reservation.release()
        if self._upload is not None:
            self._upload.stop_sending()
        admission.count("retried")
        log.info(
            event,
            request_id=self.request_id,
            model=self._request.name,
            endpoint=reservation.name,
            retry=self.retry_count,
        )
        return reservation

    def _try_elsewhere(self) -> None:
        other = self._attempts.elsewhere(self._routed, self._prompt, self._request.adapter)
        if other is not None:
            self._attempt(other)
        else:
            self._wait(self._try_later)

    @override
    def give_up(self, failure: int) -> None:
        reason = _FAILURES[failure]
        if self._reservation is None:
            who = "supervisor" if is_console(self.target) else "gateway's local routes"
            log.error("upstream did not respond", upstream=who, reason=reason)
            self._say(502, f"The {who} did not respond.")
            return
        self._is_unanswered = failure in _UNANSWERED
        if not self._chooses_id:
            self._abandon_response(self._reservation)
        endpoint = self._reservation.name
        log.warning("request failed", model=self._request.name, endpoint=endpoint, reason=reason)
        if failure == TIMEOUT:
            self._say(504, f"The model {self._request.model!r} did not respond in time.", "timeout")
        else:
            self._say(
                502,
                f"No replica of the model {self._request.model!r} could be reached: {reason}.",
                "bad_gateway",
            )

    @override
    def on_refusal(self, status: int, content_type: str, body: bytes) -> None:
        self._refuse(engine_error(status, content_type, body))

    @property
    def retry_count(self) -> int:
        """How many attempts of this request have failed."""
        return 0 if self._retries is None else self._retries.count

    @override
    def note_candidates(self) -> None:
        if self.headers(b"x-kubeai-explain") == [b"1"]:
            picker = self._routed.picker
            self._candidates = picker.explain(self._prompt, self._request.adapter)

    @override
    def explain(self, reservation: Reservation) -> None:
        assert self._candidates is not None, "asked for"
        text = explanation(self._routed.route.strategy, self._prompt, reservation, self._candidates)
        self.add_response_header(b"X-KubeAI-Explain", text)

    @override
    def payload_with_id(self) -> bytes:
        payload = self._payload
        assert payload is not None, "the request has a JSON body"
        self._response_id = None
        if self._key is None:  # then the ID has no owner, and is needed only to follow the response
            if not self._may_go_on or not asks_for_background(payload):
                return payload
            chosen = chosen_id(payload)
            if chosen is not None:
                self._response_id = chosen or None
                return payload
        self._response_id = new_id(self._key)
        return with_id(payload, self._response_id)

    @property
    def _may_go_on(self) -> bool:
        """Whether the engine can compute responses in the background."""
        return self._routed.route.engine in STORING_ENGINES

    @override
    def is_followed(self, prompt_tokens: int, sent_tokens: int) -> bool:
        reservation, admission, key = self._reservation, self._admission, self._key
        assert reservation is not None, "an attempt has a reservation"
        assert admission is not None, "an attempt has been admitted"
        if not self._may_be_in_background:
            return False
        reserved = expected_tokens(key, self._prompt, self._request) - self._prompt.tokens
        self.context.background_responses.follow(
            BackgroundResponse(
                cast(str, self._response_id),
                cast(EndpointPool, reservation.target).host,
                self._routed,
                lookup_headers(self) if key is None else {},
                admission,
                reservation,
                key,
                self._charge,
                self._tenant,
                prompt_tokens or self._prompt.tokens,
                sent_tokens,
                reserved,
            )
        )
        return True

    def _abandon_response(self, reservation: Reservation) -> None:
        """Have a failed attempt's engine cancel the response that it may have begun.

        The client does not learn its ID, unless it has chosen it: other attempts use it as well.
        """
        is_unanswered, self._is_unanswered = self._is_unanswered, False
        if not (is_unanswered and self._may_be_in_background) or self._chooses_id:
            return
        self.context.background_responses.follow(
            BackgroundResponse(
                cast(str, self._response_id),
                cast(EndpointPool, reservation.target).host,
                self._routed,
                lookup_headers(self) if self._key is None else {},
            )
        )

    @property
    def _chooses_id(self) -> bool:
        """Whether the client has chosen the ID of its response."""
        return (
            self._key is None
            and self._response_id is not None
            and (chosen_id(self._payload or b"{}") is not None)
        )

    @property
    def _may_be_in_background(self) -> bool:
        """Whether the engine may compute a response in the background that can be asked for."""
        return (
            self._response_id is not None
            and self._payload is not None
            and self._may_go_on
            and is_background(self._payload)
        )

    @override
    def moved(self, reservation: Reservation, suppressed: int) -> None:
        log_move(self.request_id, self._routed.route, reservation, suppressed)

    # -- bodies that are sent in pieces ------------------------------------------------------------

    @override
    def send_other(self, pool: Pool) -> None:
        if self._upload is None:  # a WebSocket handshake
            self.send(pool, self._path, None)
            return
        size_bytes = self._uploaded.length_bytes(self._request, self._routed.route)
        self.send_in_pieces(pool, self._path, size_bytes)

    @override
    def on_send(self) -> None:
        self._uploaded.send(self._request, self._routed.route)

    @override
    def on_writable(self) -> None:
        self._uploaded.wake()

    @property
    def _uploaded(self) -> Upload:
        assert self._upload is not None, "the request has a form"
        return self._upload

    # -- waits -------------------------------------------------------------------------------------

    @override
    def wait_for_endpoint(self) -> None:
        self._wait(self._hold)

    def _wait(self, waiting: Callable[[], Coroutine[Any, Any, Reservation]]) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(waiting))

    async def _run(self, waiting: Callable[[], Coroutine[Any, Any, Reservation]]) -> None:
        """Wait for an endpoint and send the request there, or respond with the error."""
        try:
            reservation = await waiting()
            if self._session is not None:
                self._session.name_model(self._request.engines_name)
            self._task = None
            self._attempt(reservation)
        except ErrorResponse as error:
            self._task = None
            self._refuse(error)
        except Exception:
            log.exception(
                "request task failed", model=self._request.name if self._request else None
            )
            self._task = None
            self._say(500, "Internal error in the gateway.", "internal_error")

    async def _try_later(self) -> Reservation:
        if self._routed.is_full(self._request.adapter):
            return await self._hold()
        return await self._back_off() or await self._hold()

    async def _back_off(self) -> Reservation | None:
        return await self._attempts.later(self._routed, self._prompt, self._request.adapter)

    async def _try_after_loss(self, lost: Reservation, alone: bool) -> Reservation:
        await check_loss(self._attempts, self._routed, lost, alone)
        other = self._attempts.elsewhere(self._routed, self._prompt, self._request.adapter)
        return other or await self._try_later()

    @property
    def _tenant(self) -> str:
        """Whose request it is: the key's tenant, or what the client says where keys are off."""
        if self._key is not None:
            return self._key.fairness_id
        if self.context.keys is not None or self.context.request_type == "message":
            return ""
        return next(iter(self.headers(b"x-gateway-inference-fairness-id")), b"").decode("latin-1")

    @property
    def _priority(self) -> int:
        """The key's priority, or the objective's if that is lower or there is no key.

        Messages have none.
        """
        if self.context.request_type == "message":
            return 0
        objectives = self.context.config.queue.objectives
        given = None if self._key is None else self._key.priority
        for name in self.headers(b"x-gateway-inference-objective")[:1]:
            asked = objectives.get(name.decode("latin-1"))
            if asked is not None:
                given = asked if given is None else min(given, asked)
        return given or 0

    def _waiting(self, prompt: Prompt, adapter: str | None) -> Waiting:
        """The request in a Model's queue."""
        return Waiting(prompt, adapter, self._tenant, self._priority)

    async def _hold(self) -> Reservation:
        assert self._admission is not None, "a request is counted before it is held"
        waiting = self._waiting(self._prompt, self._request.adapter)
        waiting.number = self._number
        try:
            return await hold(
                self.context,
                self._routed,
                self._request.model,
                waiting,
                self._admission,
                max_wait_s=None if self._max_wait_s is None else self._max_wait_s - self._waited_s,
                during=self._wait_counted(waiting),
                request_id=self.request_id,
            )
        finally:
            self._number = waiting.number

    @contextlib.contextmanager
    def _wait_counted(self, waiting: Waiting) -> Iterator[None]:
        """Add the time of a wait to ``_waited_s``, and send comments meanwhile."""
        before_s = self._waited_s
        loop = asyncio.get_running_loop()
        began_s = loop.time()

        def head() -> bytes:
            headers = _waited(before_s + loop.time() - began_s)
            if self._kind is Kind.MESSAGES:
                headers["request-id"] = self.request_id  # which Anthropic's clients read
            return header_lines(headers)

        comments = None
        if HoldComments.suit(self._request, self.context.config):
            phrase = partial(progress, self._routed, waiting)
            comments = HoldComments(self, self.context.config, head, phrase)
        try:
            yield
        finally:
            if comments is not None:
                comments.stop()
            self._waited_s = before_s + loop.time() - began_s
            self.comment(f"waited {self._waited_s:.3f} s".encode())
            for name, value in _waited(self._waited_s).items():
                self.add_response_header(name.encode(), value.encode())

    # -- the gateway's own responses ---------------------------------------------------------------

    @override
    def revoked(self) -> None:
        self._refuse(no_valid_key(Problem.INVALID, 0))

    def _note_denial(self, error: ErrorResponse) -> None:
        """Write the audit log's line, if the error denies something to a client."""
        if self.context.key_table is not None:
            self.context.key_table.audit.note(
                error,
                client=self.peer,
                method=self.method,
                target=self.target,
                request_id=self.request_id,
                key=self._key,
            )

    @override
    def _refuse(self, error: ErrorResponse, headers: dict[str, str] | None = None) -> None:
        self._note_denial(error)
        if self.begun:
            self.end(error.status, last_event(error, self._kind, self.request_id))
            return
        body, more = error_answer(error, self.target, self.request_id)
        if self._waited_s:
            more |= _waited(self._waited_s)
        self.answer(error.status, body, header_lines({**advice(error), **more, **(headers or {})}))

    def _say(self, status: int, message: str, code: str | None = None) -> None:
        self._refuse(ErrorResponse(message, status=status, code=code))


def _waited(waited_s: float) -> dict[str, str]:
    return {WAITED: f"{waited_s:.3f}"}
