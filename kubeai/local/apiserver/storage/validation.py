"""The checks of a write, before it reaches the store: decoding, identity, version and validation.

Functions on values: they reject a write by raising a StatusError. The registry calls them in the
order in which a real API server makes these checks.
"""

from __future__ import annotations

from typing import Any

import orjson

from kubeai.local.apiserver import errors
from kubeai.local.apiserver.errors import Cause
from kubeai.local.apiserver.kinds.metadata import check_metadata, tidy_metadata
from kubeai.local.apiserver.kinds.resources import Resource
from kubeai.local.apiserver.kinds.strategies import strategy_of
from kubeai.local.apiserver.storage.options import WriteOptions
from kubeai.local.apiserver.storage.store import Stored

Object = dict[str, Any]


def decode(resource: Resource, obj: Object, options: WriteOptions) -> Any:
    """Check the object's kind and apiVersion, and prune undeclared fields.

    Removes and returns the managedFields that the client sent.
    """
    kind, version = obj.get("kind") or resource.kind, obj.get("apiVersion")
    if resource.custom and not obj.get("kind"):
        raise errors.bad_request(
            f"the object provided is unrecognized (must be of type {resource.kind}): "
            "Object 'Kind' is missing"
        )
    if kind != resource.kind or (version or resource.api_version) != resource.api_version:
        raise errors.bad_request(
            f"the object provided is unrecognized or does not match the resource: "
            f"{version or resource.api_version}, Kind={kind} (want "
            f"{resource.api_version}, Kind={resource.kind})"
        )
    obj["kind"], obj["apiVersion"] = resource.kind, resource.api_version
    unknown, given = tidy_metadata(obj, resource.version, resource.kind)
    if resource.schema is not None:
        unknown += resource.schema.prune(obj)
        resource.schema.default(obj)
        mismatches = [] if resource.custom else resource.schema.mismatches(obj)
        if mismatches:
            raise errors.bad_request(
                f'{resource.kind} in version "{resource.version}" cannot be handled as a '
                f"{resource.kind}: {mismatches[0].line()}"
            )
    problems = [f'duplicate field "{path}"' for path in options.duplicates]
    problems += [f'unknown field "{path}"' for path in sorted(set(unknown))]
    if not problems or options.field_validation == "Ignore":
        return given
    if options.field_validation == "Strict":
        raise errors.bad_request(
            f'{resource.kind} in version "{resource.version}" cannot be handled as a '
            f"{resource.kind}: strict decoding error: {', '.join(problems)}"
        )
    options.warnings += problems
    return given


def check_identity(resource: Resource, name: str, obj: Object, uid: str) -> None:
    """Check that a patch or apply does not change the object's name or uid."""
    metadata = obj.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise errors.bad_request("metadata must be an object")
    given = metadata.get("uid", uid)
    if given != uid:
        why = f'Invalid value: "{given}": field is immutable'
        cause = Cause("FieldValueInvalid", why, "metadata.uid")
        raise errors.invalid(resource.group, resource.kind, name, [cause])
    if metadata.get("name", name) != name:
        raise errors.bad_request(
            f"the name of the object ({metadata['name']}) does not match the name "
            f"on the URL ({name})"
        )


def set_namespace(resource: Resource, namespace: str, metadata: Object) -> None:
    """Check that the object's namespace is the URL's, and set it."""
    given = metadata.pop("namespace", "")
    if given and given != namespace:
        raise errors.bad_request(
            f"the namespace of the provided object does not match the namespace sent on the "
            f"request ({given} != {namespace or 'none'})"
        )
    if resource.namespaced:
        metadata["namespace"] = namespace


def check_version(resource: Resource, name: str, metadata: Object, old: Stored) -> None:
    """Check a write's uid and resourceVersion against the current object's."""
    version, uid = metadata.get("resourceVersion"), metadata.get("uid")
    if uid and uid != old.uid:
        why = f"Precondition failed: UID in precondition: {uid}, UID in object meta: {old.uid}"
        raise errors.conflict(resource.group, resource.plural, name, why)
    if version and version != "0":
        if version != old.metadata["resourceVersion"]:
            raise errors.conflict(resource.group, resource.plural, name, errors.MODIFIED)
    elif not resource.unconditional_update:
        why = "Invalid value: 0: must be specified for an update"
        cause = Cause("FieldValueInvalid", why, "metadata.resourceVersion")
        raise errors.invalid(resource.group, resource.kind, name, [cause])


def validate(resource: Resource, obj: Object, old: Object | None, subresource: str = "") -> None:
    """Validate the object. Raises a 422 that lists all problems."""
    strategy = strategy_of(resource)
    causes = check_metadata(obj["metadata"], strategy.name_is_label, resource.custom)
    if old is not None:
        causes += _check_finalizers(obj["metadata"], old["metadata"])
    if not causes and resource.schema is not None:
        causes = resource.schema.validate(obj, old)
    if not causes:
        causes = strategy.check(obj, old, subresource)
    if causes:
        name = obj["metadata"].get("name", "")
        raise errors.invalid(resource.group, resource.kind, name, causes)


def _check_finalizers(metadata: Object, old: Object) -> list[Cause]:
    if not old.get("deletionTimestamp"):
        return []
    new = sorted(set(metadata.get("finalizers") or ()) - set(old.get("finalizers") or ()))
    if not new:
        return []
    why = (
        "Forbidden: no new finalizers can be added if the object is being deleted, found new "
        f"finalizers []string{{{', '.join(orjson.dumps(name).decode() for name in new)}}}"
    )
    return [Cause("FieldValueForbidden", why, "metadata.finalizers")]


def changes_desired_state(resource: Resource, obj: Object, old: Object) -> bool:
    """Whether the write increments the generation: anything but metadata and status differs."""
    if not (resource.generation or resource.custom):
        return False
    ignored = {"metadata", "apiVersion", "kind"}
    if "status" in resource.subresources:
        ignored.add("status")
    return {name: obj[name] for name in obj if name not in ignored} != {
        name: old[name] for name in old if name not in ignored
    }
