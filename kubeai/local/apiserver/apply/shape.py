"""How a schema splits an object into fields: `Shape`.

A scalar and an atomic list or map are one field each. Other maps have a field per member, other
lists one per item, which its merge keys or its value identify.
"""

from __future__ import annotations

from typing import Any

import orjson

from kubeai.local.apiserver.schema.structural import Schema

Object = dict[str, Any]

_PRESERVE = "x-kubernetes-preserve-unknown-fields"


class SchemaMismatch(Exception):
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
        """``map`` and ``list`` are split, ``atomic`` is not; ``untyped`` depends on the value."""
        node = self._node
        if node.get("type") == "array" or "items" in node:
            return "list" if node.get("x-kubernetes-list-type") in ("map", "set") else "atomic"
        if node.get("x-kubernetes-map-type") == "atomic":
            return "atomic"
        if self._resource or node.get("properties") or node.get("additionalProperties"):
            return "map"
        if node.get("x-kubernetes-preserve-unknown-fields"):
            return "untyped"
        return "map" if node.get("type") == "object" else "atomic"

    def container_type(self, value: Any) -> type | None:
        """Return ``dict`` or ``list`` if the value is split, or None if it is one field."""
        if isinstance(value, dict):
            return dict if self.type in ("map", "untyped") else None
        return list if isinstance(value, list) and self.type == "list" else None

    @property
    def expected(self) -> str:
        """The expected type, as messages name it."""
        kind = self._node.get("type") if self.type == "atomic" else self.type
        return kind if isinstance(kind, str) else "anything"

    @property
    def accepts(self) -> tuple[type, ...]:
        """The Python types of the values that the schema allows."""
        return _ACCEPTED.get(self.expected, (object,))

    def names(self, name: str) -> bool:
        """Whether the schema declares this member by name."""
        return name in (self._node.get("properties") or ()) or (
            self._resource and name in ("apiVersion", "kind", "metadata")
        )

    def member(self, name: str) -> Shape:
        """Return a member's shape. Raises SchemaMismatch if it is not declared."""
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
        if self.type == "untyped" or extra is True or node.get(_PRESERVE):
            return self._shared("anything", {_PRESERVE: True})
        raise SchemaMismatch("field not declared in schema")

    def _shared(self, name: str, node: Object) -> Shape:
        """Return one shape that is shared by all members not declared by name."""
        name = f"{name}:"  # cannot collide with a cached member
        if name not in self._known:
            self._known[name] = Shape(self._schema, node, self._meta)
        return self._known[name]

    @property
    def item(self) -> Shape:
        """The shape of a list's items. Only for a list that is split."""
        assert self._items is not None
        return self._items

    def below(self, step: str) -> Shape:
        """Return the shape below a step. Raises SchemaMismatch if the schema no longer has one."""
        if step.startswith("f:"):
            return self.member(step[2:])
        if self._items is None:
            raise SchemaMismatch("not a list with fields of its own")
        return self._items

    def step(self, item: Any) -> str:
        """Return the step to a list item. Raises SchemaMismatch if it has none of the keys."""
        if not self.keys:
            return "v:" + orjson.dumps(item, option=orjson.OPT_SORT_KEYS).decode()
        if not isinstance(item, dict):
            raise SchemaMismatch(f"an item must be a map with the keys {', '.join(self.keys)}")
        found = {key: item.get(key, self._defaults[key]) for key in self.keys}
        found = {key: value for key, value in found.items() if value is not None}
        if not found:
            raise SchemaMismatch(f"an item omits all key fields {orjson.dumps(self.keys).decode()}")
        return "k:" + orjson.dumps(found, option=orjson.OPT_SORT_KEYS).decode()

    def indexed(self, items: list[Any]) -> dict[str, list[Any]]:
        """Return the items by step; more than one per step only if there are duplicates."""
        found: dict[str, list[Any]] = {}
        for item in items:
            found.setdefault(self.step(item), []).append(item)
        return found


_ACCEPTED: dict[str, tuple[type, ...]] = {
    "string": (str,), "boolean": (bool,), "integer": (int, float), "number": (int, float),
    "map": (dict,), "list": (list,),
}  # fmt: skip
