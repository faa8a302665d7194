"""Patches: JSON patch, merge patch and strategic merge patch, applied to a copy.

The fourth kind, APPLY, depends on field ownership: see `ownership`.

A strategic merge follows the patch strategies in the schemas of the built-in types
(``x-kubernetes-patch-strategy`` and ``-merge-key``). Custom resources have none, so strategic merge
patches of them are rejected.
"""

from __future__ import annotations

import copy
from typing import Any

import jsonpatch
import jsonpointer

from kubeai.local.apiserver.errors import StatusError, bad_request, unsupported_media_type
from kubeai.local.apiserver.schema.structural import Schema

Object = dict[str, Any]

JSON = "application/json-patch+json"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
APPLY = "application/apply-patch+yaml"
OPERATIONS_MAX = 10_000


def apply_patch(
    kind: str, target: Object, patch: Any, schema: Schema | None, custom: bool
) -> Object:
    """Return `target` with the patch applied. `kind` is the request's content type."""
    if kind == JSON:
        return _json(target, patch)
    if kind == MERGE or (kind == STRATEGIC and not custom and schema is not None):
        if not isinstance(patch, dict):
            raise bad_request("the patch must be a JSON object")
        if schema is not None and kind == STRATEGIC:
            return strategic(target, patch, schema)
        merged: Object = merge(target, patch)
        return merged
    accepted = (JSON, MERGE, APPLY) if custom else (JSON, MERGE, STRATEGIC, APPLY)
    raise unsupported_media_type(kind, accepted)


def _json(target: Object, patch: Any) -> Object:
    if not isinstance(patch, list):
        raise bad_request("a JSON patch must be an array of operations")
    if len(patch) > OPERATIONS_MAX:
        raise StatusError(
            413,
            "RequestEntityTooLarge",
            f"the allowed maximum operations in a JSON patch is {OPERATIONS_MAX}, got {len(patch)}",
        )
    try:
        patched = jsonpatch.JsonPatch(patch).apply(copy.deepcopy(target))
    except (jsonpatch.JsonPatchException, jsonpointer.JsonPointerException, KeyError) as error:
        message = f"the server rejected our request due to an error in our request: {error}"
        raise StatusError(422, "Invalid", message) from None
    if not isinstance(patched, dict):
        raise bad_request("the patched object is not a JSON object")
    return patched


def merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    out = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            out.pop(name, None)
        else:
            out[name] = merge(out.get(name), value)
    return out


# Strategic merge.

_ORDER, _DROP = "$setElementOrder/", "$deleteFromPrimitiveList/"
_RETAIN, _DIRECTIVE = "$retainKeys", "$patch"
_PLAIN: Object = {}


def strategic(target: Object, patch: Object, schema: Schema) -> Object:
    """Merge lists by the keys in the schema, and follow the directives in the patch."""
    return _merge_map(target, patch, schema.root, schema)


def _merge_map(target: Any, patch: Object, place: Object, schema: Schema) -> Object:
    """Merge two maps; `place` is the schema of both."""
    directive = patch.get(_DIRECTIVE)
    if directive == "delete":
        return {}
    if directive not in (None, "merge", "replace"):
        raise bad_request(f"Unknown patch type found: {directive}")
    out = dict(target) if isinstance(target, dict) and directive != "replace" else {}
    if _RETAIN in patch:
        out = {name: out[name] for name in out if name in patch[_RETAIN]}
    for name, value in patch.items():
        if name.startswith(_DROP):
            field = name.removeprefix(_DROP)
            out[field] = [item for item in out.get(field) or () if item not in value]
        elif name in (_DIRECTIVE, _RETAIN) or name.startswith(_ORDER):
            continue
        elif value is None:
            out.pop(name, None)
        else:
            order = patch.get(_ORDER + name)
            out[name] = _merge_member(out.get(name), value, _member(place, name), schema, order)
    for name, order in patch.items():  # an order may be given without a change of the list
        field = name.removeprefix(_ORDER)
        if name.startswith(_ORDER) and field not in patch and out.get(field):
            key = _member(place, field).get(_KEY)
            out[field] = _ordered(out[field], out[field], order, key)
    return out


_KEY, _STRATEGY = "x-kubernetes-patch-merge-key", "x-kubernetes-patch-strategy"


def _member(place: Object, name: str) -> Object:
    """Return a member's schema, unresolved: a strategy is declared beside the ``$ref``."""
    properties = place.get("properties") or {}
    member: Object = properties.get(name) or place.get("additionalProperties") or _PLAIN
    return member


def _merge_member(
    target: Any, value: Any, place: Object, schema: Schema, order: list[Any] | None
) -> Any:
    strategies = str(place.get(_STRATEGY, "")).split(",")
    if isinstance(value, dict):
        if "replace" in strategies:
            return copy.deepcopy(value)
        return _merge_map(target, value, schema.resolve(place), schema)
    if isinstance(value, list) and "merge" in strategies:
        return _merge_list(target if isinstance(target, list) else [], value, place, schema, order)
    return copy.deepcopy(value)


def _merge_list(
    target: list[Any], patch: list[Any], place: Object, schema: Schema, order: list[Any] | None
) -> list[Any]:
    key = place.get(_KEY)
    if key is None:
        merged = [*target, *(item for item in patch if item not in target)]
        return _ordered(merged, target, order or patch, None)
    item_schema = schema.resolve(place.get("items") or _PLAIN)
    merged = list(target)
    for item in patch:
        if not isinstance(item, dict):
            raise bad_request(f"list item {item!r} must be an object with the merge key {key}")
        if item.get(_DIRECTIVE) == "replace":
            rest = [other for other in patch if _DIRECTIVE not in other]
            return copy.deepcopy(rest)
        if key not in item:
            raise bad_request(f"map: {item} does not contain declared merge key: {key}")
        found = [n for n, other in enumerate(merged) if other.get(key) == item[key]]
        if item.get(_DIRECTIVE) == "delete":
            merged = [other for other in merged if other.get(key) != item[key]]
        elif found:
            merged[found[0]] = _merge_map(merged[found[0]], item, item_schema, schema)
        else:
            merged.append(_merge_map({}, item, item_schema, schema))
    return _ordered(merged, target, order or patch, key)


def _ordered(items: list[Any], before: list[Any], order: list[Any], key: str | None) -> list[Any]:
    """Sort items into the patch's order, and insert those that the patch does not list.

    Each unlisted item goes before the first item that followed it in `before`.
    """

    def identity(item: Any) -> Any:
        return item.get(key) if key and isinstance(item, dict) else item

    wanted = [identity(item) for item in order]
    places = [identity(item) for item in before]
    out = sorted(
        (item for item in items if identity(item) in wanted),
        key=lambda item: wanted.index(identity(item)),
    )
    at = 0
    for item in items:
        if identity(item) in wanted:
            continue
        place = places.index(identity(item))
        while at < len(out) and not (
            identity(out[at]) in places and places.index(identity(out[at])) > place
        ):
            at += 1
        out.insert(at, item)
        at += 1
    return out
