"""Field ownership: ``metadata.managedFields`` and server-side apply.

Pure functions in three parts; the registry calls them, through `managers`, on each write.

- Field sets, in the format that clients see (FieldsV1): a tree of dicts whose keys are steps.
  ``f:name`` leads to a member, ``k:{"name":"a"}`` to the list item with that key, ``v:"a"`` to the
  list item with that value. A node is in the set if it has no steps below it, or a ``.`` among
  them. Trees are shared between versions of an object and never mutated.
- `Shape`, which splits an object into fields by its schema: a scalar and an atomic list or map are
  one field each.
- What a write does to the owners. An update takes ownership of the fields that it changes. An apply
  lists all fields that its manager wants. Changing a field owned by others is a `Conflict` unless
  the apply is forced. A field that the manager applied before and no longer lists is removed if
  nobody else owns it.

The rules are those of Kubernetes' structured-merge-diff, so that its clients work unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import orjson

from kubeai.local.apiserver.schema.structural import Schema

Object = dict[str, Any]
Fields = dict[str, Any]  # a node of a field set

UPDATE, APPLY = "Update", "Apply"
FORMAT = "FieldsV1"
BEFORE_FIRST_APPLY, ANCIENT = "before-first-apply", "ancient-changes"
UPDATERS_MAX = 10  # beyond that, the oldest are merged into one entry
DEPTH_MAX = 200  # of field sets that clients send
SHARED_MAX = 512  # field sets cached for sharing between objects
_PRESERVE = "x-kubernetes-preserve-unknown-fields"
_SELF = "."
_IN: Fields = {}  # a node that is in the set and has nothing below it
_METADATA: Fields = {"f:metadata": _IN}
_NAME: Fields = {"f:metadata": {"f:name": _IN}}
# Set by the API; never owned by a manager.
_TYPE = ("apiVersion", "kind")
_SYSTEM = (
    "name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "selfLink",
    "managedFields",
)  # fmt: skip


# Field sets. At the root {} is the empty set; below the root it is a field.


def _is_in(node: Fields) -> bool:
    return not node or _SELF in node


def _node(inside: bool, below: Fields) -> Fields | None:
    """Return a node, or None if it would be empty."""
    if not below:
        return _IN if inside else None
    return {_SELF: _IN, **below} if inside else below


def union(one: Fields, other: Fields) -> Fields:
    if not one or not other:
        return one or other
    return _union(one, other)


def _union(one: Fields, other: Fields) -> Fields:
    below = {step: child for step, child in one.items() if step != _SELF}
    for step, child in other.items():
        if step != _SELF:
            below[step] = _union(below[step], child) if step in below else child
    return _node(_is_in(one) or _is_in(other), below) or _IN


def difference(one: Fields, other: Fields) -> Fields:
    return (_difference(one, other) or {}) if one and other else one


def _difference(one: Fields, other: Fields) -> Fields | None:
    below = {}
    for step, child in one.items():
        rest = _difference(child, other[step]) if step in other else child
        if step != _SELF and rest is not None:
            below[step] = rest
    return _node(_is_in(one) and not _is_in(other), below)


def intersection(one: Fields, other: Fields) -> Fields:
    return (_intersection(one, other) or {}) if one and other else {}


def _intersection(one: Fields, other: Fields) -> Fields | None:
    below = {}
    for step, child in one.items():
        both = _intersection(child, other[step]) if step in other else None
        if step != _SELF and both is not None:
            below[step] = both
    return _node(_is_in(one) and _is_in(other), below)


def paths(fields: Fields, before: str = "") -> Iterator[str]:
    """Yield the fields of a set as messages show them: ``.spec.containers[name="a"].image``."""
    below = {step: child for step, child in sorted(fields.items()) if step != _SELF}
    for step, child in below.items():
        if _is_in(child):
            yield before + _shown(step)
    for step, child in below.items():
        yield from paths(child, before + _shown(step))


def _shown(step: str) -> str:
    kind, _, rest = step.partition(":")
    if kind == "f":
        return f".{rest}"
    if kind == "v":
        return f"[={rest}]"
    if kind == "i":
        return f"[{rest}]"
    keys = orjson.loads(rest)
    return "[" + ",".join(f"{k}={orjson.dumps(v).decode()}" for k, v in keys.items()) + "]"


def _is_set(fields: Any, depth: int = 0) -> bool:
    return (
        isinstance(fields, dict)
        and depth < DEPTH_MAX
        and all(_is_step(s) and _is_set(child, depth + 1) for s, child in fields.items())
    )


def _is_step(step: str) -> bool:
    if step == _SELF or step.startswith("f:"):
        return True
    try:
        value = orjson.loads(step[2:])
    except ValueError:
        return False
    return isinstance(value, dict) if step.startswith("k:") else step.startswith(("v:", "i:"))


# Shapes.


class Misfit(Exception):
    """A value cannot be split into fields by its schema."""


class Shape:
    """How one node of a schema splits a value into fields. Created lazily: types recur."""

    def __init__(self, schema: Schema, node: Object, meta: Schema, resource: bool = False) -> None:
        node = {**schema.resolve(node), **node}
        self._schema, self._node, self._meta = schema, node, meta
        self._known: dict[str, Shape] = {}
        self._resource = resource or bool(node.get("x-kubernetes-embedded-resource"))
        self._items: Shape | None = None
        self.keys: tuple[str, ...] = ()  # merge keys of a list's items; empty: a set
        self.type = self._type()
        if self.type == "list":
            items = node.get("items") or {}
            self.keys = tuple(node.get("x-kubernetes-list-map-keys") or ())
            self._items = Shape(schema, items, meta)
            members = self._items._node.get("properties") or {}
            self._defaults = {key: members.get(key, {}).get("default") for key in self.keys}

    def _type(self) -> str:
        """``map`` and ``list`` are split, ``whole`` is not; ``free`` depends on the value."""
        node = self._node
        if node.get("type") == "array" or "items" in node:
            return "list" if node.get("x-kubernetes-list-type") in ("map", "set") else "whole"
        if node.get("x-kubernetes-map-type") == "atomic":
            return "whole"
        if self._resource or node.get("properties") or node.get("additionalProperties"):
            return "map"
        if node.get("x-kubernetes-preserve-unknown-fields"):
            return "free"
        return "map" if node.get("type") == "object" else "whole"

    def cuts(self, value: Any) -> type | None:
        """Return ``dict`` or ``list`` if the value is split, or None if it is one field."""
        if isinstance(value, dict):
            return dict if self.type in ("map", "free") else None
        return list if isinstance(value, list) and self.type == "list" else None

    @property
    def expected(self) -> str:
        """The expected type, as messages name it."""
        kind = self._node.get("type") if self.type == "whole" else self.type
        return kind if isinstance(kind, str) else "anything"

    @property
    def accepts(self) -> tuple[type, ...]:
        return _ACCEPTED.get(self.expected, (object,))

    def names(self, name: str) -> bool:
        """Whether the schema declares this member by name."""
        return name in (self._node.get("properties") or ()) or (
            self._resource and name in ("apiVersion", "kind", "metadata")
        )

    def member(self, name: str) -> Shape:
        """Return a member's shape. Raises Misfit if it is not declared."""
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = self._member(name)
        return found

    def _member(self, name: str) -> Shape:
        node = self._node
        if self._resource and name == "metadata":
            return Shape(self._meta, self._meta.root, self._meta)
        if self._resource and name in ("apiVersion", "kind"):
            return Shape(self._schema, {"type": "string"}, self._meta)
        properties, extra = node.get("properties") or {}, node.get("additionalProperties")
        if name in properties:
            return Shape(self._schema, properties[name], self._meta)
        if isinstance(extra, dict):
            return self._shared("additionalProperties", extra)
        if self.type == "free" or extra is True or node.get(_PRESERVE):
            return self._shared("anything", {_PRESERVE: True})
        raise Misfit("field not declared in schema")

    def _shared(self, name: str, node: Object) -> Shape:
        """Return one shape that is shared by all members not declared by name."""
        name = f"{name}:"  # cannot collide with a cached member
        if name not in self._known:
            self._known[name] = Shape(self._schema, node, self._meta)
        return self._known[name]

    @property
    def item(self) -> Shape:
        assert self._items is not None
        return self._items

    def below(self, step: str) -> Shape:
        """Return the shape below a step. Raises Misfit if the schema has none (any more)."""
        if step.startswith("f:"):
            return self.member(step[2:])
        if self._items is None:
            raise Misfit("not a list with fields of its own")
        return self._items

    def step(self, item: Any) -> str:
        """Return the step to a list item. Raises Misfit if the item has none of the keys."""
        if not self.keys:
            return "v:" + orjson.dumps(item, option=orjson.OPT_SORT_KEYS).decode()
        if not isinstance(item, dict):
            raise Misfit(f"an item must be a map with the keys {', '.join(self.keys)}")
        found = {key: item.get(key, self._defaults[key]) for key in self.keys}
        found = {key: value for key, value in found.items() if value is not None}
        if not found:
            raise Misfit(f"an item omits all key fields {orjson.dumps(self.keys).decode()}")
        return "k:" + orjson.dumps(found, option=orjson.OPT_SORT_KEYS).decode()

    def indexed(self, items: list[Any]) -> dict[str, list[Any]]:
        """Return the items by step; more than one per step only if there are duplicates."""
        found: dict[str, list[Any]] = {}
        for item in items:
            found.setdefault(self.step(item), []).append(item)
        return found


_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list",
               dict: "map"}  # fmt: skip
_ACCEPTED: dict[str, tuple[type, ...]] = {
    "string": (str,), "boolean": (bool,), "integer": (int, float), "number": (int, float),
    "map": (dict,), "list": (list,),
}  # fmt: skip


# From objects to field sets.


def named(value: Any, shape: Shape) -> Fields:
    """Return the fields of an applied configuration. Raises Misfit, whose text begins with a path.

    A member declared by name is in the set through its content only; keys of a map and items of a
    list are fields themselves.
    """
    return _named(value, shape, False, "") or {}


def _named(value: Any, shape: Shape, itself: bool, path: str) -> Fields | None:
    cut, below = shape.cuts(value), Fields()
    if cut is None:
        if value is not None and not isinstance(value, shape.accepts):
            raise Misfit(f"{path}: expected {shape.expected}, got {_JSON_TYPES[type(value)]}")
        return _IN
    for step, part, place, own in _parts(value, shape, path):
        found = _named(part, place, own, path + _shown(step))
        if found is not None:
            below[step] = found
    return _node(itself or (cut is dict and not value), below)


def _parts(value: Any, shape: Shape, path: str) -> Iterator[tuple[str, Any, Shape, bool]]:
    """Yield step, value, shape, and whether it is a field itself. A Misfit names the path."""
    if isinstance(value, dict):
        for name, part in value.items():
            try:
                place = shape.member(name)
            except Misfit as misfit:
                raise Misfit(f"{path}.{name}: {misfit}") from None
            yield f"f:{name}", part, place, not shape.names(name)
        return
    try:
        items = shape.indexed(value)
    except Misfit as misfit:
        raise Misfit(f"{path}: {misfit}") from None
    for step, found in items.items():
        if len(found) > 1:
            raise Misfit(f"{path}: duplicate entries for key {_shown(step)}")
        yield step, found[0], shape.item, True


def everything(value: Any, shape: Shape) -> Fields:
    """Return a node with all fields of a value, including containers and the value itself."""
    below: Fields = {}
    cut = shape.cuts(value)
    if cut is dict:
        below = {f"f:{name}": everything(part, shape.member(name)) for name, part in value.items()}
    elif cut is list:
        below = {step: _of_item(found, shape) for step, found in shape.indexed(value).items()}
    return {_SELF: _IN, **below} if below else _IN


def _of_item(found: list[Any], shape: Shape) -> Fields:
    return everything(found[0], shape.item) if len(found) == 1 else _IN


def compare(old: Any, new: Any, shape: Shape) -> tuple[Fields, Fields]:
    """Return the fields added or changed in `new`, and the fields removed from it."""
    changed, gone = _compare(old, new, shape)
    return changed or {}, gone or {}


def _compare(old: Any, new: Any, shape: Shape) -> tuple[Fields | None, Fields | None]:
    if old == new and type(old) is type(new):
        return None, None
    cut = shape.cuts(old if new is None else new)
    if cut is None or (old is not None and shape.cuts(old) is not cut) or not (old or new):
        return _IN, None
    old, new = old or cut(), new or cut()  # null has no fields, like an empty value
    changed, gone = Fields(), Fields()
    if cut is dict:
        for name, part in new.items():
            if name not in old:
                changed[f"f:{name}"] = everything(part, shape.member(name))
            elif part != old[name] or type(part) is not type(old[name]):
                below = _compare(old[name], part, shape.member(name))
                _add(f"f:{name}", below, changed, gone)
        for name in old.keys() - new.keys():
            gone[f"f:{name}"] = everything(old[name], shape.member(name))
    else:
        before, after = shape.indexed(old), shape.indexed(new)
        for step, found in after.items():
            was = before.get(step)
            if was is None:
                changed[step] = _of_item(found, shape)
            elif len(was) == len(found) == 1:
                _add(step, _compare(was[0], found[0], shape.item), changed, gone)
            elif was != found:
                changed[step] = _IN
        for step in before.keys() - after.keys():
            gone[step] = _of_item(before[step], shape)
    return changed or None, gone or None


def _add(
    step: str, below: tuple[Fields | None, Fields | None], changed: Fields, gone: Fields
) -> None:
    for found, into in zip(below, (changed, gone), strict=True):
        if found is not None:
            into[step] = found


# From field sets to objects.


def merged(live: Any, config: Any, shape: Shape) -> Any:
    """Merge `config` into `live`. The result may share parts of both."""
    cut = shape.cuts(live)
    if cut is None or (config is not None and shape.cuts(config) is not cut):
        return config
    if config is None:
        return live
    if cut is list:
        return _merged_list(live, config, shape)
    out = dict(live)
    for name, part in config.items():
        out[name] = merged(live[name], part, shape.member(name)) if name in live else part
    return out


def _merged_list(live: list[Any], config: list[Any], shape: Shape) -> list[Any]:
    """Keep the configuration's order; other items stay before the items that they preceded."""
    before, wanted = shape.indexed(live), shape.indexed(config)
    shared = [step for step in wanted if step in before]
    rest = iter(wanted)
    out: list[Any] = []

    def take(until: str | None) -> None:
        for step in rest:
            was = before.get(step, ())
            given = wanted[step][0]
            out.append(merged(was[0], given, shape.item) if len(was) == 1 else given)
            if step == until:
                return

    for item in live:
        step = shape.step(item)
        if step not in wanted:
            out.append(item)
        elif shared and step == shared[0]:
            take(shared.pop(0))
    take(None)
    return out


def without(value: Any, fields: Fields, shape: Shape) -> Any:
    """Remove the fields of the set and their content. Returns None if nothing is left."""
    cut = shape.cuts(value)
    if cut is None or not fields or not value:
        return value
    if cut is dict:
        named = ((f"f:{name}", name, part) for name, part in value.items())
        return {
            name: without(part, fields[step], shape.below(step)) if step in fields else part
            for step, name, part in named
            if step not in fields or not _is_in(fields[step])
        } or None
    items = ((shape.step(item), item) for item in value)
    return [
        without(item, fields[step], shape.item) if step in fields else item
        for step, item in items
        if step not in fields or not _is_in(fields[step])
    ] or None


def _with_holders(fields: Fields, shape: Shape) -> Fields:
    """Add the declared members that contain the set's fields: they are removed together."""
    out: Fields = {}
    for step, child in fields.items():
        if step == _SELF or not child:
            out[step] = child
            continue
        try:
            child = _with_holders(child, shape.below(step))
        except Misfit:  # it was written under an older schema
            out[step] = child
            continue
        holder = step.startswith("f:") and shape.names(step[2:])
        out[step] = {_SELF: _IN, **child} if holder else child
    return out


# Owners.


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
        version = "" if self.operation == APPLY else self.api_version
        return self.manager, self.operation, version, self.subresource

    def shown(self) -> str:
        """Format the manager as in a conflict message."""
        text = orjson.dumps(self.manager).decode()
        if self.subresource:
            text += f" with subresource {orjson.dumps(self.subresource).decode()}"
        return text if self.operation == APPLY else f"{text} using {self.api_version}"

    def encoded(self) -> Object:
        out: Object = {"manager": self.manager, "operation": self.operation}
        fields = _shared(orjson.dumps(self.fields))
        out |= {"apiVersion": self.api_version, "fieldsType": FORMAT, "fieldsV1": fields}
        if self.time:
            out["time"] = self.time
        if self.subresource:
            out["subresource"] = self.subresource
        return out


class Conflict(Exception):
    """An apply would change fields that other managers own."""

    def __init__(self, fields: list[tuple[Entry, Fields]]) -> None:
        super().__init__("an apply conflicts with other managers")
        self.fields = fields


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
    return bool(entries) and all(_is_set(entry.fields) for entry in entries or ())


def encode(entries: Iterable[Entry]) -> list[Object]:
    """Encode entries in Kubernetes' order: applies first, then by age."""
    kept = [entry for entry in entries if entry.fields]
    kept.sort(key=lambda e: (e.operation, e.time or "", e.manager, e.api_version, e.subresource))
    return [entry.encoded() for entry in kept]


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
        changed, gone = compare(_view(old or {}, unowned), _view(new, unowned), self.shape)
        if not changed and not gone:
            return managed
        mine = Entry(writer.manager, UPDATE, writer.api_version, writer.subresource, changed,
                     writer.time)  # fmt: skip
        entries = []
        for entry in decode(managed) or ():
            rest = difference(difference(entry.fields, changed), gone)
            if entry.key != mine.key:
                entries.append(replace(entry, fields=rest))
            elif changed:
                mine = replace(mine, fields=union(rest, changed))
            else:
                mine = replace(entry, fields=rest)
        return encode(_capped([*entries, mine]))

    def applied(
        self, managed: list[Object], live: Object, config: Object, writer: Writer,
        force: bool = False, unowned: tuple[str, ...] = (),
        yielding: Callable[[], Fields] = dict,
    ) -> tuple[Object, list[Object]]:  # fmt: skip
        """Return `live` after an apply, and its ``managedFields``. Raises Misfit or Conflict.

        `config` has no `unowned` members. The `yielding` fields never conflict.
        """
        shape = self.shape
        mine = Entry(writer.manager, APPLY, writer.api_version, writer.subresource,
                     self._named(config))  # fmt: skip
        entries = decode(managed) or []
        if not entries and live:
            everywhere, _ = compare(_view({}), _view(live, unowned), shape)
            entries = [Entry(BEFORE_FIRST_APPLY, UPDATE, writer.api_version, writer.subresource,
                             everywhere, writer.time)]  # fmt: skip
        last = next((entry for entry in entries if entry.key == mine.key), None)
        others = [entry for entry in entries if entry.key != mine.key]
        new = merged(live, config, shape)
        if last is not None:
            owned = [mine.fields, _NAME, *(entry.fields for entry in others)]
            kept = _with_holders(functools.reduce(union, owned), shape)
            new = without(new, difference(_with_holders(last.fields, shape), kept), shape)
        changed, gone = compare(_view(live, unowned), _view(new, unowned), shape)
        if not force:
            _refuse_conflicts(others, changed, yielding)
        before = last.time if last is not None else None
        time = writer.time if changed or gone else before
        others = [
            replace(entry, fields=difference(difference(entry.fields, changed), gone))
            for entry in others
        ]
        return new, encode([*others, replace(mine, time=time)])

    def agreed(self, config: Object, live: Object) -> Fields:
        """Return the fields of a configuration that have the same value in `live`."""
        try:
            changed, gone = compare(_view(config), _view(live), self.shape)
            return difference(difference(self._named(config), changed), gone)
        except Misfit:
            return {}

    def _named(self, config: Object) -> Fields:
        return difference(named(_view(config), self.shape), _METADATA)


def _view(obj: Object, unowned: tuple[str, ...] = ()) -> Object:
    """Return the part of an object that can be owned. Always has ``metadata``."""
    view = {name: value for name, value in obj.items() if name not in _TYPE and name not in unowned}
    metadata = view.get("metadata") or {}
    view["metadata"] = {name: value for name, value in metadata.items() if name not in _SYSTEM}
    return view


def _refuse_conflicts(others: list[Entry], changed: Fields, yielding: Callable[[], Fields]) -> None:
    taken = [(entry, intersection(entry.fields, changed)) for entry in others]
    taken = [(entry, fields) for entry, fields in taken if fields]
    if taken:
        given = yielding()
        left = [(entry, difference(fields, given)) for entry, fields in taken]
        left = [(entry, fields) for entry, fields in left if fields]
        if left:
            raise Conflict(left)


def _capped(entries: list[Entry]) -> list[Entry]:
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
