"""What a worker counts for the limits of API keys: one Charge for each request."""

from typing import Literal, final

from kubeai._key_table import KeyTable

TOKENS_MAX: int

@final
class Charge:
    """One request, counted for its key until it has ended; or refused, and not counted."""

    excess: Literal["requests", "tokens", "in flight", "too large"] | None  # None: it is counted
    retry_after_s: float  # until the limit allows the request, if refused; 0: never
    tokens: int  # reserved until the request ends
    requests_left: int  # of the minute, after this request
    tokens_left: int
    reset_s: float  # until nothing of the minute is used any more, without further requests

    def end(self, tokens: int = -1) -> None:
        """Stop counting it as in flight (idempotent; also done when garbage-collected).

        ``tokens``: what it has used, instead of what was reserved; -1: as reserved.
        """

def charge(
    table: KeyTable,
    row: int,
    generation: int,
    *,
    requests: int = 0,
    tokens: int = 0,
    in_flight: int = 0,
    reserve: int = 0,
) -> Charge:
    """Count a request in the row of its key unless it exceeds a limit (0: there is none).

    ``requests`` and ``tokens`` are limits per minute. ``reserve``: the tokens that the request is
    expected to use.
    """

def live() -> int:
    """Number of open Charges in this process: a leak check for tests."""
