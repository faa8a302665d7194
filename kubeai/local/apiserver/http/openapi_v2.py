"""OpenAPI v2: the schemas of all resources in one document, as JSON and as protobuf.

kubectl requests protobuf only, whenever OpenAPI v3 does not list a kind: it needs this document
before it reports that there are no matches for the kind. The field numbers are those of gnostic's
OpenAPIv2.proto, the schema of that media type. The document has no paths.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any

import orjson

from kubeai.local.apiserver.http.discovery import schema_name, schema_of, version_text
from kubeai.local.apiserver.kinds.resources import Catalog

Object = dict[str, Any]

PROTOBUF = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
PROTOBUF_DEPRECATED = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
DOCUMENTS_MAX = 2  # cached until the resources change

_TITLE = "KubeAI's embedded Kubernetes API"
_INT_OR_STRING = "x-kubernetes-int-or-string"
_PRESERVE = "x-kubernetes-preserve-unknown-fields"


def as_json(catalog: Catalog) -> bytes:
    """Return the document as JSON."""
    document = {
        "swagger": "2.0",
        "info": {"title": _TITLE, "version": version_text()},
        "paths": {},
        "definitions": _definitions(catalog),
    }
    return orjson.dumps(document).replace(b'"#/$defs/', b'"#/definitions/')


def as_protobuf(catalog: Catalog) -> bytes:
    """Return the document as protobuf, which kubectl asks for."""
    return _as_protobuf(catalog, catalog.changes)


def _definitions(catalog: Catalog) -> Object:
    definitions: Object = {}
    for resource in catalog.all():
        definitions[schema_name(resource)] = schema_of(resource)
        if resource.schema is not None:
            definitions |= resource.schema.definitions
    return definitions


@functools.lru_cache(maxsize=DOCUMENTS_MAX)
def _as_protobuf(catalog: Catalog, _changes: int) -> bytes:
    info = _text(1, _TITLE) + _text(2, version_text())
    return (
        _text(1, "2.0")
        + _message(2, info)
        + _message(8, b"")
        + _message(9, _named_schemas(_definitions(catalog)))
    )


# Messages of OpenAPIv2.proto.


def _named_schemas(schemas: Object) -> bytes:
    """Definitions and Properties: repeated NamedSchema."""
    return b"".join(
        _message(1, _text(1, name) + _message(2, _schema(schema)))
        for name, schema in schemas.items()
    )


def _schema(schema: Object) -> bytes:
    """Encode a Schema. Like a real API server, omits keywords that OpenAPI v2 lacks."""
    if schema.get(_PRESERVE) or schema.get(_INT_OR_STRING):
        dropped = ("type", "properties", "items", "additionalProperties")
        schema = {name: value for name, value in schema.items() if name not in dropped}
    extensions = (
        _message(31, _named_any(name, value))
        for name, value in schema.items()
        if name.startswith("x-")
    )
    known = (_FIELDS[name](value) for name, value in schema.items() if name in _FIELDS)
    return b"".join((*known, *extensions))


def _reference(value: str) -> bytes:
    return _text(1, value.replace("#/$defs/", "#/definitions/"))


def _type(value: str | list[str]) -> bytes:
    """Encode one type, as clients reject lists; Kubernetes encodes int-or-string as string."""
    return _message(22, _text(1, value if isinstance(value, str) else "string"))


def _additional_properties(value: Object | bool) -> bytes:
    item = _bool(2, value) if isinstance(value, bool) else _message(1, _schema(value))
    return _message(21, item)


def _named_any(name: str, value: Any) -> bytes:
    return _text(1, name) + _message(2, _any(value))


def _any(value: Any) -> bytes:
    """Encode an Any. It holds YAML, of which JSON is a subset."""
    return _text(2, orjson.dumps(value).decode())


_FIELDS: dict[str, Callable[[Any], bytes]] = {
    "$ref": _reference,
    "format": lambda value: _text(2, value),
    "title": lambda value: _text(3, value),
    "description": lambda value: _text(4, value),
    "default": lambda value: _message(5, _any(value)),
    "multipleOf": lambda value: _double(6, value),
    "maximum": lambda value: _double(7, value),
    "exclusiveMaximum": lambda value: _bool(8, bool(value)),
    "minimum": lambda value: _double(9, value),
    "exclusiveMinimum": lambda value: _bool(10, bool(value)),
    "maxLength": lambda value: _integer(11, value),
    "minLength": lambda value: _integer(12, value),
    "pattern": lambda value: _text(13, value),
    "maxItems": lambda value: _integer(14, value),
    "minItems": lambda value: _integer(15, value),
    "uniqueItems": lambda value: _bool(16, value),
    "maxProperties": lambda value: _integer(17, value),
    "minProperties": lambda value: _integer(18, value),
    "required": lambda value: b"".join(_text(19, name) for name in value),
    "enum": lambda value: b"".join(_message(20, _any(item)) for item in value),
    "additionalProperties": _additional_properties,
    "type": _type,
    "items": lambda value: _message(23, _message(1, _schema(value))),
    "allOf": lambda value: b"".join(_message(24, _schema(item)) for item in value),
    "properties": lambda value: _message(25, _named_schemas(value)),
}


# The wire format: a tag (field number and wire type), then a value.


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _text(number: int, value: str) -> bytes:
    return _message(number, value.encode())


def _integer(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value & (1 << 64) - 1)


def _bool(number: int, value: bool) -> bytes:
    return _integer(number, int(value))


def _double(number: int, value: float) -> bytes:
    return _varint(number << 3 | 1) + struct.pack("<d", value)
