import asyncio
from collections.abc import Callable
from typing import Any, final

RETRY_AFTER_S: int  # Retry-After of the relay's own 503 responses

class Connection: ...

@final
class Relay:
    context: Any  # shared by all exchanges; opaque to the relay
    downstreams: set[Connection]
    upstreams: set[Connection]
    exchanges: int  # requests between their head and the end of their response
    requests: int  # since the start
    buffered_bytes: int  # by request bodies that are collected or being collected
    draining: bool  # responses carry Connection: close

    def __init__(
        self,
        context: Any,
        exchange: Callable[[Any], Any],
        refusal: Callable[[int, str, bytes, str | None], tuple[bytes, bytes]],
        *,
        head_max_bytes: int,
        head_max_count: int,
        head_timeout_s: float,
        body_timeout_s: float,
        keep_alive_timeout_s: float,
        stall_timeout_s: float,
        connections_max: int,
        buffer_max_bytes: int,
        tick_s: float = 0.25,
    ) -> None: ...
    @property
    def connections(self) -> int: ...
    def start(self, loop: asyncio.AbstractEventLoop) -> None: ...
    def stop(self) -> None: ...
    def close_idle(self) -> None: ...
