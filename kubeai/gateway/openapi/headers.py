"""The headers that the gateway reads in requests and adds to responses."""

from __future__ import annotations

from typing import Any

from kubeai.gateway.fallback import ANSWERED_BY
from kubeai.gateway.holding import WAITED
from kubeai.openai.errors import CRASHED_ENGINES

Schema = dict[str, Any]
SELECTOR, MAX_WAIT, REQUEST_ID = "X-Label-Selector", "X-KubeAI-Max-Wait", "X-Request-Id"
TENANT, OBJECTIVE = "X-Gateway-Inference-Fairness-ID", "X-Gateway-Inference-Objective"
EXPLAIN, ENCODING = "X-KubeAI-Explain", "Content-Encoding"
RETRY_AFTER, SHOULD_RETRY = "Retry-After", "x-should-retry"
_DURATION = r"^((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))+$|^0$"


def _parameter(name: str, description: str, schema: Schema) -> Schema:
    return {"name": name, "in": "header", "description": description, "schema": schema}


PARAMETERS: dict[str, Schema] = {
    SELECTOR: _parameter(
        SELECTOR,
        "Use only Models whose labels match this label selector. May be repeated up to 8 times; "
        "all selectors must match.",
        {"type": "string", "examples": ["team=search,tier in (gold,silver)"]},
    ),
    MAX_WAIT: _parameter(
        MAX_WAIT,
        "How long the request may be held while no replica is ready. It cannot extend "
        "`gateway.holdTimeout`. With `0s` the request is not held, but a replica is started.",
        {"type": "string", "pattern": _DURATION, "examples": ["30s", "1m30s"]},
    ),
    REQUEST_ID: _parameter(
        REQUEST_ID,
        "An ID for the request: 1 to 128 visible ASCII characters. Otherwise the gateway makes "
        "one. The engine, the response and the logs have the same ID.",
        {"type": "string"},
    ),
    TENANT: _parameter(
        TENANT,
        "The tenant for fair queueing. Ignored if keys are required: the key has a tenant.",
        {"type": "string"},
    ),
    OBJECTIVE: _parameter(
        OBJECTIVE,
        "A name in `gateway.queue.objectives`, which has the request's priority. If keys are "
        "required, it can only lower the priority of the key.",
        {"type": "string"},
    ),
    EXPLAIN: _parameter(
        EXPLAIN,
        "With `1`, the response explains why its replica was picked. Only if `gateway.explain` is "
        "true; otherwise ignored.",
        {"type": "string", "enum": ["1"]},
    ),
    ENCODING: _parameter(
        ENCODING,
        "The coding of a JSON body: `gzip`, `zstd` or `identity`. The engine gets the body as it "
        "came, unless `gateway.decompressBodies` is true.",
        {"type": "string", "examples": ["gzip", "zstd"]},
    ),
}


def _header(description: str, type_: str = "string", **more: Any) -> Schema:
    return {"description": description, "schema": {"type": type_, **more}}


ON_ALL = (REQUEST_ID,)
OF_INFERENCE = (MAX_WAIT, TENANT, OBJECTIVE, EXPLAIN)  # of requests that name their model
OF_ENGINES = (WAITED, ANSWERED_BY.decode(), EXPLAIN)
LIMITS = tuple(
    f"x-ratelimit-{what}-{of}"
    for of in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
)
_LIMITS = {
    "limit": _header("The limit of the key, per minute. Only for keys that have it.", "integer"),
    "remaining": _header("How much of the limit is left.", "integer"),
    "reset": _header("The time until the limit is whole again.", examples=["1s", "6m0s"]),
}
HEADERS: dict[str, Schema] = {
    REQUEST_ID: _header("The ID of the request, also in the logs of the gateway and the engine."),
    WAITED: _header(
        "The seconds for which the request was held. Absent if it was not.",
        pattern=r"^\d+\.\d{3}$",
    ),
    ANSWERED_BY.decode(): _header("The Model that answered, if it is a canary or a fallback."),
    EXPLAIN: _header(
        "Why the replica was picked, as JSON. Only if it was asked for and `gateway.explain` is "
        "true."
    ),
    **{name: _LIMITS[name.split("-")[2]] for name in LIMITS},
    RETRY_AFTER: _header("When the request may succeed, in seconds.", "integer", minimum=0),
    SHOULD_RETRY: _header("`false` if the same request will fail again.", enum=["false"]),
    CRASHED_ENGINES: _header(
        "How many engines crashed while they served the request. Only of `engine_died`.",
        "integer",
        minimum=1,
    ),
    "request-id": _header("The value of X-Request-Id, as Anthropic's clients expect it."),
    "WWW-Authenticate": _header("`Bearer`.", enum=["Bearer"]),
    "Accept-Encoding": _header("The codings that the gateway accepts."),
}
# Headers of errors, by status.
OF_ERRORS: dict[int, tuple[str, ...]] = {
    401: ("WWW-Authenticate",),
    415: ("Accept-Encoding",),
    429: (RETRY_AFTER, SHOULD_RETRY, *LIMITS),
    502: (SHOULD_RETRY, CRASHED_ENGINES),
    503: (RETRY_AFTER, SHOULD_RETRY),
    504: (RETRY_AFTER,),
}


def references(names: tuple[str, ...]) -> dict[str, Schema]:
    """References to response headers in the document's components."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}
