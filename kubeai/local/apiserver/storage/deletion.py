"""The rules of deletion: preconditions, propagation policies, grace periods and finalizers.

Functions on values. The registry calls them for deletes; the collector carries out the policies,
which are stored as finalizers.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from kubeai.local.apiserver import errors
from kubeai.local.apiserver.kinds.resources import Resource
from kubeai.local.apiserver.kinds.strategies import strategy_of
from kubeai.local.apiserver.storage.options import DeleteOptions
from kubeai.local.apiserver.storage.store import Stored

Object = dict[str, Any]

FOREGROUND, ORPHAN = "foregroundDeletion", "orphan"
_POLICIES = {"Foreground": FOREGROUND, "Orphan": ORPHAN, "Background": ""}


def check_preconditions(resource: Resource, name: str, old: Stored, options: DeleteOptions) -> None:
    """Raise a 409 if the object is not the one that the delete refers to."""
    version = old.metadata["resourceVersion"]
    for label, wanted, found, perhaps in (
        ("UID", options.uid, old.uid, "deleted and then recreated"),
        ("ResourceVersion", options.resource_version, version, "modified"),
    ):
        if wanted is not None and wanted != found:
            why = (
                f"the {label} in the precondition ({wanted}) does not match the {label} in "
                f"record ({found}). The object might have been {perhaps}"
            )
            raise errors.conflict(resource.group, resource.plural, name, why)


def set_propagation(metadata: Object, propagation: str | None) -> None:
    """Store the propagation policy as a finalizer for the collector."""
    if propagation is None:
        return
    if propagation not in _POLICIES:
        raise errors.bad_request(f"invalid propagationPolicy {propagation!r}")
    kept = [f for f in metadata.get("finalizers", ()) if f not in (FOREGROUND, ORPHAN)]
    added = _POLICIES[propagation]
    metadata["finalizers"] = [*kept, added] if added else kept
    if not metadata["finalizers"]:
        del metadata["finalizers"]


def mark_deleted(metadata: Object, grace_s: int) -> None:
    """Set the time of deletion; a second deletion can only bring it forward."""
    before = metadata.get("deletionGracePeriodSeconds")
    if metadata.get("deletionTimestamp") and (before is None or before <= grace_s):
        return
    at = datetime.now(UTC) + timedelta(seconds=grace_s)
    metadata["deletionTimestamp"] = at.strftime("%Y-%m-%dT%H:%M:%SZ")
    metadata["deletionGracePeriodSeconds"] = grace_s


def is_finished(resource: Resource, metadata: Object) -> bool:
    """Whether the object is being deleted and nothing blocks its removal."""
    return bool(
        not strategy_of(resource).waits_for_contents
        and metadata.get("deletionTimestamp")
        and not metadata.get("finalizers")
        and not metadata.get("deletionGracePeriodSeconds")
    )
