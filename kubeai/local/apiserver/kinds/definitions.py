"""CustomResourceDefinitions: validation, status, and conversion to served resources."""

from __future__ import annotations

from typing import Any

from kubeai.local.apiserver.errors import Cause
from kubeai.local.apiserver.kinds.metadata import now
from kubeai.local.apiserver.kinds.resources import BUILT_IN, Resource, ScalePaths
from kubeai.local.apiserver.schema.structural import Schema

Object = dict[str, Any]

CLEANUP = "customresourcecleanup.apiextensions.k8s.io"


def prepare_definition(obj: Object, old: Object | None) -> None:
    """Set defaults and status. A CRD that passes validation is established at once."""
    spec = obj.get("spec")
    if not isinstance(spec, dict) or not isinstance(spec.get("names"), dict):
        return
    names = spec["names"]
    if isinstance(names.get("kind"), str):
        names.setdefault("singular", names["kind"].lower())
        names.setdefault("listKind", names["kind"] + "List")
    spec.setdefault("conversion", {"strategy": "None"})
    if old is None:
        finalizers = obj["metadata"].setdefault("finalizers", [])
        if CLEANUP not in finalizers:
            finalizers.append(CLEANUP)
    stored = [v["name"] for v in spec.get("versions") or () if v.get("storage")]
    before = (obj.get("status") or {}).get("storedVersions") or []
    conditions = {
        condition["type"]: condition for condition in (obj.get("status") or {}).get(
            "conditions", ())
    }  # fmt: skip
    for kind, reason, message in (
        ("NamesAccepted", "NoConflicts", "no conflicts found"),
        ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
    ):
        conditions.setdefault(
            kind,
            {"type": kind, "status": "True", "reason": reason, "message": message,
             "lastTransitionTime": now()},
        )  # fmt: skip
    obj["status"] = {
        "acceptedNames": dict(names),
        "conditions": list(conditions.values()),
        "storedVersions": [*before, *(name for name in stored if name not in before)],
    }


def check_definition(obj: Object, old: Object | None) -> list[Cause]:
    """Find mistakes that would make the resource unusable."""
    spec = obj.get("spec")
    if not isinstance(spec, dict):
        return [_required("spec")]
    names, versions = spec.get("names"), spec.get("versions")
    causes = [_required(f"spec.{field}") for field in ("group", "scope") if not spec.get(field)]
    if not isinstance(names, dict) or not names.get("plural") or not names.get("kind"):
        return [*causes, _required("spec.names")]
    if not isinstance(versions, list) or not versions:
        return [*causes, _required("spec.versions")]
    if causes:
        return causes
    expected = f"{names['plural']}.{spec['group']}"
    if obj["metadata"].get("name") != expected:
        why = (
            f'Invalid value: "{obj["metadata"].get("name")}": must be spec.names.plural+"."'
            "+spec.group"
        )
        causes.append(Cause("FieldValueInvalid", why, "metadata.name"))
    if spec["scope"] not in ("Namespaced", "Cluster"):
        why = f'Unsupported value: "{spec["scope"]}": supported values: "Cluster", "Namespaced"'
        causes.append(Cause("FieldValueNotSupported", why, "spec.scope"))
    if (spec.get("conversion") or {}).get("strategy") != "None":
        why = 'Unsupported value: "Webhook": supported values: "None"'
        causes.append(Cause("FieldValueNotSupported", why, "spec.conversion.strategy"))
    if any(resource.group == spec["group"] for resource in BUILT_IN):
        why = f'Invalid value: "{spec["group"]}": is a built-in group'
        causes.append(Cause("FieldValueInvalid", why, "spec.group"))
    if sum(bool(version.get("storage")) for version in versions) != 1:
        why = "Invalid value: must have exactly one version marked as storage version"
        causes.append(Cause("FieldValueInvalid", why, "spec.versions"))
    for index, version in enumerate(versions):
        causes += _check_version(version, f"spec.versions[{index}]")
    return causes + _check_unchanged(spec, old)


def _required(field: str) -> Cause:
    return Cause("FieldValueRequired", "Required value", field)


def _check_version(version: Object, path: str) -> list[Cause]:
    schema = (version.get("schema") or {}).get("openAPIV3Schema")
    if not version.get("name"):
        return [_required(f"{path}.name")]
    if not isinstance(schema, dict):
        why = "Required value: schemas are required"
        return [Cause("FieldValueRequired", why, f"{path}.schema.openAPIV3Schema")]
    if schema.get("type") != "object":
        why = 'Invalid value: must be "object" at the root'
        return [Cause("FieldValueInvalid", why, f"{path}.schema.openAPIV3Schema.type")]
    try:
        built = Schema(schema)
    except ValueError as error:
        why = f"Invalid value: {error}"
        return [Cause("FieldValueInvalid", why, f"{path}.schema.openAPIV3Schema")]
    return [
        cause._replace(field=f"{path}.schema.openAPIV3Schema{cause.field}")
        for cause in built.mistakes
    ]


def _check_unchanged(spec: Object, old: Object | None) -> list[Cause]:
    if old is None:
        return []
    return [
        Cause("FieldValueInvalid", f'Invalid value: "{spec[name]}": field is immutable',
              f"spec.{name}")
        for name in ("group", "scope")
        if spec[name] != old["spec"][name]
    ]  # fmt: skip


def resources_of(definition: Object) -> list[Resource]:
    """Return a resource for each version that the CRD declares as served."""
    spec = definition["spec"]
    storage = next(version["name"] for version in spec["versions"] if version.get("storage"))
    return [
        _resource(spec, version, storage) for version in spec["versions"] if version.get("served")
    ]


def _resource(spec: Object, version: Object, storage: str) -> Resource:
    names = spec["names"]
    subresources = version.get("subresources") or {}
    scale = subresources.get("scale")
    return Resource(
        spec["group"],
        version["name"],
        names["plural"],
        names["kind"],
        namespaced=spec["scope"] == "Namespaced",
        short_names=tuple(names.get("shortNames") or ()),
        categories=tuple(names.get("categories") or ()),
        subresources=tuple(name for name in ("status", "scale") if name in subresources),
        unconditional_update=False,
        custom=True,
        singular=names.get("singular", ""),
        list_kind=names.get("listKind", ""),
        storage_version=storage,
        schema=Schema(version["schema"]["openAPIV3Schema"]),
        scale=ScalePaths(
            scale["specReplicasPath"],
            scale["statusReplicasPath"],
            scale.get("labelSelectorPath"),
        )
        if scale
        else None,
        columns=tuple(version.get("additionalPrinterColumns") or ()),
        selectable=(
            "metadata.name",
            "metadata.namespace",
            *(field["jsonPath"].lstrip(".") for field in version.get("selectableFields") or ()),
        ),
    )
