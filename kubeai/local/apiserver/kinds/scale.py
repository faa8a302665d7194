"""autoscaling/v1 Scale: reads and writes an object's replicas at the paths in its CRD."""

from __future__ import annotations

from typing import Any

from kubeai.local.apiserver import errors
from kubeai.local.apiserver.errors import Cause
from kubeai.local.apiserver.kinds.resources import Resource

Object = dict[str, Any]


def scale_of(resource: Resource, obj: Object) -> Object:
    """Return the Scale of an object."""
    paths = resource.scale
    assert paths is not None
    metadata = {
        name: obj["metadata"][name]
        for name in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
        if name in obj["metadata"]
    }
    status: Object = {"replicas": _at(obj, paths.status) or 0}
    if paths.selector and _at(obj, paths.selector):
        status["selector"] = _at(obj, paths.selector)
    spec: Object = {}
    replicas = _at(obj, paths.spec)
    if replicas is not None:
        spec["replicas"] = replicas
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": metadata,
        "spec": spec,
        "status": status,
    }


def check_scale(scale: Object) -> None:
    """Reject an applied object that is not a Scale."""
    if (scale.get("apiVersion"), scale.get("kind")) != ("autoscaling/v1", "Scale"):
        api_version, kind = scale.get("apiVersion") or "/", scale.get("kind") or ""
        raise errors.bad_request(f"invalid object type: {api_version}, Kind={kind}")


def with_replicas(resource: Resource, obj: Object, scale: Object) -> Object:
    """Set the Scale's ``spec.replicas`` in `obj` at the path in its CRD (in place)."""
    assert resource.scale is not None
    replicas = (scale.get("spec") or {}).get("replicas", 0)
    if not isinstance(replicas, int) or isinstance(replicas, bool):
        raise errors.bad_request(f"spec.replicas of a Scale must be an integer, not {replicas!r}")
    if replicas < 0:
        why = f"Invalid value: {replicas}: should be a non-negative integer"
        cause = Cause("FieldValueInvalid", why, "spec.replicas")
        raise errors.invalid(resource.group, resource.kind, obj["metadata"]["name"], [cause])
    *parents, last = _parts(resource.scale.spec)
    place = obj
    for name in parents:
        place = place.setdefault(name, {})
    place[last] = replicas
    return obj


def _parts(path: str) -> list[str]:
    return path.lstrip(".").split(".")


def _at(obj: Object, path: str) -> Any:
    value: Any = obj
    for name in _parts(path):
        value = value.get(name) if isinstance(value, dict) else None
    return value
