"""Finds the replica that has a stored response of OpenAI's Responses API.

An engine keeps responses that it stores in its own memory. The ID of a response was made by the
engine, and names neither the Model nor the replica. Therefore :class:`StoredResponses` asks all
endpoints that may have it, and the one that has it gets the request. That works for every worker
and every replica of KubeAI, also after they have restarted. A worker remembers the endpoints that
it has found, because clients poll responses that are generated in the background: a response never
moves, so as long as its endpoint exists, no other one can have it. An endpoint is remembered when a
lookup finds it, not when it creates the response: that would require reading the ID from every
response body.

A request that continues a stored response (``previous_response_id``) names its Model, so only the
endpoints of that Model, its canary and its fallbacks are asked, and none if the only one is the
Model's own.

Only endpoints are asked whose engine stores responses and whose Model matches the request's
selectors. If an adapter made the response, the client gets its name as clients call it.

If keys are required, only the tenant whose key created a response can read, cancel or continue it;
other tenants get 404. The ID identifies the tenant. Both engines that store responses take the ID
from the request's ``request_id``, so :func:`new_id` has it begin with a hash of the tenant's name,
and :func:`check_tenant` compares that before anything is looked up. This needs no memory, and holds
for all workers and replicas and after restarts. A response created without a key has no owner.

Limits: ``ASKED_AT_ONCE_MAX_COUNT`` endpoints at a time for each request, ``ASK_TIMEOUT_S`` for each
of them and ``LOOKUP_TIMEOUT_S`` for all, ``LOOKUPS_MAX_COUNT`` such requests at a time and
``REMEMBERED_MAX_COUNT`` remembered responses in each worker. Created by context.py, called by
proxy.py, closed by the worker.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import aiohttp
import msgspec

from kubeai.errors import quoted
from kubeai.logs import get_logger
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.routes import RESPONSE_ID, Kind
from kubeai.routing.routes import Endpoint, Route
from kubeai.routing.table import RoutedModel

if TYPE_CHECKING:
    from kubeai._keys import Key
    from kubeai.gateway.relay._exchange import Exchange

log = get_logger(__name__)

STORING_ENGINES = frozenset(("VLLM", "SGLang"))  # the others have no such routes
LOOKUP_TIMEOUT_S = 5.0
ASK_TIMEOUT_S = 2.0
ASKED_AT_ONCE_MAX_COUNT = 32
LOOKUPS_MAX_COUNT = 16
CONNECTIONS_MAX_COUNT = 96  # of all lookups; each takes a descriptor
REMEMBERED_MAX_COUNT = 4096
MODEL_IN_MAX_BYTES = 1 << 20  # the longest response of which the model is read
_TENANT_CHARS = 16  # of an ID, in hexadecimal: 64 bits

Place = tuple[RoutedModel, Endpoint]


class Location(NamedTuple):
    """Where a stored response is."""

    routed: RoutedModel
    endpoint: str
    model: str  # that made it, as clients call it


class _Remembered(NamedTuple):
    """A Location without the objects of the routing table, which changes."""

    name: str  # of the Model
    endpoint: str
    model: str


class _Answer(NamedTuple):
    """What an endpoint said. ``status`` 0: nothing."""

    place: Place
    status: int = 0
    model: str | None = None  # in the response, if the Model has adapters

    @property
    def is_silent(self) -> bool:
        """Whether the endpoint may have the response nevertheless."""
        return not self.status or (self.status >= 500 and self.status != 501)  # 501: no such API


class _Response(msgspec.Struct):
    model: str | None = None


class _Chosen(msgspec.Struct):
    request_id: Any = None


_chosen_decoder = msgspec.json.Decoder(_Chosen)


class StoredResponses:
    """The lookups of one worker."""

    def __init__(self) -> None:
        self.lookups = 0  # in progress
        self._session: aiohttp.ClientSession | None = None  # made for the first lookup
        self._remembered: OrderedDict[str, _Remembered] = OrderedDict()  # by ID, oldest use first

    async def close(self) -> None:
        """Close the connections; a lookup in progress fails."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def find(
        self,
        models: Iterable[RoutedModel],
        exchange: Exchange,
        response_id: str,
        selects: Callable[[Route], bool],
    ) -> Location:
        """The endpoint of one of these models that has the response.

        ``selects``: whether the client may use a Model. ErrorResponse 404 if no endpoint has the
        response, 503 if one of them did not answer.
        """
        able = [
            routed
            for routed in models
            if routed.route.engine in STORING_ENGINES and selects(routed.route)
        ]
        location = await self._find(able, exchange, response_id)
        if location is None:
            raise not_stored(response_id)
        return location

    async def location_of(
        self, models: Sequence[RoutedModel], exchange: Exchange, response_id: str
    ) -> Location | None:
        """The endpoint that has the response, for a request to the first model that continues it.

        The other models are its canary and fallbacks, which may have created the response. None if
        any endpoint of the first model can take the request: there is only one, or none has the
        response, and the engine's own error is the most accurate. ErrorResponse 503 if one did not
        answer.
        """
        able = [routed for routed in models if routed.route.engine in STORING_ENGINES]
        places = [routed for routed in able for _ in routed.route.endpoints]
        if not places or (len(places) == 1 and places[0] is models[0]):
            return None
        if not RESPONSE_ID.fullmatch(response_id):
            return None
        return await self._find(able, exchange, response_id)

    async def _find(
        self, models: list[RoutedModel], exchange: Exchange, response_id: str
    ) -> Location | None:
        return self._recall(models, response_id) or await self._look_up(
            models, exchange, response_id
        )

    def _recall(self, models: Iterable[RoutedModel], response_id: str) -> Location | None:
        found = self._remembered.get(response_id)
        if found is None:
            return None
        for routed in models:
            route = routed.route
            if route.model == found.name and found.endpoint in (e.name for e in route.endpoints):
                self._remembered.move_to_end(response_id)
                return Location(routed, found.endpoint, found.model)
        return None

    def _remember(self, response_id: str, location: Location) -> None:
        found = _Remembered(location.routed.route.model, location.endpoint, location.model)
        self._remembered[response_id] = found
        self._remembered.move_to_end(response_id)
        if len(self._remembered) > REMEMBERED_MAX_COUNT:
            self._remembered.popitem(last=False)

    async def _look_up(
        self, models: Iterable[RoutedModel], exchange: Exchange, response_id: str
    ) -> Location | None:
        if self.lookups >= LOOKUPS_MAX_COUNT:
            message = "Too many stored responses are being looked up."
            raise ErrorResponse(message, status=503, code="overloaded")
        places = [(routed, endpoint) for routed in models for endpoint in routed.route.endpoints]
        self.lookups += 1
        try:
            found = await self._ask_all(places, response_id, lookup_headers(exchange))
        finally:
            self.lookups -= 1
        if found is None:
            return None
        routed, endpoint = found.place
        model = routed.route.model
        if found.model in routed.route.adapters:
            model = f"{model}_{found.model}"
        location = Location(routed, endpoint.name, model)
        self._remember(response_id, location)
        return location

    async def _ask_all(
        self, places: list[Place], response_id: str, headers: dict[str, str]
    ) -> _Answer | None:
        """Ask the endpoints, a few at a time, until one has the response; None if none has it."""
        path = Kind.STORED_RESPONSE.value.replace("{id}", response_id)
        left = iter(places)
        silent = {endpoint.address: endpoint.name for _, endpoint in places}  # until they answer
        found: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()

        async def ask() -> None:
            for place in left:
                answer = await self._ask(place, path, headers)
                if 200 <= answer.status < 300:
                    if not found.done():
                        found.set_result(answer)
                    return
                if not answer.is_silent:
                    silent.pop(place[1].address, None)

        count = min(len(places), ASKED_AT_ONCE_MAX_COUNT)
        tasks = [asyncio.ensure_future(ask()) for _ in range(count)]
        all_asked = asyncio.gather(*tasks)
        all_asked.add_done_callback(_retrieve)
        try:
            await asyncio.wait(
                (found, all_asked), timeout=LOOKUP_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
            )
            if found.done():
                return found.result()
            if all_asked.done():
                all_asked.result()  # raises what is not an answer
            if silent:
                raise _unsure(response_id, sorted(silent.values()))
            return None
        finally:
            for task in tasks:
                task.cancel()
            found.cancel()

    async def _ask(self, place: Place, path: str, headers: dict[str, str]) -> _Answer:
        if self._session is None:
            self._session = _new_session()
        routed, endpoint = place
        url = f"http://{endpoint.address}{path}"
        try:
            async with self._session.get(url, headers=headers, allow_redirects=False) as response:
                if response.status < 300 and routed.route.adapters:
                    return _Answer(place, response.status, await _model_in(response))
                return _Answer(place, response.status)
        except (aiohttp.ClientError, TimeoutError):
            return _Answer(place)


def _retrieve(done: asyncio.Future[Any]) -> None:
    """Retrieve the exception of an abandoned future; otherwise asyncio logs it."""
    if not done.cancelled():
        done.exception()


def _new_session() -> aiohttp.ClientSession:
    # Connections are not kept: there are more endpoints than descriptors. Cookies are not kept:
    # the lookups of all clients share the session.
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX_COUNT, force_close=True),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=ASK_TIMEOUT_S),
    )


def _unsure(response_id: str, silent: list[str]) -> ErrorResponse:
    log.warning("endpoints did not answer the lookup of a stored response", endpoints=silent[:10])
    return ErrorResponse(
        f"No replica that answered has a response with the ID {quoted(response_id)}, but "
        f"{len(silent)} did not answer.",
        status=503,
        code="model_unavailable",
    )


def new_id(key: Key | None) -> str:
    """An ID for a response of the key's tenant, or nobody's. Each attempt needs another one."""
    return f"resp_{'' if key is None else _tenant_hash(key.tenant)}{uuid.uuid4().hex}"


def chosen_id(payload: bytes) -> str | None:
    """The ID that a client has chosen for its response; None if it has not.

    Empty if no response can be asked for with it.
    """
    chosen = _chosen_decoder.decode(payload).request_id
    if chosen is None:
        return None
    return chosen if isinstance(chosen, str) and RESPONSE_ID.fullmatch(chosen) else ""


def with_id(payload: bytes, response_id: str) -> bytes:
    """The body of a request, so that a response that the engine stores has this ID.

    ``payload``: a JSON object. It overrides the client's ``request_id``: of several members with
    one name, engines use the last.
    """
    end = payload.rindex(b"}")
    return b'%b,"request_id":"%b"}' % (payload[:end], response_id.encode())


def check_tenant(response_id: str, key: Key | None) -> None:
    """404 if a stored response belongs to another tenant than the client's, or to none."""
    if key is not None and not response_id.startswith(f"resp_{_tenant_hash(key.tenant)}"):
        raise not_stored(response_id)


@lru_cache(maxsize=1024)
def _tenant_hash(tenant: str) -> str:
    return hashlib.sha256(f"response of {tenant}".encode()).hexdigest()[:_TENANT_CHARS]


def not_stored(response_id: str) -> ErrorResponse:
    """404: no replica has this response, or none that the client may use."""
    return ErrorResponse(
        f"No replica has a response with the ID {quoted(response_id)}.", status=404
    )


def lookup_headers(exchange: Exchange) -> dict[str, str]:
    """The headers of the lookup, with the client's key for the engine, if there is one."""
    headers = {"X-Request-Id": exchange.request_id}
    for value in exchange.headers(b"authorization"):
        headers["Authorization"] = value.decode("latin-1")
    return headers


async def _model_in(response: aiohttp.ClientResponse) -> str | None:
    """The model in a stored response; None if it is too long or not one."""
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MODEL_IN_MAX_BYTES:
            return None
    try:
        return msgspec.json.decode(body, type=_Response).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
