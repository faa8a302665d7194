"""Prints values.schema.json of the chart models, made from the CustomResourceDefinition of Model.

python charts/models_schema.py > charts/models/values.schema.json

An entry of the catalogue is a Model's spec with a few keys more. Its name is checked by the
template, and what it means as a whole (the rules in CEL) by the API server.
"""

from __future__ import annotations

import json
from typing import Any

from kubeai.api.crd import model_crd

KEPT = ("description", "type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength")
Schema = dict[str, Any]
FLAG: Schema = {"type": "boolean"}
STRING_MAP: Schema = {"type": ["object", "null"], "additionalProperties": {"type": "string"}}


def plain(crd: Schema) -> Schema:
    """The part of a CRD's schema that Helm knows; a field that there is not is refused."""
    schema = {key: crd[key] for key in (*KEPT, "minItems", "maxItems", "required") if key in crd}
    if "properties" in crd:
        needed = crd.get("required", ())
        schema["properties"] = {
            name: plain(field) if name in needed else or_null(plain(field))
            for name, field in crd["properties"].items()
        }
        schema["additionalProperties"] = False
    elif "additionalProperties" in crd:
        schema["additionalProperties"] = plain(crd["additionalProperties"])
    if "items" in crd:
        schema["items"] = plain(crd["items"])
    return schema


def or_null(schema: Schema) -> Schema:
    """``null`` is how Helm's users take away what the chart gives."""
    nullable = schema | {"type": [schema["type"], "null"]}
    return nullable | {"enum": [*schema["enum"], None]} if "enum" in schema else nullable


def values_schema() -> Schema:
    root = model_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    entry = plain(root["properties"]["spec"])
    entry["description"] = (
        "A Model: its spec, its labels and annotations, and whether it is wanted."
    )
    entry["properties"] = {
        "enabled": {"description": "Whether the Model is installed.", **FLAG},
        "labels": {"description": "Labels of the Model.", **STRING_MAP},
        "annotations": {"description": "Annotations of the Model.", **STRING_MAP},
        **entry["properties"],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The values of the chart models",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "global": {"type": "object"},
            "all": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"enabled": FLAG},
            },
            "catalog": {"type": "object", "additionalProperties": or_null(entry)},
        },
    }


if __name__ == "__main__":
    print(json.dumps(values_schema(), indent=2, ensure_ascii=False))
