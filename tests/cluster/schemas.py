"""Write what the embedded API knows of the built-in kinds: builtins.json and protobuf.json.

The schemas are those that a real kube-apiserver tells; the numbers of protobuf's fields are read
from the Go modules of the same version.

    KUBEBUILDER_ASSETS=$(tests/cluster/build.sh) python tests/cluster/schemas.py

To be run again when the version in go.mod changes. What the embedded API has no use for is left
out: descriptions, the zero values that OpenAPI calls defaults, and `required` (Go fills such
fields with zero values; what a real API server insists on is checked by hand).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import orjson
from repository import REPOSITORY

sys.path[:0] = [str(REPOSITORY / "tests" / "contract"), str(REPOSITORY / "tests")]
TARGET = REPOSITORY / "kubeai" / "local" / "apiserver"
GROUPS = {
    "api/v1": (
        "ConfigMap", "Event", "Namespace", "Node", "PersistentVolumeClaim", "Pod", "Secret",
        "Service", "ServiceAccount",
    ),
    "apis/batch/v1": ("Job",),
    "apis/coordination.k8s.io/v1": ("Lease",),
    "apis/apiextensions.k8s.io/v1": ("CustomResourceDefinition",),
}  # fmt: skip
# What typed Go clients may send without it being stored.
ALSO_SENT = ("DeleteOptions", "SelfSubjectAccessReview", "SelfSubjectReview")
PROTOS = {
    "k8s.io/api": (
        "core/v1",
        "batch/v1",
        "coordination/v1",
        "authorization/v1",
        "authentication/v1",
    ),
    "k8s.io/apimachinery": ("pkg/apis/meta/v1",),
}
SCALARS = {"string", "bytes", "bool", "int32", "int64", "double"}
KEPT = (
    "type", "x-kubernetes-patch-strategy", "x-kubernetes-patch-merge-key", "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys", "x-kubernetes-map-type",
)  # fmt: skip
OBSERVED = ("Status", "Condition", "State", "Address", "Info")  # an enum there is not enforced
ANYTHING = {"x-kubernetes-preserve-unknown-fields": True}


def short(name: str) -> str:
    return name.rpartition(".")[2]


def slim(schema: dict, enums: bool) -> dict:
    """One schema, and the names of the others that it needs in `$ref`s."""
    reference = schema.get("$ref") or next(
        (part["$ref"] for part in schema.get("allOf", ()) if "$ref" in part), None
    )
    out = {key: schema[key] for key in KEPT if key in schema}
    if reference:
        return {**out, "$ref": f"#/$defs/{short(reference.rpartition('/')[2])}"}
    if "oneOf" in schema:  # IntOrString and Quantity
        out["type"] = [kind["type"] for kind in schema["oneOf"]]
    if schema.get("format") == "date-time":
        out["format"] = "date-time"
    if enums and "enum" in schema:
        out["enum"] = schema["enum"]
    if schema.get("default"):  # such as a port's protocol, which is a part of its list's key
        out["default"] = schema["default"]
    if "properties" in schema:
        out["properties"] = {key: slim(value, enums) for key, value in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            out[key] = slim(schema[key], enums)
    plain_object = out.get("type") == "object" and not (
        "properties" in out or "additionalProperties" in out
    )
    return out if "type" in out and not plain_object else {**out, **ANYTHING}


def messages() -> dict[str, dict[str, list[str]]]:
    """Message → number → [name, type, "" | repeated | map], of every message in PROTOS."""
    line = re.compile(r"\s*(?:(optional|repeated) (\S+)|(map)<string, *(\S+?)>) (\w+) = (\d+);")
    found: dict[str, dict[str, list[str]]] = {}
    for module, folders in PROTOS.items():
        command = ["go", "list", "-m", "-f", "{{.Dir}}", module]
        root = subprocess.check_output(command, cwd=Path(__file__).parent, text=True).strip()
        for folder in folders:
            fields: dict[str, list[str]] = {}
            for text in (Path(root) / folder / "generated.proto").read_text().splitlines():
                if text.startswith("message "):
                    fields = found.setdefault(text.split()[1], {})
                elif match := line.match(text):
                    label = "map" if match[3] else match[1].replace("optional", "")
                    fields[match[6]] = [match[5], short(match[2] or match[4]), label]
    return found


def wire_format(known: dict[str, dict], kinds: set[str]) -> dict[str, dict[str, list[str]]]:
    """The messages that the kinds need. A name of "" marks a message that JSON inlines."""
    declared = messages()
    chosen: dict[str, dict[str, list[str]]] = {}
    wanted = set(kinds)
    while wanted:
        name = wanted.pop()
        if name in chosen or name in SCALARS or name not in declared:
            continue
        members = known.get(name, {}).get("properties")
        chosen[name] = {}
        for number, (field, kind, label) in declared[name].items():
            inlined = members is not None and field not in members
            if inlined and kind in SCALARS:
                continue
            chosen[name][number] = ["" if inlined else field, kind, label]
            wanted.add(kind)
    return {name: chosen[name] for name in sorted(chosen)}


def references(value: object) -> set[str]:
    if isinstance(value, dict):
        target = value.get("$ref")  # a definition's schema has a property of that name
        found = {short(target.rpartition("/")[2])} if isinstance(target, str) else set()
        return found.union(*(references(member) for member in value.values()))
    if isinstance(value, list):
        return set().union(*(references(item) for item in value))
    return set()


def main() -> None:
    from servers import real

    known: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder, real(Path(folder) / "api") as server:
        for path in (*GROUPS, "apis/authorization.k8s.io/v1"):
            document = server.request("GET", f"/openapi/v3/{path}")[1]
            for name, schema in document["components"]["schemas"].items():
                converted = slim(schema, not short(name).endswith(OBSERVED))
                assert known.setdefault(short(name), converted) == converted, name
    wanted = {kind for kinds in GROUPS.values() for kind in kinds}
    needed: set[str] = set()
    while wanted:
        needed |= wanted
        wanted = set().union(*(references(known[name]) for name in wanted)) - needed
    chosen = {name: known[name] for name in sorted(needed)}
    kinds = {kind for kinds in GROUPS.values() for kind in kinds} | set(ALSO_SENT)
    wire = wire_format(known, kinds - {"CustomResourceDefinition"})
    for name, content in (("kinds/builtins.json", chosen), ("http/protobuf.json", wire)):
        data = orjson.dumps(content, option=orjson.OPT_SORT_KEYS) + b"\n"
        (TARGET / name).write_bytes(data)
        print(f"{name}: {len(content)} types, {len(data)} bytes")


if __name__ == "__main__":
    main()
