"""Exec: commands in containers, each over a WebSocket.

``/exec/{namespace}/{pod}/{container}`` with the kubelet's parameters: ``command`` (repeated for
each argument) and ``input``, ``output``, ``error``. Messages are those of
``kubeai.kube.exec``.

Promises: when the client disconnects or after ``EXEC_TIMEOUT_S``, the command is killed with all
its descendants. A slow client slows the command down; its output is not buffered here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from aiohttp import web

from kubeai.errors import KubeAIError
from kubeai.kube.exec import CLOSE, ERROR, PROTOCOL_V4, PROTOCOL_V5, STDERR, STDIN, STDOUT, Ending
from kubeai.local.kubelet.runtime.command import Command
from kubeai.local.sockets import asked_protocol, first_of, payload, ping, server_socket
from kubeai.logs import get_logger

log = get_logger(__name__)

EXECS_MAX = 64
EXEC_TIMEOUT_S = 4 * 3600.0
_REASONS = {400: "BadRequest", 404: "NotFound", 429: "TooManyRequests"}


class Refusal(Exception):
    """A request is refused with the HTTP ``status``."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Container(Protocol):
    """A running container. ``open`` raises KubeAIError or OSError if a command cannot start."""

    async def open(self, command: Sequence[str]) -> Command:
        """Start a command alongside the container's main process."""


class Containers(Protocol):
    """The containers of this node; Refusal if the container is not running."""

    def find_container(self, namespace: str, pod: str, container: str) -> Container:
        """Return a running container. Raises Refusal."""


class _Streams(NamedTuple):
    """Whether the client requested each of the command's stdin, stdout and stderr."""

    input: bool
    output: bool
    error: bool


class Execs:
    """Handles the requests of one server."""

    def __init__(self, containers: Containers) -> None:
        self._containers = containers
        self._count = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Run a command and relay its streams. A refused request gets a Status."""
        try:
            return await self._handle(request)
        except Refusal as error:
            # A Status, not text as for logs: real API servers pass it through to clients.
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
            raise Refusal(400, "no command specified")
        if not any(streams):
            raise Refusal(400, "at least one of stdin, stdout and stderr is needed")
        if request.query.get("tty") == "1":
            raise Refusal(400, "tty is not supported: containers are processes without a terminal")
        if not (protocol := asked_protocol(request)):
            known = f"{PROTOCOL_V5}, {PROTOCOL_V4}"
            raise Refusal(400, f"exec requires a WebSocket upgrade with one of: {known}")
        if self._count >= EXECS_MAX:
            raise Refusal(429, f"too many commands: the limit is {EXECS_MAX}")
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
            await socket.send_bytes(bytes([ERROR]) + ending.encode())
        await socket.close()
    except ConnectionError:
        pass  # the client disconnected


async def _converse(
    socket: web.WebSocketResponse, command: Command, streams: _Streams
) -> Ending | None:
    """Forward input and output until the command ends; None if the client disconnects first."""
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
    log.warning("killed a command after the timeout", limit_s=EXEC_TIMEOUT_S)
    return Ending(None, 504, "Timeout", f"killed after {EXEC_TIMEOUT_S:.0f} s")


async def _send_output(
    socket: web.WebSocketResponse, command: Command, streams: _Streams
) -> Ending | None:
    """Send output until the command has ended, and return how; None if the client disconnected.

    A stream that the client did not request is read and dropped: a full pipe would block the
    command.
    """

    async def send(stream: int, channel: int, is_requested: bool) -> None:
        while data := await command.read(stream):
            if is_requested:
                await socket.send_bytes(bytes([channel]) + data)

    has_disconnected = False
    try:
        async with asyncio.TaskGroup() as both:
            both.create_task(send(command.stdout, STDOUT, streams.output))
            both.create_task(send(command.stderr, STDERR, streams.error))
    except* ConnectionError:
        has_disconnected = True
    if has_disconnected:
        return None
    end = await asyncio.shield(command.ended)
    if end.code < 0:  # it could not be started, or its container has ended
        return Ending(None, 500, "InternalError", end.output)
    return Ending(end.code)


async def _receive(socket: web.WebSocketResponse, command: Command, streams: _Streams) -> None:
    """Forward input until the client disconnects."""
    async for message in socket:
        data = payload(message)
        if data is None or not streams.input:
            continue
        if data[:1] == bytes([STDIN]):
            await command.write(data[1:])
        elif data == bytes([CLOSE, STDIN]):
            command.end_input()
