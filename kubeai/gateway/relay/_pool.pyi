from kubeai.gateway.relay._exchange import Exchange, Pool, UpstreamEnd
from kubeai.gateway.relay._relay import Relay

class ConnectionPool(Pool):
    answered_s: float  # start of the last good response (CLOCK_MONOTONIC); 0: never
    answers: int  # good responses that have begun

    def __init__(
        self,
        relay: Relay,
        host: str,
        *,
        idle_timeout_s: float,
        max_idle: int,
        first_byte_timeout_s: float = 0,
        between_bytes_timeout_s: float = 0,
    ) -> None: ...
    @property
    def idle(self) -> int: ...
    def keep(self, upstream: UpstreamEnd) -> None:
        """Keep a new connection for the next request if there is room; otherwise close it."""
    def failed(self, failure: int) -> None: ...
    def restored(self) -> None: ...
    def recovered(self) -> None: ...
    def waiting(self, sent_before_s: float) -> list[Exchange]: ...
    def forget(self, upstream: UpstreamEnd) -> None: ...
    def close(self) -> None: ...
