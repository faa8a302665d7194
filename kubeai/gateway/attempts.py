"""Retries and waits: one policy for JSON requests and for uploads.

:class:`Retries` says whether a failed attempt is repeated, where, and after which pause; it holds
no connection. :class:`RetryBudget` bounds the retries of all of a model's requests in a worker.
:func:`check_loss` finds out whether a request has killed its engine. Called by exchange.py and
transcriptions.py; holding.py waits for an endpoint when there is none.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from kubeai.logs import get_logger
from kubeai.openai import BadRequest

if TYPE_CHECKING:
    from kubeai._load import Reservation
    from kubeai.gateway.pool import Pool
    from kubeai.routing import RoutedModel, Upstream

log = get_logger(__name__)

# Before an endpoint that has just failed is tried again; doubled with each further retry, and half
# of it more or less, so that requests which failed together do not come back together.
RETRY_PAUSE_S = 0.1
# Over how long a model's answers and retries are recent.
BUDGET_WINDOW_S = 10.0

# How long a retry beyond the budget waits for an endpoint to prove itself, 0.62 s in all; half of
# each more or less.
PROOF_PAUSES_S = (0.02, 0.04, 0.08, 0.16, 0.32)

NO_ANSWER = 0
TIMED_OUT = -1
ENGINE_DIED = "engine_died"
_CODES = {503: "model_unavailable", 504: "timeout"}  # of failures that are answered; as elsewhere


class RetryBudget:
    """The retries that a model may have in one worker on trust.

    Where every endpoint fails, repeating requests would only multiply the load on them. So there
    are two limits: a small count for retries that are likely to fail too, and that count plus a
    share of the recent answers for all. Counts fade over ``BUDGET_WINDOW_S``.
    """

    def __init__(self, percent: int, min_count: float) -> None:
        """``percent`` of the recent answers, and ``min_count`` more in each window."""
        self._share = percent / 100
        self._min_count = min_count
        self._answered_total = 0
        self._answered = 0.0  # recently
        self._retried = 0.0  # recently
        self._doubtful = 0.0  # of these, retries that were likely to fail
        self._at_s: float | None = None

    def take(self, answered_total: int, now_s: float, *, likely: bool = True) -> bool:
        """Whether one more retry is within the budget, which then counts it.

        ``answered_total``: the model's requests that have been answered well so far. ``likely``:
        whether an endpoint is left that may answer it.
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
            # Of the answers of more than a window, only the last window's part is recent.
            self._answered = self._answered * left + came * min(
                1.0, BUDGET_WINDOW_S / max(since_s, 1e-9)
            )
            self._retried *= left
            self._doubtful *= left
        self._at_s = now_s
        self._answered_total = answered_total


class Retries:
    """The failed attempts of one request, and where it is attempted next.

    At most ``max_count`` retries of no answer, 502, 503 and 504, one of a 500, and never before
    the caller is sure that nothing has reached the client. Each goes to an endpoint that has not
    been tried, where there is one; a trusted one is preferred.

    The budget bounds the retries that are made on trust. Beyond it a request waits, for up to a
    second, until an endpoint that it has not tried *proves* that it answers. So retries add no load
    where all endpoints fail, and none is refused where one answers. An endpoint that has failed is
    probed by one such request at a time; one that has not failed, and stays silent for as long as
    the wait lasts, is busy and gets the retry.
    """

    __slots__ = (
        "_budget",
        "_clock",
        "_granted",
        "_kills",
        "_max_count",
        "_probe",
        "_random",
        "_retried_500",
        "_status",
        "_timeouts",
        "_tried",
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
        """``budget``: takes one retry, see `RetryBudget.take`. ``timeouts``: whether an attempt
        without a first byte in time is repeated elsewhere."""
        self._max_count = max_count
        self._budget = budget
        self._timeouts = timeouts
        self._clock = clock
        self._random = random
        self._retried_500 = False
        self._kills = 0
        self._tried: tuple[str, ...] = ()  # endpoints that failed, in order
        self._granted = True  # whether the next retry is within the budget
        self._status = NO_ANSWER  # of the attempt that failed last
        self._probe: Upstream | None = None  # where the next retry goes, beyond the budget

    @property
    def count(self) -> int:
        """Attempts that have failed."""
        return len(self._tried)

    @property
    def pause_s(self) -> float:
        """How long to wait before an endpoint is tried that has failed already."""
        return self._jittered(RETRY_PAUSE_S) * 2.0 ** (self.count - 1)

    def wants(
        self, status: int, endpoint: str, routed: RoutedModel, adapter: str | None = None
    ) -> bool:
        """Whether to try again after an attempt, which then counts as failed.

        ``status``: of the answer, or NO_ANSWER, or TIMED_OUT.
        """
        if self.count >= self._max_count:
            return False
        tried = (*self._tried, endpoint)
        if status == TIMED_OUT:
            # Its engine would not answer the second time either; and minutes have passed.
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

    def moved(self, endpoint: str) -> bool:
        """Count an attempt that is abandoned; False when no further one is allowed."""
        if self.count >= self._max_count:
            return False
        self._tried += (endpoint,)
        return True

    def killed(self, alone: bool) -> bool:
        """Note that an engine died in an attempt; whether the request is to blame.

        It is when nobody else was with it, and when a second engine has died.
        """
        self._kills += 1
        return alone or self._kills > 1

    def elsewhere(
        self, routed: RoutedModel, key: int | None, adapter: str | None
    ) -> Reservation | None:
        """At once: an endpoint that has not been tried. None: see `later`."""
        if not self._granted:
            probe, self._probe = self._probe, None
            if probe is None:
                return None
            return routed.pick_among(lambda u: u is probe, key, adapter, self._tried)
        return self.trusted(routed, key, adapter) or routed.pick(key, adapter, self._tried)

    def trusted(
        self, routed: RoutedModel, key: int | None, adapter: str | None
    ) -> Reservation | None:
        """An endpoint that has not been tried and can be expected to answer."""
        return routed.pick_among(_is_trusted, key, adapter, self._tried)

    async def later(
        self, routed: RoutedModel, key: int | None, adapter: str | None
    ) -> Reservation | None:
        """After a wait; None when there is no endpoint at all.

        BadRequest with the failed attempt's status when the budget is used up and no other
        endpoint has proven that it answers.
        """
        if self._granted:  # each has been tried: again, but not the one that failed last
            await asyncio.sleep(self.pause_s)
            return routed.pick(key, adapter, self._tried[-1:]) or routed.pick(key, adapter)
        since_s = self._clock()
        for pause_s in PROOF_PAUSES_S:
            await asyncio.sleep(self._jittered(pause_s))
            proven = routed.pick_among(lambda u: u.is_proven(since_s), key, adapter, self._tried)
            if proven is not None:
                return proven
            if routed.first(_may_answer, adapter, self._tried) is None:
                break
        silent = self.trusted(routed, key, adapter)
        if silent is None:
            raise self._exhausted(routed)
        return silent

    def _exhausted(self, routed: RoutedModel) -> BadRequest:
        what = f"answered {self._status}" if self._status > 0 else "gave no answer"
        status = self._status if self._status > 0 else 504 if self._status == TIMED_OUT else 502
        log.warning(
            "attempt failed, and no other endpoint is known to answer",
            model=routed.route.model,
            endpoint=self._tried[-1],
            reason=what,
        )
        return BadRequest(
            f"The last replica that was tried {what}, and no other one is known to answer.",
            status=status,
            code=_CODES.get(status, "bad_gateway"),
        )

    def _jittered(self, pause_s: float) -> float:
        return pause_s * (0.5 + self._random())


def _is_trusted(upstream: Upstream) -> bool:
    return upstream.is_trusted


def _may_answer(upstream: Upstream) -> bool:
    return not upstream.is_down


def _take_probe(upstream: Upstream) -> bool:
    return not upstream.is_trusted and upstream.take_probe()


async def check_loss(retries: Retries, routed: RoutedModel, lost: Reservation, alone: bool) -> None:
    """After an attempt that lost its connection: BadRequest when the request killed the engine.

    An engine that still listens was not killed. One that the operator has taken off the routes
    meanwhile may have had other reasons to go. ``alone``: nobody else lost a connection to it.
    """
    gone = not routed.serves(lost.name)
    if not gone and await cast("Pool", lost.target).listens():
        return
    if retries.killed(alone and not gone):
        log.error("a request has killed its engine", model=routed.route.model, endpoint=lost.name)
        raise BadRequest(
            "The engine went down with this request, which is not repeated.",
            status=502,
            code=ENGINE_DIED,
        )
