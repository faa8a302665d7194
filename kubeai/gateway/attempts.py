"""Who is asked next: the one policy of retries and waits, for JSON requests and for forms.

:class:`Retries` says whether a failed attempt is repeated, where and after which pause; it holds
no clock and no connection. :class:`RetryBudget` bounds what all of a model's requests may repeat.
:func:`check_loss` finds out whether a request has killed its engine. :func:`hold` waits for an
endpoint when there is none; :func:`advice` tells the client whether and when to come again. Called
by exchange.py, transcriptions.py and pages.py.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from kubeai._relay import RETRY_AFTER_S
from kubeai.logs import get_logger
from kubeai.openai import BadRequest, model_not_found
from kubeai.routing import ModelGone, NoEndpoint

if TYPE_CHECKING:
    from kubeai import _ask
    from kubeai._load import Admission, Reservation
    from kubeai.gateway import Gateway
    from kubeai.gateway.pool import Pool
    from kubeai.openai import Ask
    from kubeai.routing import RoutedModel

log = get_logger(__name__)

# Before an endpoint that has just failed is tried again; doubled with each further retry, and half
# of it more or less, so that requests which failed together do not come back together.
RETRY_PAUSE_S = 0.1
# Over how long a model's answers and retries are recent.
BUDGET_WINDOW_S = 10.0

NO_ANSWER = 0
ENGINE_DIED = "engine_died"


class RetryBudget:
    """The retries that a model may have in one worker: a share of its recent answers.

    Where most requests fail, repeating them all would only multiply the load on what is left. Both
    counts fade over ``BUDGET_WINDOW_S``.
    """

    def __init__(self, percent: int, min_count: int) -> None:
        """``percent`` of the recent answers, and ``min_count`` more a window."""
        self._share = percent / 100
        self._min_count = min_count
        self._answered_total = 0
        self._answered = 0.0  # recently
        self._retried = 0.0  # recently
        self._at_s: float | None = None

    def take(self, answered_total: int, now_s: float) -> bool:
        """Whether one more retry is in the budget, which then counts it.

        ``answered_total``: the model's requests that have been answered well so far.
        """
        if self._at_s is not None:
            since_s = max(0.0, now_s - self._at_s)
            left = max(0.0, 1 - since_s / BUDGET_WINDOW_S)
            came = answered_total - self._answered_total
            # Of what came over more than a window, only the last window's part is recent.
            self._answered = self._answered * left + came * min(
                1.0, BUDGET_WINDOW_S / max(since_s, 1e-9)
            )
            self._retried *= left
        self._at_s = now_s
        self._answered_total = answered_total
        if self._retried + 1 > self._min_count + self._share * self._answered:
            return False
        self._retried += 1
        return True


class Retries:
    """The failed attempts of one request, and what may follow them.

    At most ``max_count`` retries of no answer, 502, 503 and 504, one of a 500, each within the
    ``budget``; on an endpoint that was not tried yet where there is one, else, after a pause, on
    one that was. Only before the first byte has reached the client, which the callers see to.
    """

    __slots__ = ("_budget", "_kills", "_max_count", "_random", "_retried_500", "_tried")

    def __init__(
        self,
        max_count: int,
        budget: Callable[[], bool] = lambda: True,
        random: Callable[[], float] = random.random,
    ) -> None:
        self._max_count = max_count
        self._budget = budget
        self._random = random
        self._retried_500 = False
        self._kills = 0
        self._tried: tuple[str, ...] = ()  # endpoints that failed, in order

    @property
    def count(self) -> int:
        """Attempts that have failed."""
        return len(self._tried)

    @property
    def pause_s(self) -> float:
        """How long to wait before an endpoint is tried that has failed already."""
        return RETRY_PAUSE_S * (0.5 + self._random()) * 2.0 ** (self.count - 1)

    def wants(self, status: int) -> bool:
        """Whether to try again after an answer with ``status``, or NO_ANSWER."""
        if self.count >= self._max_count:
            return False
        if status == 500 and not self._retried_500:
            self._retried_500 = True
            return self._budget()
        return status in (NO_ANSWER, 502, 503, 504) and self._budget()

    def failed(self, endpoint: str) -> None:
        """Count an attempt that is to be repeated."""
        self._tried += (endpoint,)

    def killed(self, alone: bool) -> bool:
        """Note that an engine died in an attempt; whether the request is to blame.

        It is when nobody else was with it, and when a second engine has died.
        """
        self._kills += 1
        return alone or self._kills > 1

    def elsewhere(
        self, routed: RoutedModel, key: int | None, adapter: str | None
    ) -> Reservation | None:
        """An endpoint that has not failed."""
        return routed.pick(key, adapter, self._tried)

    def anywhere(
        self, routed: RoutedModel, key: int | None, adapter: str | None
    ) -> Reservation | None:
        """After the pause: an endpoint, rather not the one that failed last."""
        return routed.pick(key, adapter, self._tried[-1:]) or routed.pick(key, adapter)


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


def advice(error: BadRequest) -> dict[str, str]:
    """Headers of an answer of ours: whether a client is to repeat its request, and when."""
    if error.code == ENGINE_DIED:
        return {"x-should-retry": "false"}  # OpenAI's clients would repeat a 502
    return {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else {}


async def hold(
    gateway: Gateway,
    routed: RoutedModel,
    ask: Ask | _ask.Ask,
    key: int | None,
    admission: Admission,
) -> Reservation:
    """Wait until somebody can serve the request; BadRequest when it comes to nothing.

    Meanwhile the request is counted as held, and the model is wanted.
    """
    if not gateway.hold(ask.name):
        log.warning("too many requests are held", model=ask.name)
        raise BadRequest(
            f"Too many requests wait for the model {ask.model!r}.", status=503, code="overloaded"
        )
    admission.hold()
    gateway.demand(ask.name)
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + gateway.config.hold_timeout_s
    try:
        while True:
            await routed.wait(ask.adapter, max(0.0, deadline_s - loop.time()))
            if reservation := routed.pick(key, ask.adapter):
                return reservation
    except NoEndpoint:
        log.warning("no endpoint in time", model=ask.model)
        raise BadRequest(
            f"No replica of the model {ask.model!r} was ready in time.", status=504, code="timeout"
        ) from None
    except ModelGone:
        raise model_not_found(ask.model) from None
    finally:
        admission.unhold()
        gateway.unhold(ask.name)
