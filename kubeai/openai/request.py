"""Parses requests to OpenAI's, vLLM's and Anthropic's HTTP APIs for routing. Pure: no I/O.

Owns the route table, the parsing of JSON bodies as far as routing needs it, the hash key, the
replacement of ``model`` for adapters, X-Label-Selector, and the format of error bodies. Called by
the gateway for every request.

Paths: nothing is decoded, normalized or repaired. Scheme and authority of a target in absolute form
are removed, everything after the first ``?`` is the query, and the rest must match a listed path
*exactly*: ``%63hat``, ``//``, ``/./``, ``..``, ``;x``, a trailing slash or different case all get
404. An engine receives the path from the table, never the client's spelling. The only variable
path, ``/openai/v1/models/{id}``, is served by the gateway and never reaches an engine.

Bodies: the gateway and the engine must read the same ``model``, so a body that two JSON parsers may
interpret differently is rejected with 400. Required are strict JSON (no NaN, no trailing comma, no
raw control characters), valid UTF-8 without a BOM, no lone surrogates, exactly one top-level
``model``, even if its key is escaped, and no key that differs from it only in case (Go's decoder
would accept it). The rest of the body is left to the engine: unknown fields, unusual structures and
wrong types pass through, and at most make the hash key less specific.

:func:`read` is one compiled pass (``_ask``). Bodies that it rejects go to :func:`parse`, which
finds the reason in at most two passes of msgspec's scanner. Those hold the GIL for up to 4 ns per
byte, so they only see bodies of up to ``LARGE_BYTES``; for larger ones the compiled pass reports
the reason itself. ``parse``, :func:`hash_key` and :func:`replace_model` are also the oracles that
the compiled pass is tested against. ``parse`` keeps state between calls and must only be called
from one thread. For a body above ``LARGE_BYTES``, ``read``, ``key_of`` and ``body_for`` may be
called from any thread, and release the GIL.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

import mmh3
import msgspec
from msgspec import Raw

from kubeai.api.labels import Selector, label_selector
from kubeai.errors import quoted
from kubeai.openai import _body_scan as _ask

PREFIX = "/openai"
TOP_LEVEL_KEYS_MAX_COUNT = 1000
LARGE_BYTES = 1 << 20  # larger bodies are parsed in a thread; smaller ones take 2 ms at most


class Kind(StrEnum):
    """The API of a request; the value is the path at the engine."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"
    EMBEDDINGS = "/v1/embeddings"
    RERANK = "/v1/rerank"
    TRANSCRIPTIONS = "/v1/audio/transcriptions"
    RESPONSES = "/v1/responses"
    MESSAGES = "/v1/messages"
    MODELS = "/v1/models"  # served by the gateway itself

    @property
    def is_json(self) -> bool:
        """Whether the request is a POST whose JSON body :func:`parse` reads."""
        return self not in (Kind.TRANSCRIPTIONS, Kind.MODELS)


route_table: dict[str, Kind] = {PREFIX + kind.value: kind for kind in Kind}
_MODEL_PATH = PREFIX + Kind.MODELS.value + "/"
_GET = ("GET", "HEAD")
_POST = ("POST",)


# -- errors ----------------------------------------------------------------------------------------


class BadRequest(Exception):
    """An error response by the gateway itself, with ``status`` and ``body()``."""

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.status = status
        self.code = code

    def body(self) -> bytes:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return error_body(self.message, kind, self.code, self.param)


class _ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail


_encode = msgspec.json.Encoder().encode


def error_body(
    message: str,
    type: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
) -> bytes:
    """OpenAI's error object as JSON. Lone surrogates in ``message`` are replaced."""
    message = message.encode("utf-8", "replace").decode()
    return _encode(_ErrorBody(_ErrorDetail(message, type, param, code)))


def model_not_found(model: str) -> BadRequest:
    """The same 404 for a missing model, a missing adapter and a selector that does not match."""
    return BadRequest(
        f"The model {quoted(model)} does not exist or you do not have access to it.",
        param="model",
        status=404,
        code="model_not_found",
    )


# -- paths -----------------------------------------------------------------------------------------


def is_identity(codings: Iterable[str]) -> bool:
    """Whether the Content-Encoding values are all empty or "identity"."""
    return all(
        coding.strip(" \t").lower() in ("", "identity")
        for value in codings
        for coding in value.split(",")
    )


def compressed_body() -> BadRequest:
    """415 for a body in another content coding."""
    return BadRequest(
        "Compressed request bodies are not supported. Send the body uncompressed.", status=415
    )


class Target(NamedTuple):
    """The route of a request. ``kind`` is set for status 200; else 404, or 405 with ``allow``."""

    status: int
    kind: Kind | None = None
    query: str = ""  # without the "?", unchanged
    model_id: str | None = None  # of GET /openai/v1/models/{id}, still percent-encoded
    allow: tuple[str, ...] = ()


_TARGETS = {
    (method, path): Target(200, kind)
    for path, kind in route_table.items()
    for method in (_GET if kind is Kind.MODELS else _POST)
}


def classify(method: str, target: str) -> Target:
    """Look a request line up in the route table; see the module's docstring for the rules."""
    if found := _TARGETS.get((method, target)):
        return found
    if not target.startswith("/"):  # absolute form: http://authority/path
        scheme, separator, rest = target.partition("://")
        if not separator or scheme.lower() not in ("http", "https"):
            return Target(404)
        slash = rest.find("/")
        target = rest[slash:] if slash >= 0 else "/"
    path, _, query = target.partition("?")
    kind = route_table.get(path)
    model_id = None
    if kind is None:
        model_id = path.removeprefix(_MODEL_PATH)
        if model_id == path or not model_id or "/" in model_id:
            return Target(404)
        kind = Kind.MODELS
    allow = _GET if kind is Kind.MODELS else _POST
    if method not in allow:
        return Target(405, allow=allow)
    return Target(200, kind, query, model_id)


# -- bodies ----------------------------------------------------------------------------------------


class Ask(msgspec.Struct, frozen=True):
    """A parsed request."""

    kind: Kind
    model: str  # as the client wrote it
    name: str  # of the Model
    adapter: str | None = None  # "" if the first "_" is the last character: matches no adapter
    stream: bool = False
    hash_input: dict[str, Raw] = {}  # the fields that hash_key reads, still JSON


_HASH_FIELDS: dict[Kind, frozenset[str]] = {
    Kind.CHAT: frozenset({"messages"}),
    Kind.COMPLETIONS: frozenset({"prompt"}),
    Kind.EMBEDDINGS: frozenset({"input"}),
    Kind.RERANK: frozenset({"query"}),
    Kind.RESPONSES: frozenset({"instructions", "input"}),
    Kind.MESSAGES: frozenset({"system", "messages"}),
}


SHAPES: dict[Kind, _ask.Shape] = {
    Kind.CHAT: _ask.Shape(conversation=b"messages"),
    Kind.COMPLETIONS: _ask.Shape(text=b"prompt"),
    Kind.EMBEDDINGS: _ask.Shape(text=b"input"),
    Kind.RERANK: _ask.Shape(text=b"query"),
    Kind.RESPONSES: _ask.Shape(conversation=b"input", system=b"instructions"),
    Kind.MESSAGES: _ask.Shape(conversation=b"messages", system=b"system"),
}


def read(kind: Kind, body: bytes) -> Ask | _ask.Ask:
    """Like :func:`parse`, in one compiled pass."""
    if len(body) <= LARGE_BYTES:
        return _ask.read(SHAPES[kind], body) or parse(kind, body)
    try:
        return _ask.judge(SHAPES[kind], body)
    except _ask.Refused as error:
        message, param = error.args
        raise BadRequest(message, param=param) from None


def key_of(ask: Ask | _ask.Ask, prefix_char_length: int) -> int:
    """The :func:`hash_key` of a request that :func:`read` returned."""
    if isinstance(ask, _ask.Ask):
        return ask.key(prefix_char_length)
    return hash_key(ask.adapter, ask, prefix_char_length)


def body_for(ask: Ask | _ask.Ask, body: bytes) -> bytes:
    """The body to send to the engine; for an adapter, ``model`` is replaced by its name."""
    if ask.adapter is None:
        return body
    if isinstance(ask, _ask.Ask):
        return ask.with_model(_encode(ask.adapter))
    return replace_model(body, ask.adapter)


def split_model(model: str) -> tuple[str, str | None]:
    """Split ``<model>_<adapter>`` at the first ``_``, which no Model's name contains."""
    name, separator, adapter = model.partition("_")
    return name, adapter if separator else None


def named(kind: Kind, model: str) -> Ask:
    """The Ask of a request whose model is not in a JSON body (but in a form field or message)."""
    if not model:
        raise BadRequest("You must provide a model parameter.", param="model")
    name, adapter = split_model(model)
    return Ask(kind, model, name, adapter)


def parse(kind: Kind, body: bytes) -> Ask:
    """Parse a request's JSON body. BadRequest if it is invalid or ambiguous; see the module."""
    model: Raw | None = None
    stream = False
    hashed: dict[str, Raw] = {}
    wanted = _HASH_FIELDS[kind]
    for key, value in _top_level(body).items():
        text = key.text
        if text in wanted:
            hashed[text] = value
        elif text == "stream":
            stream = len(memoryview(value)) == 4 and bytes(value) == b"true"
        elif len(text) == 5 and text.lower() == "model":
            if model is not None or text != "model":
                raise BadRequest(
                    "The body has several keys that may be read as 'model'."
                    if model is not None
                    else f"Unknown parameter {quoted(text)}: did you mean 'model'?",
                    param="model",
                )
            model = value
    if model is None:
        raise BadRequest("You must provide a model parameter.", param="model")
    asked = _model_value(model)
    name, adapter = split_model(asked)
    return Ask(kind, asked, name, adapter, stream, hashed)


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
    raise BadRequest("You must provide a model parameter.", param="model")


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
        return _top_level_decoder.decode(body)
    except UnicodeDecodeError as error:
        raise BadRequest(f"The body is not valid UTF-8 (byte {error.start}).") from None
    except msgspec.ValidationError as error:
        raise BadRequest(f"The body is not an acceptable JSON object: {error}.") from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"The body is not valid JSON: {error}.") from None
    except RecursionError:
        raise BadRequest("The body is nested too deeply.") from None


def _model_value(raw: Raw) -> str:
    try:
        model = _string_decoder.decode(raw)
    except msgspec.ValidationError:
        raise BadRequest("'model' must be a string.", param="model") from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BadRequest("'model' is not valid text.", param="model") from None
    if not model:
        raise BadRequest("You must provide a model parameter.", param="model")
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


def hash_key(adapter: str | None, ask: Ask, prefix_char_length: int) -> int:
    """The 64-bit key of a request on the ring; the same in every process and release.

    mmh3 of a hash of all system text, the adapter, and the first ``prefix_char_length`` code points
    of the first user message (chat, responses, messages), the prompt, the query or the first input.
    A token id counts as one code point. Structures that an engine would reject hash as if they were
    empty. Conversations of more than ``HASH_MAX_COUNT`` messages hash by their first bytes.
    """
    try:
        system, prefix = _hash_text(ask, max(prefix_char_length, 0))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        system, prefix = [], ""
    system_hash = mmh3.hash64("\0".join(system).encode(), signed=False)[0]
    material = struct.pack("<Q", system_hash) + f"{adapter or ''}\0{prefix}".encode()
    return int(mmh3.hash64(material, signed=False)[0])


def _hash_text(ask: Ask, limit: int) -> tuple[list[str], str]:
    """(all system texts, the first ``limit`` code points of the first user input)."""
    fields, kind = ask.hash_input, ask.kind
    if kind is Kind.CHAT:
        return _conversation(fields.get("messages", _EMPTY), limit)
    if kind is Kind.MESSAGES or kind is Kind.RESPONSES:
        messages = fields.get("messages" if kind is Kind.MESSAGES else "input", _EMPTY)
        system, prefix = _conversation(messages, limit)
    else:
        return [], _first_input(memoryview(next(iter(fields.values()), _EMPTY)), limit)
    for name in ("instructions", "system"):
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


# -- label selectors -------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def parse_selector(text: str) -> Selector:
    """Parse an X-Label-Selector header; see `label_selector`. BadRequest if it is invalid."""
    try:
        return label_selector(text)
    except ValueError as error:
        raise BadRequest(
            f"X-Label-Selector {quoted(text)} is not a valid label selector: {error}.",
            param="X-Label-Selector",
        ) from None
