"""The retry policy.

:class:`Retries` decides whether a failed attempt is retried, on which endpoint, and after what
back-off; it holds no connections. :class:`RetryBudget` limits the retries of all of a model's
requests in a worker. :func:`check_loss` determines whether a request crashed its engine. Used by
attempts.py; holding.py waits for an endpoint when there is none.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from kubeai.logs import get_logger
from kubeai.openai.errors import EngineDied, ErrorResponse

if TYPE_CHECKING:
    from kubeai._counts import Reservation
    from kubeai._prompt import Prompt
    from kubeai.gateway.endpoint_pool import EndpointPool
    from kubeai.routing.table import EndpointConnections, RoutedModel

log = get_logger(__name__)

# Back-off before an endpoint that has just failed is tried again. Doubled with each further retry,
# with ±50 % jitter, so that requests which failed together are not retried together.
RETRY_PAUSE_S = 0.1
# Window over which a model's responses and retries count for its budget.
BUDGET_WINDOW_S = 10.0

# Intervals at which a retry beyond the budget checks for a proven endpoint: 0.62 s in total, ±50 %
# jitter on each.
PROOF_PAUSES_S = (0.02, 0.04, 0.08, 0.16, 0.32)

NO_ANSWER = 0
TIMED_OUT = -1
_CODES = {503: "model_unavailable", 504: "timeout"}  # of failures that are answered; as elsewhere


class RetryBudget:
    """Limits a model's retries in one worker.

    If every endpoint fails, retries would only multiply the load on them. There are two limits: a
    small count for retries that are likely to fail too, and that count plus a share of the recent
    responses for all retries. Counts decay over ``BUDGET_WINDOW_S``.
    """

    def __init__(self, percent: int, min_count: float) -> None:
        """Allows ``percent`` of the recent responses plus ``min_count`` in each window."""
        self._share = percent / 100
        self._min_count = min_count
        self._answered_total = 0
        self._answered = 0.0  # recently
        self._retried = 0.0  # recently
        self._doubtful = 0.0  # recent retries that were likely to fail
        self._at_s: float | None = None

    def take(self, answered_total: int, now_s: float, *, likely: bool = True) -> bool:
        """Take one retry from the budget; False if it is exhausted.

        ``answered_total``: the model's responses so far, without 5xx. ``likely``: whether an
        endpoint remains that may serve the request.
        """
        self._fade(answered_total, now_s)
        if self._retried + 1 > self._min_count + self._share * self._answered:
            return False
        if not likely and self._doubtful + 1 > self._min_count:
            return False
        self._retried += 1
        self._doubtful += not likely
        return True

    def _fade(self, answered_total: int, now_s: float) -> None:
        if self._at_s is not None:
            since_s = max(0.0, now_s - self._at_s)
            left = max(0.0, 1 - since_s / BUDGET_WINDOW_S)
            came = answered_total - self._answered_total
            # If more than a window has passed, count only the last window's share.
            self._answered = self._answered * left + came * min(
                1.0, BUDGET_WINDOW_S / max(since_s, 1e-9)
            )
            self._retried *= left
            self._doubtful *= left
        self._at_s = now_s
        self._answered_total = answered_total


class Retries:
    """The failed attempts of one request, and the choice of the next endpoint.

    Allows at most ``max_count`` retries after no response, 502, 503 or 504, and one after a 500.
    The caller ensures that nothing has been sent to the client. Each retry goes to an endpoint that
    has not been tried, if there is one; a trusted one is preferred.

    The budget limits immediate retries. Beyond it, a request waits for up to a second until an
    untried endpoint is *proven* by a response. Retries therefore add no load if all endpoints fail,
    and none is denied if one endpoint works. An endpoint that has failed is probed by one such
    request at a time. An endpoint that has not failed but does not respond during the whole wait is
    considered busy, and gets the retry.
    """

    __slots__ = (
        "_budget",
        "_clock",
        "_granted",
        "_max_count",
        "_probe",
        "_random",
        "_retried_500",
        "_status",
        "_timeouts",
        "_tried",
        "crashes",
    )

    def __init__(
        self,
        max_count: int,
        budget: Callable[[bool], bool] = lambda likely: True,
        *,
        timeouts: bool = False,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random.random,
    ) -> None:
        """``budget``: takes one retry, see `RetryBudget.take`. ``timeouts``: whether a first-byte
        timeout is retried on another endpoint."""
        self._max_count = max_count
        self._budget = budget
        self._timeouts = timeouts
        self._clock = clock
        self._random = random
        self._retried_500 = False
        self.crashes = 0  # of engines, during attempts
        self._tried: tuple[str, ...] = ()  # endpoints that failed, in order
        self._granted = True  # whether the next retry is within the budget
        self._status = NO_ANSWER  # of the last failed attempt
        self._probe: EndpointConnections | None = (
            None  # to be probed by the next retry, beyond the budget
        )

    @property
    def count(self) -> int:
        """The number of failed attempts."""
        return len(self._tried)

    @property
    def pause_s(self) -> float:
        """Back-off before retrying an endpoint that has already failed."""
        return self._jittered(RETRY_PAUSE_S) * 2.0 ** (self.count - 1)

    def wants(
        self, status: int, endpoint: str, routed: RoutedModel, adapter: str | None = None
    ) -> bool:
        """Whether to retry after an attempt; if so, the attempt is counted as failed.

        ``status``: of the response, or NO_ANSWER, or TIMED_OUT.
        """
        if self.count >= self._max_count:
            return False
        tried = (*self._tried, endpoint)
        if status == TIMED_OUT:
            # The same engine would likely time out again, and minutes have already passed.
            if not (self._timeouts and routed.can_serve(adapter, tried)):
                return False
        elif status == 500 and not self._retried_500:
            self._retried_500 = True
        elif status not in (NO_ANSWER, 502, 503, 504):
            return False
        untried = routed.can_serve(adapter, tried)
        likely = routed.first(_may_answer, adapter, tried if untried else ()) is not None
        granted = self._budget(likely)
        if not granted:
            if not (untried and likely):
                return False
            self._probe = routed.first(_take_probe, adapter, tried)
        self._tried, self._granted, self._status = tried, granted, status
        return True

    def move(
        self,
        here: Reservation,
        routed: RoutedModel,
        prompt: Prompt,
        adapter: str | None,
    ) -> Reservation | None:
        """Pick another endpoint for an attempt that gets no response, and count it as failed.

        None if it has to stay: no other endpoint is expected to respond, or the request has no
        retries left.
        """
        if self.count >= self._max_count:
            return None
        other = self.trusted(routed, prompt, adapter)
        if other is not None and other.target is here.target:
            other.release()
            return None
        if other is not None:
            self._tried += (here.name,)
        return other

    def killed(self, alone: bool) -> bool:
        """Count an engine that crashed during an attempt. Returns whether the request is to blame.

        It is if it was the only request on the engine, or if this is the second engine to crash.
        """
        self.crashes += 1
        return alone or self.crashes > 1

    def elsewhere(
        self, routed: RoutedModel, prompt: Prompt, adapter: str | None
    ) -> Reservation | None:
        """Pick an untried endpoint for an immediate retry. None: wait with `later`."""
        if not self._granted:
            probe, self._probe = self._probe, None
            if probe is None:
                return None
            return routed.pick_among(lambda u: u is probe, prompt, adapter, self._tried)
        return self.trusted(routed, prompt, adapter) or routed.pick(prompt, adapter, self._tried)

    def trusted(
        self, routed: RoutedModel, prompt: Prompt, adapter: str | None
    ) -> Reservation | None:
        """Pick an untried endpoint that is expected to respond."""
        return routed.pick_among(_is_trusted, prompt, adapter, self._tried)

    async def later(
        self, routed: RoutedModel, prompt: Prompt, adapter: str | None
    ) -> Reservation | None:
        """Pick an endpoint after a wait; None if there is none, or if those that work are full.

        ErrorResponse with the failed attempt's status if the budget is exhausted and no other
        endpoint is proven.
        """
        if self._granted:  # all have been tried: retry any but the one that failed last
            await asyncio.sleep(self.pause_s)
            return routed.pick(prompt, adapter, self._tried[-1:]) or routed.pick(prompt, adapter)
        since_s = self._clock()
        for pause_s in PROOF_PAUSES_S:
            await asyncio.sleep(self._jittered(pause_s))
            proven = routed.pick_among(lambda u: u.is_proven(since_s), prompt, adapter, self._tried)
            if proven is not None:
                return proven
            if routed.first(_may_answer, adapter, self._tried) is None:
                break
        silent = self.trusted(routed, prompt, adapter)
        if silent is None and routed.first(_is_trusted, adapter, self._tried) is None:
            raise self._exhausted(routed)
        return silent

    def _exhausted(self, routed: RoutedModel) -> ErrorResponse:
        """The error after the last failed attempt; its status is that attempt's if it had one."""
        what = f"responded with {self._status}" if self._status > 0 else "did not respond"
        status = self._status if self._status > 0 else 504 if self._status == TIMED_OUT else 502
        log.warning(
            "attempt failed and no other endpoint is known to work",
            model=routed.route.model,
            endpoint=self._tried[-1],
            reason=what,
        )
        return ErrorResponse(
            f"The last replica tried {what}, and no other replica is known to work.",
            status=status,
            code=_CODES.get(status, "bad_gateway"),
        )

    def _jittered(self, pause_s: float) -> float:
        return pause_s * (0.5 + self._random())


def _is_trusted(upstream: EndpointConnections) -> bool:
    return upstream.is_trusted


def _may_answer(upstream: EndpointConnections) -> bool:
    return not upstream.is_down


def _take_probe(upstream: EndpointConnections) -> bool:
    return not upstream.is_trusted and upstream.take_probe()


async def check_loss(retries: Retries, routed: RoutedModel, lost: Reservation, alone: bool) -> None:
    """After an attempt lost its connection, raise ErrorResponse if the request crashed the engine.

    An engine that still listens has not crashed, and one that drains was stopped on purpose. One
    that is no longer in the route may have been stopped for another reason. ``alone``: no other
    request lost its connection to the engine.
    """
    if lost.name in routed.route.draining:
        return
    gone = not routed.serves(lost.name)
    if not gone and await cast("EndpointPool", lost.target).listens():
        return
    if retries.killed(alone and not gone):
        log.error("request crashed its engine", model=routed.route.model, endpoint=lost.name)
        raise EngineDied(retries.crashes)
