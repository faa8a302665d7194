"""OpenTelemetry spans, one per request. Requires the extra ``otel``.

Enabled by OpenTelemetry's environment variables: ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or
``…_TRACES_ENDPOINT``), with ``OTEL_TRACES_SAMPLER``, ``OTEL_SERVICE_NAME`` and others as its SDK
defines them. ``OTEL_SDK_DISABLED`` and ``OTEL_TRACES_EXPORTER=none`` disable it. The request's
``traceparent`` becomes the parent of its span, and the engine receives the span's instead. Without
tracing it is forwarded unchanged. A thread of the SDK exports spans over HTTP, from a queue that
drops spans when it is full. Called by access_log.py, and by the supervisor when it starts.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

import kubeai
from kubeai.errors import ConfigError, install_hint
from kubeai.openai.routes import path_template

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from kubeai.gateway.observation import RequestEnd, RequestStart

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SERVICE_NAME = "kubeai"
CLOSE_TIMEOUT_MS = 2_000
PATH_MAX_CHARS = 200  # of a span, which may wait in the queue


def wants_tracing() -> str | None:
    """The environment variable that enables tracing, or None."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    if os.environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return None
    return next((name for name in ENDPOINTS if os.environ.get(name)), None)


def check_tracing() -> bool:
    """Whether the environment enables tracing; ConfigError if OpenTelemetry is not installed.

    The supervisor also calls this, before it starts workers that would fail.
    """
    variable = wants_tracing()
    if variable is None:
        return False
    try:
        importlib.import_module("opentelemetry.sdk.trace")
        importlib.import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    except ImportError:
        raise ConfigError(
            variable, f"tracing requires OpenTelemetry: {install_hint('otel')}; or unset it"
        ) from None
    return True


def make_tracing() -> Tracing | None:
    """Create the tracer if the environment enables it; see :func:`check_tracing`."""
    if not check_tracing():
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME as SERVICE_NAME_KEY
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME_KEY: SERVICE_NAME}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider)


class Tracing:
    """The spans of one worker."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("kubeai.gateway", kubeai.__version__)
        self._kind = SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()
        self._error = Status(StatusCode.ERROR)
        self._set_span_in_context = set_span_in_context

    def began(self, request: RequestStart) -> tuple[Span, dict[str, str]]:
        """Start a request's span as a child of the client's.

        Also returns the headers that make it the parent of the engine's span.
        """
        path = request.target.partition("?")[0][:PATH_MAX_CHARS]
        span = self._tracer.start_span(
            f"{request.method} {path_template(path)}" if request.is_inference else request.method,
            context=self._propagator.extract(request.trace_headers),
            kind=self._kind,
            attributes={
                "http.request.method": request.method,
                "url.path": path,
                "client.address": request.peer,
                "kubeai.request_id": request.request_id,
            },
        )
        sent: dict[str, str] = {}
        self._propagator.inject(sent, self._set_span_in_context(span))
        return span, sent

    def ended(self, span: Span, request: RequestEnd, first_byte_s: float | None) -> None:
        """Set the attributes of the response and end the span."""
        if span.is_recording():
            if request.status:
                span.set_attribute("http.response.status_code", request.status)
            if request.model is not None:
                span.set_attribute("gen_ai.request.model", request.model)
            if request.endpoint is not None:
                span.set_attribute("kubeai.endpoint", request.endpoint)
            if request.retry_count:
                span.set_attribute("http.request.resend_count", request.retry_count)
            if first_byte_s is not None:
                span.set_attribute("kubeai.first_byte_s", first_byte_s)
            span.set_attribute("kubeai.end", request.end)
            if request.status >= 500 or request.end == "broken":
                span.set_status(self._error)
        span.end()

    def close(self) -> None:
        """Export the remaining spans, for at most ``CLOSE_TIMEOUT_MS``."""
        self._provider.force_flush(CLOSE_TIMEOUT_MS)
        self._provider.shutdown()
