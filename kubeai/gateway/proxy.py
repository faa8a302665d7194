"""One request, from its head to the end of its response: admit → wait → pick → attempt.

The relay calls :class:`Proxy` at each step. An inference POST is read completely, counted for
its model (Admission), assigned an endpoint (Reservation) and sent there; a request that no endpoint
can serve yet is held. An upload takes the same path, except that its body, a multipart form, waits
on disk (uploads); a WebSocket's handshake has none (realtime.py). All other requests are streamed:
to the supervisor's console (console.py) or the worker's local routes (local_routes.py). Only waits,
uploads, and large or compressed bodies (bodies.py) need a task.

retries.py decides which attempts are retried and where, holding.py how long a request waits. The
Reservation of a failed attempt is released before the next pick.

The fast path, which nearly every request takes, is compiled (_fast_path.pyx). It also releases the
Admission and the Reservation exactly once in all cases. This module handles everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import override

from kubeai._prompt import Prompt
from kubeai.gateway._fast_path import FastPath
from kubeai.gateway.bodies import check_coding, read_body
from kubeai.gateway.console import CONSOLE_BODY_MAX_BYTES, check_request, is_console
from kubeai.gateway.endpoint_pool import EndpointPool
from kubeai.gateway.explanation import explanation, log_move
from kubeai.gateway.holding import WAITED, HoldComments, advice, hold, progress
from kubeai.gateway.observation import request_end, request_start
from kubeai.gateway.ollama import check_engine
from kubeai.gateway.realtime import (
    Session,
    check_handshake,
    engines_query,
    last_event,
    model_in,
    no_websocket,
    websocket_required,
)
from kubeai.gateway.relay._exchange import CONNECT, INVALID, LOST, TIMEOUT
from kubeai.gateway.relay._renaming import Renaming
from kubeai.gateway.relay._tunnel import Tunnel
from kubeai.gateway.retries import TIMED_OUT, Retries, check_loss
from kubeai.gateway.stored_responses import find_owner, not_stored
from kubeai.gateway.uploads.upload import Upload, is_form
from kubeai.logs import get_logger
from kubeai.openai import request as openai
from kubeai.openai.errors import (
    BadRequest,
    engine_error,
    error_answer,
    header_lines,
    model_not_found,
)
from kubeai.openai.routes import Kind, classify, origin_form

if TYPE_CHECKING:
    from kubeai._counts import Reservation
    from kubeai.gateway.access_log import Observation, Observers
    from kubeai.gateway.cors import CorsPolicy
    from kubeai.gateway.relay._exchange import Pool
    from kubeai.openai.request import InferenceRequest
    from kubeai.routing.routes import Route
    from kubeai.routing.table import RoutedModel

log = get_logger(__name__)
_FAILURES = {
    CONNECT: "cannot connect",
    LOST: "connection lost",
    INVALID: "invalid HTTP response",
    TIMEOUT: "response timeout",
}


class Proxy(FastPath):
    """See the module; the relay creates one for each request."""

    __slots__ = ()

    # -- called by the relay -----------------------------------------------------------------------

    @override
    def on_head(self) -> None:
        target = classify(self.method, self.target)
        kind = target.kind
        if self.asks_websocket and self.method == "GET" and target.status == 405:
            self._refuse(no_websocket(), {"Upgrade": "HTTP/1.1", "Connection": "Upgrade"})
            return
        if kind is None and is_console(self.target) and self.context.console is not None:
            self._relay_to_console(self.context.console)
            return
        if kind is None or kind.is_local or target.status != 200:
            self.stream(
                self.context.local_routes,
                origin_form(self.target).encode("latin-1"),
                self.context.config.multipart_max_bytes,
            )
            return
        if kind is Kind.REALTIME:
            self._open_websocket(target.query)
            return
        is_upload = is_form(self, kind)
        try:
            check_coding(self, is_form=is_upload)
        except BadRequest as error:
            self._refuse(error)
            return
        path = kind.value.replace("{id}", target.id or "").encode()
        self._kind = kind
        self._path = path + b"?" + target.query.encode("latin-1") if target.query else path
        if is_upload:
            self._receive_upload()
        else:
            self.collect(self.context.body_max_bytes)

    def _open_websocket(self, query: str) -> None:
        self._kind = Kind.REALTIME
        if not self.asks_websocket:
            self._refuse(websocket_required(), {"Upgrade": "websocket", "Connection": "Upgrade"})
            return
        try:
            check_handshake(self, self.context.cors)
            model = model_in(query)
            tunnel = Tunnel(self, self.context.config.websocket_idle_timeout_s)
            if model is None:
                self._path = f"{self._kind.value}?{query}".rstrip("?").encode("latin-1")
                self._wait(partial(self._read_session, Session(self, tunnel)))
                return
            request = openai.named(self._kind, model)
            routed = self._find(request)
        except BadRequest as error:
            self._refuse(error)
            return
        self._path = f"{self._kind.value}?{engines_query(query, request)}".encode("latin-1")
        self._place(self._admit(request, routed))

    async def _read_session(self, session: Session) -> Reservation:
        request = openai.named(self._kind, await session.model())
        routed = self._find(request)
        if request.adapter is not None:
            session.name_model(request.adapter)
        return self._admit(request, routed) or await self._hold()

    def _relay_to_console(self, pool: Pool) -> None:
        try:
            check_request(self, self.context.config.ui.hosts)
        except BadRequest as error:
            self._refuse(error)
        else:
            self.stream(pool, self.target.encode("latin-1"), CONSOLE_BODY_MAX_BYTES)

    @override
    def on_body(self) -> None:
        if self._kind.is_stored:
            self._wait(self._find_stored)
            return
        if len(self.body) > openai.LARGE_BYTES or self.headers(b"content-encoding"):
            self._wait(self._read)
            return
        try:
            request = self._request or openai.read(self._kind, self.body)
            routed = self._find(request)
        except BadRequest as error:
            self._refuse(error)
            return
        self._prompt = openai.prompt_of(routed.picker, request, self.context.logs_prompts)
        self._payload = openai.body_for(request, self.body)
        self._place(self._admit(request, routed))

    @override
    def wants_retry(self, failure: int, status: int) -> bool:
        reservation = self._reservation
        assert reservation is not None, "an attempt has a reservation"
        if self._kind.is_stored:
            return False
        self._lost = failure == LOST
        if failure == TIMEOUT:
            status = TIMED_OUT
        return self._attempts.wants(status, reservation.name, self._routed, self._request.adapter)

    @override
    def retry(self) -> None:
        reservation = self._end_attempt("attempt failed, retrying")
        if self._lost:
            alone = cast(EndpointPool, reservation.target).lost_one_alone
            self._wait(partial(self._try_after_loss, reservation, alone))
        else:
            self._try_elsewhere()

    @override
    def attempt_elsewhere(self) -> None:
        if self.answered or self._reservation is None or self._kind.is_stored:
            return
        other = self._attempts.move(
            self._reservation, self._routed, self._prompt, self._request.adapter
        )
        if other is not None:
            self.detach()
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
            log.error(f"{who} did not respond", reason=reason)
            self._say(502, f"The {who} did not respond.")
            return
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

    # -- uploads -----------------------------------------------------------------------------------

    def _receive_upload(self) -> None:
        try:
            self._upload = Upload(self, self.context)
        except BadRequest as error:
            self._refuse(error)
            return
        self.receive(self.context.config.multipart_max_bytes)
        if not self.finished:
            self._wait(self._read_upload)

    async def _read_upload(self) -> Reservation:
        upload = self._uploaded
        await upload.receive()
        self.set_header(b"content-type", upload.content_type)
        request = openai.named(self._kind, upload.model)
        return self._admit(request, self._find(request)) or await self._hold()

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
    def on_piece(self) -> None:
        self._uploaded.wake()

    @override
    def on_writable(self) -> None:
        self._uploaded.wake()

    @property
    def _uploaded(self) -> Upload:
        assert self._upload is not None, "the request has a form"
        return self._upload

    # -- routing -----------------------------------------------------------------------------------

    async def _read(self) -> Reservation:
        """Like ``on_body`` for a large or compressed body."""
        request, self._prompt, self._payload = await read_body(
            self, self.context, self._kind, self._find
        )
        # The model may have been deleted or created again meanwhile.
        return self._admit(request, self._find(request)) or await self._hold()

    def _admit(
        self, request: InferenceRequest, routed: RoutedModel, *, only: str | None = None
    ) -> Reservation | None:
        """Count the request for its model, and pick an endpoint if one (``only``) can serve it."""
        self._request = request
        self._routed = routed
        self._admission = routed.admit(self.context.request_type)
        if request.adapter is not None:
            self.renaming = Renaming(*map(openai.json_string, (request.adapter, request.model)))
        if self._prompt is None:  # an upload's
            self._prompt = Prompt()
        if self.context.explains:
            self.note_candidates()
        if only is not None:
            return routed.pick_only(only, self._prompt)
        return routed.pick(self._prompt, request.adapter)

    def _find(self, request: InferenceRequest) -> RoutedModel:
        """The requested model, if it matches the request's label selectors.

        Also reads the client's limit on the wait for an endpoint.
        """
        routed = self.context.routes.find(request.name)
        if routed is None or (
            request.adapter is not None and request.adapter not in routed.route.adapters
        ):
            raise model_not_found(request.model)
        if not self._selects(routed.route):
            raise model_not_found(request.model)
        check_engine(request.kind, routed.route)
        self._max_wait_s = openai.parse_max_wait(self.headers(b"x-kubeai-max-wait"))
        return routed

    def _selects(self, route: Route) -> bool:
        """Whether a Model's labels match all selectors of the request."""
        texts = [text.decode("latin-1") for text in self.headers(b"x-label-selector")]
        return all(openai.parse_selector(text)(route.labels) for text in texts)

    async def _find_stored(self) -> Reservation:
        """Find the replica that has the stored response of the path, and count the request."""
        response_id = classify(self.method, self.target).id or ""
        owner = await find_owner(self.context, self, response_id, self._selects)
        self._payload = self.body
        request = openai.named(self._kind, owner.model)
        reservation = self._admit(request, owner.routed, only=owner.endpoint)
        if reservation is None:
            raise not_stored(response_id)
        return reservation

    @override
    def wait_for_endpoint(self) -> None:
        self._wait(self._hold)

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
    def moved(self, reservation: Reservation) -> None:
        log_move(self.request_id, self._routed.route, reservation)

    # -- observers ---------------------------------------------------------------------------------

    @override
    def observe(self, observers: Observers) -> None:
        start = request_start(self, is_inference=self._kind is not None)
        self._observed = observation = observers.began(start)
        for name, value in observation.upstream_headers.items():
            self.set_header(name.encode(), value.encode("latin-1"))

    @override
    def observed(self) -> None:
        end = request_end(
            self,
            # Names that clients make up are not recorded.
            model=None if self._admission is None else self._request.model,
            endpoint=None if self._reservation is None else self._reservation.name,
            retry_count=self.retry_count,
            prompt=self._prompt if self.context.logs_prompts else None,
        )
        cast("Observation", self._observed).ended(end)

    @property
    def retry_count(self) -> int:
        """How many attempts of this request have failed."""
        return 0 if self._retries is None else self._retries.count

    # -- waits -------------------------------------------------------------------------------------

    def _wait(self, waiting: Callable[[], Coroutine[Any, Any, Reservation]]) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(waiting))

    async def _run(self, waiting: Callable[[], Coroutine[Any, Any, Reservation]]) -> None:
        """Wait for an endpoint and send the request there, or respond with the error."""
        try:
            reservation = await waiting()
            self._task = None
            self._attempt(reservation)
        except BadRequest as error:
            self._task = None
            self._refuse(error)
        except Exception:
            log.exception(
                "request task failed", model=self._request.name if self._request else None
            )
            self._task = None
            self._say(500, "Internal error in the gateway.", "internal_error")

    async def _try_later(self) -> Reservation:
        later = await self._attempts.later(self._routed, self._prompt, self._request.adapter)
        return later or await self._hold()

    async def _try_after_loss(self, lost: Reservation, alone: bool) -> Reservation:
        await check_loss(self._attempts, self._routed, lost, alone)
        other = self._attempts.elsewhere(self._routed, self._prompt, self._request.adapter)
        return other or await self._try_later()

    async def _hold(self) -> Reservation:
        assert self._admission is not None, "a request is counted before it is held"
        return await hold(
            self.context,
            self._routed,
            self._request,
            self._prompt,
            self._admission,
            max_wait_s=None if self._max_wait_s is None else self._max_wait_s - self._waited_s,
            during=self._wait_counted(),
            request_id=self.request_id,
        )

    @contextlib.contextmanager
    def _wait_counted(self) -> Iterator[None]:
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
            phrase = partial(progress, self._routed, self._request)
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
    def allow_origin(self, policy: CorsPolicy) -> None:
        policy.apply(self)

    def _refuse(self, error: BadRequest, headers: dict[str, str] | None = None) -> None:
        if self.begun:
            self.end(error.status, last_event(error, self._kind, self.request_id))
            return
        body, more = error_answer(error, self.target, self.request_id)
        if self._waited_s:
            more |= _waited(self._waited_s)
        self.answer(error.status, body, header_lines({**advice(error), **more, **(headers or {})}))

    def _say(self, status: int, message: str, code: str | None = None) -> None:
        self._refuse(BadRequest(message, status=status, code=code))


def _waited(waited_s: float) -> dict[str, str]:
    return {WAITED: f"{waited_s:.3f}"}
