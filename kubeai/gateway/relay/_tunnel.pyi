import asyncio
from typing import Protocol, final

from kubeai.gateway.relay._exchange import Exchange

class TunnelSession(Protocol):
    def wake(self) -> None: ...

@final
class Tunnel:
    early: bytearray  # frames that came before there is an engine

    def __init__(self, exchange: Exchange, idle_timeout_s: float) -> None:
        """Have the next attempts ask for a WebSocket. Follow with ``send``, without a body.

        ``idle_timeout_s``: after this time without data in either direction, it is closed.
        """
    def accept(self, session: TunnelSession, headers: bytes, greeting: bytes) -> None:
        """Accept the handshake before there is an engine.

        ``headers``: extra lines, each ending in CRLF. ``greeting``: the first frame to the client,
        in place of the engine's. What the client sends is collected in ``early``, and ``session``
        is notified. Errors then end the exchange by its ``end``, with the last frames.
        """
    def write(self, frame: bytes) -> None:
        """Write a frame to a client that was accepted."""
    def upgraded(self, data: bytes) -> None: ...

@final
class ClientSide(asyncio.Protocol):
    def __init__(self, tunnel: Tunnel) -> None: ...

@final
class EngineSide(asyncio.Protocol):
    def __init__(self, tunnel: Tunnel) -> None: ...
