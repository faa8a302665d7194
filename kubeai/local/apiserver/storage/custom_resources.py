"""Keeps the catalog in step with the CustomResourceDefinitions in the store."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from kubeai.local.apiserver.kinds.definitions import resources_of
from kubeai.local.apiserver.kinds.resources import CRDS, Catalog
from kubeai.local.apiserver.schema.structural import Schema
from kubeai.local.apiserver.storage.store import Event, Store

Object = dict[str, Any]


def serve_custom_resources(store: Store, catalog: Catalog) -> None:
    """Serve the resources of all CRDs in the store, and follow changes to these."""

    def follow(event: Event) -> None:
        if event.resource != CRDS.key:
            return
        if event.new is not None:
            _serve(store, catalog, event.new.object)
        else:
            spec = event.last.object["spec"]
            catalog.replace(spec["group"], spec["names"]["plural"], ())

    for definition in store.items(CRDS.key):
        _serve(store, catalog, definition.object)
    store.listeners.append(follow)


def _serve(store: Store, catalog: Catalog, definition: Object) -> None:
    """Make the catalog serve exactly the versions that the CRD declares as served."""
    spec, resources = definition["spec"], resources_of(definition)
    catalog.replace(spec["group"], spec["names"]["plural"], resources)
    for resource in resources:
        if resource.version == resource.storage_version and resource.schema is not None:
            store.reread(resource.key, _defaulted_by(resource.schema))


def _defaulted_by(schema: Schema) -> Callable[[Object], Object]:
    """Return a function that adds the schema's defaults to a copy of an object."""

    def default(obj: Object) -> Object:
        obj = copy.deepcopy(obj)
        schema.default(obj)
        return obj

    return default
