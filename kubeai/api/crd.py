"""The CustomResourceDefinition of Model, generated from the types in `kubeai.api.model`.

``python -m kubeai.api.crd`` writes it to standard output; ``kubeai crd`` prints the same, the
Helm chart carries a copy (a test holds the two equal), and `kubeai local` installs it.
"""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import yaml
from msgspec import inspect

from kubeai.api.model import GROUP, KIND, PLURAL, VERSION, Model, ModelSpec, ModelStatus, Rule

Schema = dict[str, Any]

_READY = '.status.conditions[?(@.type=="Ready")].reason'
_COLUMNS = (
    # name, type, path, description, priority (1: only with -o wide)
    ("Engine", "string", ".spec.engine", "The model server", 0),
    ("Replicas", "integer", ".spec.replicas", "Replicas wanted", 0),
    ("Ready", "integer", ".status.replicas.ready", "Replicas that can be sent requests", 0),
    ("Status", "string", _READY, "Why it serves, or why it does not", 0),
    ("Age", "date", ".metadata.creationTimestamp", "", 0),
    ("Profile", "string", ".spec.resourceProfile", "What one replica gets", 1),
    ("URL", "string", ".spec.url", "Where the weights come from", 1),
)


def model_crd() -> dict[str, Any]:
    """The CustomResourceDefinition (apiextensions.k8s.io/v1) of Model, ready to be applied."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["mdl"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root_schema()},
                    "additionalPrinterColumns": [_column(*column) for column in _COLUMNS],
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas.all",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                }
            ],
        },
    }


def crd_yaml() -> str:
    """The CRD as the YAML file that is installed."""
    note = "# Made by `python -m kubeai.api.crd` from kubeai/api/model.py. Do not edit.\n"
    text = yaml.dump(model_crd(), Dumper=_Dumper, sort_keys=False, width=100, allow_unicode=True)
    return note + text


def _column(name: str, type_: str, path: str, description: str, priority: int) -> Schema:
    column: Schema = {"name": name, "type": type_, "jsonPath": path}
    if description:
        column["description"] = description
    if priority:
        column["priority"] = priority
    return column


def _root_schema() -> Schema:
    """The whole object: Kubernetes adds the fields of metadata itself."""
    return {
        "type": "object",
        "description": _class_doc(Model),
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": _schema(inspect.type_info(ModelSpec)),
            "status": _schema(inspect.type_info(ModelStatus)),
        },
        "x-kubernetes-validations": _rules(Model.RULES),
    }


def _rules(rules: tuple[Rule, ...]) -> list[dict[str, str]]:
    return [rule._asdict() for rule in rules]


def _class_doc(cls: type) -> str:
    return " ".join((cls.__doc__ or "").split())


def _schema(type_: inspect.Type) -> Schema:
    """The structural schema of a type; msgspec's inspection tells what the type is."""
    match type_:
        case inspect.Metadata(type=inner, extra_json_schema=extra):
            # An outer description says what the field is for; it wins over the type's own.
            return _schema(inner) | (extra or {})
        case inspect.UnionType(types=types):
            (inner,) = (t for t in types if not isinstance(t, inspect.NoneType))
            return _schema(inner)
        case inspect.StructType():
            return _object(type_)
        case inspect.VarTupleType(item_type=item):
            return {"type": "array", "items": _schema(item)}
        case inspect.DictType(value_type=value):
            return {"type": "object", "additionalProperties": _schema(value)}
        case inspect.LiteralType(values=values):
            # msgspec sorts a Literal's values, so the file does not depend on their order.
            return {"type": "string", "enum": list(values)}
        case inspect.StrType() | inspect.DateTimeType():
            return {"type": "string"}
        case inspect.BoolType():
            return {"type": "boolean"}
        case inspect.IntType():
            return {"type": "integer"}
    raise TypeError(f"no schema is known for {type_!r}")


def _object(type_: inspect.StructType) -> Schema:
    properties = {}
    for field in type_.fields:
        schema = _schema(field.type)
        default = _default(field)
        if default is not None:
            schema["default"] = default
        properties[field.encode_name] = schema
    schema = {"type": "object", "description": _class_doc(type_.cls), "properties": properties}
    required = [field.encode_name for field in type_.fields if field.required]
    if required:
        schema["required"] = required
    rules = getattr(type_.cls, "RULES", ())
    if rules:
        schema["x-kubernetes-validations"] = _rules(rules)
    return schema


def _default(field: inspect.Field) -> Any:
    """What the API server fills in: numbers and words, and {} where a struct has its own.

    Empty strings, lists and maps and False mean the same as nothing, and stay away from objects.
    """
    if field.default_factory is not msgspec.NODEFAULT and field.default_factory not in (list, dict):
        return {}
    default = field.default
    if default is msgspec.NODEFAULT or default is None or default is False:
        return None
    return default if isinstance(default, int) or default else None


class _Dumper(yaml.SafeDumper):
    """Readable YAML: lists indented, no anchors, several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_str)


if __name__ == "__main__":
    sys.stdout.write(crd_yaml())
