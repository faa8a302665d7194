"""Counts what each API key uses of each Model, between two reports to the supervisor."""

from typing import final

from kubeai._keys import Key
from kubeai.routing.usage import UsageRow

@final
class Counts:
    """The sums over a key's requests to one Model. Not used from Python."""

@final
class Meter:
    """The counts of one worker; see :class:`.UsageRow`."""

    def take(self) -> tuple[UsageRow, ...]:
        """What has been counted since the last call."""

def counted(
    meter: Meter,
    key: Key,
    model: str,
    prompt: int,
    cached: int,
    completion: int,
    is_estimated: bool = False,
) -> None:
    """Count a request that has ended before. The fast path calls the compiled method."""
