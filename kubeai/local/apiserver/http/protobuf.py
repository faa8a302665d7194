"""Decoder for Kubernetes' protobuf, which typed Go clients (``kubectl create secret``) send.

A body consists of four magic bytes and an Unknown message with the kind and the object. The field
numbers are in protobuf.json, which tests/cluster/schemas.py generates. Responses are JSON, which
those clients also accept.

Go encodes unset fields as empty ones. Empty strings and times are therefore treated as absent, as
in Go's JSON.
"""

from __future__ import annotations

import base64
import functools
import struct
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from kubeai.local.apiserver.errors import bad_request

Object = dict[str, Any]

CONTENT_TYPE = "application/vnd.kubernetes.protobuf"
_MAGIC = b"k8s\x00"
_DEPTH_MAX = 64
_VARINT_MAX_BYTES = 10
_TYPE_META, _RAW, _CONTENT_ENCODING = 1, 2, 3
_KEPT_WHEN_EMPTY = ("storageClassName",)  # where "" differs from absent


# Errors of malformed input: a field may have any wire type, such as a number instead of bytes.
_MALFORMED = (
    ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError, OSError,
    struct.error,
)  # fmt: skip


@functools.cache
def _messages() -> dict[str, dict[str, tuple[str, str, str]]]:
    """Map message → field number → (name or "" if inlined, type, "", "repeated" or "map")."""
    path = Path(__file__).with_name("protobuf.json")
    messages: dict[str, dict[str, tuple[str, str, str]]] = orjson.loads(path.read_bytes())
    return messages


def decode(body: bytes) -> Object:
    """Decode an object into its JSON form. Raises a 400 if it is malformed."""
    try:
        if not body.startswith(_MAGIC):
            raise ValueError("the prefix k8s\\x00 is missing")
        fields = dict(_fields(body[len(_MAGIC) :]))
        if fields.get(_CONTENT_ENCODING):
            raise ValueError("content encodings are not supported")
        names = dict(_fields(fields[_TYPE_META]))
        kind = names.get(2, b"").decode()
        if kind not in _messages():
            raise ValueError(f"the kind {kind} is supported as JSON only")
        obj = _message(kind, fields.get(_RAW, b""), 0)
        return {"apiVersion": names.get(1, b"").decode(), "kind": kind, **obj}
    except _MALFORMED as error:
        raise bad_request(f"the body of the request is not protobuf: {error}") from None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for index in range(_VARINT_MAX_BYTES):
        byte = data[at + index]
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    raise ValueError("a varint is too long")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield field numbers and raw values: ints for varints, bytes for all other wire types."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        value: int | bytes
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 2:
            size, at = _varint(data, at)
            if at + size > len(data):
                raise ValueError("a field is truncated")
            value, at = data[at : at + size], at + size
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"wire type {wire} is unknown")
        yield tag >> 3, value


def _message(kind: str, data: bytes, depth: int) -> Object:
    if depth > _DEPTH_MAX:
        raise ValueError("it is nested too deeply")
    known, out = _messages()[kind], Object()
    for number, raw in _fields(data):
        if str(number) not in known:
            continue
        name, of, label = known[str(number)]
        if label == "map":
            entry = dict(_fields(raw))
            member = _value(of, entry[2], depth) if 2 in entry else _empty(of)
            out.setdefault(name, {})[entry.get(1, b"").decode()] = member
            continue
        value = _value(of, raw, depth)
        if label == "repeated":
            out.setdefault(name, []).append(value)
        elif not name:
            out |= value
        elif value not in ("", None) or name in _KEPT_WHEN_EMPTY:
            out[name] = value
    return out


def _empty(kind: str) -> Any:
    return "" if kind in ("string", "bytes", "Quantity") else {}


def _value(kind: str, raw: Any, depth: int) -> Any:
    if kind == "string":
        return raw.decode()
    if kind == "bytes":
        return base64.b64encode(raw).decode()
    if kind == "bool":
        return bool(raw)
    if kind in ("int32", "int64"):
        return raw - (1 << 64) if raw >> 63 else raw
    if kind == "double":
        return struct.unpack("<d", raw)[0]
    special = _SPECIAL.get(kind)
    return special(dict(_fields(raw))) if special else _message(kind, raw, depth + 1)


def _time(fields: dict[int, Any]) -> str | None:
    if not fields.get(1):
        return None
    at = datetime.fromtimestamp(fields[1], UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def _micro_time(fields: dict[int, Any]) -> str | None:
    if not fields.get(1):
        return None
    at = datetime.fromtimestamp(fields[1], UTC)
    return at.strftime("%Y-%m-%dT%H:%M:%S.") + f"{fields.get(2, 0) // 1000:06d}Z"


def _int_or_string(fields: dict[int, Any]) -> int | str:
    if fields.get(1):
        return str(fields.get(3, b"").decode())
    return int(_value("int32", fields.get(2, 0), 0))


_SPECIAL: dict[str, Callable[[dict[int, Any]], Any]] = {
    "Time": _time,
    "MicroTime": _micro_time,
    "Quantity": lambda fields: fields.get(1, b"").decode(),
    "IntOrString": _int_or_string,
    "FieldsV1": lambda fields: orjson.loads(fields.get(1) or b"{}"),
}
