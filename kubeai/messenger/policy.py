"""When a message is tried again, and when it is given up.

An attempt is one request through the gateway, which itself retries on other endpoints. It counts as
failed if it was sent to an engine and its status is 429 or 5xx. A request that ended while it was
held for a model without an endpoint has not failed: it waits on, up to a limit of its own. A
request that seems to have crashed one engine is tried once more: the engine's machine may have
failed just then. Pure: no I/O.
"""

from __future__ import annotations

from enum import Enum

from kubeai.kube.backoff import Backoff
from kubeai.messenger.message import Answer
from kubeai.openai.errors import CRASHED_ENGINES

ATTEMPTS_MAX_COUNT = 8  # failed ones; with errorMaxBackoff 30s, about a minute and what they took
CRASHES_MAX_COUNT = 2  # of engines; after that many, the message is given up
FAILED_MAX_S = 1800.0  # that failed attempts may take together: engines that time out waste GPUs
HELD_MAX_S = 6 * 3600.0  # that a message waits for endpoints of its model, in one process
BACKOFF_FIRST_S = 1.0
# Limit on deliveries, checked for messages that this process does not hold. A message that crashes
# the process is redelivered repeatedly; some brokers also count deliveries that were released
# during a drain.
DELIVERIES_MAX_COUNT = 25


class Verdict(Enum):
    """What follows from an attempt's response."""

    DONE = "done"  # it is the message's response
    FAILED = "failed"  # the attempt has failed: try again
    WAIT = "wait"  # no endpoint could take the request: try again, uncounted


def judge(answer: Answer, held: bool) -> Verdict:
    """Judge a response. ``held``: the gateway gave it while it held the request.

    ``x-should-retry: false`` marks a crash of the engine that the request seems to have caused, a
    model that cannot start until a user fixes it, and errors that the engine regards as final. The
    model may be fixed while the message is tried again.
    """
    status = answer.status
    hopeless = answer.headers.get("x-should-retry") == "false"
    if held:
        if status not in (503, 504):
            return Verdict.DONE  # the model was deleted
        return Verdict.FAILED if hopeless else Verdict.WAIT
    if _crashes(answer):
        return Verdict.FAILED
    if hopeless or status in (501, 505) or (status < 500 and status != 429):
        return Verdict.DONE
    return Verdict.FAILED


class Attempts:
    """The attempts of one message."""

    def __init__(self, backoff_max_s: float) -> None:
        """``backoff_max_s``: the config's ``errorMaxBackoff``."""
        self.failed = 0
        self._crashes = 0
        self._failed_s = 0.0
        self._held_s = 0.0
        self._backoff_max_s = backoff_max_s
        self._backoff = Backoff(BACKOFF_FIRST_S, backoff_max_s)

    def next_s(
        self, verdict: Verdict, answer: Answer, took_s: float, held_s: float
    ) -> float | None:
        """The wait before the next attempt; None if the message is given up.

        ``took_s``: how long this attempt took, without ``held_s``, the time for which it was held.
        """
        self._held_s += held_s
        self._crashes += _crashes(answer)
        if verdict is Verdict.FAILED:
            self.failed += 1
            self._failed_s += took_s
        elif held_s >= self._backoff_max_s:
            self._backoff.reset()  # it has waited enough
        if (
            self.failed >= ATTEMPTS_MAX_COUNT
            or self._crashes >= CRASHES_MAX_COUNT
            or self._failed_s >= FAILED_MAX_S
            or self._held_s >= HELD_MAX_S
        ):
            return None
        wait_s = max(self._backoff.next_s(), min(_retry_after_s(answer), self._backoff_max_s))
        if verdict is Verdict.WAIT:
            self._held_s += wait_s  # a model that is known to be unavailable holds no request
        return wait_s


def _crashes(answer: Answer) -> int:
    """How many engines the request seems to have crashed in this attempt."""
    text = answer.headers.get(CRASHED_ENGINES.lower(), "")
    return int(text) if text.isascii() and text.isdigit() else 0


def _retry_after_s(answer: Answer) -> float:
    """Retry-After in seconds; 0 if it is missing or a date."""
    text = answer.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else 0.0
