"""Operations on values whose fields a `Shape` defines: to a field set, compare, merge, remove.

Pure. The rules are those of the package of this name in Kubernetes' structured-merge-diff.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kubeai.local.apiserver.apply.field_sets import (
    MEMBER,
    SELF,
    Fields,
    format_step,
    is_member,
    make_node,
)
from kubeai.local.apiserver.apply.shape import SchemaMismatch, Shape

_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "list",
               dict: "map"}  # fmt: skip


def to_field_set(value: Any, shape: Shape) -> Fields:
    """Return the fields of an applied configuration.

    Raises SchemaMismatch, whose text begins with a path.

    A member declared by name is in the set through its content only; keys of a map and items of a
    list are fields themselves.
    """
    return _to_field_set(value, shape, False, "") or {}


def _to_field_set(value: Any, shape: Shape, is_field: bool, path: str) -> Fields | None:
    container, below = shape.container_type(value), Fields()
    if container is None:
        if value is not None and not isinstance(value, shape.accepts):
            raise SchemaMismatch(
                f"{path}: expected {shape.expected}, got {_JSON_TYPES[type(value)]}"
            )
        return MEMBER
    for step, part, part_shape, part_is_field in _parts(value, shape, path):
        found = _to_field_set(part, part_shape, part_is_field, path + format_step(step))
        if found is not None:
            below[step] = found
    return make_node(is_field or (container is dict and not value), below)


def _parts(value: Any, shape: Shape, path: str) -> Iterator[tuple[str, Any, Shape, bool]]:
    """Yield step, value, shape, and whether it is a field itself. Errors name the path."""
    if isinstance(value, dict):
        for name, part in value.items():
            try:
                part_shape = shape.member(name)
            except SchemaMismatch as mismatch:
                raise SchemaMismatch(f"{path}.{name}: {mismatch}") from None
            yield f"f:{name}", part, part_shape, not shape.names(name)
        return
    try:
        items = shape.indexed(value)
    except SchemaMismatch as mismatch:
        raise SchemaMismatch(f"{path}: {mismatch}") from None
    for step, found in items.items():
        if len(found) > 1:
            raise SchemaMismatch(f"{path}: duplicate entries for key {format_step(step)}")
        yield step, found[0], shape.item, True


def all_fields(value: Any, shape: Shape) -> Fields:
    """Return a node with all fields of a value, including containers and the value itself."""
    below: Fields = {}
    container = shape.container_type(value)
    if container is dict:
        below = {f"f:{name}": all_fields(part, shape.member(name)) for name, part in value.items()}
    elif container is list:
        below = {step: _of_item(found, shape) for step, found in shape.indexed(value).items()}
    return {SELF: MEMBER, **below} if below else MEMBER


def _of_item(found: list[Any], shape: Shape) -> Fields:
    return all_fields(found[0], shape.item) if len(found) == 1 else MEMBER


def compare(old: Any, new: Any, shape: Shape) -> tuple[Fields, Fields]:
    """Return the fields added or changed in `new`, and the fields removed from it."""
    changed, removed = _compare(old, new, shape)
    return changed or {}, removed or {}


def _compare(old: Any, new: Any, shape: Shape) -> tuple[Fields | None, Fields | None]:
    if old == new and type(old) is type(new):
        return None, None
    container = shape.container_type(old if new is None else new)
    if (
        container is None
        or (old is not None and shape.container_type(old) is not container)
        or not (old or new)
    ):
        return MEMBER, None
    old, new = old or container(), new or container()  # null has no fields, like an empty value
    changed, removed = Fields(), Fields()
    if container is dict:
        for name, part in new.items():
            if name not in old:
                changed[f"f:{name}"] = all_fields(part, shape.member(name))
            elif part != old[name] or type(part) is not type(old[name]):
                below = _compare(old[name], part, shape.member(name))
                _add(f"f:{name}", below, changed, removed)
        for name in old.keys() - new.keys():
            removed[f"f:{name}"] = all_fields(old[name], shape.member(name))
    else:
        before, after = shape.indexed(old), shape.indexed(new)
        for step, found in after.items():
            was = before.get(step)
            if was is None:
                changed[step] = _of_item(found, shape)
            elif len(was) == len(found) == 1:
                _add(step, _compare(was[0], found[0], shape.item), changed, removed)
            elif was != found:
                changed[step] = MEMBER
        for step in before.keys() - after.keys():
            removed[step] = _of_item(before[step], shape)
    return changed or None, removed or None


def _add(
    step: str, below: tuple[Fields | None, Fields | None], changed: Fields, removed: Fields
) -> None:
    for found, into in zip(below, (changed, removed), strict=True):
        if found is not None:
            into[step] = found


def merge(live: Any, config: Any, shape: Shape) -> Any:
    """Merge `config` into `live`. The result may share parts of both."""
    container = shape.container_type(live)
    if container is None or (config is not None and shape.container_type(config) is not container):
        return config
    if config is None:
        return live
    if container is list:
        return _merge_list(live, config, shape)
    out = dict(live)
    for name, part in config.items():
        out[name] = merge(live[name], part, shape.member(name)) if name in live else part
    return out


def _merge_list(live: list[Any], config: list[Any], shape: Shape) -> list[Any]:
    """Keep the configuration's order; other items stay before the items that they preceded."""
    before, wanted = shape.indexed(live), shape.indexed(config)
    shared = [step for step in wanted if step in before]
    rest = iter(wanted)
    out: list[Any] = []

    def take(until: str | None) -> None:
        for step in rest:
            was = before.get(step, ())
            given = wanted[step][0]
            out.append(merge(was[0], given, shape.item) if len(was) == 1 else given)
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


def remove(value: Any, fields: Fields, shape: Shape) -> Any:
    """Remove the fields of the set and their content. Returns None if nothing is left."""
    container = shape.container_type(value)
    if container is None or not fields or not value:
        return value
    if container is dict:
        named = ((f"f:{name}", name, part) for name, part in value.items())
        return {
            name: remove(part, fields[step], shape.below(step)) if step in fields else part
            for step, name, part in named
            if step not in fields or not is_member(fields[step])
        } or None
    items = ((shape.step(item), item) for item in value)
    return [
        remove(item, fields[step], shape.item) if step in fields else item
        for step, item in items
        if step not in fields or not is_member(fields[step])
    ] or None


def with_parents(fields: Fields, shape: Shape) -> Fields:
    """Add the declared members that contain the set's fields: they are removed together."""
    out: Fields = {}
    for step, child in fields.items():
        if step == SELF or not child:
            out[step] = child
            continue
        try:
            child = with_parents(child, shape.below(step))
        except SchemaMismatch:  # it was written under an older schema
            out[step] = child
            continue
        parent = step.startswith("f:") and shape.names(step[2:])
        out[step] = {SELF: MEMBER, **child} if parent else child
    return out
