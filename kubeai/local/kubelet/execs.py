"""Commands that people and programs run in containers, over a WebSocket each.

``/exec/{namespace}/{pod}/{container}`` with the kubelet's own parameters: ``command`` (once a
word) and ``input``, ``output``, ``error``. The messages are those of kubeai.channels.

Promises: a command whose client has left, or that ran for ``EXEC_TIMEOUT_S``, is killed with all
below it; a client that reads slowly slows the command down, and nothing is kept of it here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from kubeai import channels
from kubeai.channels import Ending
from kubeai.errors import KubeAIError
from kubeai.http import web
from kubeai.local.kubelet.process import Command
from kubeai.local.sockets import asked_protocol, first_of, payload, ping, server_socket
from kubeai.logs import get_logger

log = get_logger(__name__)

EXECS_MAX = 64
EXEC_TIMEOUT_S = 4 * 3600.0
_REASONS = {400: "BadRequest", 404: "NotFound", 429: "TooManyRequests"}


class Refusal(Exception):
    """What was asked for is not to be had; ``status`` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Container(Protocol):
    """One that runs; KubeAIError or OSError when a command cannot be started in it."""

    async def open(self, command: Sequence[str]) -> Command: ...


class Containers(Protocol):
    """The containers of this node; Refusal where there is none that runs."""

    def find_container(self, namespace: str, pod: str, container: str) -> Container: ...


class _Streams(NamedTuple):
    input: bool
    output: bool
    error: bool


class Execs:
    """Handles the requests of one server."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers
        self._count = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        try:
            return await self._handle(request)
        except Refusal as error:
            # A Status, not text as for logs: real API servers hand it on to clients unread.
            ending = Ending(None, error.status, _REASONS[error.status], str(error))
            return web.Response(
                status=error.status, body=ending.encode(), content_type="application/json"
            )

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        names, words = request.match_info, request.query.getall("command", [])
        streams = _Streams(*(request.query.get(name) == "1" for name in _Streams._fields))
        container = self._containers.find_container(
            names["namespace"], names["pod"], names["container"]
        )
        if not words or not words[0]:
            raise Refusal(400, "the request names no command")
        if not any(streams):
            raise Refusal(400, "at least one of stdin, stdout and stderr is needed")
        if request.query.get("tty") == "1":
            raise Refusal(400, "containers are processes without a terminal here: no tty")
        if not (protocol := asked_protocol(request)):
            known = f"{channels.V5}, {channels.V4}"
            raise Refusal(400, f"exec needs the upgrade to a WebSocket that speaks one of: {known}")
        if self._count >= EXECS_MAX:
            raise Refusal(429, f"there are {EXECS_MAX} commands already")
        self._count += 1
        try:
            socket = server_socket(protocol)
            await socket.prepare(request)
            await _run(socket, container, words, streams)
            return socket
        finally:
            self._count -= 1


async def _run(
    socket: web.WebSocketResponse, container: Container, words: list[str], streams: _Streams
) -> None:
    try:
        command = await container.open(words)
    except (KubeAIError, OSError) as error:
        ending: Ending | None = Ending(None, 500, "InternalError", str(error))
    else:
        try:
            ending = await _converse(socket, command, streams)
        finally:
            command.close()
    try:
        if ending is not None:
            await socket.send_bytes(bytes([channels.ERROR]) + ending.encode())
        await socket.close()
    except ConnectionError:
        pass  # the client has left


async def _converse(
    socket: web.WebSocketResponse, command: Command, streams: _Streams
) -> Ending | None:
    """Carry input and output until the command has ended; None when the client left before."""
    if not streams.input:
        command.end_input()
    output = asyncio.create_task(_send_output(socket, command, streams))
    receiving = asyncio.create_task(_receive(socket, command, streams))
    pings = asyncio.create_task(ping(socket))
    await first_of((output, receiving, pings), EXEC_TIMEOUT_S)
    if not output.cancelled():
        return output.result()
    if not (receiving.cancelled() and pings.cancelled()):
        return None
    log.warning("a command was killed that ran too long", limit_s=EXEC_TIMEOUT_S)
    return Ending(None, 504, "Timeout", f"killed after {EXEC_TIMEOUT_S:.0f} s")


async def _send_output(
    socket: web.WebSocketResponse, command: Command, streams: _Streams
) -> Ending | None:
    """Until the command has ended and all that it wrote is sent; None when the client left."""

    async def send(stream: int, channel: int, wanted: bool) -> None:
        while data := await command.read(stream):
            if wanted:
                await socket.send_bytes(bytes([channel]) + data)

    left = False
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(send(command.stdout, channels.STDOUT, streams.output))
            both.create_task(send(command.stderr, channels.STDERR, streams.error))
    except* ConnectionError:
        left = True
    if left:
        return None
    end = await asyncio.shield(command.ended)
    if end.code < 0:
        return Ending(None, 500, "InternalError", end.output)
    return Ending(end.code)


async def _receive(socket: web.WebSocketResponse, command: Command, streams: _Streams) -> None:
    """Until the client leaves."""
    async for message in socket:
        data = payload(message)
        if data is None or not streams.input:
            continue
        if data[:1] == bytes([channels.STDIN]):
            await command.write(data[1:])
        elif data == bytes([channels.CLOSE, channels.STDIN]):
            command.end_input()
