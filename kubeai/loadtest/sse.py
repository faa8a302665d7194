"""Reads the stream of a chat completion at low cost per event.

An event with text is recognised from its bytes alone: JSON escapes quotes inside strings, so
``"content":"`` can only be the field. All other events are decoded: roles, reasoning, tool calls,
usage, errors, and text from servers that write JSON with spaces. In most streams the text is at the
same offset in each event: these are counted without parsing lines or keeping the event
(`_streams`). Data may be split anywhere, and lines may end in CRLF.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

import msgspec

from kubeai.loadtest._streams import Stream

LINE_MAX_BYTES = 1 << 20
_FIELD = b"data:"
_CONTENT, _USAGE = b'"content":"', b'"usage":{'
_CONTENT_BYTES = len(_CONTENT)


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class ReportedUsage(msgspec.Struct):
    """Token counts that the endpoint reported; -1 if it did not."""

    prompt_tokens: int = -1
    completion_tokens: int = -1
    prompt_tokens_details: _Details | None = None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens found in a cache; -1 if the endpoint did not report it."""
        details = self.prompt_tokens_details
        return -1 if details is None or details.cached_tokens is None else details.cached_tokens


class Delta(msgspec.Struct):
    """A message or a delta. Older and newer engines name the reasoning field differently."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None

    def is_empty(self) -> bool:
        """Whether it has no text, reasoning or tool calls."""
        return not (self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(msgspec.Struct):
    delta: Delta | None = None
    message: Delta | None = None


class Completion(msgspec.Struct):
    """A stream event or a non-streamed response, with the fields used here."""

    choices: list[_Choice] = []
    usage: ReportedUsage | None = None
    error: Any = None

    @property
    def deltas(self) -> list[Delta]:
        """The message or delta of each choice."""
        found = (choice.delta or choice.message for choice in self.choices)
        return [one for one in found if one is not None]

    @property
    def text(self) -> str:
        """The text of all choices."""
        return "".join(one.content or "" for one in self.deltas)


decode_completion = msgspec.json.Decoder(Completion).decode


class Reader(Stream):
    """One stream. ``times_s`` holds the arrival time, on ``clock``, of each event with content.

    ``keep`` retains the text. Call `feed` with the received data (a `Poller` may already have
    counted some events) and `close` at the end. Afterwards ``done`` tells whether the stream
    completed, and ``problem`` what was wrong with it.
    """

    __slots__ = ("_clock", "done", "others", "problem", "usage")

    def __init__(self, *, keep: bool = False, clock: Callable[[], float] = monotonic) -> None:
        self.others = 0  # events without text
        self.done = False  # `[DONE]` was received
        self.usage: ReportedUsage | None = None
        self.problem = ""
        self._clock = clock
        if keep:
            self.keep()

    def feed(self, piece: bytes) -> None:
        """Take received data, which may be split anywhere."""
        now_s = self._clock()
        if not self.take(piece, now_s):
            self._lines(piece, now_s)

    def keep(self) -> None:
        """From now on, keep the received data as ``body``."""
        if self.kept is None:
            self.kept = []

    def close(self) -> None:
        """End of the stream. The last line need not end in a line feed."""
        if self.rest:
            self._lines(b"\n", self._clock())

    @property
    def body(self) -> bytes:
        """The received data, if kept."""
        return b"".join(self.kept or ())

    @property
    def text(self) -> str:
        """The text without reasoning, as a client would keep it in its history."""
        lines = self.body.splitlines()
        events = (line[5:].strip() for line in lines if line.startswith(_FIELD))
        return "".join(_text(event) for event in events if event and event != b"[DONE]")

    def _lines(self, piece: bytes, now_s: float) -> None:
        if self.kept is not None:
            self.kept.append(piece)
        lines = (self.rest + piece).split(b"\n")
        self.rest = lines.pop()
        for line in lines:
            if line.startswith(_FIELD):
                self._event(line, now_s)
        if len(self.rest) > LINE_MAX_BYTES:
            self.rest = b""
            self.problem = f"event larger than {LINE_MAX_BYTES >> 20} MiB"

    def _event(self, line: bytes, now_s: float) -> None:
        at = line.find(_CONTENT)
        data = line[len(_FIELD) :].strip()
        if at >= 0 and line[at + _CONTENT_BYTES :][:1] not in (b'"', b""):
            self.note(now_s)
            if _USAGE in line:
                self.forget()
                self._decoded(data)
            else:
                self.learn(line, at)
        elif data == b"[DONE]":
            self.done = True
            self.others += 1
        elif data:
            self._other(data, now_s)

    def _other(self, data: bytes, now_s: float) -> None:
        event = self._decoded(data)
        if event is not None and not all(one.is_empty() for one in event.deltas):
            self.note(now_s)
        else:
            self.others += 1

    def _decoded(self, data: bytes) -> Completion | None:
        try:
            event = decode_completion(data)
        except msgspec.DecodeError as error:
            self.problem = self.problem or f"invalid event: {error}"
            return None
        if event.usage is not None:
            self.usage = event.usage
        if event.error is not None:
            self.problem = self.problem or data.decode(errors="replace")
        return event


def _text(event: bytes) -> str:
    try:
        return decode_completion(event).text
    except msgspec.DecodeError:
        return ""
