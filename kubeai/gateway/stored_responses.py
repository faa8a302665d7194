"""Finds the replica that has a stored response of OpenAI's Responses API.

An engine keeps responses that it stores in its own memory. The ID in a request's path was made by
the engine, and names neither the Model nor the replica. Therefore :func:`find_owner` asks all
endpoints that may have it, and the one that has it gets the request. Nothing is remembered, so it
works for every worker and every replica of KubeAI, also after they have restarted. Only endpoints
are asked whose engine stores responses and whose Model matches the request's selectors. If an
adapter made the response, the client gets its name as clients call it.

Limits: ``ASKED_AT_ONCE_MAX_COUNT`` endpoints at a time for each request, ``ASK_TIMEOUT_S`` for all
of them, and ``LOOKUPS_MAX_COUNT`` such requests at a time in each worker. Called by proxy.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import aiohttp
import msgspec

from kubeai.errors import quoted
from kubeai.logs import get_logger
from kubeai.openai.errors import BadRequest
from kubeai.openai.routes import Kind
from kubeai.routing.routes import Endpoint, Route
from kubeai.routing.table import RoutedModel

if TYPE_CHECKING:
    from kubeai.gateway.context import Context
    from kubeai.gateway.relay._exchange import Exchange

log = get_logger(__name__)

STORING_ENGINES = frozenset(("VLLM", "SGLang"))  # the others have no such routes
ASK_TIMEOUT_S = 5.0
ASKED_AT_ONCE_MAX_COUNT = 32
LOOKUPS_MAX_COUNT = 16
MODEL_IN_MAX_BYTES = 1 << 20  # the longest response of which the model is read

Place = tuple[RoutedModel, Endpoint]


class Owner(NamedTuple):
    """Where a stored response is."""

    routed: RoutedModel
    endpoint: str
    model: str  # that made it, as clients call it


class _Answer(NamedTuple):
    """What an endpoint said. ``status`` 0: nothing."""

    place: Place
    status: int = 0
    model: str | None = None  # in the response, if the Model has adapters


class _Response(msgspec.Struct):
    model: str | None = None


async def find_owner(
    context: Context, exchange: Exchange, response_id: str, selects: Callable[[Route], bool]
) -> Owner:
    """The endpoint that has the response.

    ``selects``: whether a Model may be asked. BadRequest: 404 if no endpoint has the response, 503
    if one of them did not answer.
    """
    if context.lookups >= LOOKUPS_MAX_COUNT:
        message = "Too many stored responses are being looked up."
        raise BadRequest(message, status=503, code="overloaded")
    places = [
        (routed, endpoint)
        for routed in context.routes
        if routed.route.engine in STORING_ENGINES and selects(routed.route)
        for endpoint in routed.route.endpoints
    ]
    context.lookups += 1
    try:
        found = await _ask(places, response_id, _headers(exchange))
    finally:
        context.lookups -= 1
    routed, endpoint = found.place
    model = routed.route.model
    if found.model in routed.route.adapters:
        model = f"{model}_{found.model}"
    return Owner(routed, endpoint.name, model)


def not_stored(response_id: str) -> BadRequest:
    """404: no replica has this response, or none that the client may use."""
    return BadRequest(f"No replica has a response with the ID {quoted(response_id)}.", status=404)


def _headers(exchange: Exchange) -> dict[str, str]:
    """The headers of the lookup, with the client's key for the engine, if there is one."""
    headers = {"X-Request-Id": exchange.request_id}
    for value in exchange.headers(b"authorization"):
        headers["Authorization"] = value.decode("latin-1")
    return headers


async def _ask(places: Iterable[Place], response_id: str, headers: dict[str, str]) -> _Answer:
    path = Kind.STORED_RESPONSE.value.replace("{id}", response_id)
    connector = aiohttp.TCPConnector(limit=ASKED_AT_ONCE_MAX_COUNT)
    timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:

        async def ask(place: Place) -> _Answer:
            url = f"http://{place[1].address}{path}"
            try:
                async with session.get(url, allow_redirects=False) as response:
                    if response.status < 300 and place[0].route.adapters:
                        return _Answer(place, response.status, await _model_in(response))
                    return _Answer(place, response.status)
            except (aiohttp.ClientError, TimeoutError):
                return _Answer(place)

        asked = [asyncio.ensure_future(ask(place)) for place in places]
        try:
            return await _first_owner(asked, response_id)
        finally:
            for each in asked:
                each.cancel()


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


async def _first_owner(asked: Sequence[asyncio.Future[_Answer]], response_id: str) -> _Answer:
    silent = []
    for each in asyncio.as_completed(asked):
        answer = await each
        status = answer.status
        if 200 <= status < 300:
            return answer
        if not status or (status >= 500 and status != 501):  # 501: the model has no such API
            silent.append(answer.place[1].name)
    if silent:
        log.warning(
            "endpoints did not answer the lookup of a stored response", endpoints=silent[:10]
        )
        raise BadRequest(
            f"No replica that answered has a response with the ID {quoted(response_id)}, but "
            f"{len(silent)} did not answer.",
            status=503,
            code="model_unavailable",
        )
    raise not_stored(response_id)
