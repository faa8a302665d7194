"""Field managers: applies `ownership` to the served resources.

Decides which members of an object a write (also to a subresource) cannot set, when a client may set
managedFields itself, and how kubectl migrates from client-side to server-side apply. The registry
calls `applied` for an apply, and `updated` for every other write.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from typing import Any

import orjson

from kubeai.local.apiserver import errors
from kubeai.local.apiserver.apply.field_sets import Fields, paths
from kubeai.local.apiserver.apply.managed_fields import Writer, well_formed
from kubeai.local.apiserver.apply.ownership import Conflict, Ownership
from kubeai.local.apiserver.apply.shape import SchemaMismatch
from kubeai.local.apiserver.kinds.resources import OBJECT_META, Resource
from kubeai.local.apiserver.kinds.strategies import strategy_of

Object = dict[str, Any]

# kubectl's record of its last client-side apply. A server-side apply by kubectl takes it over.
LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
KUBECTL = "kubectl"
OWNERSHIPS_MAX = 256  # cached, one per resource version


def managed_fields(obj: Object) -> list[Object]:
    """Return the object's ``metadata.managedFields``; empty if ownership is untracked."""
    return obj.get("metadata", {}).get("managedFields") or []


def without_managed_fields(obj: Object) -> Object:
    """Return a shallow copy without ``metadata.managedFields``, for comparison."""
    metadata = {name: value for name, value in obj["metadata"].items() if name != "managedFields"}
    return {**obj, "metadata": metadata}


def copied(obj: Object) -> Object:
    """Return a deep copy that shares managedFields, which are never mutated."""
    metadata = obj.get("metadata")
    managed = metadata.get("managedFields") if isinstance(metadata, dict) else None
    return copy.deepcopy(obj, {id(managed): managed} if managed else None)


def updated(
    resource: Resource, given: list[Object] | None, old: Object | None, new: Object, writer: Writer
) -> list[Object]:
    """Return the managedFields after a write from `old` (None on creation) to `new`.

    A client may set managedFields itself (`given`). A list with one empty entry clears them; so
    does an empty list in a built-in object. A malformed list is ignored, so that clients unaware of
    managedFields do no harm.
    """
    before = managed_fields(old) if old else []
    if given is not None and not writer.subresource and given != before:
        if given == [{}] or (not given and not resource.custom):
            return []
        before = given if well_formed(given) else before
    unowned = _unowned(resource, writer.subresource, old is None, new)
    try:
        return _ownership(resource).updated(before, old, new, writer, unowned)
    except SchemaMismatch:
        return before  # it fails validation next, or predates its schema


def applied(
    resource: Resource, name: str, live: Object, config: Object, writer: Writer, force: bool
) -> tuple[Object, list[Object]]:
    """Return a copy of `live` ({} on creation) after an apply, and its managedFields.

    Raises a 400 if the configuration does not match the schema, or a 409 if it conflicts.
    """
    owners = _ownership(resource)
    unowned = _unowned(resource, writer.subresource, not live, live.keys() | config.keys())
    config = {member: value for member, value in config.items() if member not in unowned}
    config["metadata"] = config.get("metadata") or {}
    recorded = _record(live) if writer.manager == KUBECTL else None

    def uncontested() -> Fields:
        return (
            owners.fields_in_agreement(_read_record(resource, recorded), live) if recorded else {}
        )

    try:
        obj, managed = owners.applied(
            managed_fields(live), live, config, writer, force, unowned, uncontested
        )
    except SchemaMismatch as mismatch:
        about = f"{name}; {resource.api_version}, Kind={resource.kind}"
        message = f"failed to create typed patch object ({about}): {mismatch}"
        raise errors.bad_request(message) from None
    except Conflict as conflict:
        found = [(entry.shown(), list(paths(fields))) for entry, fields in conflict.fields]
        raise errors.apply_conflict(found) from None
    obj = copied(obj)
    if recorded is not None:
        obj["metadata"].setdefault("annotations", {})[LAST_APPLIED] = _as_record(config)
    return obj, managed


@functools.lru_cache(maxsize=OWNERSHIPS_MAX)
def _ownership(resource: Resource) -> Ownership:
    assert resource.schema is not None
    return Ownership(resource.schema, OBJECT_META)


def _unowned(
    resource: Resource, subresource: str, creating: bool, members: Iterable[str]
) -> tuple[str, ...]:
    """Return the members of an object that a write, possibly to a subresource, cannot set."""
    strategy = strategy_of(resource)
    if subresource == "status":
        kept = {"status", "apiVersion", "kind"}
        kept |= {"metadata"} if strategy.metadata_with_status else set()
        return tuple(member for member in members if member not in kept)
    unowned: tuple[str, ...] = ("spec",) if strategy.sets_spec else ()
    if "status" in resource.subresources and (strategy.resets_status or not creating):
        unowned += ("status",)
    return unowned


def _record(live: Object) -> str | None:
    annotations = live.get("metadata", {}).get("annotations") or {}
    found: str | None = annotations.get(LAST_APPLIED)
    return found


def _read_record(resource: Resource, recorded: str) -> Object:
    """Return the configuration of the last client-side apply; {} if it is not usable."""
    try:
        config = orjson.loads(recorded)
    except ValueError:
        return {}
    same = isinstance(config, dict) and config.get("apiVersion") == resource.api_version
    return config if same and isinstance(config.get("metadata"), dict) else {}


def _as_record(config: Object) -> str:
    """Encode a configuration as kubectl does in its annotation."""
    metadata = {**config["metadata"]}
    if metadata.get("annotations"):
        metadata["annotations"] = {**metadata["annotations"]}
        metadata["annotations"].pop(LAST_APPLIED, None)
    text = orjson.dumps({**config, "metadata": metadata}, option=orjson.OPT_SORT_KEYS)
    return text.decode() + "\n"
