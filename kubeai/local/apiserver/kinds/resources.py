"""The served resources: the built-in ones, and those added by CustomResourceDefinitions.

A `Resource` describes a collection to the registry, the printer and discovery. The `Catalog` looks
resources up by path and by key, and changes as CRDs are created and deleted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from kubeai.local.apiserver.errors import group_resource
from kubeai.local.apiserver.schema.structural import Schema

Object = dict[str, Any]

VERBS = (
    "create", "delete", "deletecollection", "get", "list", "patch", "update", "watch",
)  # fmt: skip


@dataclass(slots=True, frozen=True)
class ScalePaths:
    """The JSONPaths, such as ``.spec.replicas``, of the fields behind ``/scale``."""

    spec: str
    status: str
    selector: str | None


@dataclass(slots=True, frozen=True, eq=False)
class Resource:
    """One collection at one API version."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()  # any of: status, scale, log, exec, binding
    # Whether an update may omit resourceVersion: most built-in kinds allow it, custom ones do not.
    unconditional_update: bool = True
    generation: bool = False  # metadata.generation counts spec changes
    custom: bool = False
    singular: str = ""
    list_kind: str = ""
    storage_version: str = ""
    schema: Schema | None = None
    scale: ScalePaths | None = None
    columns: tuple[Object, ...] | None = None  # additionalPrinterColumns
    selectable: tuple[str, ...] = field(default=())  # fields that a field selector may name

    @property
    def api_version(self) -> str:
        """The group and version, as in an object's ``apiVersion``."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def key(self) -> str:
        """The collection's key in the store; the same for all versions."""
        return group_resource(self.group, self.plural)

    @property
    def lists(self) -> str:
        """The kind of a list of these objects."""
        return self.list_kind or self.kind + "List"

    @property
    def one(self) -> str:
        """The singular name, as kubectl accepts it."""
        return self.singular or self.kind.lower()


@functools.cache
def _definitions() -> Object:
    """Schemas of the built-in kinds, by kind. tests/cluster/schemas.py generates the file."""
    content: Object = orjson.loads(Path(__file__).with_name("builtins.json").read_bytes())
    return content


def _references(value: Any) -> set[str]:
    if isinstance(value, list):
        return set().union(*map(_references, value))
    if not isinstance(value, dict):
        return set()
    target = value.get("$ref")
    found = {target.rpartition("/")[2]} if isinstance(target, str) else set()
    return found.union(*map(_references, value.values()))


def _built_in_schema(kind: str) -> Schema:
    """Return the schema of a built-in kind, with only the definitions that it needs."""
    known = _definitions()
    needed: set[str] = set()
    wanted = _references(known[kind])
    while wanted:
        needed |= wanted
        wanted = set().union(*(_references(known[name]) for name in wanted)) - needed
    return Schema(known[kind], {name: known[name] for name in sorted(needed)})


def _built_in(group: str, plural: str, kind: str, **rest: Any) -> Resource:
    return Resource(group, "v1", plural, kind, schema=_built_in_schema(kind), **rest)


OBJECT_META = _built_in_schema("ObjectMeta")
_META = ("metadata.name", "metadata.namespace")
CORE = ""
CRDS = _built_in(
    "apiextensions.k8s.io", "customresourcedefinitions", "CustomResourceDefinition",
    namespaced=False, short_names=("crd", "crds"), categories=("api-extensions",),
    subresources=("status",), unconditional_update=False, generation=True, selectable=_META,
)  # fmt: skip
PODS = _built_in(
    CORE, "pods", "Pod", short_names=("po",), categories=("all",), generation=True,
    subresources=("status", "log", "exec", "binding"),
    selectable=(*_META, "spec.nodeName", "spec.restartPolicy", "spec.schedulerName",
                "spec.serviceAccountName", "spec.hostNetwork", "status.phase", "status.podIP",
                "status.nominatedNodeName"),
)  # fmt: skip
NAMESPACES = _built_in(
    CORE, "namespaces", "Namespace", namespaced=False, short_names=("ns",),
    subresources=("status",), selectable=(*_META, "status.phase"),
)  # fmt: skip
EVENTS = _built_in(
    CORE, "events", "Event", short_names=("ev",),
    selectable=(*_META, "involvedObject.kind", "involvedObject.namespace", "involvedObject.name",
                "involvedObject.uid", "involvedObject.apiVersion",
                "involvedObject.resourceVersion", "involvedObject.fieldPath", "reason",
                "reportingComponent", "source", "type"),
)  # fmt: skip
BUILT_IN = (
    NAMESPACES,
    PODS,
    EVENTS,
    CRDS,
    _built_in(CORE, "configmaps", "ConfigMap", short_names=("cm",), selectable=_META),
    _built_in(CORE, "secrets", "Secret", selectable=(*_META, "type")),
    _built_in(
        CORE, "services", "Service", short_names=("svc",), categories=("all",),
        subresources=("status",), selectable=(*_META, "spec.clusterIP", "spec.type"),
    ),
    _built_in(CORE, "serviceaccounts", "ServiceAccount", short_names=("sa",),
             selectable=_META),
    _built_in(
        CORE, "persistentvolumeclaims", "PersistentVolumeClaim", short_names=("pvc",),
        subresources=("status",), selectable=_META,
    ),
    _built_in(
        CORE, "nodes", "Node", namespaced=False, short_names=("no",),
        subresources=("status",), selectable=(*_META, "spec.unschedulable"),
    ),
    _built_in(
        "batch", "jobs", "Job", categories=("all",), subresources=("status",),
        generation=True, selectable=(*_META, "status.successful"),
    ),
    _built_in(
        "coordination.k8s.io", "leases", "Lease", unconditional_update=False,
        selectable=_META,
    ),
)  # fmt: skip


class Catalog:
    """The resources that are currently served."""

    def __init__(self) -> None:
        self._served: dict[tuple[str, str, str], Resource] = {}
        self.changes = 0  # number of changes; part of the key of caches derived from the catalog
        for resource in BUILT_IN:
            self._served[resource.group, resource.version, resource.plural] = resource

    def find(self, group: str, version: str, plural: str) -> Resource | None:
        """Return the resource that a path refers to, if it is served."""
        return self._served.get((group, version, plural))

    def by_key(self, key: str) -> Resource | None:
        """Return any served version of the collection with this store key."""
        plural, _, group = key.partition(".")
        for resource in self._served.values():
            if resource.plural == plural and resource.group == group:
                return resource
        return None

    def all(self) -> Iterable[Resource]:
        """Return all served versions of all resources."""
        return list(self._served.values())

    def of_group(self, group: str) -> list[Resource]:
        """Return all served versions of the group's resources."""
        return [resource for resource in self._served.values() if resource.group == group]

    def groups(self) -> list[str]:
        """The names of all groups except core."""
        return list(dict.fromkeys(r.group for r in self._served.values() if r.group))

    def replace(self, group: str, plural: str, resources: Iterable[Resource]) -> None:
        """Serve exactly these versions of a custom collection."""
        self.changes += 1
        for old in [r for r in self._served.values() if (r.group, r.plural) == (group, plural)]:
            del self._served[old.group, old.version, old.plural]
        for resource in resources:
            self._served[resource.group, resource.version, resource.plural] = resource
