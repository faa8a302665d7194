"""Field ownership and server-side apply: what a write does to ``metadata.managedFields``.

Pure; the registry calls it, through `field_manager`, on each write. An update takes ownership of
the fields that it changes. An apply lists all fields that its manager wants. Changing a field owned
by others is a `Conflict` unless the apply is forced. A field that the manager applied before and no
longer lists is removed if nobody else owns it.

The rules are those of Kubernetes' structured-merge-diff, so that its clients work unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kubeai.local.apiserver.apply.field_sets import MEMBER, Fields, difference, intersection, union
from kubeai.local.apiserver.apply.managed_fields import (
    APPLY,
    UPDATE,
    Entry,
    Writer,
    capped,
    decode,
    encode,
)
from kubeai.local.apiserver.apply.shape import SchemaMismatch, Shape
from kubeai.local.apiserver.apply.typed import compare, merge, remove, to_field_set, with_parents
from kubeai.local.apiserver.schema.structural import Schema

Object = dict[str, Any]

BEFORE_FIRST_APPLY = "before-first-apply"
_METADATA: Fields = {"f:metadata": MEMBER}
_NAME: Fields = {"f:metadata": {"f:name": MEMBER}}
# Set by the API; never owned by a manager.
_TYPE = ("apiVersion", "kind")
_SYSTEM = (
    "name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "selfLink",
    "managedFields",
)  # fmt: skip


class Conflict(Exception):
    """An apply would change fields that other managers own."""

    def __init__(self, fields: list[tuple[Entry, Fields]]) -> None:
        super().__init__("an apply conflicts with other managers")
        self.fields = fields


class Ownership:
    """Field ownership for one version of a resource. `meta` is the schema of ObjectMeta."""

    def __init__(self, schema: Schema, meta: Schema) -> None:
        self.shape = Shape(schema, schema.root, meta, resource=True)

    def updated(
        self, managed: list[Object], old: Object | None, new: Object, writer: Writer,
        unowned: tuple[str, ...] = (),
    ) -> list[Object]:  # fmt: skip
        """Return ``managedFields`` after an update from `old` (None on creation) to `new`.

        `unowned` are members of the object that this write cannot set. If the object has no
        ``managedFields``, ownership stays untracked until the first apply.
        """
        if old is not None and not managed:
            return managed
        changed, removed = compare(_view(old or {}, unowned), _view(new, unowned), self.shape)
        if not changed and not removed:
            return managed
        mine = Entry(writer.manager, UPDATE, writer.api_version, writer.subresource, changed,
                     writer.time)  # fmt: skip
        entries = []
        for entry in decode(managed) or ():
            rest = difference(difference(entry.fields, changed), removed)
            if entry.key != mine.key:
                entries.append(replace(entry, fields=rest))
            elif changed:
                mine = replace(mine, fields=union(rest, changed))
            else:
                mine = replace(entry, fields=rest)
        return encode(capped([*entries, mine]))

    def applied(
        self, managed: list[Object], live: Object, config: Object, writer: Writer,
        force: bool = False, unowned: tuple[str, ...] = (),
        uncontested: Callable[[], Fields] = dict,
    ) -> tuple[Object, list[Object]]:  # fmt: skip
        """Return `live` after an apply, and its ``managedFields``.

        `config` has no `unowned` members. The `uncontested` fields never conflict.
        Raises SchemaMismatch or Conflict.
        """
        shape = self.shape
        mine = Entry(writer.manager, APPLY, writer.api_version, writer.subresource,
                     self._applied_fields(config))  # fmt: skip
        entries = decode(managed) or []
        if not entries and live:
            everywhere, _ = compare(_view({}), _view(live, unowned), shape)
            entries = [Entry(BEFORE_FIRST_APPLY, UPDATE, writer.api_version, writer.subresource,
                             everywhere, writer.time)]  # fmt: skip
        last = next((entry for entry in entries if entry.key == mine.key), None)
        others = [entry for entry in entries if entry.key != mine.key]
        new = merge(live, config, shape)
        if last is not None:
            owned = [mine.fields, _NAME, *(entry.fields for entry in others)]
            kept = with_parents(functools.reduce(union, owned), shape)
            new = remove(new, difference(with_parents(last.fields, shape), kept), shape)
        changed, removed = compare(_view(live, unowned), _view(new, unowned), shape)
        if not force:
            _refuse_conflicts(others, changed, uncontested)
        before = last.time if last is not None else None
        time = writer.time if changed or removed else before
        others = [
            replace(entry, fields=difference(difference(entry.fields, changed), removed))
            for entry in others
        ]
        return new, encode([*others, replace(mine, time=time)])

    def fields_in_agreement(self, config: Object, live: Object) -> Fields:
        """Return the fields of a configuration that have the same value in `live`."""
        try:
            changed, removed = compare(_view(config), _view(live), self.shape)
            return difference(difference(self._applied_fields(config), changed), removed)
        except SchemaMismatch:
            return {}

    def _applied_fields(self, config: Object) -> Fields:
        return difference(to_field_set(_view(config), self.shape), _METADATA)


def _view(obj: Object, unowned: tuple[str, ...] = ()) -> Object:
    """Return the part of an object that can be owned. Always has ``metadata``."""
    view = {name: value for name, value in obj.items() if name not in _TYPE and name not in unowned}
    metadata = view.get("metadata") or {}
    view["metadata"] = {name: value for name, value in metadata.items() if name not in _SYSTEM}
    return view


def _refuse_conflicts(
    others: list[Entry], changed: Fields, uncontested: Callable[[], Fields]
) -> None:
    taken = [(entry, intersection(entry.fields, changed)) for entry in others]
    taken = [(entry, fields) for entry, fields in taken if fields]
    if taken:
        given = uncontested()
        left = [(entry, difference(fields, given)) for entry, fields in taken]
        left = [(entry, fields) for entry, fields in left if fields]
        if left:
            raise Conflict(left)
