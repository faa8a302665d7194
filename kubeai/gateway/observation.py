"""The record of a request that the access log and the tracing take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from kubeai._prompt import Prompt
    from kubeai.gateway.relay._exchange import Exchange

# "whole", "left" (the client disconnected), "broken" (the engine's response was cut short).
End = Literal["whole", "left", "broken"]


class RequestStart(NamedTuple):
    """A request whose head is complete."""

    request_id: str
    peer: str  # the client's address, without the port
    method: str
    target: str
    is_inference: bool  # whether the path is in the route table; others are unbounded in number
    trace_headers: dict[str, str]  # the request's "traceparent" and "tracestate", if present


class RequestEnd(NamedTuple):
    """A request that has ended."""

    status: int  # of the response; 0: the client disconnected before it began
    end: End
    answered_s: float  # when the response began (CLOCK_MONOTONIC); 0: it did not
    request_bytes: int  # size of the request's body
    response_bytes: int  # written to the client, including heads and framing
    model: str | None  # the requested model, if it exists
    endpoint: str | None  # of the last attempt
    retry_count: int
    prompt: Prompt | None = None  # None: unknown, or not to be recorded


def request_start(
    exchange: Exchange, *, is_inference: bool, keeps_query: bool = True
) -> RequestStart:
    """The record of a request whose head is complete.

    ``keeps_query``: False if the query may have a secret, such as an API key in the wrong place.
    """
    return RequestStart(
        request_id=exchange.request_id,
        peer=exchange.peer,
        method=exchange.method,
        target=exchange.target if keeps_query else exchange.target.partition("?")[0],
        is_inference=is_inference,
        trace_headers={
            name: values[0].decode("latin-1")
            for name in ("traceparent", "tracestate")
            if (values := exchange.headers(name.encode()))
        },
    )


def request_end(
    exchange: Exchange,
    *,
    model: str | None,
    endpoint: str | None,
    retry_count: int,
    prompt: Prompt | None,
) -> RequestEnd:
    """The record of a request that has ended."""
    return RequestEnd(
        status=exchange.status,
        end="broken" if exchange.broken else "whole" if exchange.whole else "left",
        answered_s=exchange.answered_s,
        request_bytes=exchange.request_bytes,
        response_bytes=exchange.answer_bytes,
        model=model,
        endpoint=endpoint,
        retry_count=retry_count,
        prompt=prompt,
    )
