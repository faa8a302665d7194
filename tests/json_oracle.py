"""JSON request bodies read in plain Python, with msgspec: the reference for the compiled reader.

Used by the tests only, for comparisons with hypothesis. Keeps state between calls, so it must only
be called from one thread.
"""

from __future__ import annotations

import re
import struct
from typing import Any

import mmh3
import msgspec
from msgspec import Raw

from kubeai.errors import quoted
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.request import split_model
from kubeai.openai.routes import Kind

TOP_LEVEL_KEYS_MAX_COUNT = 1000
NESTING_MAX_COUNT = 981  # of lists and objects: 980 of a value, and the body itself

_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]', re.DOTALL)
_encode = msgspec.json.Encoder().encode


class Parsed(msgspec.Struct, frozen=True):
    """A parsed request."""

    kind: Kind
    model: str  # as the client wrote it
    name: str  # of the Model
    adapter: str | None = None  # "" if the first "_" is the last character: matches no adapter
    stream: bool = False
    hash_input: dict[str, Raw] = {}  # the fields that hash_key reads, still JSON


_TEXTS: dict[Kind, str] = {  # the member that is hashed, if it is not a conversation
    Kind.COMPLETIONS: "prompt",
    Kind.SYSTEM_ONE: "state",
    Kind.EMBEDDINGS: "input",
    Kind.EMBED_V2: "texts",
    Kind.RERANK: "query",
    Kind.SCORE: "queries",
    Kind.GENERATIVE_SCORING: "query",
    Kind.POOLING: "input",
    Kind.CLASSIFY: "input",
    Kind.SPEECH: "input",
    Kind.OLLAMA_GENERATE: "prompt",
    Kind.OLLAMA_EMBED: "input",
    Kind.OLLAMA_EMBEDDINGS: "prompt",
}
_CONVERSATIONS: dict[Kind, str] = {
    Kind.CHAT: "messages",
    Kind.CHAT_BATCH: "messages",
    Kind.RESPONSES: "input",
    Kind.MESSAGES: "messages",
    Kind.OLLAMA_CHAT: "messages",
}
SYSTEMS: dict[Kind, str] = {
    Kind.RESPONSES: "instructions",
    Kind.MESSAGES: "system",
    Kind.SYSTEM_ONE: "instructions",
    Kind.OLLAMA_GENERATE: "system",
}
_STREAMS = (Kind.OLLAMA_CHAT, Kind.OLLAMA_GENERATE)  # unless the body says otherwise


def _hash_fields(kind: Kind) -> set[str]:
    return {fields[kind] for fields in (_TEXTS, _CONVERSATIONS, SYSTEMS) if kind in fields}


def parse(kind: Kind, body: bytes) -> Parsed:
    """Parse a request's JSON body. ErrorResponse if it is invalid or ambiguous; see request.py."""
    model: Raw | None = None
    stream = kind in _STREAMS
    hashed: dict[str, Raw] = {}
    wanted = _hash_fields(kind)
    for key, value in _top_level(body).items():
        text = key.text
        if text in wanted:
            hashed[text] = value
        elif text == "stream":
            stream = bytes(value) == b"true" or (kind in _STREAMS and bytes(value) != b"false")
        elif len(text) == 5 and text.lower() == "model":
            if model is not None or text != "model":
                raise ErrorResponse(
                    "The body has several keys that may be read as 'model'."
                    if model is not None
                    else f"Unknown parameter {quoted(text)}: did you mean 'model'?",
                    param="model",
                )
            model = value
    if model is None:
        raise ErrorResponse("You must provide a model parameter.", param="model")
    model_text = _model_value(model)
    if kind.is_ollama and model_text != ":latest":
        model_text = model_text.removesuffix(":latest")
    name, adapter = split_model(model_text)
    return Parsed(kind, model_text, name, adapter, stream, hashed)


def replace_model(body: bytes, new: str) -> bytes:
    """The body with another top-level ``model``; all other bytes are unchanged.

    ``body`` must have been accepted by :func:`parse`.
    """
    position = 0
    for key, value in _top_level(body).items():
        member = _MEMBER.match(body, position)
        assert member is not None, "msgspec has validated the body"
        start = member.end()
        position = start + len(memoryview(value))
        if key.text == "model":
            view = memoryview(body)  # copies a long body once, not three times
            return b"".join((view[:start], _encode(new), view[position:]))
    raise ErrorResponse("You must provide a model parameter.", param="model")


# What precedes a top-level value: an opening brace or a comma, the key, a colon.
_MEMBER = re.compile(
    rb'[ \t\r\n]*[{,][ \t\r\n]*"[^"\\]*(?:\\.[^"\\]*)*"[ \t\r\n]*:[ \t\r\n]*', re.DOTALL
)


class _Key:
    """A key of the top-level object. Compares by identity, so that a dict keeps duplicates."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


_keys_left = 0


def _make_key(_type: type, text: Any) -> _Key:
    global _keys_left
    if not _keys_left:
        raise ValueError(f"more than {TOP_LEVEL_KEYS_MAX_COUNT} keys")
    _keys_left -= 1
    return _Key(text)


_top_level_decoder = msgspec.json.Decoder(dict[_Key, Raw], dec_hook=_make_key)
_string_decoder = msgspec.json.Decoder(str)


def _top_level(body: bytes) -> dict[_Key, Raw]:
    """All members of the body's object in order, with duplicates. Values are views of the body."""
    global _keys_left
    _keys_left = TOP_LEVEL_KEYS_MAX_COUNT
    try:
        if not body.isascii():
            body.decode()  # msgspec does not validate strings that it skips
        members = _top_level_decoder.decode(body)
    except UnicodeDecodeError as error:
        raise ErrorResponse(f"The body is not valid UTF-8 (byte {error.start}).") from None
    except msgspec.ValidationError as error:
        raise ErrorResponse(f"The body is not an acceptable JSON object: {error}.") from None
    except msgspec.DecodeError as error:
        raise ErrorResponse(f"The body is not valid JSON: {error}.") from None
    except RecursionError:  # until Python 3.13; later the limit is the stack's size
        raise ErrorResponse("The body is nested too deeply.") from None
    if _nesting(body) > NESTING_MAX_COUNT:
        raise ErrorResponse("The body is nested too deeply.")
    return members


def _nesting(body: bytes) -> int:
    """How deep lists and objects of valid JSON are nested, with the outermost one."""
    if body.count(b"[") + body.count(b"{") <= NESTING_MAX_COUNT:
        return 0  # not deeper than allowed
    deepest = depth = 0
    for token in _BRACKETS.finditer(body):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        deepest = max(deepest, depth)
    return deepest


def _model_value(raw: Raw) -> str:
    try:
        model = _string_decoder.decode(raw)
    except msgspec.ValidationError:
        raise ErrorResponse("'model' must be a string.", param="model") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise ErrorResponse("'model' is not valid text.", param="model") from None
    if not model:
        raise ErrorResponse("You must provide a model parameter.", param="model")
    return model


# -- the hash key ----------------------------------------------------------------------------------

_EMPTY = Raw(b"")
_SYSTEM_ROLES = ("system", "developer")
# A code point takes at most 12 bytes in JSON: two \\uXXXX escapes, a surrogate pair.
_CODE_POINT_MAX_BYTES = 12
_TOKEN_MAX_BYTES = 24
# Limit of messages and parts to decode, estimated by counting { and ". Decoding that many takes
# about 10 ms; 64 MiB of them would take seconds and gigabytes of memory. Counting costs 1.5 ns per
# byte, so input of up to HASH_SURE_BYTES is not counted.
HASH_MAX_COUNT = 200_000
HASH_SURE_BYTES = 1 << 20
CROWDED_BYTES = 4096  # hashed instead: later turns of a conversation begin with the same bytes


class _Message(msgspec.Struct, gc=False):
    role: str = ""
    content: Raw = _EMPTY


class _Part(msgspec.Struct, gc=False):
    text: Raw = _EMPTY


_messages_decoder = msgspec.json.Decoder(list[_Message])
_parts_decoder = msgspec.json.Decoder(list[_Part | str])
_OPENING = re.compile(rb"[\[ \t\r\n]*")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def hash_key(adapter: str | None, parsed: Parsed, prefix_char_length: int) -> int:
    """The 64-bit key of a request on the ring; the same in every process and release.

    mmh3 of a hash of all system text, the adapter, and the first ``prefix_char_length`` code points
    of the first user message (chat, responses, messages), the prompt, the query or the first input.
    A token id counts as one code point. Structures that an engine would reject hash as if they were
    empty. Conversations of more than ``HASH_MAX_COUNT`` messages hash by their first bytes.
    """
    try:
        system, prefix = _hash_text(parsed, max(prefix_char_length, 0))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        system, prefix = [], ""
    system_hash = mmh3.hash64("\0".join(system).encode(), signed=False)[0]
    material = struct.pack("<Q", system_hash) + f"{adapter or ''}\0{prefix}".encode()
    return int(mmh3.hash64(material, signed=False)[0])


def _hash_text(parsed: Parsed, limit: int) -> tuple[list[str], str]:
    """(all system texts, the first ``limit`` code points of the first user input)."""
    fields, kind = parsed.hash_input, parsed.kind
    system: list[str] = []
    if kind in _CONVERSATIONS:
        system, prefix = _conversation(fields.get(_CONVERSATIONS[kind], _EMPTY), limit)
    else:
        text = fields.get(_TEXTS[kind], _EMPTY) if kind in _TEXTS else _EMPTY
        prefix = _first_input(memoryview(text), limit)
    name = SYSTEMS.get(kind, "")
    if name in fields and not _is_crowded(fields[name]):
        system.insert(0, _text(fields[name], None))
    return system, prefix


def _conversation(raw: Raw, limit: int) -> tuple[list[str], str]:
    if _is_crowded(raw):
        return [], bytes(memoryview(raw)[:CROWDED_BYTES]).decode("latin-1")
    if bytes(memoryview(raw)[:1]) != b"[":
        return [], _text(raw, limit)
    system: list[str] = []
    first: Raw | None = None
    for message in _messages_decoder.decode(raw):
        role = message.role
        if role == "user":
            if first is None:
                first = message.content
        elif role in _SYSTEM_ROLES:
            system.append(_text(message.content, None))
    return system, "" if first is None else _text(first, limit)


def _text(content: Raw, limit: int | None) -> str:
    """The text of a message's content: a string, or a list's text parts joined by newlines."""
    view = memoryview(content)
    opens = bytes(view[:1])
    if opens == b'"':
        return _string(view, limit)
    if opens != b"[":
        return ""
    texts = (
        part if isinstance(part, str) else _string(memoryview(part.text), limit)
        for part in _parts_decoder.decode(content)
        if isinstance(part, str) or bytes(memoryview(part.text)[:1]) == b'"'
    )
    return "\n".join(texts)[:limit]


def _first_input(view: memoryview, limit: int) -> str:
    """The prefix of a string, a list of strings, of token ids, or of lists of token ids."""
    opens = bytes(view[:1])
    if opens == b'"':
        return _string(view, limit)
    if opens != b"[":
        return ""
    # Only decode the beginning: a list may have 100,000 items.
    opening = _OPENING.match(view)
    begin = opening.end() if opening else 0
    head = bytes(view[begin : begin + _TOKEN_MAX_BYTES * (limit + 3)])
    if head.startswith(b'"'):
        whole = _STRING.match(head)
        return _string_decoder.decode(whole[0])[:limit] if whole else _cut_string(head, limit)
    tokens = head.partition(b"]")[0].split(b",")[:limit]
    # Latin-1, because the cut may split a UTF-8 sequence.
    return ",".join(token.strip().decode("latin-1") for token in tokens)


def _string(view: memoryview, limit: int | None) -> str:
    """Decode a JSON string, or only its first ``limit`` code points, at a cost bounded by them."""
    if limit is None or len(view) <= _CODE_POINT_MAX_BYTES * (limit + 1):
        return _string_decoder.decode(view)[:limit]
    return _cut_string(bytes(view[: _CODE_POINT_MAX_BYTES * (limit + 1) + 1]), limit)


def _cut_string(head: bytes, limit: int) -> str:
    """The first ``limit`` code points of a JSON string that is truncated somewhere after them."""
    # The cut may split an escape or a UTF-8 sequence; one of the last twelve positions does not.
    for end in range(len(head), len(head) - _CODE_POINT_MAX_BYTES, -1):
        try:
            return _string_decoder.decode(head[:end] + b'"')[:limit]
        except (msgspec.DecodeError, UnicodeDecodeError):
            continue
    return ""


def _is_crowded(raw: Raw) -> bool:
    """Whether there may be more than ``HASH_MAX_COUNT`` messages or parts."""
    view = memoryview(raw)
    if len(view) <= HASH_SURE_BYTES:
        return False
    text = bytes(view)
    return text.count(b"{") + text.count(b'"') - text.count(b'\\"') > HASH_MAX_COUNT
