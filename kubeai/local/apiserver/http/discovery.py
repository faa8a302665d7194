"""Discovery documents: versions, groups, resources, OpenAPI.

OpenAPI v3 is served per group and version, with the paths, the parameters and, if there is one, the
schema of each resource: enough for kubectl's apply, diff, edit and field validation. OpenAPI v2 is
in openapi_v2.py.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from typing import Any

import orjson

import kubeai
from kubeai.local.apiserver.apply.patch import APPLY, JSON, MERGE, STRATEGIC
from kubeai.local.apiserver.kinds.resources import VERBS, Catalog, Resource

Object = dict[str, Any]

# The Kubernetes release that the contract tests compare against.
MAJOR, MINOR, PATCH = 1, 36, 3
DOCUMENTS_MAX = 64  # cached until the resources change
_READS = ("get", "patch", "update")


def version() -> Object:
    """Return the document of ``/version``."""
    return {
        "major": str(MAJOR),
        "minor": str(MINOR),
        "gitVersion": f"v{MAJOR}.{MINOR}.{PATCH}+kubeai-{kubeai.__version__}",
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "1970-01-01T00:00:00Z",
        "goVersion": "",
        "compiler": f"Python {platform.python_version()}",
        "platform": f"linux/{platform.machine()}",
    }


def api_versions() -> Object:
    """Return the document of ``/api``."""
    return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}


def group_list(catalog: Catalog) -> Object:
    """Return the document of ``/apis``."""
    groups = [group(catalog, name) for name in catalog.groups()]
    return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}


def _versions(catalog: Catalog, name: str) -> list[str]:
    return list(dict.fromkeys(resource.version for resource in catalog.of_group(name)))


def group(catalog: Catalog, name: str) -> Object:
    """Return the document of ``/apis/<group>``."""
    versions = [
        {"groupVersion": f"{name}/{version}", "version": version}
        for version in _versions(catalog, name)
    ]
    return {
        "kind": "APIGroup",
        "apiVersion": "v1",
        "name": name,
        "versions": versions,
        "preferredVersion": versions[0],
    }


def resource_list(catalog: Catalog, group: str, version: str) -> Object:
    """Return the resources of a group and version, with their subresources."""
    entries: list[Object] = []
    for resource in catalog.of_group(group):
        if resource.version == version:
            entries.append(_entry(resource))
            entries += [_subresource_entry(resource, name) for name in resource.subresources]
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{group}/{version}" if group else version,
        "resources": entries,
    }


def _entry(resource: Resource) -> Object:
    entry: Object = {
        "name": resource.plural,
        "singularName": resource.one,
        "namespaced": resource.namespaced,
        "kind": resource.kind,
        "verbs": list(VERBS),
        "storageVersionHash": hashlib.sha256(resource.key.encode()).hexdigest()[:11] + "=",
    }
    if resource.short_names:
        entry["shortNames"] = list(resource.short_names)
    if resource.categories:
        entry["categories"] = list(resource.categories)
    return entry


def _of_subresource(resource: Resource, name: str) -> tuple[str, str, str, tuple[str, ...]]:
    """Return the subresource's group, version, kind and verbs."""
    if name == "scale":
        return "autoscaling", "v1", "Scale", _READS
    if name == "binding":
        return "", "v1", "Binding", ("create",)
    if name == "exec":
        return "", "v1", "PodExecOptions", ("create", "get")
    if name == "log":
        return resource.group, resource.version, resource.kind, ("get",)
    return resource.group, resource.version, resource.kind, _READS


def _subresource_entry(resource: Resource, name: str) -> Object:
    group, version, kind, verbs = _of_subresource(resource, name)
    entry = {
        "name": f"{resource.plural}/{name}",
        "singularName": "",
        "namespaced": resource.namespaced,
        "kind": kind,
        "verbs": list(verbs),
    }
    if (group, version) != (resource.group, resource.version):
        entry |= {"group": group, "version": version}
    return entry


def aggregated(catalog: Catalog, core: bool, version: str) -> Object:
    """Return an APIGroupDiscoveryList of all named groups, or of the core group if `core`."""
    names = [""] if core else catalog.groups()
    return {
        "kind": "APIGroupDiscoveryList",
        "apiVersion": f"apidiscovery.k8s.io/{version}",
        "metadata": {},
        "items": [_aggregated_group(catalog, name) for name in names],
    }


def _aggregated_group(catalog: Catalog, name: str) -> Object:
    metadata: Object = {"creationTimestamp": None}
    if name:
        metadata["name"] = name
    versions = [
        {
            "version": version,
            "freshness": "Current",
            "resources": [
                _aggregated_resource(resource)
                for resource in catalog.of_group(name)
                if resource.version == version
            ],
        }
        for version in _versions(catalog, name)
    ]
    return {"metadata": metadata, "versions": versions}


def _aggregated_resource(resource: Resource) -> Object:
    entry: Object = {
        "resource": resource.plural,
        "responseKind": _gvk(resource),
        "scope": "Namespaced" if resource.namespaced else "Cluster",
        "singularResource": resource.one,
        "verbs": list(VERBS),
    }
    if resource.short_names:
        entry["shortNames"] = list(resource.short_names)
    if resource.categories:
        entry["categories"] = list(resource.categories)
    if resource.subresources:
        entry["subresources"] = [
            {
                "subresource": name,
                "responseKind": {"group": group, "version": version, "kind": kind},
                "verbs": list(verbs),
            }
            for name in resource.subresources
            for group, version, kind, verbs in [_of_subresource(resource, name)]
        ]
    return entry


def _gvk(resource: Resource) -> Object:
    return {"group": resource.group, "version": resource.version, "kind": resource.kind}


# OpenAPI.


def _group_versions(catalog: Catalog) -> dict[str, tuple[str, str]]:
    """``apis/batch/v1`` → (group, version)."""
    return {
        (f"apis/{r.group}/{r.version}" if r.group else f"api/{r.version}"): (r.group, r.version)
        for r in catalog.all()
    }


def openapi_index(catalog: Catalog) -> Object:
    """Return the document of ``/openapi/v3``: each group and version, with a hash."""
    paths: Object = {}
    for path, (group, version) in _group_versions(catalog).items():
        document = openapi_v3(catalog, group, version) or b""
        digest = hashlib.sha256(document).hexdigest()[:32].upper()
        paths[path] = {"serverRelativeURL": f"/openapi/v3/{path}?hash={digest}"}
    return {"paths": paths}


def openapi_v3(catalog: Catalog, group: str, version: str) -> bytes | None:
    """Return the document of one group and version, or None if it is not served."""
    return _openapi_v3(catalog, catalog.changes, group, version)


@functools.lru_cache(maxsize=DOCUMENTS_MAX)
def _openapi_v3(catalog: Catalog, _changes: int, group: str, version: str) -> bytes | None:
    resources = [r for r in catalog.of_group(group) if r.version == version]
    if not resources:
        return None
    schemas: Object = {}
    paths: Object = {}
    for resource in resources:
        name = schema_name(resource)
        schemas[name] = schema_of(resource)
        if resource.schema is not None:
            schemas |= resource.schema.definitions
        paths |= _paths(resource, {"$ref": f"#/components/schemas/{name}"})
    document = {
        "openapi": "3.0.0",
        "info": {"title": "KubeAI's embedded Kubernetes API", "version": version_text()},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    return orjson.dumps(document).replace(b'"#/$defs/', b'"#/components/schemas/')


def version_text() -> str:
    """Return the server's version, like ``v1.2.3+kubeai-0.1.0``."""
    return str(version()["gitVersion"])


def schema_name(resource: Resource) -> str:
    """Return the name of the kind's schema in OpenAPI documents."""
    domain = ".".join(reversed(resource.group.split("."))) if resource.group else "io.k8s.api.core"
    return f"{domain}.{resource.version}.{resource.kind}"


def schema_of(resource: Resource) -> Object:
    """Return the kind's schema, tagged with its group, version and kind."""
    root: Object = {"type": "object"}
    if resource.schema is not None:
        root = {**resource.schema.root}
    root["x-kubernetes-group-version-kind"] = [_gvk(resource)]
    return root


_WRITES = ("dryRun", "fieldManager", "fieldValidation")


def _paths(resource: Resource, schema: Object) -> Object:
    base = f"/apis/{resource.group}" if resource.group else "/api"
    base += f"/{resource.version}/"
    if resource.namespaced:
        base += "namespaces/{namespace}/"
    base += resource.plural
    return {
        base: {
            "get": _operation(resource, "list", schema),
            "post": _operation(resource, "post", schema, _WRITES),
        },
        base + "/{name}": {
            "get": _operation(resource, "get", schema),
            "put": _operation(resource, "put", schema, _WRITES),
            "patch": _operation(resource, "patch", schema, (*_WRITES, "force")),
            "delete": _operation(resource, "delete", schema),
        },
    }


_PATCHES = (JSON, MERGE, APPLY)


def _operation(
    resource: Resource, action: str, schema: Object, parameters: tuple[str, ...] = ()
) -> Object:
    operation: Object = {
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": _gvk(resource),
        "parameters": [
            {"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": True}}
            for name in parameters
        ],
        "responses": {
            "200": {"description": "OK", "content": {"application/json": {"schema": schema}}}
        },
    }
    if action in ("post", "put"):
        operation["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    elif action == "patch":
        kinds = _PATCHES if resource.custom else (*_PATCHES, STRATEGIC)
        operation["requestBody"] = {"content": {kind: {"schema": {}} for kind in kinds}}
    return operation
