"""Requests that no endpoint can serve yet, and the headers of answers that say so.

:func:`hold` waits for an endpoint when there is none. :func:`advice` tells a client whether and
when to repeat a request. Called by exchange.py, transcriptions.py and pages.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from kubeai._relay import RETRY_AFTER_S
from kubeai.gateway.attempts import ENGINE_DIED
from kubeai.logs import get_logger
from kubeai.openai import BadRequest, model_not_found
from kubeai.routing import ModelGone, NoEndpoint

if TYPE_CHECKING:
    from kubeai import _ask
    from kubeai._load import Admission, Reservation
    from kubeai.gateway import Gateway
    from kubeai.openai import Ask
    from kubeai.routing import RoutedModel

log = get_logger(__name__)


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
