"""Requests that no endpoint can serve yet, and the headers of answers that say so.

:func:`hold` waits for an endpoint when there is none. :func:`advice` tells a client whether and
when to repeat a request. Called by exchange.py, transcriptions.py and pages.py.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from kubeai._relay import RETRY_AFTER_S
from kubeai.gateway.attempts import ENGINE_DIED
from kubeai.logs import Sparingly, get_logger
from kubeai.openai import BadRequest, model_not_found
from kubeai.routing import Blocked, ModelGone, NoEndpoint

if TYPE_CHECKING:
    from kubeai import _ask
    from kubeai._load import Admission, Reservation
    from kubeai.gateway import Gateway
    from kubeai.openai import Ask
    from kubeai.routing import Block, RoutedModel

log = get_logger(__name__)

# Codes of a 503 for a model, or an adapter, that cannot be served: until somebody mends it, and
# where a later request may succeed.
CANNOT_START = "model_cannot_start"
UNAVAILABLE = "model_unavailable"

# Requests that fail at once may be many.
_refusals = Sparingly(burst_max=50, per_s=1)


def advice(error: BadRequest) -> dict[str, str]:
    """Headers of an answer of ours: whether a client is to repeat its request, and when."""
    if error.code in (ENGINE_DIED, CANNOT_START):
        return {"x-should-retry": "false"}  # OpenAI's clients would repeat a 502 or a 503
    return {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else {}


async def hold(
    gateway: Gateway,
    routed: RoutedModel,
    ask: Ask | _ask.Ask,
    key: int | None,
    admission: Admission,
) -> Reservation:
    """Wait until an endpoint can serve the request; BadRequest when none does in time.

    The request is counted as held meanwhile, and a replica of the model is demanded. A model that
    is known to be unable to start is not waited for, and not scaled up.
    """
    loop = asyncio.get_running_loop()
    block = routed.block(ask.adapter)
    if block is not None and block.fails_at_s <= loop.time():
        raise _blocked(ask, block)
    if not gateway.hold(ask.name):
        log.warning("too many requests are held", model=ask.name)
        raise BadRequest(
            f"Too many requests wait for the model {ask.model!r}.", status=503, code="overloaded"
        )
    admission.hold()
    gateway.demand(ask.name)
    deadline_s = loop.time() + gateway.config.hold_timeout_s
    try:
        while True:
            await routed.wait(ask.adapter, max(0.0, deadline_s - loop.time()))
            if reservation := routed.pick(key, ask.adapter):
                return reservation
    except Blocked as blocked:
        raise _blocked(ask, blocked.block) from None
    except NoEndpoint:
        message = f"No replica of the model {ask.model!r} was ready in time."
        if block := routed.block(ask.adapter):
            message += f" {block.reason}: {block.message}"
        log.warning("no endpoint in time", model=ask.model, reason=block and block.reason)
        raise BadRequest(message, status=504, code="timeout") from None
    except ModelGone:
        raise model_not_found(ask.model) from None
    finally:
        admission.unhold()
        gateway.unhold(ask.name)


def _blocked(ask: Ask | _ask.Ask, block: Block) -> BadRequest:
    left_out = _refusals.take(time.monotonic())
    if left_out is not None:
        log.warning(
            "model cannot be served", model=ask.model, reason=block.reason, left_out=left_out
        )
    return BadRequest(
        f"The model {ask.model!r} cannot be served. {block.reason}: {block.message}",
        status=503,
        code=UNAVAILABLE if block.retry else CANNOT_START,
    )
