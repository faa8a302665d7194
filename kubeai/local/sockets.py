"""WebSocket helpers for exec, shared by the embedded API and the process kubelet."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import aiohttp
from aiohttp import web

from kubeai.kube.exec import PROTOCOL_V4, PROTOCOL_V5

PING_INTERVAL_S = 15.0
CLOSE_TIMEOUT_S = 1.0
MESSAGE_MAX_BYTES = 4 << 20
# The command's arguments are in the query string.
REQUEST_LINE_MAX_BYTES = 256 << 10


def asked_protocol(request: web.Request) -> str:
    """Return the best exec protocol that the client offers; empty if there is none."""
    if request.headers.get("Upgrade", "").lower() != "websocket":
        return ""
    offered = [
        word.strip() for word in request.headers.get("Sec-WebSocket-Protocol", "").split(",")
    ]
    return next((known for known in (PROTOCOL_V5, PROTOCOL_V4) if known in offered), "")


def server_socket(protocol: str) -> web.WebSocketResponse:
    """The server's end of a WebSocket that speaks one subprotocol."""
    return web.WebSocketResponse(
        protocols=(protocol,),
        timeout=CLOSE_TIMEOUT_S,
        compress=False,
        max_msg_size=MESSAGE_MAX_BYTES,
    )


def payload(message: aiohttp.WSMessage) -> bytes | None:
    """Return a binary or text message's bytes (Python's client sends text); None for others."""
    if message.type is aiohttp.WSMsgType.TEXT:
        return str(message.data).encode()
    return bytes(message.data) if message.type is aiohttp.WSMsgType.BINARY else None


async def first_of(work: Iterable[asyncio.Task[object]], timeout_s: float | None = None) -> None:
    """Wait until one task is done or the timeout expires, then cancel and await all others."""
    tasks = list(work)
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ping(socket: web.WebSocketResponse) -> None:
    """Ping until the client is gone, to detect that even while nothing reads from it."""
    while True:
        await asyncio.sleep(PING_INTERVAL_S)
        try:
            await socket.ping()
        except ConnectionError:
            return
