"""One request, from its head to the end of its answer: admit → wait → pick → attempt.

:class:`Exchange` is what the relay asks at each step. An inference POST is read whole, counted for
its model (Admission), given an endpoint (Reservation) and sent there; a request that no endpoint
can serve yet is held. Everything else is relayed to the worker's pages while it comes. Nothing of
this needs a task, but a wait.

Which attempts are repeated, where, and how long a request waits is attempts.py's. The Reservation
of a failed attempt is released before the next pick.

``on_end`` gives back whatever was taken, exactly once, whatever happens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import structlog

from kubeai import _relay, openai
from kubeai.gateway.attempts import RETRY_AFTER_S, Retries, hold
from kubeai.openai import BadRequest, Kind

if TYPE_CHECKING:
    from kubeai._load import Admission, Reservation
    from kubeai._relay import Downstream
    from kubeai.gateway.connection import Front
    from kubeai.openai import Ask
    from kubeai.routing import RoutedModel

log = structlog.get_logger(__name__)

_PATHS = {kind: kind.value.encode() for kind in Kind if kind.is_json}
_FAILURES = {
    _relay.CONNECT: "no connection",
    _relay.LOST: "connection lost",
    _relay.INVALID: "not an HTTP answer",
    _relay.TIMEOUT: "no answer in time",
}


class Exchange(_relay.Exchange):
    """See the module; made by the relay, one for each request."""

    __slots__ = (
        "_admission",
        "_ask",
        "_key",
        "_kind",
        "_path",
        "_payload",
        "_reservation",
        "_retries",
        "_routed",
        "_task",
    )

    owner: Front
    _ask: Ask
    _key: int | None
    _kind: Kind
    _path: bytes  # at the engine
    _payload: bytes  # what the engine gets for a body
    _routed: RoutedModel

    def __init__(self, downstream: Downstream) -> None:
        self._admission: Admission | None = None
        self._reservation: Reservation | None = None
        self._task: asyncio.Task[None] | None = None  # while it waits
        self._retries: Retries | None = None  # once an attempt has failed

    # -- what the relay asks -----------------------------------------------------------------------

    def on_head(self) -> None:
        target = openai.classify(self.method, self.target)
        kind = target.kind
        path = _PATHS.get(kind) if kind is not None else None
        if kind is None or path is None or target.status != 200:
            self.stream(
                self.owner.pages,
                _origin_form(self.target),
                self.owner.config.multipart_max_bytes,
            )
            return
        encodings = self.headers(b"content-encoding")
        if encodings and encodings != [b"identity"]:
            self._say(415, "A compressed body cannot be read here: send it as it is.")
            return
        self._kind = kind
        self._path = path + b"?" + target.query.encode("latin-1") if target.query else path
        self.collect(self.owner.config.body_max_bytes)

    def on_body(self) -> None:
        try:
            ask = openai.parse(self._kind, self.body)
            routed = self._find(ask)
            self._payload = (
                self.body if ask.adapter is None else openai.replace_model(self.body, ask.adapter)
            )
        except BadRequest as error:
            self._refuse(error)
            return
        self._ask = ask
        self._routed = routed
        self._admission = routed.admit("http")
        self._key = routed.key(ask)
        self._place(routed.pick(self._key, ask.adapter))

    def wants_retry(self, failure: int, status: int) -> bool:
        if failure == _relay.TIMEOUT:
            # An engine that has not begun to answer after minutes would not on the next try.
            return False
        if self._retries is None:
            self._retries = Retries(self.owner.config.retries)
        return self._retries.wants(status)  # 0 where there was no answer

    def retry(self) -> None:
        failed, retries = self._release(), self._retries
        assert retries is not None, "the relay asks wants_retry first"
        retries.failed(failed)
        log.info(
            "attempt failed, retrying", model=self._ask.name, endpoint=failed, retry=retries.count
        )
        other = retries.elsewhere(self._routed, self._key, self._ask.adapter)
        if other is not None:
            self._attempt(other)
        else:
            self._wait(self._try_again)

    def give_up(self, failure: int) -> None:
        reason = _FAILURES[failure]
        if self._reservation is None:
            log.error("the pages did not answer", reason=reason)
            self._say(502, "The gateway's own pages did not answer.")
            return
        endpoint = self._reservation.name
        log.warning("attempts failed", model=self._ask.name, endpoint=endpoint, reason=reason)
        if failure == _relay.TIMEOUT:
            self._say(504, f"The model {self._ask.model!r} did not answer in time.", "timeout")
        else:
            self._say(
                502,
                f"No replica of the model {self._ask.model!r} could be reached: {reason}.",
                "bad_gateway",
            )

    def on_end(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
        if self._reservation is not None:
            self._reservation.release()
        if self._admission is not None:
            self._admission.close()

    # -- routing -----------------------------------------------------------------------------------

    def _find(self, ask: Ask) -> RoutedModel:
        """The model that is asked for, if the request's selectors let it be seen."""
        routed = self.owner.gateway.table.find(ask.name)
        if routed is None or (ask.adapter is not None and ask.adapter not in routed.route.adapters):
            raise openai.model_not_found(ask.model)
        for selector in self.headers(b"x-label-selector"):
            if not openai.parse_selector(selector.decode("latin-1"))(routed.route.labels):
                raise openai.model_not_found(ask.model)
        return routed

    def _place(self, reservation: Reservation | None) -> None:
        """Attempt, or hold the request when nobody can serve it."""
        if reservation is not None:
            self._attempt(reservation)
        else:
            self._wait(self._hold)

    def _attempt(self, reservation: Reservation) -> None:
        self._reservation = reservation
        if reservation.first != reservation.name:
            log.info(
                "moved off its endpoint",
                request_id=self._request_id(),
                model=self._ask.name,
                endpoint=reservation.name,
                first=reservation.first,
                first_load=reservation.first_load,
                bound=reservation.bound,
            )
        self.send(reservation.target, self._path, self._payload)  # type: ignore[arg-type]

    def _request_id(self) -> str:
        """What the client calls the request, to find it in the log; "" for nothing."""
        given = self.headers(b"x-request-id")
        return given[0][: openai.ECHO_MAX_CHARS].decode("latin-1") if given else ""

    def _release(self) -> str:
        """Count the attempt no more; the name of its endpoint."""
        reservation, self._reservation = self._reservation, None
        assert reservation is not None, "an attempt has a reservation"
        reservation.release()
        return reservation.name

    # -- waits -------------------------------------------------------------------------------------

    def _wait(self, waiting: Callable[[], Coroutine[Any, Any, Reservation]]) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(waiting))

    async def _run(self, waiting: Callable[[], Coroutine[Any, Any, Reservation]]) -> None:
        """Attempt on the endpoint that was waited for, or answer why there is none."""
        try:
            reservation = await waiting()
            self._task = None
            self._attempt(reservation)
        except BadRequest as error:
            self._task = None
            self._refuse(error)
        except Exception:
            log.exception("a wait failed", model=self._ask.name)
            self._task = None
            self._say(500, "Something is wrong with the gateway.", "internal_error")

    async def _try_again(self) -> Reservation:
        retries = self._retries
        assert retries is not None, "an attempt has failed"
        await asyncio.sleep(retries.pause_s)
        return retries.anywhere(self._routed, self._key, self._ask.adapter) or await self._hold()

    async def _hold(self) -> Reservation:
        assert self._admission is not None, "a request is counted before it is held"
        return await hold(self.owner.gateway, self._routed, self._ask, self._key, self._admission)

    # -- answers of our own ------------------------------------------------------------------------

    def _refuse(self, error: BadRequest) -> None:
        headers = b"Retry-After: %d\r\n" % RETRY_AFTER_S if error.status == 503 else b""
        self.answer(error.status, error.body(), headers)

    def _say(self, status: int, message: str, code: str | None = None) -> None:
        self.answer(status, error_body(status, message, code))


def error_body(status: int, message: str, code: str | None = None) -> bytes:
    """OpenAI's error object for a status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return openai.error_body(message, type=kind, code=code)


def _origin_form(target: str) -> bytes:
    """A request target without scheme and authority."""
    if not target.startswith("/"):
        _, separator, rest = target.partition("://")
        if separator:
            target = "/" + rest.partition("/")[2]
    return target.encode("latin-1")
