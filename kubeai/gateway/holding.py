"""Holds requests that no endpoint can serve yet.

:func:`hold` waits for an endpoint. :func:`advice` returns headers that tell a client whether and
when to retry. Called by proxy.py and local_routes.py.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from kubeai.gateway.relay._exchange import RETRY_AFTER_S
from kubeai.gateway.retries import ENGINE_DIED
from kubeai.logs import RateLimit, get_logger
from kubeai.openai.errors import BadRequest, model_not_found
from kubeai.routing.table import Blocked, ModelGone, NoEndpoint

if TYPE_CHECKING:
    from kubeai._counts import Admission, Reservation
    from kubeai._prompt import Prompt
    from kubeai.gateway.context import Context
    from kubeai.openai.request import InferenceRequest
    from kubeai.routing.routes import Block
    from kubeai.routing.table import RoutedModel

log = get_logger(__name__)

# Error codes of a 503 for a model or adapter that cannot be served: until a user fixes it, or for
# now, in which case a later request may succeed.
CANNOT_START = "model_cannot_start"
UNAVAILABLE = "model_unavailable"

# Requests that are rejected at once may be frequent.
_refusals = RateLimit(burst_max=50, per_s=1)


def advice(error: BadRequest) -> dict[str, str]:
    """Headers of an error response that say whether the client should retry, and when."""
    if error.code in (ENGINE_DIED, CANNOT_START):
        return {"x-should-retry": "false"}  # OpenAI's clients would retry a 502 or 503
    return {"Retry-After": str(RETRY_AFTER_S)} if error.status == 503 else {}


async def hold(
    context: Context,
    routed: RoutedModel,
    request: InferenceRequest,
    prompt: Prompt,
    admission: Admission,
) -> Reservation:
    """Wait until an endpoint can serve the request; BadRequest if none can in time.

    The request is counted as held while it waits, and a replica of the model is demanded. A model
    that is known to be unable to start is neither waited for nor scaled up.
    """
    loop = asyncio.get_running_loop()
    block = routed.block(request.adapter)
    if block is not None and block.fails_at_s <= loop.time():
        raise _blocked(request, block)
    if not context.hold(request.name):
        log.warning("too many held requests", model=request.name)
        raise BadRequest(
            f"Too many requests are waiting for the model {request.model!r}.",
            status=503,
            code="overloaded",
        )
    admission.hold()
    context.demand(request.name)
    deadline_s = loop.time() + context.config.hold_timeout_s
    try:
        while True:
            await routed.wait(request.adapter, max(0.0, deadline_s - loop.time()))
            if reservation := routed.pick(prompt, request.adapter):
                return reservation
    except Blocked as blocked:
        raise _blocked(request, blocked.block) from None
    except NoEndpoint:
        message = f"No replica of the model {request.model!r} became ready in time."
        if block := routed.block(request.adapter):
            message += f" {block.reason}: {block.message}"
        log.warning("no endpoint became ready", model=request.model, reason=block and block.reason)
        raise BadRequest(message, status=504, code="timeout") from None
    except ModelGone:
        raise model_not_found(request.model) from None
    finally:
        admission.unhold()
        context.unhold(request.name)


def _blocked(request: InferenceRequest, block: Block) -> BadRequest:
    suppressed = _refusals.take(time.monotonic())
    if suppressed is not None:
        log.warning(
            "model cannot be served",
            model=request.model,
            reason=block.reason,
            suppressed=suppressed,
        )
    return BadRequest(
        f"The model {request.model!r} cannot be served. {block.reason}: {block.message}",
        status=503,
        code=UNAVAILABLE if block.retry else CANNOT_START,
    )
