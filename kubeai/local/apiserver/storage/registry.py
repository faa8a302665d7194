"""The rules of reads and writes: what a Kubernetes API server does between request and store.

Owns metadata, optimistic concurrency, the separation of spec and status, generations, schema
pruning, defaulting and validation, finalizers and graceful deletion. Everything is synchronous:
each request is one step, so nothing runs between a read and the write that depends on it. The
server calls it for clients, the collector for the effects of deletions.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable
from typing import Any

import orjson

from kubeai.local.apiserver import errors
from kubeai.local.apiserver.apply import field_manager
from kubeai.local.apiserver.apply.field_manager import (
    copied,
    managed_fields,
    without_managed_fields,
)
from kubeai.local.apiserver.apply.managed_fields import Writer
from kubeai.local.apiserver.apply.patch import apply_patch
from kubeai.local.apiserver.errors import Cause
from kubeai.local.apiserver.kinds.metadata import (
    NAME_MAX_CHARS,
    check_metadata_unchanged,
    now,
    random_suffix,
)
from kubeai.local.apiserver.kinds.resources import NAMESPACES, PODS, Catalog, Resource
from kubeai.local.apiserver.kinds.scale import check_scale, scale_of, with_replicas
from kubeai.local.apiserver.kinds.strategies import strategy_of
from kubeai.local.apiserver.storage.custom_resources import serve_custom_resources
from kubeai.local.apiserver.storage.deletion import (
    check_preconditions,
    is_finished,
    mark_deleted,
    set_propagation,
)
from kubeai.local.apiserver.storage.options import DeleteOptions, WriteOptions
from kubeai.local.apiserver.storage.store import Key, Store, Stored
from kubeai.local.apiserver.storage.validation import (
    changes_desired_state,
    check_identity,
    check_version,
    decode,
    set_namespace,
    validate,
)

Object = dict[str, Any]

PREMADE_NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")


class Registry:
    """Reads and writes objects by Kubernetes' rules."""

    def __init__(self, store: Store, catalog: Catalog) -> None:
        self.store = store
        self.catalog = catalog
        serve_custom_resources(store, catalog)
        for name in PREMADE_NAMESPACES:
            if store.get(NAMESPACES.key, ("", name)) is None:
                self.create(NAMESPACES, "", {"metadata": {"name": name}}, WriteOptions())

    # Reads.

    def get(self, resource: Resource, namespace: str, name: str) -> Stored:
        """Return the object. Raises a 404."""
        stored = self.store.get(resource.key, (namespace, name))
        if stored is None:
            raise errors.not_found(resource.group, resource.plural, name)
        return stored

    # Writes.

    def create(
        self, resource: Resource, namespace: str, obj: Object, options: WriteOptions
    ) -> Stored:
        """Create the object, with a generated name if it has only ``generateName``."""
        return self._create(resource, namespace, obj, options)

    def _create(
        self,
        resource: Resource,
        namespace: str,
        obj: Object,
        options: WriteOptions,
        applied: list[Object] | None = None,
    ) -> Stored:
        """`applied`: the managedFields that an apply made; other writes make them here."""
        strategy = strategy_of(resource)
        given = decode(resource, obj, options)
        metadata = obj["metadata"]
        if metadata.get("resourceVersion"):
            raise errors.bad_request("resourceVersion should not be set on objects to be created")
        set_namespace(resource, namespace, metadata)
        name = self._name(resource, namespace, metadata)
        if self.store.get(resource.key, (namespace, name)) is not None:
            raise errors.already_exists(resource.group, resource.plural, name)
        self._check_namespace_accepts(resource, namespace, name)
        for given in ("deletionTimestamp", "deletionGracePeriodSeconds", "generation"):
            metadata.pop(given, None)
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now()}
        if resource.generation or resource.custom:
            metadata["generation"] = 1
        if "status" in resource.subresources and strategy.resets_status:
            obj.pop("status", None)
        strategy.prepare(obj, None)
        if resource.schema is not None:
            resource.schema.default(obj)
        validate(resource, obj, None)
        if applied is None:
            applied = field_manager.updated(resource, given, None, obj, _writer(resource, options))
        _set_managed(obj, applied)
        return self._commit(resource, (namespace, name), obj, options)

    def update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        obj: Object,
        options: WriteOptions,
        subresource: str = "",
    ) -> Stored:
        """Replace the object or its status."""
        return self._update(resource, namespace, name, obj, options, subresource)

    def _update(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        obj: Object,
        options: WriteOptions,
        subresource: str,
        applied: list[Object] | None = None,
    ) -> Stored:
        """`applied`: the managedFields that an apply made; other writes make them here."""
        old = self.get(resource, namespace, name)
        given = decode(resource, obj, options)
        metadata = obj["metadata"]
        set_namespace(resource, namespace, metadata)
        if not metadata.get("name"):
            raise errors.bad_request(
                f"the name of the object ({name} based on URL) was undeterminable: "
                "name must be provided"
            )
        if metadata["name"] != name:
            raise errors.bad_request(
                f"the name of the object ({metadata['name']}) does not match the name on the "
                f"URL ({name})"
            )
        check_version(resource, name, metadata, old)
        strategy = strategy_of(resource)
        fixed = check_metadata_unchanged(metadata, old.metadata)
        if fixed:
            raise errors.invalid(resource.group, resource.kind, name, fixed)
        _keep_system_metadata(metadata, old.metadata)
        if subresource == "status":
            obj = strategy.only_status(
                obj, copy.deepcopy(without_managed_fields(old.object)), resource
            )
        elif "status" in resource.subresources:
            _keep_status(obj, old.object)
        strategy.prepare(obj, old.object)
        if resource.schema is not None:
            resource.schema.default(obj)
        obj["metadata"]["resourceVersion"] = old.metadata["resourceVersion"]
        if changes_desired_state(resource, obj, old.object):
            obj["metadata"]["generation"] = old.metadata.get("generation", 0) + 1
        if applied is None:
            writer = _writer(resource, options, subresource)
            applied = field_manager.updated(resource, given, old.object, obj, writer)
        if obj == without_managed_fields(old.object) and applied == managed_fields(old.object):
            return old
        validate(resource, obj, old.object, subresource)
        _set_managed(obj, applied)
        if is_finished(resource, obj["metadata"]):
            return self._remove(resource, (namespace, name), options, obj)
        return self._commit(resource, (namespace, name), obj, options)

    def patch(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        kind: str,
        patch: Any,
        options: WriteOptions,
        subresource: str = "",
    ) -> Stored:
        """Apply a patch to the object or its status. `kind` is the patch's content type."""
        old = self.get(resource, namespace, name)
        patched = self._patched(resource, kind, old.object, patch)
        check_identity(resource, name, patched, old.uid)
        return self._update(resource, namespace, name, patched, options, subresource)

    def apply(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        config: Object,
        options: WriteOptions,
        subresource: str = "",
    ) -> tuple[Stored, bool]:
        """Server-side apply; `config` holds all fields that the manager wants.

        Creates the object if it does not exist. Returns it, and whether it was created.
        """
        if (config.get("apiVersion"), config.get("kind")) != (resource.api_version, resource.kind):
            api_version, kind = config.get("apiVersion") or "/", config.get("kind") or ""
            raise errors.bad_request(f"invalid object type: {api_version}, Kind={kind}")
        metadata = config.get("metadata")
        if isinstance(metadata, dict) and metadata.get("managedFields") is not None:
            raise errors.bad_request("metadata.managedFields must be nil")
        old = self.store.get(resource.key, (namespace, name))
        if old is None and subresource:
            raise errors.not_found(resource.group, resource.plural, name)
        check_identity(resource, name, config, old.uid if old else "")
        writer, live = _writer(resource, options, subresource), old.object if old else {}
        obj, managed = field_manager.applied(resource, name, live, config, writer, options.force)
        if old is not None:
            stored = self._update(resource, namespace, name, obj, options, subresource, managed)
            return stored, False
        obj["metadata"].pop("resourceVersion", None)
        if not obj["metadata"].get("name"):
            raise errors.bad_request(
                f"the name of the object ({name} based on URL) was undeterminable: "
                "name must be provided"
            )
        return self._create(resource, namespace, obj, options, managed), True

    def scale(self, resource: Resource, namespace: str, name: str) -> Object:
        """Return the object's autoscaling/v1 Scale."""
        return scale_of(resource, self.get(resource, namespace, name).object)

    def set_scale(
        self, resource: Resource, namespace: str, name: str, scale: Object, options: WriteOptions
    ) -> Object:
        """Write a Scale's ``spec.replicas`` to the object."""
        old = self.get(resource, namespace, name)
        obj = with_replicas(resource, copied(old.object), scale)
        version = (scale.get("metadata") or {}).get("resourceVersion")
        if version:
            obj["metadata"]["resourceVersion"] = version
        stored = self._update(resource, namespace, name, obj, options, "scale")
        return scale_of(resource, stored.object)

    def patch_scale(
        self,
        resource: Resource,
        namespace: str,
        name: str,
        kind: str,
        patch: Any,
        options: WriteOptions,
    ) -> Object:
        """Apply a patch to the object's Scale. `kind` is the patch's content type."""
        before = self.scale(resource, namespace, name)
        scale = apply_patch(kind, before, patch, None, custom=True)
        return self.set_scale(resource, namespace, name, scale, options)

    def apply_scale(
        self, resource: Resource, namespace: str, name: str, scale: Object, options: WriteOptions
    ) -> Object:
        """Apply to ``/scale``: an apply to the object with only its replicas."""
        check_scale(scale)
        config: Object = {"apiVersion": resource.api_version, "kind": resource.kind}
        config["metadata"] = scale.get("metadata") or {"name": name}
        config = with_replicas(resource, config, scale)
        stored, _ = self.apply(resource, namespace, name, config, options, "scale")
        return scale_of(resource, stored.object)

    def bind(self, namespace: str, name: str, binding: Object, options: WriteOptions) -> None:
        """Bind a pod to a node: ``POST pods/<name>/binding``."""
        old = self.get(PODS, namespace, name)
        about = binding.get("metadata") or {}
        if about.get("name") != name:
            raise errors.bad_request("name in URL does not match name in Binding object")
        if about.get("uid", old.uid) != old.uid:
            raise errors.conflict("", "pods/binding", name, errors.MODIFIED)
        node = (binding.get("target") or {}).get("name")
        if not node:
            raise errors.invalid(
                "", "Binding", name, [Cause("FieldValueRequired", "Required value", "target.name")]
            )
        if old.object["spec"].get("nodeName"):
            why = f'pod {name} is already assigned to node "{old.object["spec"]["nodeName"]}"'
            raise errors.conflict("", "pods/binding", name, why)
        if old.metadata.get("deletionTimestamp"):
            why = f"pod {name} is being deleted, cannot be assigned to a host"
            raise errors.conflict("", "pods/binding", name, why)
        obj = copied(old.object)
        obj["spec"]["nodeName"] = node
        condition = {"type": "PodScheduled", "status": "True", "lastProbeTime": None,
                     "lastTransitionTime": now()}  # fmt: skip
        conditions = obj.setdefault("status", {}).setdefault("conditions", [])
        conditions[:] = [c for c in conditions if c.get("type") != "PodScheduled"] + [condition]
        self._commit(PODS, (namespace, name), obj, options)

    # Deletion.

    def delete(
        self, resource: Resource, namespace: str, name: str, options: DeleteOptions
    ) -> tuple[Stored, bool]:
        """Delete the object or begin to. Returns it, and whether it is gone."""
        old = self.get(resource, namespace, name)
        check_preconditions(resource, name, old, options)
        strategy = strategy_of(resource)
        if resource is NAMESPACES and name in PREMADE_NAMESPACES[:-1]:
            raise errors.forbidden("", "namespaces", name, "this namespace may not be deleted")
        obj = copied(old.object)
        metadata = obj["metadata"]
        set_propagation(metadata, options.propagation or strategy.default_propagation)
        grace_s = strategy.grace_s(obj, options.grace_s)
        write = WriteOptions(dry_run=options.dry_run)
        stays = grace_s > 0 or metadata.get("finalizers") or strategy.waits_for_contents
        if not stays:
            return self._remove(resource, (namespace, name), write), True
        mark_deleted(metadata, grace_s)
        strategy.mark_deleted(obj)
        if obj == old.object:
            return old, False
        if "generation" in metadata and not old.metadata.get("deletionTimestamp"):
            metadata["generation"] += 1
        return self._commit(resource, (namespace, name), obj, write), False

    def change(self, resource: Resource, key: Key, edit: Callable[[Object], None]) -> Stored | None:
        """Edit without admission, for the collector. Returns None if the object is gone."""
        old = self.store.get(resource.key, key)
        if old is None:
            return None
        obj = copied(old.object)
        edit(obj)
        if obj == old.object:
            return old
        if is_finished(resource, obj["metadata"]):
            self.store.remove(resource.key, key)
            return None
        return self.store.put(resource.key, key, obj)

    # Steps of a write.

    def _patched(self, resource: Resource, kind: str, obj: Object, patch: Any) -> Object:
        patched = apply_patch(kind, obj, patch, resource.schema, resource.custom)
        return copied(patched)  # unpatched parts are shared with the store

    def _name(self, resource: Resource, namespace: str, metadata: Object) -> str:
        prefix = metadata.get("generateName")
        if not metadata.get("name") and prefix:
            name = prefix[: NAME_MAX_CHARS - 5] + random_suffix()
            while self.store.get(resource.key, (namespace, name)) is not None:
                name = prefix + random_suffix()
            metadata["name"] = name
        return str(metadata.get("name", ""))

    def _check_namespace_accepts(self, resource: Resource, namespace: str, name: str) -> None:
        if not resource.namespaced:
            return
        home = self.store.get(NAMESPACES.key, ("", namespace))
        if home is None:
            raise errors.not_found("", "namespaces", namespace)
        if home.metadata.get("deletionTimestamp"):
            why = (
                f"unable to create new content in namespace {namespace} "
                "because it is being terminated"
            )
            raise errors.forbidden(resource.group, resource.plural, name, why)

    def _commit(self, resource: Resource, key: Key, obj: Object, options: WriteOptions) -> Stored:
        if options.dry_run:
            return Stored(obj, orjson.dumps(obj), 0)
        return self.store.put(resource.key, key, obj)

    def _remove(
        self, resource: Resource, key: Key, options: WriteOptions, last: Object | None = None
    ) -> Stored:
        if options.dry_run:
            old = self.get(resource, *key)
            return Stored(last, orjson.dumps(last), 0) if last else old
        return self.store.remove(resource.key, key)


def _writer(resource: Resource, options: WriteOptions, subresource: str = "") -> Writer:
    return Writer(options.manager, resource.api_version, now(), subresource)


def _set_managed(obj: Object, managed: list[Object]) -> None:
    obj["metadata"].pop("managedFields", None)
    if managed:
        obj["metadata"]["managedFields"] = managed


def _keep_system_metadata(metadata: Object, old: Object) -> None:
    """Restore the metadata that clients cannot change."""
    for name in (
        "uid", "creationTimestamp", "generation", "generateName", "deletionTimestamp",
        "deletionGracePeriodSeconds",
    ):  # fmt: skip
        metadata.pop(name, None)
        if name in old:
            metadata[name] = old[name]


def _keep_status(obj: Object, old: Object) -> None:
    obj.pop("status", None)
    if "status" in old:
        obj["status"] = copy.deepcopy(old["status"])
