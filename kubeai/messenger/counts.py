"""What is counted of a stream, and its state, for the supervisor (:class:`.StreamReport`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from kubeai.brokers.base import BrokerUnavailable
from kubeai.errors import QUOTED_MAX_CHARS
from kubeai.logs import get_logger
from kubeai.routing.channel import OUTCOMES, Side, StreamReport

log = get_logger(__name__)


def outcome_of(status: int) -> str:
    """The class of a status, one of ``OUTCOMES``."""
    return f"{min(max(status // 100, 2), 5)}xx"


class SideState:
    """One side's connection to its broker. Logs when it is made, and when it is lost."""

    def __init__(self, stream: str, side: str) -> None:
        """``stream``: its name in logs. ``side``: ``requests`` or ``responses``."""
        self._stream, self._side = stream, side
        self.connected = False
        self._connections = 0
        self._problem = ""

    def note_connected(self) -> None:
        """A connection was made."""
        self.connected = True
        self._connections += 1
        self._problem = ""
        log.info("message stream connected", stream=self._stream, side=self._side)

    def note_closed(self) -> None:
        """The connection was closed on purpose."""
        self.connected = False

    def note_problem(self, error: Exception) -> None:
        """The connection was lost, or could not be made. Logged unless nothing is new."""
        self.connected = False
        problem = str(error) if isinstance(error, BrokerUnavailable) else ""
        # Of another exception the text may have anything in it, such as credentials.
        problem = problem[: 2 * QUOTED_MAX_CHARS] or type(error).__name__
        if problem != self._problem:
            log.warning(
                "message stream not connected", stream=self._stream, side=self._side, error=problem
            )
        self._problem = problem

    def report(self) -> Side:
        """The state as it is sent."""
        return Side(self.connected, self._connections, self._problem)


@dataclass
class Counts:
    """One stream's counts since the process started."""

    requests: SideState
    responses: SideState
    received: int = 0
    redelivered: int = 0
    retried: int = 0
    dead: int = 0
    publish_failures: int = 0
    answered: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    lag: int | None = None

    def report(self, in_hand: int, held: int) -> StreamReport:
        """The counts as they are sent."""
        return StreamReport(
            requests=self.requests.report(),
            responses=self.responses.report(),
            received=self.received,
            redelivered=self.redelivered,
            retried=self.retried,
            dead=self.dead,
            publish_failures=self.publish_failures,
            answered=dict(self.answered),
            in_hand=in_hand,
            held=held,
            lag=self.lag if self.requests.connected else None,
        )
