"""The format of messages: requests, and the responses to them.

A request is ``{"metadata": …, "path": "/v1/completions", "body": {…}}``, a response
``{"metadata": …, "status_code": 200, "body": …}``, as in KubeAI in Go. The metadata may be any JSON
value and comes back as it was, byte for byte, and the request's body reaches the gateway so.

A response's body that is JSON is embedded as it is. Other text becomes a JSON string, and anything
else a string in base64; ``content_type`` then says what it was, and ``encoding`` is ``base64``.
Pure: no I/O.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec

from kubeai.errors import decode_problem, quoted
from kubeai.openai.errors import ErrorResponse, error_answer
from kubeai.openai.request import split_model
from kubeai.openai.routes import Kind, classify

DEFAULT_PATH = Kind.COMPLETIONS.value
# Attributes of a message that are passed on as headers of the request.
HEADERS = ("x-label-selector", "traceparent", "tracestate")
HEADER_MAX_CHARS = 4096
# Routes of Ollama's that stream unless they are asked not to.
_STREAM_BY_DEFAULT = frozenset((Kind.OLLAMA_CHAT, Kind.OLLAMA_GENERATE))
_PRINTABLE = re.compile(r"[!-~]*")  # of ASCII, without spaces: what a request target may contain
_HEADER_VALUE = re.compile(r"[\t -~]*")
NULL = msgspec.Raw(b"null")


class Request(msgspec.Struct, frozen=True):
    """A request to the gateway. ``path`` is its target, which may have a query."""

    metadata: msgspec.Raw
    path: str
    body: bytes
    headers: dict[str, str]  # names in lower case
    model: str = ""  # the Model that the body names, without an adapter


class Answer(msgspec.Struct, frozen=True):
    """The gateway's response to an attempt. ``headers``: names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class Malformed(Exception):
    """A message that cannot be sent to the gateway, and the answer that says why."""

    def __init__(self, error: ErrorResponse, metadata: msgspec.Raw = NULL, path: str = "") -> None:
        super().__init__(error.message)
        self.metadata = metadata
        self.answer = refusal(error, path)


class _Message(msgspec.Struct):
    metadata: msgspec.Raw = NULL
    path: str | None = None
    body: msgspec.Raw = msgspec.Raw(b"")


class _Metadata(msgspec.Struct):
    metadata: msgspec.Raw = NULL


class _Fields(msgspec.Struct):
    """What is read of a request's body."""

    model: Any = None
    stream: Any = None


class _Response(msgspec.Struct, omit_defaults=True):
    metadata: msgspec.Raw
    status_code: int
    body: msgspec.Raw | str
    content_type: str = ""
    encoding: str = ""


_decode_message = msgspec.json.Decoder(_Message).decode
_decode_metadata = msgspec.json.Decoder(_Metadata).decode
_decode_fields = msgspec.json.Decoder(_Fields).decode
_decode_raw = msgspec.json.Decoder(msgspec.Raw).decode
_encode = msgspec.json.Encoder().encode


def refusal(error: ErrorResponse, path: str = "") -> Answer:
    """An error of the messenger, in the format of the API that ``path`` belongs to."""
    body, _ = error_answer(error, path, None)
    return Answer(error.status, {"content-type": "application/json"}, body)


def read_request(body: bytes, attributes: Mapping[str, str]) -> Request:
    """Read a message. Malformed if it is not a request for a route that messages can use."""
    message = _read_message(body)
    # Raw refers to the whole message, which is not needed for as long.
    metadata = message.metadata.copy()
    path = message.path or DEFAULT_PATH
    if not path.startswith("/"):
        path = f"/{path}"
    try:
        kind = _check_path(path)
        payload = bytes(message.body)
        if not payload:
            raise ErrorResponse("The message has no body.", param="body")
        fields = _read_fields(payload)
        _check_stream(kind, fields.stream)
        model = split_model(fields.model)[0] if isinstance(fields.model, str) else ""
        return Request(metadata, path, payload, _headers(attributes), model)
    except ErrorResponse as error:
        raise Malformed(error, metadata, path) from None


def _read_message(body: bytes) -> _Message:
    try:
        body.decode()  # msgspec does not check the strings in a Raw
        return _decode_message(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        problem = decode_problem(error)
    message = (
        "The message is not a request. It must be a JSON object with the members path (a string) "
        f"and body (an object): {problem}"
    )
    raise Malformed(ErrorResponse(message), _salvage_metadata(body))


def _salvage_metadata(body: bytes) -> msgspec.Raw:
    """The metadata of a message that is not a request; null if it cannot be read."""
    try:
        metadata = _decode_metadata(body).metadata
        bytes(metadata).decode()
        return metadata.copy()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:  # accepts lone surrogates, which clients send that cut a text in two
        loose = json.loads(body)
        return msgspec.Raw(json.dumps(loose["metadata"], allow_nan=False).encode())
    except (ValueError, TypeError, KeyError, RecursionError):
        return NULL


def _check_path(path: str) -> Kind:
    target = classify("POST", path)
    shown = quoted(path)
    if target.kind is None or not _PRINTABLE.fullmatch(path):
        if target.status == 405:
            raise ErrorResponse(
                f"The path {shown} is not for POST requests, which messages are.",
                param="path",
                code="method_not_allowed",
            )
        message = f"The path {shown} is not an inference route, such as {DEFAULT_PATH}."
        raise ErrorResponse(message, param="path", status=404, code="unknown_url")
    if not target.kind.is_json:
        reason = "takes a form" if target.kind.is_form else "is not for inference with a JSON body"
        raise ErrorResponse(
            f"The path {shown} {reason}, which a message cannot ask for. Use HTTP.",
            param="path",
            code="not_for_messages",
        )
    return target.kind


def _read_fields(body: bytes) -> _Fields:
    """Whether the body is otherwise valid is for the gateway to say."""
    try:
        return _decode_fields(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _Fields()


def _check_stream(kind: Kind, stream: object) -> None:
    """Refuse a request for a streamed response: the answer is one message."""
    if stream is True or (stream is None and kind in _STREAM_BY_DEFAULT):
        raise ErrorResponse(
            'The answer to a message is not streamed. Set "stream" to false.',
            param="stream",
            code="unsupported_value",
        )


def _headers(attributes: Mapping[str, str]) -> dict[str, str]:
    headers = {}
    for name, value in attributes.items():
        if name.lower() not in HEADERS:
            continue
        if len(value) > HEADER_MAX_CHARS or not _HEADER_VALUE.fullmatch(value):
            raise ErrorResponse(
                f"The message's attribute {name} is not a header: it must be at most "
                f"{HEADER_MAX_CHARS} printable ASCII characters.",
                param=name,
            )
        headers[name.lower()] = value
    return headers


def write_response(metadata: msgspec.Raw, answer: Answer) -> bytes:
    """The body of the response message."""
    content_type = answer.headers.get("content-type", "")
    if embedded := _as_json(answer.body):
        return _encode(_Response(metadata, answer.status, embedded))
    try:
        text, encoding = answer.body.decode(), ""
    except UnicodeDecodeError:
        text, encoding = base64.b64encode(answer.body).decode(), "base64"
    return _encode(_Response(metadata, answer.status, text, content_type, encoding))


def _as_json(body: bytes) -> msgspec.Raw | None:
    """The body if it is one JSON value in UTF-8."""
    try:
        body.decode()  # msgspec does not check the strings in a Raw
        return _decode_raw(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
