"""Generates the system config's JSON Schema from the types that `kubeai.api.config.strict` reads.

Constraints that a pattern cannot express (a duration that is too long, contradictory profiles) are
checked only when the config is read. Used for the Helm chart's values, and by editors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import inspect

from kubeai.api.config.strict import NANOSECONDS_MIN

Schema = dict[str, Any]
_DURATION = r"^(|0|((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))+)$"
_QUANTITY = r"^[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+|[numkMGTPE]|[KMGTPE]i)?$"
_UNITS: dict[str, Schema] = {
    "duration": {
        "type": ["string", "number"],
        "pattern": _DURATION,
        "minimum": 0,
        "not": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": NANOSECONDS_MIN},
    },
    "quantity": {"type": ["string", "number"], "pattern": _QUANTITY, "minimum": 0},
    "size": {"type": ["string", "number"], "pattern": f"^$|{_QUANTITY}", "minimum": 0},
    "bytes": {"type": ["string", "integer"], "pattern": f"^$|{_QUANTITY}", "minimum": 0},
    "address": {"type": "string", "pattern": r"^$|^.*:[0-9]{1,5}$"},
    "origin": {"type": "string", "pattern": r"^(\*|[a-zA-Z][a-zA-Z0-9+.-]*://[^/]+)$"},
}


def config_schema(cls: type[msgspec.Struct]) -> Schema:
    """The schema of one section and everything below it."""
    return _schema(inspect.type_info(cls), {})


def _schema(type_: inspect.Type, unit: Mapping[str, Any]) -> Schema:
    match type_:
        case inspect.Metadata(type=inner, extra=extra):
            return _schema(inner, {**unit, **(extra or {})})
        case inspect.UnionType(types=types):
            (inner,) = (t for t in types if not isinstance(t, inspect.NoneType))
            return _schema(inner, unit)
        case inspect.StructType(fields=fields):
            return {
                "type": "object",
                "additionalProperties": False,
                "properties": {f.encode_name: _or_zero(_schema(f.type, {})) for f in fields},
                "required": [f.encode_name for f in fields if f.required],
            }
        case inspect.DictType(value_type=value):
            return {"type": "object", "additionalProperties": _or_null(_schema(value, {}))}
        case inspect.VarTupleType(item_type=item):
            return {"type": "array", "items": _schema(item, {})}
        case inspect.LiteralType(values=values):
            return {"enum": list(values)}
        case inspect.AnyType():
            return {}
    if "unit" in unit:
        return _UNITS[unit["unit"]]
    return _scalar(type_)


def _or_zero(schema: Schema) -> Schema:
    """Null and Go's zero values also mean "not given"."""
    if "enum" in schema:
        return {"enum": [*schema["enum"], "", None]}
    if schema.get("minimum", 0) > 0:
        schema = schema | {"minimum": 0}
    if schema.get("required"):
        return {"anyOf": [schema, {"type": ["object", "null"], "maxProperties": 0}]}
    return _or_null(schema)


def _or_null(schema: Schema) -> Schema:
    """``null`` means "not given". Helm users set it to remove a default."""
    if "type" not in schema:
        return schema
    types = schema["type"]
    return schema | {"type": [*([types] if isinstance(types, str) else types), "null"]}


def _scalar(type_: inspect.Type) -> Schema:
    match type_:
        case inspect.StrType():
            return {"type": "string"}
        case inspect.BoolType():
            return {"type": "boolean"}
        case inspect.IntType(ge=least, le=most):
            return _within({"type": "integer"}, least, most)
        case inspect.FloatType(ge=least, le=most):
            return _within({"type": "number"}, least, most)
    raise TypeError(f"no schema for {type_!r}")


def _within(schema: Schema, least: float | None, most: float | None) -> Schema:
    limits = {"minimum": least, "maximum": most}
    return schema | {key: limit for key, limit in limits.items() if limit is not None}
