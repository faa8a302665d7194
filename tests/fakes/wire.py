"""Both other ends of the relay: scripted engines and a client that sees every byte.

Neither uses the code under test to read HTTP.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

WAIT_S = 20.0  # a busy machine is slow


async def until(holds: Callable[[], object], what: str = "", within_s: float = WAIT_S) -> None:
    """Wait for a state, with a deadline."""
    deadline = asyncio.get_running_loop().time() + within_s
    while not holds():
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"not within {within_s} s: {what or holds}")
        await asyncio.sleep(0.002)


class Broken(Exception):
    """A message ended before it was whole. ``so_far``: what came of it."""

    def __init__(self, so_far: bytes, reset: bool) -> None:
        super().__init__(f"{'reset' if reset else 'end'} after {so_far[-200:]!r}")
        self.so_far = so_far
        self.reset = reset


@dataclass
class Message:
    """A request or an answer as it was on the wire."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    raw_body: bytes = b""  # with its chunk framing
    trailers: list[str] = field(default_factory=list)

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def one(self, name: str) -> str | None:
        values = self.all(name)
        assert len(values) <= 1, f"{name} came {len(values)} times: {self.headers}"
        return values[0] if values else None

    @property
    def status(self) -> int:
        return int(self.line.split()[1])

    @property
    def method(self) -> str:
        return self.line.split()[0]

    @property
    def target(self) -> str:
        return self.line.split()[1]


class Wire:
    """One connection, from either side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @property
    def socket(self) -> socket.socket:
        return self.writer.get_extra_info("socket")

    async def send(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)
        await self.writer.drain()

    async def head(self) -> Message:
        raw = b""
        try:
            raw = await self.reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            raise Broken(error.partial, False) from None
        except ConnectionError:
            raise Broken(raw, True) from None
        line, *lines = raw[:-4].decode("latin-1").split("\r\n")
        headers = []
        for each in lines:
            name, colon, value = each.partition(":")
            assert colon, each
            assert name == name.strip(), each
            headers.append((name, value.strip()))
        return Message(line, headers)

    async def body(self, message: Message, until_close: bool = False) -> Message:
        length = message.one("content-length")
        coding = message.one("transfer-encoding")
        assert length is None or coding is None, "two framing headers"
        try:
            if coding is not None:
                assert coding == "chunked"
                await self._chunks(message)
            elif length is not None:
                message.raw_body = message.body = await self.reader.readexactly(int(length))
            elif until_close:
                message.raw_body = message.body = await self.reader.read()
        except asyncio.IncompleteReadError as error:
            raise Broken(message.raw_body + error.partial, False) from None
        except ConnectionError:
            raise Broken(message.raw_body, True) from None
        return message

    async def _chunks(self, message: Message) -> None:
        while True:
            line = await self.reader.readuntil(b"\r\n")
            message.raw_body += line
            size = int(line.split(b";")[0], 16)
            if size == 0:
                break
            data = await self.reader.readexactly(size + 2)
            assert data.endswith(b"\r\n")
            message.raw_body += data
            message.body += data[:-2]
        while line := await self.reader.readuntil(b"\r\n"):
            message.raw_body += line
            if line == b"\r\n":
                return
            message.trailers.append(line[:-2].decode())

    async def request(self) -> Message:
        return await self.body(await self.head())

    async def answer(self, to: str = "POST") -> Message:
        """The next answer (interim ones too)."""
        head = await self.head()
        if to == "HEAD" or head.status in (204, 304) or head.status < 200:
            return head
        return await self.body(head, until_close=True)

    async def ended(self) -> bool:
        """Wait for the other side's end; True when it was a reset, False when a tidy one."""
        try:
            async with asyncio.timeout(WAIT_S):
                rest = await self.reader.read()
        except ConnectionError:
            return True
        assert rest == b"", f"more came: {rest!r}"
        return False

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Close with RST."""
        if self.socket is not None:  # it is when the other side was quicker
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


async def connect(port: int, receive_buffer_bytes: int = 0) -> Wire:
    sock = socket.socket()
    if receive_buffer_bytes:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    limit = receive_buffer_bytes or 1 << 20
    return Wire(*await asyncio.open_connection(sock=sock, limit=limit))


Script = Callable[[Wire, Message], Awaitable[None]]


class Engine:
    """An upstream that does with each request what its script says.

    The script is called with the connection and the request; the connection is kept open after it
    unless the script closed it. ``requests``: those read so far; ``connections``: those accepted.
    ``read_request``: how much of a request is read before the script is called.
    """

    read_request = staticmethod(Wire.request)

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[Message] = []
        self.connections = 0
        self.open: set[Wire] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> "Engine":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        wire = Wire(reader, writer)
        self.connections += 1
        self.open.add(wire)
        try:
            while not writer.is_closing():
                request = await self.read_request(wire)
                self.requests.append(request)
                await self.script(wire, request)
        except (Broken, ConnectionError, asyncio.CancelledError):
            pass  # cancelled by stop(): asyncio's streams would call that an error
        finally:
            self.open.discard(wire)
            writer.close()

    def die(self) -> None:
        """Listen no more, and end every connection: what a process's death looks like."""
        self._server.close()
        for wire in list(self.open):
            wire.close()

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def answer(
    status: int = 200, body: bytes = b"{}", *headers: str, reason: str = "OK", close: bool = False
) -> bytes:
    """An answer of known length."""
    lines = [f"HTTP/1.1 {status} {reason}", *headers, f"Content-Length: {len(body)}"]
    if close:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def says(data: bytes, status: int = 200) -> Script:
    """A script that answers every request alike."""

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(status, data))

    return script


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def post(
    path: str = "/openai/v1/chat/completions",
    body: bytes = b'{"model":"m"}',
    *headers: str,
    version: str = "1.1",
    host: str = "gateway",
) -> bytes:
    """A request of known length."""
    lines = [f"POST {path} HTTP/{version}", f"Host: {host}", *headers]
    lines.append(f"Content-Length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body
