import asyncio
from typing import final

from kubeai.gateway.relay._exchange import DownstreamEnd
from kubeai.gateway.relay._relay import Relay

@final
class Downstream(DownstreamEnd, asyncio.Protocol):
    def __init__(self, relay: Relay) -> None: ...
