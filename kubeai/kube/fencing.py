"""Refuses writes at the moment of sending, when leadership may have passed."""

from __future__ import annotations

from collections.abc import Callable

import aiohttp


def fence(check: Callable[[], None]) -> aiohttp.TraceConfig:
    """Make a session send its requests only if ``check`` passes; see :meth:`Kube.fenced`.

    aiohttp calls these two hooks when it has a connection: the first right before the headers are
    written, the second one event-loop iteration later, before the body. Both are sent together.
    """

    async def headers(
        session: aiohttp.ClientSession, context: object, sent: aiohttp.TraceRequestHeadersSentParams
    ) -> None:
        if sent.method != "GET" or "Upgrade" in sent.headers:
            check()

    async def body(
        session: aiohttp.ClientSession, context: object, sent: aiohttp.TraceRequestChunkSentParams
    ) -> None:
        if sent.method != "GET":
            check()

    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(headers)
    trace.on_request_chunk_sent.append(body)
    return trace
