"""Who is asked next: the one policy of retries and waits, for JSON requests and for forms.

:class:`Retries` says whether a failed attempt is repeated, where and after which pause; it holds
no clock and no connection. :func:`hold` waits for an endpoint when there is none. Called by
exchange.py and transcriptions.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import structlog

from kubeai.openai import BadRequest, model_not_found
from kubeai.routing import ModelGone, NoEndpoint

if TYPE_CHECKING:
    from kubeai import _ask
    from kubeai._load import Admission, Reservation
    from kubeai.gateway import Gateway
    from kubeai.openai import Ask
    from kubeai.routing import RoutedModel

log = structlog.get_logger(__name__)

# Before an endpoint that has just failed is tried again; doubled with each further retry.
RETRY_PAUSE_S = 0.1
# What a client is told that gets a 503 of ours.
RETRY_AFTER_S = 5

NO_ANSWER = 0


class Retries:
    """The failed attempts of one request, and what may follow them.

    At most ``max_count`` retries of no answer, 502, 503 and 504, one of a 500; on an endpoint that
    was not tried yet where there is one, else, after a pause, on one that was. Only before the
    first byte has reached the client, which the callers see to.
    """

    __slots__ = ("_max_count", "_retried_500", "_tried")

    def __init__(self, max_count: int) -> None:
        self._max_count = max_count
        self._retried_500 = False
        self._tried: tuple[str, ...] = ()  # endpoints that failed, in order

    @property
    def count(self) -> int:
        """Attempts that have failed."""
        return len(self._tried)

    @property
    def pause_s(self) -> float:
        """How long to wait before an endpoint is tried that has failed already."""
        return RETRY_PAUSE_S * 2.0 ** (self.count - 1)

    def wants(self, status: int) -> bool:
        """Whether to try again after an answer with ``status``, or NO_ANSWER."""
        if self.count >= self._max_count:
            return False
        if status == 500 and not self._retried_500:
            self._retried_500 = True
            return True
        return status in (NO_ANSWER, 502, 503, 504)

    def failed(self, endpoint: str) -> None:
        """Count an attempt that is to be repeated."""
        self._tried += (endpoint,)

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
