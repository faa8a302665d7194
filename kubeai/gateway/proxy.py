"""One request: read, find its model, admit, and hand over to its attempts.

The relay calls :class:`Proxy` at each step. An inference POST is read completely, counted for
its model (Admission), assigned an endpoint (Reservation) and sent there (attempts.py); a request
that no endpoint can serve yet is held. An upload takes the same path, except that its body, a
multipart form, waits on disk (uploads); a WebSocket's handshake has none (realtime.py). All other
requests are streamed: to the supervisor's console (console.py) or the worker's local routes
(local_routes.py). Only waits, uploads, and large or compressed bodies (bodies.py) need a task.

The fast path, which nearly every request takes, is compiled (_fast_path.pyx). It also releases the
Admission and the Reservation exactly once in all cases. This module handles everything else.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

from typing_extensions import override

from kubeai._prompt import Prompt
from kubeai.gateway._credentials import Problem, check
from kubeai.gateway._names import find_model, prompt_id
from kubeai.gateway.bodies import check_coding, read_body
from kubeai.gateway.console import (
    CONSOLE_BODY_MAX_BYTES,
    LOGIN_PATHS,
    check_admin,
    check_host,
    check_origin,
    check_request,
    is_console,
    playground_target,
    take_cookie,
    wants_page,
)
from kubeai.gateway.denials import AUDITED, COOKIE, check_model
from kubeai.gateway.fallback import FallbackRequest
from kubeai.gateway.internal_headers import DENIED_HEADER, KEY_HEADER
from kubeai.gateway.keys import HEALTH_PATHS
from kubeai.gateway.observation import request_end, request_start
from kubeai.gateway.ollama import check_engine
from kubeai.gateway.realtime import (
    Session,
    check_handshake,
    engines_query,
    model_in,
    no_websocket,
    websocket_required,
)
from kubeai.gateway.relay._tunnel import Tunnel
from kubeai.gateway.stored_responses import check_tenant, not_stored
from kubeai.gateway.uploads.upload import Upload, is_form
from kubeai.openai import request as openai
from kubeai.openai.errors import ErrorResponse, model_not_found
from kubeai.openai.routes import Kind, classify, origin_form

if TYPE_CHECKING:
    from kubeai._counts import Reservation
    from kubeai.gateway.access_log import Observation, Observers
    from kubeai.gateway.cors import CorsPolicy
    from kubeai.gateway.relay._exchange import Pool
    from kubeai.openai.request import InferenceRequest
    from kubeai.routing.table import RoutedModel


class Proxy(FallbackRequest):
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
        if kind is None and self.context.console is not None and is_console(self.target):
            self._relay_to_console(self.context.console)
            return
        if kind is None or kind.is_local or target.status != 200:
            self._serve_locally(origin_form(self.target))
            return
        if kind is Kind.REALTIME:
            self._open_websocket(target.query)
            return
        is_upload = is_form(self, kind)
        try:
            check_coding(self, is_form=is_upload)
        except ErrorResponse as error:
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
            routed = self._split(request, self._find(request), None)
            reservation = self._admit(request, routed)
        except ErrorResponse as error:
            self._refuse(error)
            return
        self._path = f"{self._kind.value}?{engines_query(query, request)}".encode("latin-1")
        self._place(reservation)

    async def _read_session(self, session: Session) -> Reservation:
        request = openai.named(self._kind, await session.model())
        routed = self._split(request, self._find(request), None)
        self._session = session
        return self._admit(request, routed) or await self._hold()

    def _serve_locally(self, target: str, denied: str = "") -> None:
        """Pass the request to the local routes. ``denied``: see DENIED_HEADER."""
        if self.context.keys is not None:  # both are set here, and so never the client's
            self.set_header(KEY_HEADER, (self._key.name if self._key is not None else "").encode())
            self.set_header(DENIED_HEADER, denied.encode("latin-1", "replace"))
        max_bytes = self.context.config.multipart_max_bytes
        self.stream(self.context.local_routes, target.encode("latin-1"), max_bytes)

    def _relay_to_console(self, pool: Pool) -> None:
        is_login = self.context.keys is not None and self._is_login
        try:
            if is_login:
                check_host(self.host, self.context.config.ui.hosts)
                check_origin(self)
            elif self.context.keys is not None:
                check_admin(self, self._key)
                self._needs_admin = True
            else:
                check_request(self, self.context.config.ui.hosts)
        except ErrorResponse as error:
            self._deny(error)
            return
        if is_login:
            self._serve_locally(self.target)
        else:
            self.stream(pool, self.target.encode("latin-1"), CONSOLE_BODY_MAX_BYTES)

    # -- keys --------------------------------------------------------------------------------------

    @override
    def check_key(self, problem: int, sources: int) -> bool:
        keys = self.context.key_table
        assert keys is not None, "keys are required"
        try:
            cookie = take_cookie(self)
            if cookie is not None and problem == Problem.MISSING and self._targets_console:
                self._key, problem = check(keys.by_digest, cookie)
                sources = COOKIE
                if problem == Problem.NO_PROBLEM:
                    check_host(self.host, self.context.config.ui.hosts)
                if (target := playground_target(self)) is not None:
                    self.set_target(target.encode("latin-1"))
            if problem != Problem.NO_PROBLEM and not self._needs_no_key():
                raise keys.rejection(problem, sources, self.peer)
        except ErrorResponse as error:
            if self.context.observers is not None:
                self.observe(self.context.observers)
            if error.status == 429:
                self.close_after()  # which slows down guessing
            self._deny(error, shows_message=problem != Problem.MISSING)
            return False
        if problem != Problem.NO_PROBLEM:
            self._key = None
        return True

    def _needs_no_key(self) -> bool:
        path = origin_form(self.target).partition("?")[0]
        if self.method == "OPTIONS":  # a preflight request, to which browsers add no key
            return bool(self.headers(b"access-control-request-method")) and not is_console(path)
        return self._is_login or (self.method in ("GET", "HEAD") and path in HEALTH_PATHS)

    @property
    def _is_login(self) -> bool:
        return self._targets_console and self.method == "POST" and self.target in LOGIN_PATHS

    @property
    def _targets_console(self) -> bool:
        return self.context.console is not None and is_console(self.target)

    def _deny(self, error: ErrorResponse, *, shows_message: bool = True) -> None:
        """Respond with an error; to a browser that opens the console, with the login page.

        ``shows_message``: whether the login page also shows the error's message.
        """
        if error.code not in AUDITED or self.context.console is None or not wants_page(self):
            self._refuse(error)
            return
        try:
            check_host(self.host, self.context.config.ui.hosts)
        except ErrorResponse as unknown:
            self._refuse(unknown)
        else:
            self._note_denial(error)
            said = error.message if shows_message else ""
            self._serve_locally(self.target, f"{error.status} {said}")

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
            if routed.route.canary and request.previous_response_id is None:
                routed = self._split(request, routed, prompt_id(request))
            self._prompt = openai.prompt_of(routed.picker, request, self.context.logs_prompts)
            self._payload = openai.body_for(request, self.body)
            if request.previous_response_id is not None:
                self._wait(partial(self._continue, request))
                return
            reservation = self._admit(request, routed)
        except ErrorResponse as error:
            self._refuse(error)
            return
        self._place(reservation)

    # -- uploads -----------------------------------------------------------------------------------

    def _receive_upload(self) -> None:
        try:
            self._upload = Upload(self, self.context)
        except ErrorResponse as error:
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
        routed = self._split(request, self._find(request), None)
        return self._admit(request, routed) or await self._hold()

    @override
    def on_piece(self) -> None:
        self._uploaded.wake()

    # -- routing -----------------------------------------------------------------------------------

    async def _read(self) -> Reservation:
        """Like ``on_body`` for a large or compressed body."""
        read = await read_body(
            self,
            self.context,
            self._kind,
            self._find,
            self._split,
            changes=self._key is not None and self._kind is Kind.RESPONSES,  # see payload_with_id
            is_metered=self._key is not None,
        )
        self._prompt, self._payload = read.prompt, read.payload
        if read.metered is not None:
            self._payload = self._metered = read.metered
            self._unmetered = read.payload
        return await self._continue(read.request)

    async def _continue(self, request: InferenceRequest) -> Reservation:
        """Admit a request whose body has been read; wait for an endpoint if necessary.

        If it continues a stored response, only the replica that has that response can serve it. If
        no replica has it, the request goes to any replica, whose engine returns the error.
        """
        only = None
        if request.previous_response_id is not None:
            check_tenant(request.previous_response_id, self._key)
            only = await self._find_previous(request, request.previous_response_id)
        # The Model may have been deleted or created again meanwhile.
        routed = self.context.routes.find(request.name)
        if routed is None or request.adapter not in (None, *routed.route.adapters):
            raise model_not_found(request.model)
        return self._admit(request, routed, only=only) or await self._hold()

    async def _find_previous(self, request: InferenceRequest, response_id: str) -> str | None:
        """The endpoint that has the stored response which a request continues, if any has it.

        A canary or a fallback may have made it. The request is then for that Model.
        """
        asked = self._find(request)
        self._request = request
        self._charge_key()  # before it costs requests to the engines
        location = await self.context.stored_responses.location_of(
            [asked, *self._substitutes(asked.route)], self, response_id
        )
        if location is None:
            return None
        name = location.routed.route.model
        if name != request.name:
            self._asked = asked
            request.serve_as(name)
            self._rename()
            self._say_who(name)
        return location.endpoint

    def _admit(
        self, request: InferenceRequest, routed: RoutedModel, *, only: str | None = None
    ) -> Reservation | None:
        """Count the request for its model, and pick an endpoint if one (``only``) can serve it.

        ErrorResponse if it exceeds a limit of its key.
        """
        self._request = request
        self._routed = routed
        if self._prompt is None:  # an upload's
            self._prompt = Prompt()
        self._charge_key()
        self._admission = routed.admit(self.context.request_type)
        self._name_response(request)
        if self.context.explains:
            self.note_candidates()
        if only is not None:
            reservation = routed.pick_only(only, self._prompt)
            self._is_pinned = reservation is not None
            return reservation
        return routed.pick_new(self._prompt, request.adapter, self._tenant)

    def _find(self, request: InferenceRequest) -> RoutedModel:
        """The requested model, if it matches the request's label selectors.

        Also reads the client's limit on the wait for an endpoint.
        """
        named = routed = self.context.routes.find(request.name)
        if routed is None or request.adapter is not None:
            routed = find_model(self.context.models, self.context.aliases, request)
        check_model(self._key, routed or named, request.model)
        if routed is None or not self._may_use(routed.route):
            raise model_not_found(request.model)
        check_engine(request.kind, routed.route)
        self._max_wait_s = openai.parse_max_wait(self.headers(b"x-kubeai-max-wait"))
        return routed

    async def _find_stored(self) -> Reservation:
        """Find the replica that has the stored response of the path, and count the request."""
        response_id = classify(self.method, self.target).id or ""
        check_tenant(response_id, self._key)
        self._request = openai.named(self._kind, response_id)  # its Model is not known yet
        self._charge_key()  # before it costs requests to the engines
        location = await self.context.stored_responses.find(
            self.context.routes, self, response_id, self._may_use
        )
        self._payload = self.body
        request = openai.named(self._kind, location.model)
        reservation = self._admit(request, location.routed, only=location.endpoint)
        self.context.background_responses.asked(response_id)
        if reservation is None:
            raise not_stored(response_id)
        return reservation

    # -- observers ---------------------------------------------------------------------------------

    @override
    def observe(self, observers: Observers) -> None:
        start = request_start(
            self,
            is_inference=self._kind is not None,
            keeps_query=self.context.keys is None,
        )
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

    @override
    def allow_origin(self, policy: CorsPolicy) -> None:
        policy.apply(self)
