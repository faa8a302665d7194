"""Finds the replica that has a stored response of OpenAI's Responses API.

An engine keeps responses that it stores in its own memory. The ID in a request's path was made by
the engine, and names neither the Model nor the replica. Therefore :func:`find_owner` asks all
endpoints that may have it, and the one that has it gets the request. Nothing is remembered, so it
works for every worker and every replica of KubeAI, also after they have restarted. Only endpoints
are asked whose engine stores responses and whose Model matches the request's selectors.

Limits: ``ASKED_AT_ONCE_MAX_COUNT`` endpoints at a time for each request, ``ASK_TIMEOUT_S`` for all
of them, and ``LOOKUPS_MAX_COUNT`` such requests at a time in each worker. Called by proxy.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import aiohttp

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

Place = tuple[RoutedModel, Endpoint]


async def find_owner(
    context: Context, exchange: Exchange, response_id: str, selects: Callable[[Route], bool]
) -> tuple[RoutedModel, str]:
    """The model and the name of the endpoint that has the response.

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
        routed, endpoint = await _ask(places, response_id, _headers(exchange))
    finally:
        context.lookups -= 1
    return routed, endpoint.name


def not_stored(response_id: str) -> BadRequest:
    """404: no replica has this response, or none that the client may use."""
    return BadRequest(f"No replica has a response with the ID {quoted(response_id)}.", status=404)


def _headers(exchange: Exchange) -> dict[str, str]:
    """The headers of the lookup, with the client's key for the engine, if there is one."""
    headers = {"X-Request-Id": exchange.request_id}
    for value in exchange.headers(b"authorization"):
        headers["Authorization"] = value.decode("latin-1")
    return headers


async def _ask(places: Iterable[Place], response_id: str, headers: dict[str, str]) -> Place:
    path = Kind.STORED_RESPONSE.value.replace("{id}", response_id)
    connector = aiohttp.TCPConnector(limit=ASKED_AT_ONCE_MAX_COUNT)
    timeout = aiohttp.ClientTimeout(total=ASK_TIMEOUT_S)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=headers
    ) as session:

        async def ask(place: Place) -> tuple[Place, int]:
            url = f"http://{place[1].address}{path}"
            try:
                async with session.get(url, allow_redirects=False) as response:
                    return place, response.status
            except (aiohttp.ClientError, TimeoutError):
                return place, 0

        asked = [asyncio.ensure_future(ask(place)) for place in places]
        try:
            return await _first_owner(asked, response_id)
        finally:
            for each in asked:
                each.cancel()


async def _first_owner(
    asked: Sequence[asyncio.Future[tuple[Place, int]]], response_id: str
) -> Place:
    silent = []
    for answer in asyncio.as_completed(asked):
        place, status = await answer
        if 200 <= status < 300:
            return place
        if not status or (status >= 500 and status != 501):  # 501: the model has no such API
            silent.append(place[1].name)
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
