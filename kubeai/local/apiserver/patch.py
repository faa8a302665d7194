"""Patches: JSON patch, merge patch and strategic merge patch, applied to a copy.

A strategic merge follows the patch strategies of the built-in types, which their schemas carry
(``x-kubernetes-patch-strategy`` and ``-merge-key``); custom resources have none, and are refused
before they come here.
"""

from __future__ import annotations

import copy
from typing import Any

import jsonpatch
import jsonpointer

from kubeai.local.apiserver.schema import Schema
from kubeai.local.apiserver.status import StatusError, bad_request, unsupported_media_type

Object = dict[str, Any]

JSON = "application/json-patch+json"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
OPERATIONS_MAX = 10_000


def apply(kind: str, target: Object, patch: Any, schema: Schema | None, custom: bool) -> Object:
    """`target` with the patch applied. `kind` is the request's content type."""
    if kind == JSON:
        return _json(target, patch)
    if kind == MERGE or (kind == STRATEGIC and not custom):
        if not isinstance(patch, dict):
            raise bad_request("the patch must be a JSON object")
        merged = merge(target, patch) if kind == MERGE else strategic(target, patch, schema)
        assert isinstance(merged, dict)
        return merged
    accepted = (JSON, MERGE) if custom else (JSON, MERGE, STRATEGIC)
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


def strategic(target: Any, patch: Any, schema: Schema | None) -> Any:
    raise unsupported_media_type(STRATEGIC, (JSON, MERGE))
