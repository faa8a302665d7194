"""Sends requests through the gateway's own server, in this process.

Each request is an HTTP/1.1 POST on a socket pair of its own, so that it takes the same path as a
client's, and that no other process can connect. :class:`RelayClient` also watches which requests
the gateway holds, and passes that on to the request's :class:`Gate`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import httptools
from typing_extensions import override

from kubeai.messenger.message import Answer, Request, refusal
from kubeai.openai.errors import ErrorResponse

if TYPE_CHECKING:
    from kubeai.gateway.server import Server

RESPONSE_MAX_BYTES = 64 << 20


class Overloaded(Exception):
    """The gateway has no room for the request: no engine has had it. ``answer`` says why."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer


class Gate(Protocol):
    """Decides when a request that was held may go on."""

    def on_hold(self) -> None:
        """No endpoint can serve the request: it is about to be held or rejected."""

    async def on_endpoint(self) -> None:
        """An endpoint can serve the request, and may be sent it when this returns.

        Returns at once if the request is not held.
        """


class RelayClient:
    """Sends requests through a Server. It is the ``hold_watcher`` of the server's Context."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._gates: dict[str, Gate] = {}

    async def send(self, request_id: str, request: Request, gate: Gate) -> Answer:
        """Send a request and return the response. A response that is cut off counts as a 502.

        ``request_id``: its X-Request-Id, which no other request in progress has. A cancellation
        ends the request at the engine, too. Overloaded if a limit of the gateway or of the process
        on connections or on buffered bodies is reached.
        """
        self._gates[request_id] = gate
        try:
            try:
                exchange = await self._server.connect(
                    lambda: _Exchange(_encode(request_id, request))
                )
            except OSError as error:  # no file descriptor is left
                message = f"The messenger cannot connect to the gateway: {error}."
                raise Overloaded(
                    refusal(ErrorResponse(message, status=503, code="overloaded"), request.path)
                ) from None
            try:
                answer = await exchange.answer
            finally:
                exchange.close()
        finally:
            del self._gates[request_id]
        # The relay closes the connection after its own refusals, and only then: the Server of a
        # messenger does not drain.
        if answer.status == 503 and answer.headers.get("connection") == "close":
            raise Overloaded(answer)
        return answer

    def on_hold(self, request_id: str) -> None:
        """See :class:`.HoldWatcher`."""
        if gate := self._gates.get(request_id):
            gate.on_hold()

    async def on_endpoint(self, request_id: str) -> None:
        """See :class:`.HoldWatcher`."""
        if gate := self._gates.get(request_id):
            await gate.on_endpoint()


def _encode(request_id: str, request: Request) -> bytes:
    lines = [
        f"POST {request.path} HTTP/1.1",
        "Host: kubeai",
        "Content-Type: application/json",
        "Accept-Encoding: identity",
        f"Content-Length: {len(request.body)}",
        f"X-Request-Id: {request_id}",
        *(f"{name}: {value}" for name, value in request.headers.items()),
        "\r\n",
    ]
    return "\r\n".join(lines).encode("latin-1") + request.body


class _Exchange(asyncio.Protocol):
    """One request and its response. ``answer`` is set when it is complete."""

    def __init__(self, request: bytes) -> None:
        self.answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.BaseTransport | None = None
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._size_bytes = 0

    def close(self) -> None:
        """Close the connection, which cancels a request that has no response yet."""
        if self._transport is not None:
            self._transport.close()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(self._request)  # type: ignore[attr-defined]  # uvloop's are no subclasses
        self._request = b""

    @override
    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"The gateway's response is not valid HTTP: {error}.", "bad_gateway")

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail("The connection to the engine was lost during its response.", "bad_gateway")

    def _fail(self, message: str, code: str) -> None:
        if not self.answer.done():
            self.answer.set_result(refusal(ErrorResponse(message, status=502, code=code)))

    # called by the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note a header; of repeated ones, the last."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        """Collect a piece of the body."""
        self._size_bytes += len(data)
        if self._size_bytes <= RESPONSE_MAX_BYTES:
            self._body.append(data)
            return
        self._body.clear()
        self._fail(
            f"The engine's response is larger than {RESPONSE_MAX_BYTES} bytes.",
            "response_too_large",
        )
        self.close()

    def on_message_complete(self) -> None:
        """The response is complete."""
        status = self._parser.get_status_code()
        if status < 200:  # the final response follows
            self._headers.clear()
        elif not self.answer.done():
            self.answer.set_result(Answer(status, self._headers, b"".join(self._body)))
