"""The strategies of the built-in resources: what differs from a plain resource.

`STRATEGIES[""]` is the strategy of plain resources, which custom resources use too.
"""

from __future__ import annotations

import base64
import copy
from dataclasses import dataclass
from typing import Any

from kubeai.local.apiserver.errors import Cause
from kubeai.local.apiserver.kinds.definitions import check_definition, prepare_definition
from kubeai.local.apiserver.kinds.jobs import JobStrategy
from kubeai.local.apiserver.kinds.pods import PodStrategy
from kubeai.local.apiserver.kinds.resources import Resource
from kubeai.local.apiserver.kinds.strategy import Strategy, canonicalize

Object = dict[str, Any]


@dataclass(slots=True, frozen=True)
class _NamespaceStrategy(Strategy):
    name_is_label: bool = True
    waits_for_contents: bool = True
    sets_spec: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        metadata = obj["metadata"]
        labels = metadata.setdefault("labels", {})
        if "name" in metadata:
            labels["kubernetes.io/metadata.name"] = metadata["name"]
        if old is None:
            obj["spec"] = {"finalizers": ["kubernetes"]}
            obj["status"] = {"phase": "Active"}
        else:
            obj["spec"] = copy.deepcopy(old["spec"])

    def mark_deleted(self, obj: Object) -> None:
        obj["status"] = {**obj.get("status", {}), "phase": "Terminating"}


@dataclass(slots=True, frozen=True)
class _NodeStrategy(Strategy):
    resets_status: bool = False
    metadata_with_status: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        obj.setdefault("spec", {})
        for amounts in ("capacity", "allocatable"):
            canonicalize(obj.get("status", {}).get(amounts))


@dataclass(slots=True, frozen=True)
class _SecretStrategy(Strategy):
    def prepare(self, obj: Object, old: Object | None) -> None:
        _text_to_data(obj)
        _drop_empty(obj, "data")
        obj.setdefault("type", "Opaque")

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        return _check_immutable(obj, old, ("data", "immutable")) + _check_type(obj, old)


@dataclass(slots=True, frozen=True)
class _ConfigMapStrategy(Strategy):
    def prepare(self, obj: Object, old: Object | None) -> None:
        _drop_empty(obj, "data", "binaryData")

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        return _check_immutable(obj, old, ("data", "binaryData", "immutable"))


@dataclass(slots=True, frozen=True)
class _ClaimStrategy(Strategy):
    metadata_with_status: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        spec = obj.setdefault("spec", {})
        spec.setdefault("volumeMode", "Filesystem")
        canonicalize((spec.get("resources") or {}).get("requests"))
        if old is None:
            obj["status"] = {"phase": "Pending"}


@dataclass(slots=True, frozen=True)
class _ServiceStrategy(Strategy):
    name_is_label: bool = True
    metadata_with_status: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        spec = obj.setdefault("spec", {})
        for name, value in (("type", "ClusterIP"), ("sessionAffinity", "None")):
            spec.setdefault(name, value)
        for port in spec.get("ports") or ():
            port.setdefault("protocol", "TCP")
            port.setdefault("targetPort", port.get("port"))
        obj.setdefault("status", {"loadBalancer": {}})


@dataclass(slots=True, frozen=True)
class _DefinitionStrategy(Strategy):
    def prepare(self, obj: Object, old: Object | None) -> None:
        prepare_definition(obj, old)

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        return check_definition(obj, old)


STRATEGIES: dict[str, Strategy] = {
    "": Strategy(),
    "pods": PodStrategy(),
    "namespaces": _NamespaceStrategy(),
    "nodes": _NodeStrategy(),
    "secrets": _SecretStrategy(),
    "configmaps": _ConfigMapStrategy(),
    "persistentvolumeclaims": _ClaimStrategy(),
    "services": _ServiceStrategy(),
    "jobs.batch": JobStrategy(),
    "customresourcedefinitions.apiextensions.k8s.io": _DefinitionStrategy(),
}


def strategy_of(resource: Resource) -> Strategy:
    """Return the resource's strategy."""
    return STRATEGIES.get(resource.key, STRATEGIES[""])


def _drop_empty(obj: Object, *names: str) -> None:
    """Drop empty maps, as Go's ``omitempty`` does."""
    for name in names:
        if obj.get(name) == {}:
            del obj[name]


def _text_to_data(secret: Object) -> None:
    """Move the write-only ``stringData`` to ``data``."""
    for name, text in (secret.pop("stringData", None) or {}).items():
        secret.setdefault("data", {})[name] = base64.b64encode(text.encode()).decode()


def _check_immutable(obj: Object, old: Object | None, names: tuple[str, ...]) -> list[Cause]:
    if old is None or not old.get("immutable"):
        return []
    why = "Forbidden: field is immutable when `immutable` is set"
    return [
        Cause("FieldValueForbidden", why, name) for name in names if obj.get(name) != old.get(name)
    ]


def _check_type(obj: Object, old: Object | None) -> list[Cause]:
    if old is None or obj.get("type") == old.get("type"):
        return []
    why = f'Invalid value: "{obj.get("type")}": field is immutable'
    return [Cause("FieldValueInvalid", why, "type")]
