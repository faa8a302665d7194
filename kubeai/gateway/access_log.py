"""The access log and OpenTelemetry spans.

If neither is enabled, the worker creates no :class:`Observers`, and the cost per request is one
comparison. Both are called when a request's head is complete and when the request has ended; each
writes from its own thread. Created by the worker, called by proxy.py.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from queue import Full, Queue
from select import PIPE_BUF
from typing import TYPE_CHECKING, Any

import msgspec

from kubeai._prompt import Prompt
from kubeai.gateway.tracing import Tracing, make_tracing
from kubeai.logs import get_logger

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from kubeai.api.config.system import GatewayConfig
    from kubeai.gateway.observation import End, RequestEnd, RequestStart

log = get_logger(__name__)

QUEUE_MAX_LINES = 10_000
CLOSE_TIMEOUT_S = 2.0
PATH_MAX_CHARS = 200


class Line(msgspec.Struct, omit_defaults=True):
    """One request in the access log; times in seconds, body sizes in bytes."""

    time: str  # when its head was complete, UTC
    request_id: str
    client: str
    method: str
    path: str
    status: int  # 0: the client disconnected before the response began
    end: str  # see observation.End
    duration_s: float
    request_bytes: int
    answer_bytes: int
    first_byte_s: float | None = None
    model: str | None = None
    endpoint: str | None = None
    retries: int = 0
    prompt: Prompt | None = None  # with `accessLogPrompts`; written by `_prompt_fields`
    dropped: int = 0  # lines dropped before this one because the queue was full


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """A prompt in the log: hashes in hexadecimal, and the depth of each block in tokens."""
    fields: dict[str, Any] = {"tokens": prompt.tokens, "stream": prompt.streams}
    if prompt.has_key:
        fields["key"] = f"{prompt.key:016x}"
    fields["blocks"] = [f"{block:016x}" for block, _ in prompt.samples]
    fields["depths"] = [depth for _, depth in prompt.samples]
    return fields


def _write_out(text: bytes) -> None:
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


class AccessLog:
    """Writes JSON lines from a thread. Lines are dropped and counted if it cannot keep up.

    The workers share a pipe, in which writes of up to ``PIPE_BUF`` bytes are atomic. No line is
    longer, and none is split over two writes.
    """

    def __init__(
        self,
        sample: float,
        write: Callable[[bytes], object] = _write_out,
        random: Callable[[], float] = random.random,
    ) -> None:
        """``sample``: the share of complete responses below 500 to log. All others are logged."""
        self._sample = sample
        self._write = write
        self._random = random
        self._dropped = 0
        self._lines: Queue[Line | None] = Queue(QUEUE_MAX_LINES)
        self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
        self._thread.start()

    def wants(self, status: int, end: End) -> bool:
        """Whether a request that ended like this is logged."""
        well = end == "whole" and status < 500
        return not well or self._sample >= 1 or self._random() < self._sample

    def add(self, line: Line) -> None:
        """Queue a line; dropped and counted if the queue is full."""
        line.dropped = self._dropped
        try:
            self._lines.put_nowait(line)
            self._dropped = 0
        except Full:
            self._dropped += 1

    def close(self) -> None:
        """Write the queued lines, but do not wait for a stalled reader."""
        try:
            self._lines.put(None, timeout=CLOSE_TIMEOUT_S)
        except Full:
            return
        self._thread.join(CLOSE_TIMEOUT_S)

    def _run(self) -> None:
        # Prompts are encoded here, in the thread: 64 hashes take longer than the rest of a line.
        encode = msgspec.json.Encoder(enc_hook=_prompt_fields).encode
        text = b""
        while (line := self._lines.get()) is not None:
            encoded = encode(line) + b"\n"
            if len(text) + len(encoded) > PIPE_BUF:
                self._put(text)
                text = b""
            text += encoded
            if self._lines.empty():
                self._put(text)
                text = b""
        self._put(text)

    def _put(self, text: bytes) -> None:
        try:
            self._write(text)
        except OSError as error:  # a full disk or a closed pipe must not stop the thread
            log.warning("cannot write access log", reason=str(error))


def make_observers(config: GatewayConfig) -> Observers | None:
    """Create what the config and OpenTelemetry's environment enable; None if that is nothing.

    ConfigError if tracing is enabled and OpenTelemetry is not installed.
    """
    access_log = AccessLog(config.access_log_sample) if config.access_log_sample else None
    tracing = make_tracing()
    return Observers(access_log, tracing) if access_log or tracing else None


class Observers:
    """See the module."""

    def __init__(self, access_log: AccessLog | None, tracing: Tracing | None) -> None:
        self.access_log = access_log
        self.tracing = tracing

    def began(self, request: RequestStart) -> Observation:
        """Start observing a request."""
        return Observation(self, request)

    def close(self) -> None:
        """Flush the access log and the spans."""
        if self.access_log is not None:
            self.access_log.close()
        if self.tracing is not None:
            self.tracing.close()


class Observation:
    """The observation of one request. ``upstream_headers``: to set in the request to the engine."""

    __slots__ = ("_began_s", "_observers", "_request", "_span", "_time_s", "upstream_headers")

    def __init__(self, observers: Observers, request: RequestStart) -> None:
        self._observers = observers
        self._request = request
        self._time_s = time.time()
        self._began_s = time.monotonic()
        self._span: Span | None = None
        self.upstream_headers: dict[str, str] = {}
        if observers.tracing is not None:
            self._span, self.upstream_headers = observers.tracing.began(request)

    def ended(self, ending: RequestEnd) -> None:
        """Log the request and end its span."""
        access_log, tracing = self._observers.access_log, self._observers.tracing
        first_byte_s = ending.answered_s - self._began_s if ending.answered_s else None
        if access_log is not None and access_log.wants(ending.status, ending.end):
            access_log.add(self._line(ending, first_byte_s))
        if tracing is not None and self._span is not None:
            tracing.ended(self._span, ending, first_byte_s)

    def _line(self, ending: RequestEnd, first_byte_s: float | None) -> Line:
        request = self._request
        return Line(
            time=datetime.fromtimestamp(self._time_s, UTC).isoformat(timespec="milliseconds"),
            request_id=request.request_id,
            client=request.peer,
            method=request.method,
            path=request.target[:PATH_MAX_CHARS],
            status=ending.status,
            end=ending.end,
            duration_s=round(time.monotonic() - self._began_s, 6),
            request_bytes=ending.request_bytes,
            answer_bytes=ending.response_bytes,
            first_byte_s=None if first_byte_s is None else round(first_byte_s, 6),
            model=ending.model,
            endpoint=ending.endpoint,
            retries=ending.retry_count,
            prompt=ending.prompt if ending.prompt is not None and ending.prompt.tokens else None,
        )
