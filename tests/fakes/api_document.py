"""The OpenAPI document, and validators for what it describes."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema_rs

from kubeai.gateway.openapi import document


def servers(item: dict[str, Any]) -> list[str]:
    """The prefixes of a path item: "" for the root."""
    urls = [server["url"] for server in item.get("servers", document()["servers"])]
    return ["" if url == "/" else url for url in urls]


def operations() -> dict[tuple[str, str], dict[str, Any]]:
    """(method, path with its prefix) → operation."""
    return {
        (method.upper(), prefix + path): operation
        for path, item in document()["paths"].items()
        for prefix in servers(item)
        for method, operation in item.items()
        if method not in ("parameters", "servers")
    }


def resolved(value: dict[str, Any]) -> dict[str, Any]:
    """What a reference refers to; other values unchanged."""
    while "$ref" in value:
        found: Any = document()
        for part in value["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        value = found
    return value


@cache
def validator(reference: str) -> Any:
    """A validator for a schema in the document's components."""
    schema = {"$ref": reference, "components": document()["components"]}
    return jsonschema_rs.Draft202012Validator(schema)
