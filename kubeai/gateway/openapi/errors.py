"""Every error that the gateway itself answers with: status, code, when, and what to do about it.

docs/reference/errors.md and the error responses in the OpenAPI document are made from this table. A
test compares it with the code, and makes a request for each entry.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from kubeai.openai.errors import anthropic_type, openai_type


class Retry(StrEnum):
    """Whether a client should send the same request again."""

    NO = "no"
    YES = "yes"
    LATER = "yes, after `Retry-After`"
    NEVER = "no; `x-should-retry: false`"


class GatewayError(NamedTuple):
    """One error. ``code``: of OpenAI's format; None: it has none."""

    status: int
    code: str | None
    when: str
    what_to_do: str
    retry: Retry = Retry.NO
    openai_types: tuple[str, ...] = ()  # if the status does not determine them

    @property
    def types(self) -> tuple[str, ...]:
        """Its types in OpenAI's format."""
        return self.openai_types or (openai_type(self.status),)

    @property
    def anthropic_type(self) -> str:
        """Its type in Anthropic's format."""
        return anthropic_type(self.status)


ERRORS = (
    GatewayError(
        400,
        None,
        "The request is malformed, or two parsers could read it differently: invalid JSON, no "
        "`model` or two of them, a form or a header that is ambiguous. The message names the place",
        "Fix the request",
    ),
    GatewayError(
        401,
        "invalid_api_key",
        "Keys are required, and the request has none, several, or one that is not valid, has "
        "expired or was revoked",
        "Send one valid key in `Authorization: Bearer`, `x-api-key` or `api-key`; see "
        "`kubeai key list`",
    ),
    GatewayError(
        403,
        "model_not_allowed",
        "The key may not use this Model, or there is no such Model",
        "List the Models of the key with `GET /v1/models`; change the key's selector",
    ),
    GatewayError(
        403,
        "admin_required",
        "The console needs the key of an administrator",
        "Use a key that was made with `kubeai key create NAME --admin`",
    ),
    GatewayError(
        403,
        "not_loopback",
        "Keys are not required, and a client on another machine opens the console",
        "Use `kubectl port-forward`, or require keys",
    ),
    GatewayError(
        403,
        "foreign_origin",
        "A web page of another origin opens a WebSocket or uses the console",
        "Add the page's origin to `gateway.corsOrigins`; the console accepts only its own pages",
    ),
    GatewayError(
        404,
        "model_not_found",
        "There is no such Model, alias or adapter, or an `X-Label-Selector` excludes it",
        "List the Models with `GET /v1/models`; check the spelling and the selector",
    ),
    GatewayError(
        404,
        "unknown_url",
        "The path is none of the gateway's. Paths are compared byte for byte",
        "Use the base URL in the message",
    ),
    GatewayError(
        404,
        None,
        "No replica has the stored response, or it belongs to another tenant; or Ollama's client "
        "wants to change a model",
        "Create the response again; change Models with `kubectl`",
    ),
    GatewayError(
        405,
        "method_not_allowed",
        "The path exists, but not with this method",
        "Use a method that `Allow` lists",
    ),
    GatewayError(
        408,
        None,
        "The head or the body of the request, or the first event of a realtime session, did not "
        "arrive in time",
        "Send the request faster, or raise `gateway.headTimeout` or `gateway.bodyTimeout`",
        Retry.YES,
    ),
    GatewayError(
        413,
        None,
        "The body, or its decompressed form, is longer than `gateway.bodyMaxBytes`; a form than "
        "`gateway.multipartMaxBytes`",
        "Send a shorter body, or raise the limit",
    ),
    GatewayError(
        415,
        None,
        "The body has a `Content-Encoding` that is not supported, or a form has any",
        "Use one of the codings that `Accept-Encoding` lists",
    ),
    GatewayError(
        417, None, "`Expect` has another value than `100-continue`", "Do not send the header"
    ),
    GatewayError(
        421,
        "unknown_host",
        "The console is opened under a host name that it does not know",
        "Add the name to `gateway.ui.hosts`",
    ),
    GatewayError(
        426,
        "upgrade_required",
        "A WebSocket handshake on a path that is none, or a plain request on `/v1/realtime`",
        "Send POST on other paths; use a WebSocket client on `/v1/realtime`",
    ),
    GatewayError(
        429,
        "rate_limit_exceeded",
        "The key has used up one of its limits, or a client has sent too many wrong keys",
        "Wait; send a shorter prompt or a lower `max_tokens` if the message says that the request "
        "is too large; raise the key's limits",
        Retry.LATER,
        ("requests", "tokens", "rate_limit_error"),
    ),
    GatewayError(
        429,
        "queue_full",
        "The queue of the Model is full, and a request of a higher priority, or of a tenant with "
        "fewer waiting requests, took the place of this one",
        "Wait; add replicas, or raise `gateway.holdMaxRequests`",
        Retry.LATER,
    ),
    GatewayError(
        431,
        None,
        "The head of the request is longer than `gateway.headMaxBytes` or has more headers than "
        "`gateway.headMaxCount`",
        "Send fewer or shorter headers",
    ),
    GatewayError(
        500,
        "internal_error",
        "An error in the gateway while it served an inference request",
        "Report the lines of the gateway's log that have the request's ID",
        Retry.YES,
    ),
    GatewayError(
        500,
        "bad_gateway",
        "Every replica that was tried responded with 500",
        "Look at the engine's log: `kubectl logs -l model=NAME`",
        Retry.YES,
    ),
    GatewayError(
        500,
        None,
        "An error in the gateway elsewhere",
        "Report the lines of the gateway's log that have the request's ID",
        Retry.YES,
    ),
    GatewayError(
        502,
        "bad_gateway",
        "No replica could be reached, or all that were tried failed, or an engine broke HTTP",
        "Look at the engine's log: `kubectl logs -l model=NAME`",
        Retry.YES,
    ),
    GatewayError(
        502,
        "engine_died",
        "The engine crashed while it served this request; only a message is tried once more",
        "Look at the engine's log: `kubectl logs -l model=NAME --previous`",
        Retry.NEVER,
    ),
    GatewayError(
        502,
        None,
        "The console's process, or another part of the gateway, did not respond",
        "Wait; look at the gateway's log",
        Retry.YES,
    ),
    GatewayError(
        503,
        "model_unavailable",
        "The replicas cannot start, for a reason that may be temporary, longer than "
        "`gateway.startFailureGrace`; or replicas did not answer the lookup of a stored response",
        "See the reason in the message in [Troubleshooting](troubleshooting.md)",
        Retry.LATER,
    ),
    GatewayError(
        503,
        "model_cannot_start",
        "The Model cannot start until somebody changes it or the system config",
        "See the reason in the message in [Troubleshooting](troubleshooting.md)",
        Retry.NEVER,
    ),
    GatewayError(
        503,
        "overloaded",
        "Too many requests are held for the Model, too many stored responses are looked up, or too "
        "many uploads are in progress",
        "Wait; add replicas, or raise `gateway.holdMaxRequests` or `gateway.spoolMaxBytes`",
        Retry.LATER,
    ),
    GatewayError(
        503,
        None,
        "Too many connections are open, or the buffer for request bodies is full",
        "Wait; raise `gateway.connectionsMax`, the limit of open files or "
        "`gateway.bufferMaxBytes`, or run more workers",
        Retry.LATER,
    ),
    GatewayError(
        504,
        "timeout",
        "No replica became ready or had room within `gateway.holdTimeout` or `X-KubeAI-Max-Wait`, "
        "or none responded within `gateway.firstByteTimeout`",
        "Wait for the replica: `kubectl describe model NAME`; raise the timeout",
        Retry.LATER,
    ),
)


def errors_of(status: int) -> tuple[GatewayError, ...]:
    """The errors with a status."""
    return tuple(error for error in ERRORS if error.status == status)
