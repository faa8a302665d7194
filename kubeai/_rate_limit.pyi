from typing import final

@final
class RateLimit:
    """A rate limit for a log event: a burst of ``burst_max``, then ``per_s`` per second."""

    def __init__(self, burst_max: float, per_s: float) -> None: ...
    def take(self, now_s: float) -> int | None:
        """How many events were suppressed before this one; None if this one is suppressed too."""
