"""POST /openai/v1/audio/transcriptions: a multipart form that is forwarded to an engine.

It is handled like a JSON request: the body is read completely, with a size limit and a timeout,
before any load is counted; then admit → wait → pick → attempt, with retries. The form is spooled
(spool.py), so that ``model`` may be anywhere in it and an attempt can be retried. A form is limited
to ``multipart_max_bytes`` and 100 parts (multipart.py), its ``model`` to ``MODEL_MAX_BYTES``, and
all forms of a worker together to ``spool_max_bytes``.

``model`` is removed for FasterWhisper, and replaced by the engine's name of the model for others.
The content of every other part reaches the engine unchanged, in a form with a new boundary
(multipart.py says why). The response is streamed. Called by local_routes.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import cast

from yarl import URL

from kubeai._counts import Admission, Reservation
from kubeai.gateway.context import Context
from kubeai.gateway.endpoint_pool import EndpointPool
from kubeai.gateway.holding import hold
from kubeai.gateway.relay._exchange import CONNECT, LOST, TIMEOUT
from kubeai.gateway.retries import NO_ANSWER, TIMED_OUT, check_loss
from kubeai.gateway.uploads.multipart import boundary_of
from kubeai.gateway.uploads.spool import SpooledForm, no_room
from kubeai.http import aiohttp, web
from kubeai.logs import get_logger
from kubeai.openai.errors import BadRequest, compressed_body, model_not_found
from kubeai.openai.request import InferenceRequest, is_identity, named, parse_selector
from kubeai.openai.routes import Kind, RouteMatch
from kubeai.routing.routes import Route
from kubeai.routing.table import RoutedModel

log = get_logger(__name__)

CONTEXT = web.AppKey("context", Context)
_SESSION = web.AppKey("session", aiohttp.ClientSession)

_HOP_BY_HOP = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection",
     "te", "trailer", "transfer-encoding", "upgrade")
)  # fmt: skip
_OURS = frozenset(("host", "content-encoding", "content-length", "content-type", "expect"))


async def client(app: web.Application) -> AsyncIterator[None]:
    """Provide the application's HTTP client while it runs."""
    # One connection per attempt avoids the failure modes of reused connections.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(sock_connect=app[CONTEXT].config.connect_timeout_s, total=None)
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
    ) as session:
        app[_SESSION] = session
        yield


def selection(request: web.Request) -> Callable[[Route], bool]:
    """A predicate for routes whose labels match every X-Label-Selector of the request."""
    selectors = [parse_selector(text) for text in request.headers.getall("X-Label-Selector", [])]
    return lambda route: all(selector(route.labels) for selector in selectors)


async def transcribe(request: web.Request, target: RouteMatch) -> web.StreamResponse:
    """Respond with an engine's response, or raise BadRequest."""
    context = request.app[CONTEXT]
    if not is_identity(request.headers.getall("Content-Encoding", [])):
        raise compressed_body()
    selected = selection(request)
    types = request.headers.getall("Content-Type", [""])
    if len(types) > 1:
        raise BadRequest("The request has more than one Content-Type.")
    with SpooledForm(boundary_of(types[0]), context) as form:
        await _read_form(request, form, context)
        inference = named(Kind.TRANSCRIPTIONS, form.model)
        model = context.routes.find(inference.name)
        if model is None or not selected(model.route):
            raise model_not_found(inference.model)
        if inference.adapter is not None and inference.adapter not in model.route.adapters:
            raise model_not_found(inference.model)
        admission = model.admit()
        outcome = "left"
        try:
            response = await _Attempts(request, target, form, inference, model, admission).run()
            cut = request.transport is None or request.transport.is_closing()
            outcome = "broken" if cut else f"{response.status // 100}xx"
            return response
        except BadRequest as error:
            outcome = f"{error.status // 100}xx"
            raise
        finally:
            admission.count(outcome)
            admission.close()


async def _read_form(request: web.Request, form: SpooledForm, context: Context) -> None:
    """Spool the whole body, with size limits and a timeout between its bytes."""
    max_bytes = context.config.multipart_max_bytes
    too_long = BadRequest(f"The form is longer than {max_bytes} bytes.", status=413)
    announced_bytes = request.content_length or 0
    if announced_bytes > max_bytes:
        raise too_long
    if context.spooled_bytes + announced_bytes > context.config.spool_max_bytes:
        raise no_room("gateway.spoolMaxBytes is used up")
    content = request.content
    while not content.at_eof():
        try:
            async with asyncio.timeout(context.config.body_timeout_s):
                data = await content.readany()
        except TimeoutError:
            raise BadRequest("The form did not arrive in time.", status=408) from None
        if form.received_bytes + len(data) > max_bytes:
            raise too_long
        await form.feed(data)
    form.finish()


class _Attempts:
    """One admitted transcription: wait → pick → attempt, until a response begins."""

    def __init__(
        self,
        request: web.Request,
        target: RouteMatch,
        form: SpooledForm,
        inference: InferenceRequest,
        model: RoutedModel,
        admission: Admission,
    ) -> None:
        self._request = request
        self._context = request.app[CONTEXT]
        self._target = target
        self._form = form
        self._inference = inference
        self._model = model
        self._admission = admission
        self._key = model.key(inference)
        self._retries = self._context.retries(model)
        self._lost: Reservation | None = None  # the last attempt, if it lost its connection
        self._alone = False
        self._moved_to: Reservation | None = None  # the next attempt, after the endpoint left

    async def run(self) -> web.StreamResponse:
        try:
            return await self._run()
        finally:
            if self._moved_to is not None:
                self._moved_to.release()

    async def _run(self) -> web.StreamResponse:
        reservation = self._model.pick(self._key, self._inference.adapter) or await self._hold()
        while True:
            try:
                answer = await self._attempt(reservation)
                if answer is not None:
                    async with answer:
                        return await self._relay(answer, cast(EndpointPool, reservation.target))
            finally:
                reservation.release()
            reservation = await self._next()

    async def _next(self) -> Reservation:
        """The endpoint of the next attempt after one has failed."""
        if self._moved_to is not None:
            moved_to, self._moved_to = self._moved_to, None
            if self._model.serves(moved_to.name):
                return moved_to
            moved_to.release()  # it has left in its turn
        if self._lost is not None:
            await check_loss(self._retries, self._model, self._lost, self._alone)
        place = (self._model, self._key, self._inference.adapter)
        return (
            self._retries.elsewhere(*place)
            or await self._retries.later(*place)
            or await self._hold()
        )

    async def _hold(self) -> Reservation:
        return await hold(self._context, self._model, self._inference, self._key, self._admission)

    async def _attempt(self, reservation: Reservation) -> aiohttp.ClientResponse | None:
        """The response to forward; None to make another attempt."""
        name = reservation.name
        pool = cast(EndpointPool, reservation.target)
        pool.probing = pool.probing or reservation.is_probe
        pool.failing = pool.failing or reservation.failing
        self._lost = None
        timed_out = False
        try:
            async with asyncio.timeout(self._context.config.first_byte_timeout_s):
                answer = await self._post_until_moved(reservation)
            if answer is None:
                self._count_retry(name, "endpoint does not respond, moving the request")
                return None
        except TimeoutError as error:
            pool.note_failure(TIMEOUT)
            timed_out = not isinstance(error, aiohttp.ConnectionTimeoutError)
            reason = "response timeout" if timed_out else "connect timeout"
        except (aiohttp.ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            connected = not isinstance(error, aiohttp.ClientConnectorError)
            pool.note_failure(LOST if connected else CONNECT)
            if connected:
                self._lost = reservation
                reservation.release()
                self._alone = pool.lost_one_alone
        else:
            pool.note_answer(answer.status)
            if not self._wants_retry(answer.status, name):
                return answer
            answer.close()
            self._count_retry(name, f"status {answer.status}")
            return None
        if not self._wants_retry(TIMED_OUT if timed_out else NO_ANSWER, name):
            if timed_out:
                raise self._failure(504, "it did not respond in time", "timeout")
            raise self._failure(502, f"no replica could be reached: {reason}", "bad_gateway")
        self._count_retry(name, reason)
        return None

    def _wants_retry(self, status: int, endpoint: str) -> bool:
        return self._retries.wants(status, endpoint, self._model, self._inference.adapter)

    async def _post_until_moved(self, reservation: Reservation) -> aiohttp.ClientResponse | None:
        """The response; None if the endpoint left before it began and another can be tried."""
        pool = cast(EndpointPool, reservation.target)
        posting = asyncio.ensure_future(self._post(pool.host))
        task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()

        def move() -> None:
            if posting.done() or self._moved_to is not None:
                return
            place = (self._model, self._key, self._inference.adapter)
            self._moved_to = self._retries.move(reservation, *place)
            if self._moved_to is not None:
                posting.cancel()

        try:
            with pool.movable(move):
                return await posting
        except asyncio.CancelledError:
            if not posting.cancel() and not posting.cancelled() and not posting.exception():
                posting.result().close()  # it came in the moment in which nobody waits any more
            if self._moved_to is None or task.cancelling() > cancelled_before:
                raise
            return None

    def _count_retry(self, endpoint: str, reason: str) -> None:
        self._admission.count("retried")
        log.info(
            "attempt failed, retrying", model=self._inference.name, endpoint=endpoint, reason=reason
        )

    def _failure(self, status: int, reason: str, code: str) -> BadRequest:
        log.warning("request failed", model=self._inference.name, status=status, reason=reason)
        return BadRequest(
            f"The model {self._inference.model!r}: {reason}.", status=status, code=code
        )

    async def _post(self, address: str) -> aiohttp.ClientResponse:
        route = self._model.route
        # FasterWhisper serves a single model, and rejects any other name for it.
        model = (
            None
            if route.engine == "FasterWhisper"
            else self._inference.adapter or self._inference.name
        )
        query = f"?{self._target.query}" if self._target.query else ""
        headers = _end_to_end(self._request.headers.items(), _OURS)
        headers.append(("Content-Type", self._form.content_type))
        headers.append(("Content-Length", str(self._form.length_bytes(model))))
        return await self._request.app[_SESSION].post(
            URL(f"http://{address}{self._inference.kind}{query}", encoded=True),
            data=self._form.chunks(model),
            headers=headers,
            allow_redirects=False,
        )

    async def _relay(
        self, answer: aiohttp.ClientResponse, pool: EndpointPool
    ) -> web.StreamResponse:
        """Stream the response. If it breaks off, abort the connection to show that."""
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for name, value in _end_to_end(answer.headers.items()):
            response.headers.add(name, value)
        await response.prepare(self._request)
        while not answer.content.at_eof():
            try:
                async with asyncio.timeout(self._context.config.between_bytes_timeout_s):
                    data = await answer.content.readany()
            except (aiohttp.ClientError, OSError) as error:
                pool.note_failure(TIMEOUT if isinstance(error, TimeoutError) else LOST)
                log.warning("response broke off", model=self._inference.model, reason=str(error))
                if self._request.transport is not None:
                    self._request.transport.abort()
                return response  # aiohttp notices the closed connection
            await response.write(data)
        pool.note_end(answer.status)
        await response.write_eof()
        return response


def _end_to_end(
    headers: Iterable[tuple[str, str]], drop: frozenset[str] = frozenset()
) -> list[tuple[str, str]]:
    """The end-to-end headers, without those in ``drop``."""
    headers = list(headers)
    listed = {
        token.strip().lower()
        for name, value in headers
        if name.lower() == "connection"
        for token in value.split(",")
    }
    gone = _HOP_BY_HOP | listed | drop
    return [(name, value) for name, value in headers if name.lower() not in gone]
