import asyncio
from typing import final

from kubeai.gateway.relay._exchange import DownstreamEnd, Relay

@final
class Downstream(DownstreamEnd, asyncio.Protocol):
    def __init__(self, relay: Relay) -> None: ...
