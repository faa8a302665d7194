"""The record of a request that the access log and the tracing take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from kubeai._prompt import Prompt

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
