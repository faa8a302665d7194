"""Reads KubeAI's access log, to replay its requests on simulated engines.

The log has no text. With ``gateway.accessLogPrompts`` it has what routing uses of each prompt: its
estimated length, the hash key, and the hashes of sampled blocks with their depths. The engines' KV
blocks are derived from those, see :meth:`LoggedRequest.block_hashes`. Used by ``kubeai.loadtest``.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from kubeai._prompt import BLOCKS_MAX
from kubeai.errors import decode_problem
from kubeai.openai.request import split_model
from kubeai.openai.routes import Kind, route_table
from kubeai.simulation.json_lines import read_lines
from kubeai.simulation.results import Measurement
from kubeai.simulation.traffic import TrafficError

ENABLE = "set gateway.accessLogPrompts to true and record the log again"
# The size of one token's event in a stream, with a chunk's framing and without the model's name;
# vLLM sends an event per token. Other kinds generate no tokens.
EVENT_BYTES = {Kind.CHAT: 233, Kind.COMPLETIONS: 242, Kind.RESPONSES: 218, Kind.MESSAGES: 124}
WHOLE_BYTES = 850  # head and JSON of a response that is not streamed, without its text
STREAM_BYTES = 800  # head, and the events of a stream that have no token
TOKEN_BYTES = 4
OUTPUT_MAX_TOKENS = 1 << 20  # longer responses are not text
_MASK = (1 << 64) - 1
_MULTIPLIER = 0x9E3779B97F4A7C15


class LoggedRequest(msgspec.Struct, kw_only=True):
    """A complete request of the log. Times in seconds, ``at_s`` since the first request's."""

    at_s: float
    tokens: int  # of the prompt, as the gateway estimated
    key: int | None  # of PrefixHash
    blocks: array[int]  # hashes of the sampled blocks, in order
    depths: array[int]  # tokens up to the end of each
    streams: bool
    output_tokens: int  # estimated from the size of the response
    endpoint: str
    first_byte_s: float  # since at_s
    duration_s: float

    def block_hashes(self, number: int, block_tokens: int) -> list[int]:
        """Hashes of the full KV blocks of prompt and output, as an engine would find them.

        A block's hash follows from the first sample that ends where the block does or later, which
        covers all of it, and from the block's position: where two prompts have a sample in common,
        they have all blocks up to it in common. Blocks beyond the last sample depend on ``number``,
        which must be the request's own: no other request has them.
        """
        hashes = []
        unique = _mix(number, 1)
        at = 0
        for end in range(block_tokens, self.tokens + self.output_tokens + 1, block_tokens):
            while at < len(self.depths) and self.depths[at] < end:
                at += 1
            covered = at < len(self.depths) and end <= self.tokens
            hashes.append(_mix(self.blocks[at] if covered else unique, end))
        return hashes

    def measurement(self, number: int) -> Measurement:
        """What the gateway measured. The time to the first byte counts if it was a stream's."""
        return Measurement(
            number,
            0,
            self.at_s,
            self.at_s,
            first_s=self.at_s + self.first_byte_s if self.streams else math.nan,
            ended_s=self.at_s + self.duration_s,
            prompt_tokens=self.tokens,
            output_tokens=self.output_tokens,
            endpoint=self.endpoint,
        )


def _mix(value: int, position: int) -> int:
    """A 64-bit hash of two numbers (the finalizer of SplitMix64)."""
    value = (value + position * _MULTIPLIER) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class AccessLog(NamedTuple):
    """The requests that can be replayed, ordered by time, and how many others there are."""

    model: str
    requests: list[LoggedRequest]
    skipped: dict[str, int]  # reason → lines
    dropped: int  # requests that the gateway could not log in time

    @property
    def endpoints(self) -> int:
        """The number of endpoints that responded."""
        return len({request.endpoint for request in self.requests})

    @property
    def warnings(self) -> list[str]:
        """What the replayed requests lack of the real ones."""
        found = []
        if self.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.items())
            found.append(f"skipped {sum(self.skipped.values()):,} lines: {reasons}")
        if self.dropped:
            found.append(f"the log lacks {self.dropped:,} requests that could not be written")
        return found


# -- lines -----------------------------------------------------------------------------------------

_Hash = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{1,16}\Z")]
_Tokens = Annotated[int, msgspec.Meta(ge=0, le=(1 << 32) - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0)]
_Seconds = Annotated[float, msgspec.Meta(ge=0)]


class _Prompt(msgspec.Struct):
    """See `_prompt_fields` in gateway/access_log.py."""

    tokens: Annotated[int, msgspec.Meta(ge=1, le=1 << 26)]
    blocks: Annotated[list[_Hash], msgspec.Meta(max_length=BLOCKS_MAX)]
    depths: list[_Tokens]
    key: _Hash | None = None
    stream: bool = False


class _Line(msgspec.Struct):
    """The fields that a replay needs; see `Line` in gateway/access_log.py."""

    time: str
    request_id: str
    path: str
    status: int
    end: str
    duration_s: _Seconds
    answer_bytes: _Count
    first_byte_s: _Seconds | None = None
    model: str | None = None
    endpoint: str | None = None
    prompt: _Prompt | None = None
    dropped: _Count = 0


_line = msgspec.json.Decoder(_Line)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ENDS = {"left": "whose client disconnected", "broken": "that the engine cut short"}
_OTHER_LOG = "of KubeAI's other logs"


def is_access_log(path: Path) -> bool:
    """Whether it is an access log rather than a trace. TrafficError if it is neither."""
    number = 0
    for number, data in read_lines(path):
        fields = _decode(f"{path}: line {number}", data) if data.strip() else {}
        if not fields or _is_message(fields):
            continue
        if fields.keys() >= {"request_id", "duration_s", "answer_bytes"}:
            return True
        if fields.keys() & {"timestamp", "created_time", "input_length", "hash_ids", "messages"}:
            return False
        raise TrafficError(
            f"{path}: line {number}: is neither of an access log of KubeAI nor of a trace"
        )
    raise TrafficError(f"{path}: " + ("has no requests" if number else "is empty"))


def _decode(where: str, data: bytes) -> dict[str, msgspec.Raw]:
    try:
        return _fields.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise TrafficError(
            f"{where}: is neither of an access log of KubeAI nor of a trace: "
            f"{decode_problem(error)}"
        ) from None


def _is_message(fields: Iterable[str]) -> bool:
    """Whether a line is of the log on stderr, which `kubectl logs` shows together with stdout's."""
    return {"event", "level"} <= set(fields)


def read_access_log(path: Path, model: str | None = None) -> AccessLog:
    """The requests of one model. ``model`` None: the only one in the log.

    TrafficError names the line that cannot be read, or says why there is nothing to replay.
    """
    reader = _Reader(path, model)
    for number, data in read_lines(path):
        if data.strip():
            reader.add(f"{path}: line {number}", data)
    return reader.found()


class _Reader:
    def __init__(self, path: Path, model: str | None) -> None:
        self._path = path
        self._model = model
        self._skipped: Counter[str] = Counter()
        self._dropped = 0
        self._requests: dict[str, list[LoggedRequest]] = {}  # by Model

    def add(self, where: str, data: bytes) -> None:
        try:
            line = _line.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if _is_message(_decode(where, data)):
                self._skipped[_OTHER_LOG] += 1
                return
            raise TrafficError(f"{where}: {decode_problem(error)}") from None
        self._dropped += line.dropped
        if reason := self._unfit(line):
            self._skipped[reason] += 1
            return
        assert line.model is not None
        model, _ = split_model(line.model)
        self._requests.setdefault(model, []).append(_request(where, line))

    def _unfit(self, line: _Line) -> str:
        """Why the request cannot be replayed; "" if it can."""
        kind = _kind(line.path)
        if kind is None or kind.is_local:
            return "of other paths than inference"
        if not 200 <= line.status < 300:
            return f"with status {line.status}"
        if line.end != "whole":
            return _ENDS.get(line.end, f"that ended {line.end!r}")
        if line.model is None or (self._model or line.model) not in (
            line.model,
            split_model(line.model)[0],
        ):
            return "of other models"
        return "" if line.prompt else "without hashes of the prompt"

    def found(self) -> AccessLog:
        if not self._requests:
            raise TrafficError(f"{self._path}: {self._nothing()}")
        if len(self._requests) > 1:
            names = sorted(self._requests, key=lambda name: (-len(self._requests[name]), name))
            listed = ", ".join(f"{name} ({len(self._requests[name]):,})" for name in names[:10])
            raise TrafficError(
                f"{self._path}: has requests of {len(names)} models: choose one with --model: "
                + listed
            )
        ((model, requests),) = self._requests.items()
        requests.sort(key=lambda request: request.at_s)
        first_s = requests[0].at_s
        for request in requests:
            request.at_s = round(request.at_s - first_s, 6)
        skipped = dict(self._skipped.most_common())
        return AccessLog(model, requests, skipped, self._dropped)

    def _nothing(self) -> str:
        if self._skipped["without hashes of the prompt"]:
            return f"has no hashes of prompts: {ENABLE}"
        reasons = [f"{count:,} {reason}" for reason, count in self._skipped.most_common() if count]
        listed = f", only lines {', '.join(reasons)}" if reasons else ""
        return f"has no request to replay{listed}"


def _request(where: str, line: _Line) -> LoggedRequest:
    prompt = line.prompt
    assert prompt is not None
    if len(prompt.blocks) != len(prompt.depths):
        raise TrafficError(
            f"{where}: prompt: has {len(prompt.blocks)} blocks, but {len(prompt.depths)} depths"
        )
    if any(before > after for before, after in itertools.pairwise(prompt.depths)):
        raise TrafficError(f"{where}: prompt.depths: are not in order")
    return LoggedRequest(
        at_s=_time_s(where, line.time),
        tokens=prompt.tokens,
        key=None if prompt.key is None else int(prompt.key, 16),
        blocks=array("Q", (int(block, 16) for block in prompt.blocks)),
        depths=array("L", prompt.depths),
        streams=prompt.stream,
        output_tokens=_output_tokens(line, streams=prompt.stream),
        endpoint=line.endpoint or "",
        first_byte_s=math.nan if line.first_byte_s is None else line.first_byte_s,
        duration_s=line.duration_s,
    )


def _time_s(where: str, time: str) -> float:
    try:
        at = datetime.fromisoformat(time)
    except ValueError:
        raise TrafficError(f"{where}: time: {time!r} is not a time as in RFC 3339") from None
    return at.replace(tzinfo=at.tzinfo or UTC).timestamp()


def _kind(path: str) -> Kind | None:
    return route_table.get(path.partition("?")[0])


def _output_tokens(line: _Line, *, streams: bool) -> int:
    """The length of the response, estimated from its size."""
    kind = _kind(line.path)
    if kind not in EVENT_BYTES:
        return 0
    if streams:
        event_bytes = EVENT_BYTES[kind] + len(line.model or "")
        tokens = round((line.answer_bytes - STREAM_BYTES) / event_bytes)
    else:
        tokens = (line.answer_bytes - WHOLE_BYTES) // TOKEN_BYTES
    return max(1, min(tokens, OUTPUT_MAX_TOKENS))
