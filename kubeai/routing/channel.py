"""The channel between the supervisor and one worker, over a socket pair.

The supervisor sends routes; the worker reports that it is ready and which models have held
requests. Loads are shared through the load table instead. Messages are msgpack, each preceded by
its length (4 bytes, big-endian). A worker that loses the channel drains.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from typing import Any, cast

import msgspec

from kubeai.routing.routes import Delta as Delta
from kubeai.routing.routes import Snapshot as Snapshot

MESSAGE_MAX_BYTES = 256 << 20
_LENGTH = struct.Struct(">I")


class Drain(msgspec.Struct, frozen=True, tag="drain", array_like=True):
    """Drain, then exit.

    New requests are served with ``Connection: close`` for ``accept_s``, then the listener is
    closed. Connections that are still open after another ``timeout_s`` are closed.
    """

    accept_s: float
    timeout_s: float


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The worker has a routing table and accepts connections."""

    pid: int


class Demand(msgspec.Struct, frozen=True, tag="demand", array_like=True):
    """A request is held for a model without an endpoint: check the load table now."""

    model: str


Down = Snapshot | Delta | Drain
Up = Ready | Demand


class Channel(asyncio.Protocol):
    """One end of the channel. ``message``: the union that it receives, ``Down`` or ``Up``."""

    def __init__(
        self,
        message: Any,
        received: Callable[[object], None],
        closed: Callable[[], None],
    ) -> None:
        self._decoder: msgspec.msgpack.Decoder[object] = msgspec.msgpack.Decoder(message)
        self._encoder = msgspec.msgpack.Encoder()
        self._received = received
        self._closed = closed
        self._buffer = bytearray()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # A cast, because uvloop's transports are not subclasses of asyncio's.
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= 4:
            (length,) = _LENGTH.unpack_from(buffer, start)
            if length > MESSAGE_MAX_BYTES:
                self.close()
                return
            end = start + 4 + length
            if len(buffer) < end:
                break
            message = self._decoder.decode(bytes(buffer[start + 4 : end]))
            start = end
            self._received(message)
        del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._closed()

    def send(self, message: Down | Up) -> None:
        """Queue a message. Dropped if the other end is gone; ``closed`` has then been called."""
        if self._transport is None:
            return
        body = self._encoder.encode(message)
        self._transport.write(_LENGTH.pack(len(body)) + body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
