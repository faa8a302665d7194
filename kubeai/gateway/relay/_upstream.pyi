import asyncio
from typing import final

from kubeai.gateway.relay._exchange import Pool, UpstreamEnd

@final
class Upstream(UpstreamEnd, asyncio.Protocol):
    def __init__(self, pool: Pool) -> None: ...
