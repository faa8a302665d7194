"""Watches: reads the events of one, and keeps a caller's view of a collection up to date.

Used through :class:`kubeai.kube.client.Kube`, which hands in its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Protocol

import aiohttp
import msgspec

from kubeai.kube.backoff import BACKOFF_MAX_S, Backoff
from kubeai.kube.connections import enable_keep_alive
from kubeai.kube.decoding import Event, Versioned, decode, decode_leniently, event_lines
from kubeai.kube.errors import ApiError, Status, api_error, no_response
from kubeai.kube.resources import Resource, Selection
from kubeai.logs import get_logger

log = get_logger(__name__)

RESPONSE_TIMEOUT_S = 30.0  # until the head of a watch's response
WATCH_TIMEOUT_S = (240.0, 300.0)  # range of the timeout that the server is asked for
WATCH_SILENCE_MAX_S = 330.0
WATCH_MIN_S = 1.0  # a watch that the server ends sooner counts as failed

RawEvent = tuple[str, str, msgspec.Raw]  # type, resourceVersion, object


class Get(Protocol):
    """Sends a GET request."""

    async def __call__(
        self, path: str, query: dict[str, str], *, timeout: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        """Return once the response's head is there. aiohttp.ClientError if there is none."""
        ...


async def watch_events(
    get: Get, renew: Callable[[], Awaitable[bool]], selection: Selection, version: str
) -> AsyncGenerator[RawEvent, None]:
    """The events of one watch from a resourceVersion on, until the server ends it.

    ApiError if it fails; its status is 410 if ``version`` has expired. ``renew`` is awaited after
    a 401, so that the next watch has new credentials.
    """
    resource, namespace = selection.resource, selection.namespace
    query = {
        "watch": "1",
        "resourceVersion": version,
        "allowWatchBookmarks": "true",
        "timeoutSeconds": str(int(random.uniform(*WATCH_TIMEOUT_S))),
    } | selection.query()
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=RESPONSE_TIMEOUT_S, sock_read=WATCH_SILENCE_MAX_S
    )
    try:
        async with asyncio.timeout(RESPONSE_TIMEOUT_S):
            response = await get(resource.path(namespace), query, timeout=timeout)
        async with response:
            if response.status == 401:
                await renew()
            if response.status >= 400:
                raise api_error(response, await response.read())
            enable_keep_alive(response)
            async for line in event_lines(response.content):
                event = decode(line, Event)
                if event.type == "ERROR":
                    status = decode(event.object, Status)
                    raise ApiError(status.code, status.reason, status.message)
                meta = decode(event.object, Versioned).metadata
                yield event.type, meta.resource_version, event.object
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise no_response("watch", resource.plural, error) from error


async def follow(
    resource: Resource,
    type_: Any,
    *,
    list_all: Callable[[], Awaitable[tuple[list[Any], str]]],
    events: Callable[[str], AsyncGenerator[RawEvent, None]],
    replaced: Callable[[list[Any]], None],
    changed: Callable[[str, Any], None],
    failed: Callable[[ApiError], None],
) -> None:
    """List and watch until cancelled; see :meth:`kubeai.kube.client.Kube.follow`.

    ``list_all`` returns the decoded items and the list's resourceVersion; ``events`` watches from a
    resourceVersion on.
    """
    backoff = Backoff()
    version = ""
    while True:
        began_s, broke, forgotten = time.monotonic(), False, False
        resumed = version != ""
        retry_after_s = 0.0
        try:
            if not version:
                items, version = await list_all()
                replaced(items)
            async with contextlib.aclosing(events(version)) as arriving:
                async for kind, version, raw in arriving:
                    backoff.reset()
                    if kind == "BOOKMARK":
                        continue
                    obj = decode_leniently(resource, raw, type_)
                    if obj is not None:
                        changed(kind, obj)
                    elif kind == "DELETED":
                        version = ""  # only a new list can show which object was deleted
                        break
        except ApiError as error:
            broke = True
            failed(error)
            if error.status == 410:
                version = ""
                forgotten = resumed
            retry_after_s = min(error.retry_after_s or 0.0, BACKOFF_MAX_S)
            log.info(
                "watch failed", resource=resource.plural, status=error.status, error=str(error)
            )
        if not forgotten and (broke or time.monotonic() - began_s < WATCH_MIN_S):
            await asyncio.sleep(max(backoff.next_s(), retry_after_s))
