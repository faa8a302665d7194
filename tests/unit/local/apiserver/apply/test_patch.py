"""Patches, as pure functions on objects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.local.apiserver.apply import patch
from kubeai.local.apiserver.schema.structural import Schema

_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=8,
)
_objects = st.dictionaries(st.sampled_from("abc"), _values, max_size=3)


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return value


@given(_objects, _objects)
def test_a_merge_patch_is_idempotent_and_does_not_modify_its_target(target: dict, change: dict):
    before = repr(target)
    once = patch.merge(target, change)
    assert patch.merge(once, change) == once
    assert repr(target) == before
    assert patch.merge({}, _without_nulls(change)) == _without_nulls(change)


@pytest.mark.parametrize(
    ("live", "change", "expected"),
    [
        ("abc", {"$setElementOrder/l": ["c", "a"], "l": ["c"]}, "bca"),
        ("ab", {"l": ["c"]}, "cab"),
        ("abc", {"l": [{"n": "b", "$patch": "delete"}]}, "ac"),
        ("abc", {"l": [{"$patch": "replace"}, {"n": "z"}]}, "z"),
        ("ab", {"$setElementOrder/l": ["b", "a"]}, "ba"),
        ("ab", {"l": None}, ""),
    ],
)
def test_lists_are_merged_by_key(live: str, change: dict, expected: str):
    schema = Schema(
        {
            "type": "object",
            "properties": {
                "l": {
                    "type": "array",
                    "x-kubernetes-patch-strategy": "merge",
                    "x-kubernetes-patch-merge-key": "n",
                    "items": {"type": "object", "properties": {"n": {"type": "string"}}},
                }
            },
        }
    )
    change = {
        k: [{"n": i} if isinstance(i, str) else i for i in v] if v else v
        for k, v in change.items()
    }  # fmt: skip
    merged = patch.strategic({"l": [{"n": name} for name in live]}, change, schema)
    assert "".join(item["n"] for item in merged.get("l", [])) == expected
