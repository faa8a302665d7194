"""Trace files: the requests of a real service, with their times and lengths but mostly no text.

The formats are those of Mooncake's and Qwen-Bailian's published traces, with the field names that
Dynamo and AIPerf also accept; docs/reference/bench.md describes them. The format of a line, and
with it the unit of its ``timestamp``, follows from its fields. Used by ``kubeai.loadtest``.

The text is generated per request on demand, since that of an hour would be gigabytes. It depends
only on the ``hash_ids``, so that prompts begin alike exactly as far as the real ones did.
"""

from __future__ import annotations

import functools
from array import array
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from kubeai.errors import decode_problem
from kubeai.simulation import text
from kubeai.simulation.json_lines import read_lines
from kubeai.simulation.traffic import Conversation, Message, TrafficError, Turn

LENGTH_MAX_TOKENS = 10_000_000  # of a prompt or a reply
MOONCAKE_BLOCK_TOKENS = 512
BAILIAN_BLOCK_TOKENS = 16
GIT_LFS_POINTER = b"version https://git-lfs"

_Format = Literal["Mooncake", "Bailian"]
_UNITS: dict[_Format, str] = {"Mooncake": "milliseconds", "Bailian": "seconds"}
# A prompt's text beyond its last hash ID is that of a number above all 64-bit IDs.
_UNIQUE = 1 << 64


class TraceEntry(msgspec.Struct):
    """A request of a trace."""

    timestamp: float  # milliseconds
    input_length: int  # tokens; 0: has messages
    output_length: int  # tokens; 0: unknown
    hash_ids: array[int]  # one per block from the prompt's start; the last block may be partial
    block_tokens: int
    unique: int  # selects the text beyond the blocks in `hash_ids`
    messages: tuple[Message, ...] = ()

    def conversation(self, at_s: float) -> Conversation:
        """The request as a conversation of one turn that starts at ``at_s``.

        Without messages, the whole prompt is one user message.
        """
        if self.messages:
            *before, (_, last) = self.messages
            return Conversation((Turn(last, self.output_length),), tuple(before), at_s)
        prompt = "".join(_block(number, self.block_tokens) for number in self.hash_ids)
        more = self.input_length - len(self.hash_ids) * self.block_tokens
        if more > 0:
            prompt += text.spelled(_UNIQUE + self.unique, more)
        prompt = prompt[: self.input_length * text.TOKEN_BYTES]
        return Conversation((Turn(prompt, self.output_length),), (), at_s)

    @property
    def blocks(self) -> int:
        """The number of blocks of the prompt, with the partial one."""
        return -(-self.input_length // self.block_tokens)


def read_trace(
    path: Path, *, block_tokens: int | None = None, requests_max: int | None = None
) -> list[TraceEntry]:
    """The requests ordered by time, from a plain or gzip-compressed file of JSON lines.

    ``block_tokens`` is the length of the blocks that ``hash_ids`` stand for; None uses that of the
    format. ``requests_max`` limits the result to the first requests. TrafficError names the line
    and the field that cannot be used.
    """
    reader = _Reader(path, block_tokens)
    for number, line in read_lines(path):
        if line.strip():
            reader.add(number, line)
    return reader.entries()[:requests_max]


# -- lines -----------------------------------------------------------------------------------------

_Length = Annotated[int, msgspec.Meta(ge=0, le=LENGTH_MAX_TOKENS)]
_Time = Annotated[float, msgspec.Meta(ge=0)]


class _Line(msgspec.Struct, kw_only=True):
    """The fields of all formats; other fields are ignored."""

    timestamp: _Time | None = None
    created_time: _Time | None = None
    input_length: _Length | None = None
    input_tokens: _Length | None = None
    output_length: _Length | None = None
    output_tokens: _Length | None = None
    max_tokens: _Length | None = None
    hash_ids: list[int] | None = None
    text_input: str | None = None
    messages: list[dict[str, Any]] | None = None
    # Bailian's.
    chat_id: int | None = None
    parent_chat_id: int | None = None  # -1: none
    # Mooncake's, as written by Dynamo and AIPerf.
    session_id: str | int | None = None
    delay: float | None = None
    delay_ms: float | None = None
    message_mode: str | None = None
    context_mode: str | None = None
    schema: str | None = None


_decoder = msgspec.json.Decoder(_Line)
_OF_MOONCAKE = ("created_time", "session_id", "delay", "delay_ms", "messages", "text_input")


class _Reader:
    """Converts lines to entries; all must have the first one's format."""

    def __init__(self, path: Path, block_tokens: int | None) -> None:
        self._path = path
        self._block_tokens = block_tokens
        self._first: tuple[int, _Format] | None = None
        self._entries: list[TraceEntry] = []
        self._chats: dict[int, TraceEntry] = {}
        self._turns: list[tuple[TraceEntry, int]] = []  # with the parent's chat_id

    def add(self, number: int, data: bytes) -> None:
        where = f"{self._path}: line {number}"
        if data.startswith(GIT_LFS_POINTER):
            raise TrafficError(f"{where}: is a Git LFS pointer: get the file with `git lfs pull`")
        try:
            line = _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise TrafficError(f"{where}: {decode_problem(error)}") from None
        kind = _format(where, line)
        self._first = self._first or (number, kind)
        if self._first[1] != kind:
            first, other = self._first
            raise TrafficError(
                f"{where}: timestamp: is in {_UNITS[kind]} as in {kind}'s traces, but that of line "
                f"{first} is in {_UNITS[other]} as in {other}'s: split the file by format"
            )
        entry = _entry(where, line, kind, self._block_tokens, number)
        self._entries.append(entry)
        if line.chat_id is not None and line.parent_chat_id is not None:
            self._chats[line.chat_id] = entry
            if line.parent_chat_id >= 0:
                self._turns.append((entry, line.parent_chat_id))

    def entries(self) -> list[TraceEntry]:
        if not self._entries:
            raise TrafficError(f"{self._path}: is empty")
        pairs = [
            (parent, turn)
            for turn, parent_id in self._turns
            if (parent := self._chats.get(parent_id)) is not None and parent is not turn
        ]
        _continue(sorted(pairs, key=lambda pair: pair[1].timestamp))
        return sorted(self._entries, key=lambda entry: entry.timestamp)


def _format(where: str, line: _Line) -> _Format:
    if line.schema is not None:
        raise TrafficError(
            f"{where}: schema: {line.schema!r} is not supported: convert the file to Mooncake's "
            "format (timestamp, input_length, output_length, hash_ids)"
        )
    if line.chat_id is None and line.parent_chat_id is None:
        return "Mooncake"
    unclear = "cannot tell whether the timestamp is in seconds, as in Bailian's traces"
    for name in ("chat_id", "parent_chat_id"):
        if getattr(line, name) is None:
            raise TrafficError(
                f"{where}: {name}: is missing; {unclear}: add it (-1 if there is no parent), or "
                "remove the other one if the timestamp is in milliseconds"
            )
    for name in _OF_MOONCAKE:
        if getattr(line, name) is not None:
            raise TrafficError(
                f"{where}: {name}: is not a field of Bailian's format, but chat_id is; {unclear}: "
                "remove the fields of one format"
            )
    return "Bailian"


def _entry(
    where: str, line: _Line, kind: _Format, block_tokens: int | None, number: int
) -> TraceEntry:
    timestamp = _milliseconds(where, line, kind)
    messages = _messages(where, line)
    length = 0 if messages else _either(where, line, "input_length", "input_tokens") or 0
    output = _either(where, line, "output_length", "output_tokens")
    if messages and line.max_tokens is not None:
        output = line.max_tokens
    if not messages and length < 1:
        raise TrafficError(
            f"{where}: has neither messages nor text_input nor an input_length of 1 or more"
        )
    block = block_tokens or (BAILIAN_BLOCK_TOKENS if kind == "Bailian" else MOONCAKE_BLOCK_TOKENS)
    return TraceEntry(
        timestamp,
        length,
        output or 0,
        _hash_ids(where, line.hash_ids or [], length, block) if length else array("Q"),
        block,
        number,
        messages,
    )


def _milliseconds(where: str, line: _Line, kind: _Format) -> float:
    """The timestamp; refuses Unix time in another unit than the format's."""
    name = "timestamp" if line.created_time is None else "created_time"
    found: float | None = _either(where, line, "timestamp", "created_time")
    if found is None:
        hint = (
            "requests that start a delay after the previous response are not supported: "
            if line.delay is not None or line.delay_ms is not None
            else ""
        )
        raise TrafficError(f"{where}: timestamp: is missing; {hint}add it, in {_UNITS[kind]}")
    # In milliseconds, 10^9 to 10^11 are 12 days to 3 years: no trace is that long. In seconds they
    # are the years 2001 to 5138.
    unit = ""
    if kind == "Mooncake" and 1e9 <= found < 1e11:
        unit = "seconds: multiply all timestamps by 1000"
    elif found >= (1e14 if kind == "Mooncake" else 1e11):
        unit = f"a smaller unit: convert all timestamps to {_UNITS[kind]}"
    if unit:
        raise TrafficError(
            f"{where}: {name}: must be in {_UNITS[kind]}, but {found:.0f} looks like Unix time in "
            f"{unit}"
        )
    return found * 1000 if kind == "Bailian" else found


def _either(where: str, line: _Line, *names: str) -> Any:
    """The value of the one of these fields that is present, or None."""
    given = [name for name in names if getattr(line, name) is not None]
    if len(given) > 1:
        raise TrafficError(f"{where}: {given[1]}: means the same as {given[0]}: remove one of them")
    return getattr(line, given[0]) if given else None


def _messages(where: str, line: _Line) -> tuple[Message, ...]:
    for name in ("message_mode", "context_mode"):
        if (getattr(line, name) or "").startswith("delta"):
            raise TrafficError(
                f"{where}: {name}: prompts without their history are not supported: write each "
                "request with its complete prompt"
            )
    if line.text_input is None:
        return tuple(
            (str(one.get("role", "user")), _said(one.get("content"))) for one in line.messages or ()
        )
    if line.messages is not None:
        raise TrafficError(f"{where}: text_input: cannot be combined with messages")
    return (("user", line.text_input),)


def _said(content: Any) -> str:
    """The text of a message's content: a string or a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def _hash_ids(where: str, found: list[int], length: int, block_tokens: int) -> array[int]:
    blocks = -(-length // block_tokens)
    if len(found) > blocks:
        raise TrafficError(
            f"{where}: hash_ids: has {len(found)} blocks, but {length} tokens are {blocks} of "
            f"{block_tokens} tokens: set the size of the blocks with --trace-block-tokens"
        )
    most = min(text.spellings(block_tokens), 1 << 64)
    if found and not 0 <= min(found) <= max(found) < most:
        raise TrafficError(
            f"{where}: hash_ids: must be 0 to {most - 1} with blocks of {block_tokens} tokens"
        )
    return array("Q", found)


# -- text ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)  # blocks that requests share; 2 KiB each with Mooncake's
def _block(number: int, tokens: int) -> str:
    return text.spelled(number, tokens)


def _continue(turns: list[tuple[TraceEntry, TraceEntry]]) -> None:
    """Make the prompt of each turn start with its parent's, where its hash IDs do.

    Takes (parent, turn) ordered by time. Prompts whose last block has an ID already have that text.
    One whose IDs end earlier gets those of its first continuation.
    """
    first: dict[int, tuple[TraceEntry, TraceEntry]] = {}
    for parent, turn in turns:
        if _continues(parent, turn):
            first.setdefault(id(parent), (parent, turn))
    # Later turns first: a turn may itself get IDs from its continuation.
    for parent, turn in reversed(first.values()):
        known = len(parent.hash_ids)
        parent.hash_ids.extend(turn.hash_ids[known : parent.blocks])
    for parent, turn in first.values():
        if _continues(parent, turn):  # the turn's IDs end within the parent's prompt, too
            turn.unique = parent.unique


def _continues(parent: TraceEntry, turn: TraceEntry) -> bool:
    known = len(parent.hash_ids)
    return (
        0 < known < parent.blocks
        and turn.input_length >= parent.input_length
        and turn.hash_ids[:known] == parent.hash_ids
    )
