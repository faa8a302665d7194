import asyncio
from typing import Protocol, final

from kubeai.gateway.relay._early import EarlyStream

class Session(Protocol):
    def wake(self) -> None: ...

class UpgradableStream(EarlyStream):
    @property
    def early(self) -> bytes:
        """Frames that came before there is an engine."""
    @early.setter
    def early(self, frames: bytes) -> None: ...
    def upgrade(self, idle_timeout_s: float) -> None: ...
    def accept(self, session: Session, headers: bytes, greeting: bytes) -> None: ...
    def write_frame(self, frame: bytes) -> None: ...

@final
class Tunnel: ...

@final
class ClientSide(asyncio.Protocol):
    def __init__(self, tunnel: Tunnel) -> None: ...

@final
class EngineSide(asyncio.Protocol):
    def __init__(self, tunnel: Tunnel) -> None: ...
