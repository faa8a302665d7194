"""The entries of ``metadata.managedFields``: decoding, encoding and limits. Pure."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from kubeai.local.apiserver.apply.field_sets import Fields, is_field_set, union

Object = dict[str, Any]

UPDATE, APPLY = "Update", "Apply"
FORMAT = "FieldsV1"
ANCIENT = "ancient-changes"
UPDATERS_MAX = 10  # beyond that, the oldest are merged into one entry
SHARED_MAX = 512  # field sets cached for sharing between objects


@functools.lru_cache(maxsize=SHARED_MAX)
def _shared(fields: bytes) -> Fields:
    """Share one tree between equal field sets: pods of a model, renewals of a lease."""
    tree: Fields = orjson.loads(fields)
    return tree


class Writer(NamedTuple):
    """The manager of a write, and the API version, time and subresource that it used."""

    manager: str
    api_version: str
    time: str
    subresource: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """The fields of one manager, operation and subresource."""

    manager: str
    operation: str
    api_version: str
    subresource: str
    fields: Fields
    time: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What identifies an entry: a manager has one per operation, version and subresource."""
        version = "" if self.operation == APPLY else self.api_version
        return self.manager, self.operation, version, self.subresource

    def shown(self) -> str:
        """Format the manager as in a conflict message."""
        text = orjson.dumps(self.manager).decode()
        if self.subresource:
            text += f" with subresource {orjson.dumps(self.subresource).decode()}"
        return text if self.operation == APPLY else f"{text} using {self.api_version}"

    def encoded(self) -> Object:
        """Return the entry as clients see it."""
        out: Object = {"manager": self.manager, "operation": self.operation}
        fields = _shared(orjson.dumps(self.fields))
        out |= {"apiVersion": self.api_version, "fieldsType": FORMAT, "fieldsV1": fields}
        if self.time:
            out["time"] = self.time
        if self.subresource:
            out["subresource"] = self.subresource
        return out


def decode(managed: Any) -> list[Entry] | None:
    """Decode ``managedFields``. Returns None if it is malformed."""
    if not isinstance(managed, list):
        return None
    entries = []
    for item in managed:
        texts = [item.get(key) or "" for key in ("manager", "operation", "apiVersion",
                                                 "subresource", "time")]  # fmt: skip
        manager, operation, api_version, subresource, time = texts
        if (
            not all(isinstance(text, str) for text in texts)
            or operation not in (APPLY, UPDATE)
            or not api_version
            or item.get("fieldsType") != FORMAT
        ):
            return None
        fields = item.get("fieldsV1") or {}
        entries.append(Entry(manager, operation, api_version, subresource, fields, time or None))
    return entries


def well_formed(managed: Any) -> bool:
    """Whether a client's ``managedFields`` is non-empty and valid."""
    entries = decode(managed)
    return bool(entries) and all(is_field_set(entry.fields) for entry in entries or ())


def encode(entries: Iterable[Entry]) -> list[Object]:
    """Encode entries in Kubernetes' order: applies first, then by age."""
    kept = [entry for entry in entries if entry.fields]
    kept.sort(key=lambda e: (e.operation, e.time or "", e.manager, e.api_version, e.subresource))
    return [entry.encoded() for entry in kept]


def capped(entries: list[Entry]) -> list[Entry]:
    """Limit update entries to UPDATERS_MAX by merging the oldest."""
    updates = sorted(
        (entry for entry in entries if entry.operation == UPDATE and entry.fields),
        key=lambda entry: (entry.manager != ANCIENT, entry.time or "", entry.manager),
    )
    surplus = updates[: max(0, len(updates) - UPDATERS_MAX + 1)]
    if len(updates) <= UPDATERS_MAX:
        return entries
    fields = functools.reduce(union, (entry.fields for entry in surplus))
    ancient = replace(surplus[-1], manager=ANCIENT, subresource="", fields=fields)
    return [*(entry for entry in entries if entry not in surplus), ancient]
