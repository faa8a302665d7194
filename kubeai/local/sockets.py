"""What the servers of an exec, the embedded API and the process kubelet, do with a WebSocket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from kubeai import channels
from kubeai.http import aiohttp, web

PING_INTERVAL_S = 15.0
CLOSE_TIMEOUT_S = 1.0
MESSAGE_MAX_BYTES = 4 << 20
# A command's words are in the request's first line.
REQUEST_LINE_MAX_BYTES = 256 << 10


def asked_protocol(request: web.Request) -> str:
    """The best protocol that the client of an upgrade can speak; empty when it is no such one."""
    if request.headers.get("Upgrade", "").lower() != "websocket":
        return ""
    offered = [
        word.strip() for word in request.headers.get("Sec-WebSocket-Protocol", "").split(",")
    ]
    return next((known for known in (channels.V5, channels.V4) if known in offered), "")


def server_socket(protocol: str) -> web.WebSocketResponse:
    return web.WebSocketResponse(
        protocols=(protocol,),
        timeout=CLOSE_TIMEOUT_S,
        compress=False,
        max_msg_size=MESSAGE_MAX_BYTES,
    )


def payload(message: aiohttp.WSMessage) -> bytes | None:
    """A message's bytes, also of one sent as text, as Python's client does; None for others."""
    if message.type is aiohttp.WSMsgType.TEXT:
        return str(message.data).encode()
    return bytes(message.data) if message.type is aiohttp.WSMsgType.BINARY else None


async def first_of(work: Iterable[asyncio.Task[object]], timeout_s: float | None = None) -> None:
    """Until one task is done, or the time is over; the others are cancelled and gone then."""
    tasks = list(work)
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ping(socket: web.WebSocketResponse) -> None:
    """Ping until the client is gone, which is noticed here also while nobody reads from it."""
    while True:
        await asyncio.sleep(PING_INTERVAL_S)
        try:
            await socket.ping()
        except ConnectionError:
            return
