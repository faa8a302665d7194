"""Errors for clients whose key is not valid or not sufficient, and the audit log of all denials.

A key or its digest occurs in neither: keys are named by their Secrets. Called by keys.py,
console.py, proxy.py, attempts.py, which logs every denial that it answers, and local_routes.py.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kubeai._rate_limit import RateLimit
from kubeai.errors import quoted
from kubeai.gateway._credentials import Problem, Source
from kubeai.logs import get_logger
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.routes import origin_form

if TYPE_CHECKING:
    from kubeai._keys import Key
    from kubeai.gateway.event_counts import EventCounter
    from kubeai.routing.table import RoutedModel

log = get_logger(__name__)

INVALID_KEY = "invalid_api_key"
MODEL_NOT_ALLOWED = "model_not_allowed"
ADMIN_REQUIRED = "admin_required"
RATE_LIMIT_EXCEEDED = "rate_limit_exceeded"
AUDITED = frozenset(
    (INVALID_KEY, MODEL_NOT_ALLOWED, ADMIN_REQUIRED, RATE_LIMIT_EXCEEDED, "queue_full")
)
AUDIT_BURST_MAX_LINES, AUDIT_LINES_PER_S = 100, 10.0
PATH_MAX_CHARS = 200

COOKIE = 8  # a further source of a key, besides those of Source
_SOURCES = {
    int(Source.AUTHORIZATION): "Authorization",
    int(Source.X_API_KEY): "x-api-key",
    int(Source.API_KEY): "api-key",
    COOKIE: "the login",
}


def no_valid_key(problem: int, sources: int) -> ErrorResponse:
    """401 that says which header has the wrong key. ``sources``: bits of Source and COOKIE."""
    where = " and ".join(name for bit, name in _SOURCES.items() if sources & bit)
    if problem == Problem.MISSING:
        message = (
            "This API needs a key. Send it as 'Authorization: Bearer <key>', 'x-api-key: <key>' "
            "or 'api-key: <key>'."
        )
    elif problem == Problem.NOT_BEARER:
        message = "Authorization is not of the form 'Bearer <key>'."
    elif problem == Problem.DIFFERENT:
        several = "have" if " and " in where else "is given several times, with"
        message = f"{where} {several} different API keys. Send one key."
    elif problem == Problem.EXPIRED:
        message = f"The API key in {where} has expired."
    elif where:
        message = f"The API key in {where} is not valid."
    else:
        message = "The API key is not valid any more."
    return ErrorResponse(message, status=401, code=INVALID_KEY)


def too_many_failures(retry_after_s: int, per_minute: int) -> ErrorResponse:
    """429 for a client that keeps sending wrong keys."""
    return ErrorResponse(
        f"Too many requests from this address had a wrong API key. The limit is {per_minute} per "
        "minute. Requests with a valid key are not affected.",
        status=429,
        code=RATE_LIMIT_EXCEEDED,
        kind="rate_limit_error",
        retry_after_s=retry_after_s,
    )


def admin_required() -> ErrorResponse:
    """403 for the console."""
    return ErrorResponse(
        "The console needs the key of an administrator: one whose Secret has the annotation "
        'kubeai.org/admin: "true".',
        status=403,
        code=ADMIN_REQUIRED,
    )


def model_not_allowed(model: str) -> ErrorResponse:
    """The same 403 for a Model that the key may not use and for one that does not exist."""
    return ErrorResponse(
        f"The model {quoted(model)} does not exist or this API key may not use it.",
        param="model",
        status=403,
        code=MODEL_NOT_ALLOWED,
    )


def check_model(key: Key | None, routed: RoutedModel | None, model: str) -> None:
    """403 if the client's key may not use a Model. ``routed``: None if there is no such Model.

    Without a restriction, a missing Model is left to the caller. ``model``: as the client names it.
    """
    if key is None or not key.restricted:
        return
    if routed is None or not key.allows(routed.route):
        raise model_not_allowed(model)


class AuditLog:
    """Counts each denial, and writes a line for it.

    The lines of a flood are sampled, and say how many are missing.
    """

    def __init__(self, events: EventCounter) -> None:
        self._events = events
        self._limit = RateLimit(AUDIT_BURST_MAX_LINES, AUDIT_LINES_PER_S)

    def note(
        self,
        error: ErrorResponse,
        *,
        client: str,
        method: str,
        target: str,
        request_id: str | None,
        key: Key | None = None,
    ) -> None:
        """Log a denial. ``client``: its address; ``target``: of the request, without checks."""
        if error.code not in AUDITED:
            return
        self._events.add("denial", error.code)
        suppressed = self._limit.take(time.monotonic())
        if suppressed is None:
            return
        log.warning(
            "request denied",
            status=error.status,
            code=error.code,
            # Clients send keys in queries, although none is accepted there.
            path=origin_form(target).partition("?")[0][:PATH_MAX_CHARS],
            method=method,
            client=client,
            key=None if key is None else key.name,
            request_id=request_id,
            message=error.message,
            suppressed=suppressed,
        )
