"""A worker's data plane without its sockets, for fuzzers: real relay, exchanges, pools and routes.

:class:`Machine` is one relay that serves the models ``m`` (adapter ``x``) and ``cold``.
:class:`End` stands where uvloop's transport would; it says what was sent, and how it ended.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest import mock

import h11

from kubeai._load import LoadTable
from kubeai.api.config.system import GatewayConfig
from kubeai.gateway import endpoint_pool, server
from kubeai.gateway.context import Context
from kubeai.gateway.proxy import Proxy
from kubeai.gateway.relay._downstream import Downstream
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route

CORPUS = Path(__file__).with_name("corpus")
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
HEAD_MAX_BYTES = 1 << 16
# Some headers that travel on.
END_TO_END = (b"x", b"x-label-selector", b"content-encoding")
TURNS = 4  # of the loop, after which whatever was to be done at once is done


def corpus(kind: str) -> list[bytes]:
    """The stored inputs of one kind."""
    return [path.read_bytes() for path in sorted((CORPUS / kind).iterdir())]


class End:
    """Our end of a connection, as the protocol on it sees it."""

    def __init__(self, protocol: Any, wrote: Callable[[End], None] | None) -> None:
        self.protocol = protocol
        self.sent = b""
        self.closed = False  # no byte goes either way any more
        self.finished = False  # a FIN has gone out, or will once the bytes are
        self.was_reset = False  # the other end sees RST rather than FIN
        self.answered = 0  # requests that a script has answered
        self._wrote = wrote
        self._socket = socket.socket()
        self._reading = True
        self._waiting: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        protocol.connection_made(self)

    # -- what the other end does -------------------------------------------------------------------

    def receive(self, data: bytes) -> None:
        self._waiting.append(data)
        self._deliver()

    def receive_end(self, reset: bool) -> None:
        """Receive FIN or RST; a FIN is only noticed while reading."""
        if self.closed or (not reset and not self._reading):
            return
        if reset:
            self._lose(ConnectionResetError())
        elif not self.protocol.eof_received():
            self.close()

    # -- what a transport does ---------------------------------------------------------------------

    def get_extra_info(self, name: str, default: object = None) -> object:
        return {"peername": ("10.0.0.1", 1), "socket": self._socket}.get(name, default)

    def set_write_buffer_limits(self, high: int) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def write(self, data: bytes) -> None:
        assert not self.finished or self.closed, "written after its end"
        if not self.closed:
            self.sent += data
            if self._wrote is not None:
                self._wrote(self)

    def writelines(self, parts: Iterable[bytes]) -> None:
        self.write(b"".join(parts))

    def write_eof(self) -> None:
        self.finished = True

    def close(self) -> None:
        self._lose(None)

    abort = close

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        while self._waiting and self._reading and not self.closed:
            self.protocol.data_received(self._waiting.pop(0))

    def _lose(self, error: Exception | None) -> None:
        if not self.closed:
            self.closed = self.finished = True
            self._loop.call_soon(self.protocol.connection_lost, error)
            size = struct.calcsize("ii")
            linger = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, size)
            self.was_reset = struct.unpack("ii", linger) == (1, 0)
            self._loop.call_soon(self._socket.close)


@dataclass
class Taken:
    """A request as the relay understood it."""

    method: str
    target: str
    headers: dict[bytes, list[bytes]]  # of END_TO_END
    exchange: Proxy

    @property
    def body(self) -> bytes | None:
        """None when it was not collected."""
        return self.exchange.body


@dataclass
class Machine:
    """``async with Machine() as machine`` … at the end nothing is left."""

    answers: Callable[[End], None] | None = None  # called when something was sent to an engine
    retries: int = 0
    taken: list[Taken] = field(default_factory=list)
    engines: list[tuple[str, End]] = field(default_factory=list)  # (where, connection)
    faults: list[dict] = field(default_factory=list)
    listens: bool = True  # whether an engine whose connection was lost does

    async def __aenter__(self) -> Machine:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: self.faults.append(context))
        self._supervisors = LoadTable.create(16, 1)
        self._loads = LoadTable.attach(self._supervisors.fd, 0)
        self._publisher = Publisher(self._supervisors)
        config = GatewayConfig(retries=self.retries, head_max_bytes=HEAD_MAX_BYTES)
        self._context = Context(config, lambda model: None)
        with mock.patch.object(server, "Proxy", self._watched()):
            self.server = server.Server(self._context, self._loads, tick_s=60)
        self.server.relay.start(loop)
        local_routes = self._dialled(endpoint_pool.LocalRoutesPool)
        self._context.local_routes = local_routes(self.server.relay, lambda: None)
        dialled = self._dialled(endpoint_pool.EndpointPool)
        endpoints = tuple(Endpoint(f"pod-{i}", f"10.0.1.{i}:8000", ("x",)) for i in range(2))
        for route in (
            Route("m", "VLLM", strategy="PrefixHash", adapters=("x",), endpoints=endpoints),
            Route("cold", "VLLM"),
        ):
            with mock.patch.object(server, "EndpointPool", dialled):
                self.server.routes.apply(self._publisher.update(route.model, route))
        return self

    def _watched(self) -> type:
        taken = self.taken

        class Watched(Proxy):
            __slots__ = ()

            def __init__(self, downstream: Downstream) -> None:
                headers = {name: self.headers(name) for name in END_TO_END}
                taken.append(Taken(self.method, self.target, headers, self))

        return Watched

    def _dialled(self, base: type) -> type:
        machine = self

        class Dialled(base):
            async def _dial(self, upstream: asyncio.Protocol) -> None:
                machine.engines.append((self.host, End(upstream, machine.answers)))

            async def listens(self) -> bool:
                return machine.listens

        return Dialled

    def client(self) -> End:
        return End(Downstream(self.server.relay), None)

    async def turn(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        relay = self.server.relay
        for downstream in list(relay.downstreams):
            cast(Downstream, downstream).connection_lost(None)
        await self.turn()
        try:
            if error is None:
                assert relay.exchanges == relay.connections == 0
                assert self._loads.active_total() == 0
                for model in ("m", "cold"):
                    row = self._publisher.row(model)
                    assert self._loads.active(row) == self._loads.held(row) == 0
                    assert self._loads.in_flight(row) == self._context.held(model) == 0
                assert not self.faults, self.faults
        finally:
            self._context.local_routes.close()
            relay.stop()
            self.server.routes.close()
            await self.turn()
            self._loads.close()
            self._supervisors.close()


# -- the reference ---------------------------------------------------------------------------------


@dataclass
class Read:
    """Messages as h11 reads them; ``error``: why it read no further."""

    messages: list[tuple]
    error: str = ""
    closed: bool = False  # the last one said that no more may follow


def read_requests(data: bytes) -> Read:
    """(method, target, headers, body) of each whole request."""
    found = Read([])
    parser = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
    if data:  # no bytes would be the end
        parser.receive_data(data)
    head, body = None, b""
    try:
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Request):
                head, body = event, b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                headers = [(bytes(k), bytes(v)) for k, v in head.headers]
                found.messages.append((head.method.decode(), bytes(head.target), headers, body))
                parser.send(h11.Response(status_code=404, headers=[("content-length", "0")]))
                parser.send(h11.EndOfMessage())
                if parser.their_state is not h11.DONE or parser.our_state is not h11.DONE:
                    found.closed = head.http_version == b"1.1"
                    found.error = "" if found.closed else "h11 keeps no HTTP/1.0 connection"
                    return found
                parser.start_next_cycle()
            else:  # more bytes would be needed
                return found
    except h11.RemoteProtocolError as error:
        found.error = str(error)
        return found


def read_answer(data: bytes, ended: bool, method: str = "POST") -> Read:
    """(status, headers, body) of the one answer, when it is whole. ``ended``: by a tidy end."""
    found = Read([])
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    parser.send(h11.Request(method=method, target="/", headers=[("host", "h")]))
    parser.send(h11.EndOfMessage())
    if data:
        parser.receive_data(data)
        if ended:
            parser.receive_data(b"")
    body = b""
    try:
        while True:
            event = parser.next_event()
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage):
                headers = [(bytes(k), bytes(v)) for k, v in head.headers]
                found.messages.append((head.status_code, headers, body))
                return found
            elif not isinstance(event, h11.InformationalResponse):
                return found
    except h11.RemoteProtocolError as error:
        found.error = str(error)
        return found
