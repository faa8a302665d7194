"""Sets of fields, in the format that clients see (FieldsV1), and their algebra. Pure.

A set is a tree of dicts whose keys are steps. ``f:name`` leads to a member, ``k:{"name":"a"}`` to
the list item with that key, ``v:"a"`` to the list item with that value. A node is in the set if it
has no steps below it, or a ``.`` among them. At the root {} is the empty set; below the root it is
a field. Trees are shared between versions of an object and never mutated.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

Fields = dict[str, Any]  # a node of a field set

DEPTH_MAX = 200  # of field sets that clients send
SELF = "."
MEMBER: Fields = {}  # a node that is in the set and has nothing below it


def is_member(node: Fields) -> bool:
    """Whether a node below the root is in the set itself, and not only a way to others."""
    return not node or SELF in node


def make_node(inside: bool, below: Fields) -> Fields | None:
    """Return a node, or None if it would be empty."""
    if not below:
        return MEMBER if inside else None
    return {SELF: MEMBER, **below} if inside else below


def union(one: Fields, other: Fields) -> Fields:
    """Return the fields that are in either set."""
    if not one or not other:
        return one or other
    return _union(one, other)


def _union(one: Fields, other: Fields) -> Fields:
    below = {step: child for step, child in one.items() if step != SELF}
    for step, child in other.items():
        if step != SELF:
            below[step] = _union(below[step], child) if step in below else child
    return make_node(is_member(one) or is_member(other), below) or MEMBER


def difference(one: Fields, other: Fields) -> Fields:
    """Return the fields of `one` that are not in `other`."""
    return (_difference(one, other) or {}) if one and other else one


def _difference(one: Fields, other: Fields) -> Fields | None:
    below = {}
    for step, child in one.items():
        rest = _difference(child, other[step]) if step in other else child
        if step != SELF and rest is not None:
            below[step] = rest
    return make_node(is_member(one) and not is_member(other), below)


def intersection(one: Fields, other: Fields) -> Fields:
    """Return the fields that are in both sets."""
    return (_intersection(one, other) or {}) if one and other else {}


def _intersection(one: Fields, other: Fields) -> Fields | None:
    below = {}
    for step, child in one.items():
        both = _intersection(child, other[step]) if step in other else None
        if step != SELF and both is not None:
            below[step] = both
    return make_node(is_member(one) and is_member(other), below)


def paths(fields: Fields, before: str = "") -> Iterator[str]:
    """Yield the fields of a set as messages show them: ``.spec.containers[name="a"].image``."""
    below = {step: child for step, child in sorted(fields.items()) if step != SELF}
    for step, child in below.items():
        if is_member(child):
            yield before + format_step(step)
    for step, child in below.items():
        yield from paths(child, before + format_step(step))


def format_step(step: str) -> str:
    """Return a step as messages show it: ``.name``, ``[="value"]``, ``[name="a"]``."""
    kind, _, rest = step.partition(":")
    if kind == "f":
        return f".{rest}"
    if kind == "v":
        return f"[={rest}]"
    if kind == "i":
        return f"[{rest}]"
    keys = orjson.loads(rest)
    return "[" + ",".join(f"{k}={orjson.dumps(v).decode()}" for k, v in keys.items()) + "]"


def is_field_set(fields: Any, depth: int = 0) -> bool:
    """Whether a value that a client sent is a FieldsV1 tree, of limited depth."""
    return (
        isinstance(fields, dict)
        and depth < DEPTH_MAX
        and all(_is_step(s) and is_field_set(child, depth + 1) for s, child in fields.items())
    )


def _is_step(step: str) -> bool:
    if step == SELF or step.startswith("f:"):
        return True
    try:
        value = orjson.loads(step[2:])
    except ValueError:
        return False
    return isinstance(value, dict) if step.startswith("k:") else step.startswith(("v:", "i:"))
