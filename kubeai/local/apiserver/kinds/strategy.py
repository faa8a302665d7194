"""The strategy of a plain resource, which those of the built-in resources specialize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kubeai.api.config.quantity import parse_quantity
from kubeai.local.apiserver.errors import Cause, bad_request
from kubeai.local.apiserver.kinds.resources import Resource

Object = dict[str, Any]


@dataclass(slots=True, frozen=True)
class Strategy:
    """The strategy of a plain resource, custom or built-in."""

    resets_status: bool = True  # drop the status on creation
    name_is_label: bool = False
    default_propagation: str | None = None
    waits_for_contents: bool = False  # a namespace: the collector removes it once empty
    metadata_with_status: bool = False  # a write to /status may also change metadata
    sets_spec: bool = False  # spec is set by the API only

    def prepare(self, obj: Object, old: Object | None) -> None:
        """Set defaults and API-owned fields in `obj`. `old` (None on creation) is unchanged."""

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        """Validate `obj`, beyond its schema. `old` is None on creation."""
        return []

    def only_status(self, obj: Object, old: Object, resource: Resource) -> Object:
        """Apply a write to ``/status`` to `old` (a copy), and return it."""
        if "status" in obj:
            old["status"] = obj["status"]
        else:
            old.pop("status", None)
        if self.metadata_with_status:
            owners = old["metadata"].get("ownerReferences")
            old["metadata"] = obj["metadata"]
            old["metadata"].pop("ownerReferences", None)
            if owners:
                old["metadata"]["ownerReferences"] = owners
        return old

    def grace_s(self, obj: Object, requested_s: int | None) -> int:
        """Return the deletion grace period in seconds."""
        return 0

    def mark_deleted(self, obj: Object) -> None:
        """Update `obj` when its deletion has begun but is not finished."""


def canonicalize(amounts: Object | None) -> None:
    """Convert quantities to canonical form, in place: 1 → "1", "1000m" → "1"."""
    for name, amount in (amounts or {}).items():
        try:
            amounts[name] = str(parse_quantity(str(amount)))  # type: ignore[index]
        except ValueError as error:
            raise bad_request(f"{name}: {error}") from None
