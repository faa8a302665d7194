"""Holds requests that no endpoint can serve yet.

:func:`hold` waits for an endpoint, in the model's queue (routing/queueing.py).
:class:`HoldComments` meanwhile sends the client of a streaming request the head of the response,
and comments that say what the model waits for. :func:`advice` returns headers that tell a client
whether and when to retry. Called by attempts.py and local_routes.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from kubeai._rate_limit import RateLimit
from kubeai.gateway.relay._relay import RETRY_AFTER_S
from kubeai.logs import get_logger
from kubeai.openai.errors import ErrorResponse, model_not_found
from kubeai.routing.queueing import Blocked, Displaced, ModelGone, NoEndpoint, Waiting

if TYPE_CHECKING:
    from kubeai._counts import Admission, Reservation
    from kubeai.api.config.system import GatewayConfig
    from kubeai.gateway.context import Context
    from kubeai.gateway.relay._early import EarlyStream
    from kubeai.openai.request import InferenceRequest
    from kubeai.routing.routes import Block
    from kubeai.routing.table import RoutedModel

log = get_logger(__name__)

# Error codes of a 503 for a model or adapter that cannot be served: until a user fixes it, or for
# now, in which case a later request may succeed.
CANNOT_START = "model_cannot_start"
UNAVAILABLE = "model_unavailable"
QUEUE_FULL = "queue_full"  # of a 429: the request made room for another

WAITED = "X-KubeAI-Waited"
RETRY_AFTER_MAX_S = 600

# Requests that are rejected at once may be frequent.
_refusals = RateLimit(burst_max=50, per_s=1)


def advice(error: ErrorResponse) -> dict[str, str]:
    """Headers of an error response that say whether the client should retry, and when."""
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.is_retryable and error.status in (429, 503):
        retry_after_s = RETRY_AFTER_S
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    if not error.is_retryable:
        headers["x-should-retry"] = "false"  # OpenAI's clients would retry a 429, 502 or 503
    return headers


async def hold(
    context: Context,
    routed: RoutedModel,
    model: str,
    waiting: Waiting,
    admission: Admission,
    *,
    max_wait_s: float | None = None,
    during: contextlib.AbstractContextManager[None] | None = None,
    request_id: str = "",
) -> Reservation:
    """Wait until an endpoint can serve the request and it is its turn.

    ErrorResponse if that takes too long.

    The request is counted as held while it waits, and a replica of the model is demanded if it has
    none. A model that is known to be unable to start is neither waited for nor scaled up. If too
    many requests wait, one of a lower priority or of a tenant with more requests gets 429, or this
    one 503. ``model``: as the client named it. ``waiting``: the request in the queue.
    ``max_wait_s``: the client's own limit, below ``holdTimeout``. ``during``: entered meanwhile.
    ``request_id``: for the context's ``hold_watcher``.
    """
    loop = asyncio.get_running_loop()
    watcher = _Watcher(context, routed, waiting, request_id)
    watcher.on_hold()
    block = routed.block(waiting.adapter)
    if block is not None and block.fails_at_s <= loop.time():
        raise _blocked(routed, model, block)
    if not context.hold(routed.model, displaces=partial(routed.queue.displace, waiting)):
        log.warning("too many held requests", model=routed.model)
        raise _too_many(routed, model)
    admission.hold()
    if not routed.can_serve(waiting.adapter):
        context.demand(routed.model)
    timeout_s = context.config.hold_timeout_s
    if max_wait_s is not None:
        timeout_s = min(timeout_s, max(0.0, max_wait_s))
    deadline_s = loop.time() + timeout_s
    try:
        with during or contextlib.nullcontext():
            reservation = await routed.queue.wait(waiting, deadline_s)
            while not await watcher.permits(reservation):
                picked = routed.pick(waiting.prompt, waiting.adapter)
                reservation = picked or await routed.queue.wait(waiting, deadline_s)
            return reservation
    except Blocked as blocked:
        raise _blocked(routed, model, blocked.block) from None
    except NoEndpoint:
        raise _timed_out(routed, model, waiting.adapter) from None
    except Displaced:
        raise _displaced(routed, model, waiting.adapter) from None
    except ModelGone:
        raise model_not_found(model) from None
    finally:
        admission.unhold()
        context.unhold(routed.model)


def _too_many(routed: RoutedModel, model: str) -> ErrorResponse:
    return ErrorResponse(
        f"Too many requests are waiting for the model {model!r}.",
        status=503,
        code="overloaded",
        retry_after_s=_retry_after_s(routed),
    )


class _Watcher:
    """The context's ``hold_watcher``, if any, for one request.

    A request of a saturated model is not reported as held: it occupies one of its message stream's
    handlers, which limits the requests that the stream has in progress.
    """

    def __init__(
        self, context: Context, routed: RoutedModel, waiting: Waiting, request_id: str
    ) -> None:
        self._watcher = context.hold_watcher
        self._routed = routed
        self._adapter = waiting.adapter
        self._request_id = request_id
        self._is_held = False

    def on_hold(self) -> None:
        if self._watcher is not None and not self._routed.can_serve(self._adapter):
            self._watcher.on_hold(self._request_id)
            self._is_held = True

    async def permits(self, reservation: Reservation) -> bool:
        """Whether a request that was reported as held may use the Reservation.

        False: the Reservation was released before waiting for the permission, which can take long.
        The caller must pick again; the permission is then already granted.
        """
        if self._watcher is None or not self._is_held:
            return True
        reservation.release()
        await self._watcher.on_endpoint(self._request_id)
        self._is_held = False
        self.on_hold()
        return False


def _timed_out(routed: RoutedModel, model: str, adapter: str | None) -> ErrorResponse:
    if routed.can_serve(adapter):
        return _saturated(routed, model)
    message = f"No replica of the model {model!r} became ready in time."
    block = routed.block(adapter)
    if block is not None:
        message += f" {block.reason}: {block.message}"
    log.warning("no endpoint became ready", model=model, reason=block and block.reason)
    retry_after_s = _retry_after_s(routed)
    return ErrorResponse(message, status=504, code="timeout", retry_after_s=retry_after_s)


def _saturated(routed: RoutedModel, model: str) -> ErrorResponse:
    suppressed = _refusals.take(time.monotonic())
    if suppressed is not None:
        waiting = len(routed.queue)
        log.warning("no endpoint had room", model=model, waiting=waiting, suppressed=suppressed)
    return ErrorResponse(
        f"All replicas of the model {model!r} were busy until the end of the wait.",
        status=504,
        code="timeout",
        retry_after_s=RETRY_AFTER_S,
    )


def _displaced(routed: RoutedModel, model: str, adapter: str | None) -> ErrorResponse:
    suppressed = _refusals.take(time.monotonic())
    if suppressed is not None:
        log.warning("request displaced", model=model, suppressed=suppressed)
    return ErrorResponse(
        f"Too many requests are waiting for the model {model!r}. One of a higher priority, "
        "or of a tenant with fewer waiting requests, has taken the place of this one.",
        status=429,
        code=QUEUE_FULL,
        retry_after_s=None if routed.can_serve(adapter) else _retry_after_s(routed),
    )


def _blocked(routed: RoutedModel, model: str, block: Block) -> ErrorResponse:
    suppressed = _refusals.take(time.monotonic())
    if suppressed is not None:
        log.warning(
            "model cannot be served",
            model=model,
            reason=block.reason,
            suppressed=suppressed,
        )
    return ErrorResponse(
        f"The model {model!r} cannot be served. {block.reason}: {block.message}",
        status=503,
        code=UNAVAILABLE if block.retry else CANNOT_START,
        retry_after_s=_retry_after_s(routed) if block.retry else None,
        is_retryable=block.retry,
    )


def _retry_after_s(routed: RoutedModel) -> int | None:
    """How long a replica of the model takes to start; None while that is not known."""
    start_s = routed.route.start_s
    return min(start_s, RETRY_AFTER_MAX_S) if start_s > 0 else None


# -- comments --------------------------------------------------------------------------------------


def progress(routed: RoutedModel, waiting: Waiting) -> str:
    """What a held request waits for, as a short phrase."""
    place, total = routed.queue.place(waiting)
    in_queue = f", place {place} of {total} in the queue" if total > 1 else ""
    if routed.can_serve(waiting.adapter):
        return f"all replicas are busy{in_queue}"
    if waiting.adapter is not None and routed.route.endpoints:
        return "loading the adapter"
    return (routed.route.progress or "starting") + in_queue


class HoldComments:
    """Comments on a streaming request's response during one wait.

    The first one follows the head of the response, after ``holdCommentAfter``; the others come at
    ``holdCommentInterval``. A request that has been held before continues with the interval.
    """

    def __init__(
        self,
        stream: EarlyStream,
        config: GatewayConfig,
        headers: Callable[[], bytes],
        phrase: Callable[[], str],
    ) -> None:
        """``headers``: makes extra lines of the response's head, each ending in CRLF."""
        self._stream = stream
        self._config = config
        self._headers = headers
        self._phrase = phrase
        after_s = config.hold_comment_interval_s if stream.begun else config.hold_comment_after_s
        self._timer = asyncio.get_running_loop().call_later(after_s, self._comment)

    @staticmethod
    def suit(request: InferenceRequest, config: GatewayConfig) -> bool:
        """Whether the response to a request may begin with comments."""
        return request.stream and request.kind.has_streams and config.hold_comment_after_s > 0

    def stop(self) -> None:
        """The wait is over."""
        self._timer.cancel()

    def _comment(self) -> None:
        self._stream.begin(self._headers())
        text = f"waiting for a replica: {self._phrase()}"
        self._stream.comment(" ".join(text.split()).encode("utf-8", "replace"))
        interval_s = self._config.hold_comment_interval_s
        self._timer = asyncio.get_running_loop().call_later(interval_s, self._comment)
