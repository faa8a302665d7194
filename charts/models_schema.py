"""Generate values.schema.json of the chart models from the CustomResourceDefinition of Model.

    python charts/models_schema.py > charts/models/values.schema.json

An entry of the catalogue is a Model's spec with a few additional keys. Numbers and booleans may be
strings, which the template converts. An entry without a URL is left to the template, which reports
that the catalogue has no such Model; the API server checks the CEL rules.
"""

from __future__ import annotations

import json
from typing import Any

from kubeai.api.crd import model_crd

KEPT = ("description", "type", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength")
Schema = dict[str, Any]
FLAG: Schema = {"enum": [True, False, "true", "false"]}
STRING_MAP: Schema = {"type": ["object", "null"], "additionalProperties": {"type": "string"}}


def plain(crd: Schema) -> Schema:
    """The part of a CRD's schema that Helm supports. Unknown fields are refused."""
    if crd.get("type") == "boolean":
        return {"description": crd["description"], **FLAG}
    schema = {key: crd[key] for key in (*KEPT, "minItems", "maxItems", "required") if key in crd}
    if crd.get("type") == "integer":
        schema |= {"type": ["integer", "string"], "pattern": "^[0-9]+$"}
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
    """``null`` removes a value of the chart."""
    types = schema.get("type", [])
    nullable = dict(schema)
    if types:
        nullable["type"] = [*([types] if isinstance(types, str) else types), "null"]
    return nullable | {"enum": [*schema["enum"], None]} if "enum" in schema else nullable


def values_schema() -> Schema:
    root = model_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    entry = plain(root["properties"]["spec"])
    del entry["required"]  # by the template
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
            "enabled": FLAG,  # of a dependency with `condition: models.enabled`
            "all": {
                "type": "object",
                "additionalProperties": False,
                "properties": {"enabled": FLAG},
            },
            "catalog": {
                "type": "object",
                "additionalProperties": {
                    "type": ["object", "null"],
                    "if": {"required": ["url"]},
                    "then": or_null(entry),
                },
            },
        },
    }


if __name__ == "__main__":
    print(json.dumps(values_schema(), indent=2, ensure_ascii=False))
