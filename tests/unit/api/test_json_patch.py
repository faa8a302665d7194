"""Patches of pods, as a Model has them."""

import pytest

from kubeai.api.json_patch import VALUE_MAX_LEVELS, JSONPatch
from kubeai.api.model import decode_model
from kubeai.kube.decoding import decode_leniently
from kubeai.kube.resources import MODELS


def nested(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


def patches(*given):
    spec = {"url": "hf://a/b", "engine": "VLLM", "features": [], "jsonPatches": list(given)}
    return decode_model({"metadata": {"name": "m"}, "spec": spec}).spec.json_patches


def test_an_operation_has_its_value_only_where_it_means_something():
    add, remove, move = patches(
        {"op": "add", "path": "/a"},
        {"op": "remove", "path": "/b", "value": 1},
        {"op": "move", "path": "/c", "from": ""},
    )
    assert add.operation() == {"op": "add", "path": "/a", "value": None}
    assert remove.operation() == {"op": "remove", "path": "/b"}
    assert move.operation() == {"op": "move", "path": "/c", "from": ""}


def test_a_value_that_is_nested_too_deeply_is_an_error_of_its_operation_alone():
    good, bad = (
        JSONPatch(op="add", path="/a", value=nested(levels))
        for levels in (VALUE_MAX_LEVELS - 1, VALUE_MAX_LEVELS)
    )
    assert good.operation()["value"] == nested(VALUE_MAX_LEVELS - 1)
    with pytest.raises(ValueError, match="more than 32 levels deep"):
        bad.operation()


def test_a_model_that_no_decoder_can_read_is_skipped():
    deep = b"[" * 100_000 + b"]" * 100_000
    patch = b'{"op": "add", "path": "/a", "value": ' + deep + b"}"
    spec = b'{"url": "hf://a/b", "engine": "VLLM", "features": [], "jsonPatches": [' + patch + b"]}"
    assert (
        decode_leniently(
            MODELS,
            b'{"spec": ' + spec + b"}",
            type(decode_model({"spec": {"url": "hf://a/b", "engine": "VLLM", "features": []}})),
        )
        is None
    )
