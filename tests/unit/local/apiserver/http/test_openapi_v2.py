"""OpenAPI v2 of the embedded API: the protobuf form has the same schemas as the JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from kubeai.api.crd import model_crd
from kubeai.local.apiserver.http import openapi_v2
from kubeai.local.apiserver.kinds.resources import CRDS, Catalog
from kubeai.local.apiserver.storage.options import WriteOptions
from kubeai.local.apiserver.storage.registry import Registry
from kubeai.local.apiserver.storage.store import Store


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield a message's field numbers and raw values."""
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        size = varint() if tag & 7 == 2 else {1: 8, 5: 4}[tag & 7]
        yield tag >> 3, data[at : at + size]
        at += size


def only(data: bytes, number: int) -> bytes:
    (value,) = (value for key, value in fields(data) if key == number)
    return value


def named(data: bytes) -> dict[str, bytes]:
    """Decode repeated NamedSchema or NamedAny."""
    return {only(item, 1).decode(): only(item, 2) for _, item in fields(data)}


def shape(data: bytes) -> dict:
    """Convert a protobuf Schema to its JSON form, for the parts that both express."""
    found: dict = {}
    for number, value in fields(data):
        if number in (1, 4):
            found["$ref" if number == 1 else "description"] = value.decode()
        elif number == 19:
            found.setdefault("required", []).append(value.decode())
        elif number == 20:
            found.setdefault("enum", []).append(orjson.loads(only(value, 2)))
        elif number == 5:
            found["default"] = orjson.loads(only(value, 2))
        elif number == 21:
            ((kind, inner),) = fields(value)
            found["additionalProperties"] = shape(inner) if kind == 1 else bool(inner)
        elif number == 22:
            found["type"] = only(value, 1).decode()
        elif number == 23:
            found["items"] = shape(only(value, 1))
        elif number == 25:
            found["properties"] = {name: shape(inner) for name, inner in named(value).items()}
        elif number == 31:
            found[only(value, 1).decode()] = orjson.loads(only(only(value, 2), 2))
    return found


_ALIKE = ("$ref", "description", "default", "enum", "required")


def expected(schema: dict) -> dict:
    """The part of a JSON schema that `shape` returns for the same schema."""
    kept = {}
    loose = schema.get("x-kubernetes-int-or-string") or schema.get(
        "x-kubernetes-preserve-unknown-fields"
    )
    for name, value in schema.items():
        if loose and name in ("type", "properties", "items", "additionalProperties"):
            continue
        if name in _ALIKE or name.startswith("x-"):
            kept[name] = value
        elif name == "type":
            kept[name] = value if isinstance(value, str) else "string"
        elif name == "properties":
            kept[name] = {key: expected(inner) for key, inner in value.items()}
        elif name == "items" or (name == "additionalProperties" and isinstance(value, dict)):
            kept[name] = expected(value)
        elif name == "additionalProperties":
            kept[name] = value
    return kept


@pytest.fixture
def catalog(tmp_path):
    store, catalog = Store(tmp_path / "objects.db"), Catalog()
    registry = Registry(store, catalog)
    registry.create(CRDS, "", model_crd(), WriteOptions())
    yield catalog
    store.close()


def test_protobuf_has_the_same_schemas_as_json(catalog):
    document = orjson.loads(openapi_v2.as_json(catalog))
    message = openapi_v2.as_protobuf(catalog)
    assert only(message, 1) == b"2.0"
    assert only(only(message, 2), 1).decode() == document["info"]["title"]
    found = {name: shape(schema) for name, schema in named(only(message, 9)).items()}
    assert found == {name: expected(value) for name, value in document["definitions"].items()}
    assert "url" in found["org.kubeai.v1.Model"]["properties"]["spec"]["properties"]


def test_protobuf_is_updated_with_the_definitions(catalog):
    before = openapi_v2.as_protobuf(catalog)
    catalog.replace("kubeai.org", "models", ())
    after = openapi_v2.as_protobuf(catalog)
    assert b"org.kubeai.v1.Model" in before
    assert b"org.kubeai.v1.Model" not in after
