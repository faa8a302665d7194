"""Which Model serves a request, if not the one that was asked for: its canary, or a fallback.

A Model names its fallbacks in order. :class:`FallbackRequest` sends a request to the first of them
that can serve it, before anything of an engine's response has reached the client, if its Model

- has no replica that can serve it within ``waitBeforeFallback`` (``not_ready``), or only replicas
  that hold as many requests as they can serve well (``saturated``);
- cannot start (``blocked``);
- fails: its replicas' responses, or the lack of them, use up the retries (``failing``).

If no fallback can serve at once, a request whose Model is not ready waits for it and for the
fallbacks, in the queues of all that have replicas; one that has none is started. A saturated Model
is waited for alone, and after another reason the first fallback. A request that has crashed its
engine does not fall back, nor does one that continues a stored response. No Model is tried twice,
and a fallback's own fallbacks do not count. The response has the name that the client used, and the
header X-KubeAI-Model with the Model that answered.

A canary that cannot serve at once is left for the Model that was asked for. There the request goes
on as if there were no canary.

The Admission moves with the request. Only that of a Model that was not ready stays open, so that
the Model keeps starting while requests for it are served elsewhere. Proxy, in proxy.py, is the
subclass.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, cast

from typing_extensions import override

from kubeai.gateway._names import bucket_of, prompt_id
from kubeai.gateway.attempts import AdmittedRequest
from kubeai.gateway.engine_routes import can_replace
from kubeai.gateway.holding import CANNOT_START, UNAVAILABLE
from kubeai.gateway.realtime import engines_query
from kubeai.gateway.relay._exchange import LOST, STATUS
from kubeai.gateway.retries import check_loss
from kubeai.gateway.waits import first_of
from kubeai.logs import get_logger
from kubeai.openai import request as openai
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.routes import Kind, classify

if TYPE_CHECKING:
    from kubeai._counts import Admission, Reservation
    from kubeai._prompt import Prompt
    from kubeai.gateway.endpoint_pool import EndpointPool
    from kubeai.openai.request import InferenceRequest
    from kubeai.routing.channel import FallbackReason
    from kubeai.routing.routes import Route
    from kubeai.routing.table import RoutedModel

log = get_logger(__name__)

ANSWERED_BY = b"X-KubeAI-Model"

# Errors of a hold after which another Model is tried.
_REASONS: dict[str | None, FallbackReason] = {
    CANNOT_START: "blocked",
    UNAVAILABLE: "blocked",
    "overloaded": "saturated",
    "queue_full": "saturated",
    "timeout": "not_ready",
}


class Fallbacks:
    """The Models that a request may still fall back to. Created when it may have to leave its own.

    At a canary, the first of them is the Model that was asked for.
    """

    __slots__ = (
        "_adapter",
        "_asked",
        "admissions",
        "leaves",
        "retry_count",
        "untried",
        "wait_s",
    )

    def __init__(self, asked: Route, current: Route, adapter: str | None) -> None:
        names = dict.fromkeys((asked.model, *asked.fallbacks))
        names.pop(current.model, None)
        self.untried = list(names)
        self._asked, self._adapter = asked.model, adapter
        self.wait_s = asked.wait_before_fallback_s
        self.leaves = False  # the current attempt has failed, and is the last one at this Model
        self.retry_count = 0  # of the attempts at Models that it has left
        self.admissions: list[Admission] = []  # of Models that were not ready

    def adapter_at(self, other: RoutedModel) -> str | None:
        """The adapter that serves the request there: that of the Model that was asked for."""
        return self._adapter if other.route.model == self._asked else None

    def close(self) -> None:
        """The request has ended."""
        for admission in self.admissions:
            admission.close()


class FallbackRequest(AdmittedRequest):
    """See the module docstring."""

    __slots__ = ()

    def _may_use(self, route: Route) -> bool:
        """Whether the client's key and all selectors of the request allow a Model."""
        if self._key is not None and not self._key.allows(route):
            return False
        texts = [text.decode("latin-1") for text in self.headers(b"x-label-selector")]
        return all(selector(route.labels) for selector in openai.parse_selectors(texts))

    # -- canaries ----------------------------------------------------------------------------------

    @override
    def split(self, request: InferenceRequest, routed: RoutedModel) -> RoutedModel:
        return self._split(request, routed, prompt_id(request))

    def _split(
        self, request: InferenceRequest, routed: RoutedModel, prompt: bytes | None
    ) -> RoutedModel:
        """The Model's canary for a part of the clients, else the Model itself.

        Clients are told apart by their keys, else by the beginning of the prompt, else by address.
        """
        route = routed.route
        if not route.canary:
            return routed
        canary = self.context.routes.find(route.canary)
        if canary is None or canary is routed or not self._may_serve(route, canary.route):
            return routed
        if request.adapter is not None and request.adapter not in canary.route.adapters:
            return routed
        who = prompt or self.peer.encode() if self._key is None else self._key.name.encode()
        if bucket_of(route.model, who) >= route.canary_percent:
            return routed
        self._asked = routed
        request.serve_as(route.canary, request.adapter)
        self._say_who(route.canary)
        return canary

    def _substitutes(self, asked: Route) -> list[RoutedModel]:
        """The Model's canary and fallbacks that may serve the request."""
        names = dict.fromkeys((asked.canary, *asked.fallbacks))
        found = map(self.context.routes.find, names)
        return [m for m in found if m is not None and self._may_serve(asked, m.route)]

    def _may_serve(self, asked: Route, other: Route) -> bool:
        return can_replace(self._kind, asked, other) and self._may_use(other)

    # -- failing attempts --------------------------------------------------------------------------

    @override
    def wants_retry(self, failure: int, status: int) -> bool:
        if super().wants_retry(failure, status):
            return True
        if failure == STATUS and (status < 500 or status == 501):
            return False  # no other Model is expected to do better
        if not any(map(self._may_answer, self._others())):
            return False
        assert self._fallbacks is not None, "there are others"
        self._lost = failure == LOST
        self._fallbacks.leaves = True
        return True

    @override
    def retry(self) -> None:
        if self._fallbacks is None or not self._fallbacks.leaves:
            super().retry()
            return
        self._fallbacks.leaves = False
        failed = self._end_attempt("attempt failed, trying a fallback")
        alone = cast("EndpointPool", failed.target).lost_one_alone
        self._wait(partial(self._leave_failing, failed, alone))

    async def _leave_failing(self, failed: Reservation, alone: bool) -> Reservation:
        if self._lost:
            await check_loss(self._attempts, self._routed, failed, alone)
        error = ErrorResponse(
            f"The model {self._request.model!r} fails, and no fallback can serve the request.",
            status=502,
            code="bad_gateway",
        )
        return await self._fall_back("failing", error)

    @override
    async def _back_off(self) -> Reservation | None:
        try:
            return await super()._back_off()
        except ErrorResponse as error:
            return await self._fall_back("failing", error)

    # -- waits -------------------------------------------------------------------------------------

    @override
    async def _hold(self) -> Reservation:
        if not self._others():
            return await super()._hold()
        assert self._fallbacks is not None, "there are others"
        if (asked := self._model_of_canary()) is not None:
            return await self._leave_canary(asked)
        timeout_s = self.context.config.hold_timeout_s  # for all Models together
        self._max_wait_s = min(
            timeout_s, math.inf if self._max_wait_s is None else self._max_wait_s
        )
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._fallbacks.wait_s):
                    return await super()._hold()
            if self._is_saturated():
                return await self._take_first("saturated") or await self._stay_saturated()
            return await self._take_first("not_ready") or await self._wait_for_any()
        except ErrorResponse as error:
            reason = _REASONS.get(error.code)
            if reason is None:
                raise
            if reason != "not_ready":
                return await self._fall_back(reason, error)
            # The time is over: only a Model that can serve at once may answer.
            found = await self._take_first("saturated" if self._is_saturated() else reason)
            if found is None:
                raise
            return found

    def _is_saturated(self) -> bool:
        """Whether a request that waits does so for room, not for a replica."""
        return self._routed.can_serve(self._request.adapter)

    async def _stay_saturated(self) -> Reservation:
        """Keep waiting for room, and start a fallback, which will have some."""
        starting = self._first_at_zero()
        if starting is not None:
            self.context.demand(starting.route.model)
        return await super()._hold()

    async def _wait_for_any(self) -> Reservation:
        """Wait for the current Model and for the fallbacks, of which one is started."""
        while True:
            others = self._others()
            starting = asyncio.ensure_future(self._start_one())
            try:
                first, reservation = await first_of(super()._hold(), *map(self._turn_at, others))
            finally:
                starting.cancel()
            if first == 0:
                return reservation
            other = others[first - 1]
            if self.context.hold_watcher is None:
                self._switch(other, self._serve_at(other), "not_ready")
                return reservation
            reservation.release()  # while the message waits for permission, which may take long
            if taken := await self._take(other, "not_ready", other.pick):
                return taken

    async def _start_one(self) -> None:
        """Start the first fallback at zero, or the next one if that cannot start."""
        while (other := self._first_at_zero()) is not None:
            with self._demanded(other):
                while self._may_answer(other) and not self._can_serve(other):
                    block = other.block(self._adapter_at(other))
                    fails_at_s = math.inf if block is None else block.fails_at_s
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout_at(
                            fails_at_s if fails_at_s < math.inf else None
                        ):
                            await other.changes.next()
            if self._can_serve(other):
                return

    async def _turn_at(self, other: RoutedModel) -> Reservation:
        """Wait at another Model too: until it has an endpoint, then in its queue.

        The request is held, limited and counted at the current Model only.
        """
        adapter = self._adapter_at(other)
        left_s = max(0.0, (self._max_wait_s or 0.0) - self._waited_s)
        deadline_s = _now_s() + left_s
        async with asyncio.timeout_at(deadline_s):
            while not other.can_serve(adapter):
                await other.changes.next()
        waiting = self._waiting(self._prompt_at(other), adapter)
        return await other.queue.wait(waiting, deadline_s)

    @contextlib.contextmanager
    def _demanded(self, other: RoutedModel) -> Iterator[None]:
        """Count the request as waiting for another Model too, which starts a replica of it."""
        with contextlib.closing(other.admit(self.context.request_type)) as admission:
            admission.hold()
            self.context.demand(other.route.model)
            yield

    # -- leaving a canary --------------------------------------------------------------------------

    def _model_of_canary(self) -> RoutedModel | None:
        """The Model that was asked for, if the request is at its canary."""
        asked = self._asked
        if asked is None or self._routed.route.model != asked.route.canary:
            return None
        return next((o for o in self._others() if o.route.model == asked.route.model), None)

    async def _leave_canary(self, asked: RoutedModel) -> Reservation:
        """Demand the canary, which cannot serve at once, and have its Model serve the request."""
        canary, adapter = self._routed, self._request.adapter
        reason: FallbackReason = "saturated"
        if not canary.can_serve(adapter):
            block = canary.block(adapter)
            is_blocked = block is not None and block.fails_at_s <= _now_s()
            reason = "blocked" if is_blocked else "not_ready"
            if not is_blocked:
                self.context.demand(canary.route.model)
        return await self._go_to(asked, reason)

    # -- falling back ------------------------------------------------------------------------------

    def _others(self) -> list[RoutedModel]:
        """The Models that the request may fall back to, in order."""
        if self._is_pinned or self._request.previous_response_id is not None:
            return []
        asked = self._asked or self._routed
        if self._fallbacks is None:
            if asked is self._routed and not asked.route.fallbacks:
                return []
            self._fallbacks = Fallbacks(asked.route, self._routed.route, self._request.adapter)
        found = map(self.context.routes.find, self._fallbacks.untried)
        return [
            other
            for other in found
            if other is not None and self._may_serve(asked.route, other.route)
        ]

    def _first_at_zero(self) -> RoutedModel | None:
        """The first Model without an endpoint that is not known to be unable to start."""
        models = (other for other in self._others() if not self._can_serve(other))
        return next(filter(self._may_answer, models), None)

    def _adapter_at(self, other: RoutedModel) -> str | None:
        assert self._fallbacks is not None, "there are others"
        return self._fallbacks.adapter_at(other)

    def _can_serve(self, other: RoutedModel) -> bool:
        return other.can_serve(self._adapter_at(other))

    def _may_answer(self, other: RoutedModel) -> bool:
        """Whether a Model serves, or may start."""
        block = other.block(self._adapter_at(other))
        if block is None or self._can_serve(other):
            return True
        return block.fails_at_s > _now_s()

    async def _fall_back(self, reason: FallbackReason, error: ErrorResponse) -> Reservation:
        """Leave the current Model, which cannot serve the request. ``error``: if none else can."""
        if (asked := self._model_of_canary()) is not None:
            return await self._go_to(asked, reason)
        if reservation := await self._take_first(reason):
            return reservation
        other = next(filter(self._may_answer, self._others()), None)
        if other is None:
            raise error
        self._switch(other, self._serve_at(other), reason)
        return await self._hold()

    async def _go_to(self, other: RoutedModel, reason: FallbackReason) -> Reservation:
        """Leave the current Model for another one, and wait there if necessary."""
        if reservation := await self._take(other, reason):
            return reservation
        self._switch(other, self._serve_at(other), reason)
        return await self._hold()

    async def _take_first(self, reason: FallbackReason) -> Reservation | None:
        for other in self._others():
            if self._can_serve(other) and (reservation := await self._take(other, reason)):
                return reservation
        return None

    async def _take(
        self,
        other: RoutedModel,
        reason: FallbackReason,
        pick: Callable[[Prompt, str | None], Reservation | None] | None = None,
    ) -> Reservation | None:
        """Switch to a Model if one of its endpoints can serve the request now.

        ``pick``: None: only if no other request waits for the Model.
        """
        watcher = self.context.hold_watcher
        if watcher is not None:
            await watcher.on_endpoint(self.request_id)
        adapter, prompt = self._adapter_at(other), self._prompt_at(other)
        candidates = self._candidates
        if candidates is not None:
            candidates = other.picker.explain(prompt, adapter)
        if pick is None:
            reservation = other.pick_new(prompt, adapter, self._tenant)
        else:
            reservation = pick(prompt, adapter)
        if reservation is None:
            return None
        self._switch(other, self._serve_at(other), reason)
        self._candidates = candidates
        return reservation

    def _prompt_at(self, other: RoutedModel) -> Prompt:
        """The prompt as another Model's strategy needs it."""
        request = self._request
        before = request.name, request.adapter
        prompt = self._serve_at(other)
        request.serve_as(*before)
        return prompt

    def _serve_at(self, other: RoutedModel) -> Prompt:
        """Name another Model in the request, and return the prompt as its strategy needs it."""
        self._request.serve_as(other.route.model, self._adapter_at(other))
        if self._payload is None or len(self._payload) > openai.LARGE_BYTES:
            return self._prompt  # its length counts; reading it again would block the event loop
        return openai.prompt_of(other.picker, self._request, self.context.logs_prompts)

    def _switch(self, other: RoutedModel, prompt: Prompt, reason: FallbackReason) -> None:
        """Continue the request at another Model, by whose name it is already known."""
        left, fallbacks, admission = self._routed, self._fallbacks, self._admission
        assert fallbacks is not None, "there are others"
        assert admission is not None, "only admitted requests fall back"
        name = other.route.model
        self.context.events.add("fallback", left.route.model, name, reason)
        log.info(
            "request falls back",
            request_id=self.request_id,
            model=left.route.model,
            fallback=name,
            reason=reason,
        )
        fallbacks.untried.remove(name)
        fallbacks.retry_count += super().retry_count
        self._asked = self._asked or left
        self._routed, self._prompt, self._retries = other, prompt, None
        self._admission = other.admit(self.context.request_type)
        if reason == "not_ready":
            fallbacks.admissions.append(admission)
        else:
            admission.close()
        self._rename()
        self._say_who(name)
        if self.context.explains:
            self.note_candidates()

    def _rename(self) -> None:
        """Give the engine its name of the model, and the response the client's."""
        self._name_response(self._request)
        if self._payload is not None:
            self._payload = self._request.with_model(openai.json_string(self._request.engines_name))
            self.drop_header(b"content-encoding")  # the payload is what was read
        elif self._kind is Kind.REALTIME and self._session is None:
            query = classify(self.method, self.target).query
            self._path = f"{self._kind.value}?{engines_query(query, self._request)}".encode(
                "latin-1"
            )

    def _say_who(self, name: str) -> None:
        asked = self._asked
        if self.begun and self._kind is not Kind.REALTIME:
            self.comment(f"fallback: the model {name}".encode())
        elif asked is not None and asked.route.model == name:
            self.drop_response_header(ANSWERED_BY)
        else:
            self.add_response_header(ANSWERED_BY, name.encode())

    @property
    @override
    def retry_count(self) -> int:
        fallbacks = self._fallbacks
        return super().retry_count + (0 if fallbacks is None else fallbacks.retry_count)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
