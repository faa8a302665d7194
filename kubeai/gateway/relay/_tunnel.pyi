import asyncio
from typing import Protocol, final

from kubeai.gateway.relay._early import EarlyStream

class Session(Protocol):
    def wake(self) -> None: ...

class UpgradableStream(EarlyStream):
    session: Session | None  # what reads ``early``
    early: bytes  # frames that came before there is an engine

    def upgrade(self, idle_timeout_s: float) -> None: ...
    def accept(self, headers: bytes, greeting: bytes) -> None: ...
    def write_frame(self, frame: bytes) -> None: ...

@final
class Tunnel: ...

@final
class ClientSide(asyncio.Protocol):
    def __init__(self, tunnel: Tunnel) -> None: ...

@final
class EngineSide(asyncio.Protocol):
    def __init__(self, tunnel: Tunnel) -> None: ...
