"""Tables (meta.k8s.io/v1 Table): what ``kubectl get`` prints.

A built-in resource has the columns that a real API server prints. A custom resource has the columns
of its CRD, evaluated with the JSONPath subset that CRDs may use.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import orjson

from kubeai.local.apiserver.kinds.columns import NAME, Printer, built_in_printer, name_of, since
from kubeai.local.apiserver.kinds.jsonpath import find, parse_path
from kubeai.local.apiserver.kinds.resources import Resource

Object = dict[str, Any]
_PARTIAL = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}


def table(
    resource: Resource,
    objects: Iterable[Object],
    list_metadata: Object,
    include: str = "Metadata",
    headers: bool = True,
) -> Object:
    """Return a Table of objects. `include` selects each row's object: Metadata, Object or None."""
    if resource.columns is None:
        columns, row = built_in_printer(resource)
    else:
        columns, row = _custom_printer(resource.columns)
    at = datetime.now(UTC)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_metadata,
        "columnDefinitions": columns if headers else [],
        "rows": [
            {"cells": row(obj, at), "object": _row_object(obj, include)}
            if include != "None"
            else {"cells": row(obj, at)}
            for obj in objects
        ],
    }


def _row_object(obj: Object, include: str) -> Object:
    return obj if include == "Object" else partial(obj)


def partial(obj: Object) -> Object:
    """Return the object as a PartialObjectMetadata."""
    return {**_PARTIAL, "metadata": obj["metadata"]}


def _custom_printer(columns: tuple[Object, ...]) -> Printer:
    if not columns:
        columns = ({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},)
    definitions = [NAME] + [
        {
            "name": c["name"],
            "type": c["type"],
            "format": c.get("format", ""),
            "description": c.get("description", ""),
            "priority": c.get("priority", 0),
        }
        for c in columns
    ]
    paths = [(parse_path(c["jsonPath"]), c["type"]) for c in columns]

    def row(obj: Object, at: datetime) -> list[Any]:
        return [name_of(obj), *(_cell(find(path, obj), kind, at) for path, kind in paths)]

    return definitions, row


def _cell(values: list[Any], kind: str, at: datetime) -> Any:
    if not values or values[0] is None:
        return None
    value = values[0]
    if kind == "date":
        return since(value, at) if isinstance(value, str) else "<invalid>"
    if kind == "integer":
        return int(value) if isinstance(value, (int, float)) else None
    if kind == "number":
        return value if isinstance(value, (int, float)) else None
    if kind == "boolean":
        return value if isinstance(value, bool) else None
    if isinstance(value, (dict, list)):
        return orjson.dumps(value).decode()
    return str(value).lower() if isinstance(value, bool) else str(value)
