"""HTTP/1.1 client for one endpoint, with an unlimited number of keep-alive connections.

Requests are encoded before they are due. After the response head, a `Poller` reads chunked streams
over plain TCP: it counts the events it recognises and passes on the rest. Times are
CLOCK_MONOTONIC, in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import ssl
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, cast

import httptools
from typing_extensions import override

from kubeai.errors import KubeAIError
from kubeai.loadtest._streams import Poller
from kubeai.loadtest.sse import Reader

CONNECT_TIMEOUT_S = 10.0
LOST_UNANSWERED = "lost before it answered"


class EndpointError(KubeAIError):
    """An endpoint cannot be used: its URL is invalid, or it does not respond as expected."""


class Response:
    """The response to a request, or its failure. ``error`` is the kind of failure, "" on success.

    Also the HTTP parser's protocol object. The parser binds the callbacks when it is created, so a
    stream's data goes directly to its reader.
    """

    __slots__ = (
        *("body", "ended_s", "endpoint", "error", "reader", "error_message", "status"),
        *("_chunked", "_connection", "_ended", "_endpoint_header", "_framed", "_parser", "_parts"),
        "on_body",
    )

    def __init__(self, reader: Reader | None, endpoint_header: bytes) -> None:
        self.reader = reader  # for a stream; None collects the whole response in `body`
        self.status = 0
        self.error = ""
        self.error_message = ""  # the endpoint's message about a failure
        self.body = b""
        self.endpoint = ""  # the endpoint that responded
        self.ended_s = 0.0
        self._endpoint_header = endpoint_header
        self._framed = False  # the headers delimit the body
        self._chunked = False
        self._parts: list[bytes] = []
        self._connection: Connection | None = None
        self._ended: asyncio.Future[None] | None = None
        self.on_body: Callable[[bytes], None] = (
            self._parts.append if reader is None else reader.feed
        )
        self._parser: Any = None

    def begin(self, connection: Connection) -> Callable[[bytes], None]:
        """Receive the response over this connection; returns the callback for its bytes."""
        self._connection = connection
        self._parser = httptools.HttpResponseParser(self)
        self._ended = asyncio.get_running_loop().create_future()
        self.error = self.error_message = ""
        self.ended_s = 0.0
        feed: Callable[[bytes], None] = self._parser.feed_data
        return feed

    async def wait(self) -> None:
        """Wait until the response has ended."""
        assert self._ended is not None
        await self._ended

    def on_connection_lost(self, exc: Exception | None) -> None:
        """Handle the loss of the connection."""
        if not self.status:
            self.end(LOST_UNANSWERED)
        elif exc is None and not self._framed:  # the body is delimited by connection close
            self.on_message_complete()
        elif self.reader is not None and self.status < 300:
            self.reader.close()
            self.end("" if self.reader.done else "cut", self.reader.problem)
        else:
            self.end("cut")

    def end(self, error: str, error_message: str = "") -> None:
        """Finish with this result; later calls have no effect."""
        if self._connection is None or self._ended is None:
            return
        self.error, self.error_message, self.ended_s = error, error_message, monotonic()
        self._connection.ended(reusable=self._parser.should_keep_alive())
        self.forget()
        if not self._ended.done():
            self._ended.set_result(None)

    def forget(self) -> None:
        """Break the reference cycle between this object and its parser."""
        self._connection = self._parser = None

    # -- parser callbacks --------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        """Note the body's framing and the endpoint."""
        name = name.lower()
        if name in (b"content-length", b"transfer-encoding"):
            self._framed = True
            self._chunked = value.lower() == b"chunked"
        elif name == self._endpoint_header:
            self.endpoint = value.decode(errors="replace")

    def on_headers_complete(self) -> None:
        """Note the status; hand a chunked stream to the poller."""
        if self._parser is None:  # an unsolicited response
            return
        self.status = self._parser.get_status_code()
        if self.reader is None or self.status < 200:
            return
        if self.status >= 300:
            self.reader.keep()
        elif self._chunked and self._connection is not None:
            self._connection.poll(self.reader)

    def on_chunk_header(self) -> None:
        """A chunk begins: the poller must not skip its bytes."""
        if self.reader is not None:
            self.reader.between_chunks = False

    def on_chunk_complete(self) -> None:
        """A chunk has ended: the poller may skip whole chunks."""
        if self.reader is not None:
            self.reader.between_chunks = True

    def on_message_complete(self) -> None:
        """Finish, unless the response was only informational (1xx)."""
        if self.status < 200:  # 100 Continue and the like
            self._framed = self._chunked = False
            return
        reader = self.reader
        self.body = b"".join(self._parts) if reader is None else reader.body
        if self.status >= 300:
            self.end(f"status {self.status}", one_line(self.body))
        elif reader is None:
            self.end("")
        else:
            reader.close()
            self.end("cut" if reader.problem or not reader.done else "", reader.problem)


class Address:
    """The address of an OpenAI-compatible endpoint. EndpointError if the URL is invalid."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            parts = urllib.parse.urlsplit(self.url)
            port = parts.port
        except ValueError as error:
            raise EndpointError(f"{url!r}: {error}") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"{url!r}: must be http://host:port/path or https://host:port/path")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise EndpointError(
                f"{parts.scheme}://{parts.hostname}: URL must not have a user, query or fragment"
            )
        self.host = parts.hostname
        self.tls = parts.scheme == "https"
        self.port = port or (443 if self.tls else 80)
        self.path = parts.path
        self.authority = parts.netloc


class Client:
    """Connections to one endpoint. Call `resolve` before the first request and `close` at the end.

    ``headers`` are added to every request. ``endpoint_header`` names the response header that
    identifies the endpoint.
    """

    def __init__(
        self,
        address: Address,
        headers: Sequence[tuple[str, str]] = (),
        *,
        timeout_s: float,
        endpoint_header: str = "",
    ) -> None:
        self.address = address
        self.endpoint_header = endpoint_header.lower().encode()
        self.idle: list[Connection] = []
        self.open: set[Connection] = set()
        self.readers: set[Reader] = set()  # of streams in flight
        self.counts: Mapping[str, int] = {}  # what only a MessageClient counts
        self.poller: Poller | None = None  # None with TLS
        self._timeout_s = timeout_s
        self._tls = ssl.create_default_context() if address.tls else None
        self._addresses: Sequence[tuple[Any, ...]] = ()
        self._next_address = itertools.count()
        given = {name.lower() for name, _ in headers}
        defaults = {"Host": address.authority, "User-Agent": "kubeai-bench", "Accept": "*/*"}
        lines = [f"{name}: {value}" for name, value in headers]
        lines += [
            f"{name}: {value}" for name, value in defaults.items() if name.lower() not in given
        ]
        self._head = "".join(f"{line}\r\n" for line in lines).encode()

    async def resolve(self) -> None:
        """Resolve the name once and keep the addresses that accept a connection.

        EndpointError if none does.
        """
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_handle_exception)
        if not self.address.tls:
            self.poller = Poller()
            loop.add_reader(self.poller.fd, self.poller.run)
        host, port = self.address.host, self.address.port
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise EndpointError(f"{self.address.url}: {host}: {_reason(error)}") from None
        addresses = list(dict.fromkeys(sockaddr for *_, sockaddr in found))
        kept, last = [], ""
        for sockaddr in addresses:
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    self.idle.append(await self._connect(sockaddr))
                kept.append(sockaddr)
            except TimeoutError:
                last = f"no connection within {CONNECT_TIMEOUT_S:g} s"
            except OSError as error:
                last = _reason(error)
        if not kept:
            raise EndpointError(f"{self.address.url}: {last}")
        self._addresses = kept

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Encode a request; ``path`` is relative to the endpoint's."""
        head = f"{method} {self.address.path}{path} HTTP/1.1\r\n".encode() + self._head
        if body:
            head += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        return head + b"\r\n" + body

    async def send(self, request: bytes, reader: Reader | None = None) -> Response:
        """Send a request and wait for its response or failure, which `Response.error` reports."""
        response = Response(reader, self.endpoint_header)
        if reader is not None:
            self.readers.add(reader)
        connection = None
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = self.idle.pop() if self.idle else None
                if connection is not None:
                    await connection.send(request, response)
                    if response.error != LOST_UNANSWERED:
                        return response
                    # The server had closed the idle connection: retry on a new one.
                sockaddr = self._addresses[next(self._next_address) % len(self._addresses)]
                connection = await self._connect(sockaddr)
                await connection.send(request, response)
        except TimeoutError:
            response.error = "timeout"
        except OSError as error:
            response.error = f"connection: {_reason(error)}"
        finally:
            if reader is not None:
                self.readers.discard(reader)
            if connection is not None:
                connection.release(response)
            response.forget()
            if not response.ended_s or response.error == "timeout":
                response.ended_s = monotonic()
        if response.error == LOST_UNANSWERED:
            response.error = "connection: lost"
        return response

    def close(self) -> None:
        """Abort all connections and close the poller."""
        for connection in list(self.open):
            connection.abort()
        if self.poller is not None:
            asyncio.get_running_loop().remove_reader(self.poller.fd)
            self.poller.close()
            self.poller = None

    async def _connect(self, sockaddr: tuple[Any, ...]) -> Connection:
        _, made = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self),
            *sockaddr[:2],
            ssl=self._tls,
            server_hostname=self.address.host if self._tls else None,
        )
        return made


class Connection(asyncio.Protocol):
    """One connection: receiving a response, or in its client's ``idle`` list."""

    __slots__ = ("_client", "_fault", "_fd", "_polled", "_response", "_transport", "data_received")

    # Bound to the parser's own method during a response, which saves one call per read. uvloop
    # looks it up in `set_protocol`.
    data_received: Callable[[bytes], None]  # type: ignore[assignment]

    def __init__(self, client: Client) -> None:
        self._client = client
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._polled: Reader | None = None
        self._fd = -1
        self._fault: Exception | None = None
        self.data_received = self._unsolicited

    async def send(self, request: bytes, response: Response) -> None:
        """Send a request and wait until its response has ended."""
        self._response = response
        self._route_data(response.begin(self))
        if self._transport is None or self._transport.is_closing():
            response.end(LOST_UNANSWERED)
        else:
            self._transport.write(request)
        await response.wait()

    def poll(self, reader: Reader) -> None:
        """Hand the socket to the client's poller for the rest of a stream."""
        poller, transport = self._client.poller, self._transport
        if poller is not None and transport is not None and not transport.is_closing():
            transport.pause_reading()
            self._polled = reader
            poller.add(self._fd, reader, self._on_unmatched)

    def ended(self, *, reusable: bool) -> None:
        """The response has ended: reuse or close the connection."""
        self._response = None
        self._stop_polling()
        self._route_data(self._unsolicited)
        if self._transport is None or self._transport.is_closing():
            return
        if reusable:
            self._client.idle.append(self)
        else:
            self._transport.close()

    def release(self, response: Response) -> None:
        """Abort if this response is still pending.

        If it has ended, the connection may already serve another request.
        """
        if self._response is response:
            self._response = None
            self.abort()

    def abort(self) -> None:
        """Close the connection without waiting for its response."""
        self._stop_polling()
        if self._transport is not None:
            self._transport.abort()

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._fd = transport.get_extra_info("socket").fileno()
        self._client.open.add(self)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_polling()
        self._client.open.discard(self)
        self._transport = None
        exc = self._fault or exc
        with contextlib.suppress(ValueError):
            self._client.idle.remove(self)
        if self._response is None:
            return
        if _is_invalid_http(exc):
            self._response.end(f"not HTTP: {exc}")
        else:
            self._response.on_connection_lost(exc)

    def _route_data(self, data_received: Callable[[bytes], None]) -> None:
        self.data_received = data_received
        if self._transport is not None:
            self._transport.set_protocol(self)

    def _on_unmatched(self, data: bytes) -> None:
        """Take data that the poller does not count; b"" returns the socket to the transport."""
        if not data:
            self._stop_polling()
            return
        try:
            self.data_received(data)
        except httptools.HttpParserError as error:
            self._fault = error
            self.abort()
            if not _is_invalid_http(error):
                raise

    def _stop_polling(self) -> None:
        reader, self._polled = self._polled, None
        if reader is not None and self._client.poller is not None:
            self._client.poller.remove(self._fd, reader)
            if self._transport is not None and not self._transport.is_closing():
                self._transport.resume_reading()

    def _unsolicited(self, _data: bytes) -> None:
        self.abort()


def _is_invalid_http(error: object) -> bool:
    """Whether the parser rejected the data, rather than one of our callbacks failing."""
    return isinstance(error, httptools.HttpParserError) and not isinstance(
        error, httptools.HttpParserCallbackError
    )


def _handle_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """The loop's exception handler: invalid HTTP is only reported as its request's error."""
    if not _is_invalid_http(context.get("exception")):
        loop.default_exception_handler(context)


def one_line(body: bytes) -> str:
    """The beginning of a response's body, without line breaks."""
    return " ".join(body.decode(errors="replace").split())[:500]


def _reason(error: OSError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError | socket.gaierror) or not error.errno:
        return error.strerror or str(error)
    return os.strerror(error.errno)
