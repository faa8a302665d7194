"""The values of a Model's fields that the API fills in, rejects, accepts or keeps from changing."""

from __future__ import annotations

import secrets

import pytest
from model_fields import ENV, refusal

from kubeai.kube.errors import ApiError
from kubeai.kube.resources import MODELS


async def test_the_api_fills_in_the_defaults(world):
    spec = (await world.create())["spec"]
    assert spec["minReplicas"] == 0
    assert spec["targetRequests"] == 100
    assert spec["scaleDownDelaySeconds"] == 30
    assert spec["loadBalancing"] == {
        "strategy": "LeastLoad",
        "prefixHash": {"meanLoadFactor": 125, "replication": 20, "prefixCharLength": 100},
    }


FILE = {"path": "/a", "content": ""}
ADAPTER = {"name": "a", "url": "hf://org/lora"}
# A change of the Model, and what the refusal has to name.
LIMITS = [
    ({"name": "n" * 41}, "the name must not be longer than 40 characters"),
    ({"url": None}, "spec.url"),
    ({"engine": None}, "spec.engine"),
    ({"engine": "vllm"}, "spec.engine"),
    ({"features": None}, "spec.features"),
    ({"features": ["Singing"]}, "spec.features[0]"),
    ({"args": "--one"}, "spec.args"),
    ({"env": {"A": 1}}, "spec.env.A"),
    ({"envFrom": [{"secretRef": "s"}]}, "spec.envFrom[0].secretRef"),
    ({"replicas": -1}, "spec.replicas"),
    ({"replicas": "1"}, "spec.replicas"),
    ({"minReplicas": -1}, "spec.minReplicas"),
    ({"maxReplicas": 0}, "spec.maxReplicas"),
    ({"minReplicas": 3, "maxReplicas": 2}, "minReplicas must be less than or equal to maxReplicas"),
    ({"autoscalingDisabled": "yes"}, "spec.autoscalingDisabled"),
    ({"targetRequests": 0}, "spec.targetRequests"),
    ({"scaleDownDelaySeconds": -1}, "spec.scaleDownDelaySeconds"),
    ({"owner": 1}, "spec.owner"),
    ({"loadBalancing": {"strategy": "Random"}}, "spec.loadBalancing.strategy"),
    (
        {"loadBalancing": {"prefixHash": {"meanLoadFactor": 99}}},
        "spec.loadBalancing.prefixHash.meanLoadFactor",
    ),
    (
        {"loadBalancing": {"prefixHash": {"replication": 0}}},
        "spec.loadBalancing.prefixHash.replication",
    ),
    (
        {"loadBalancing": {"prefixHash": {"prefixCharLength": -1}}},
        "spec.loadBalancing.prefixHash.prefixCharLength",
    ),
    ({"files": [FILE | {"path": "a"}]}, "path must be absolute"),
    ({"files": [FILE | {"path": "/a:b"}]}, "must not contain a colon"),
    ({"files": [FILE | {"path": "/" + "a" * 1024}]}, "spec.files[0].path"),
    ({"files": [FILE | {"content": "x" * 100_001}]}, "spec.files[0].content"),
    ({"files": [{"path": "/a"}]}, "spec.files[0].content"),
    ({"files": [FILE, FILE]}, "each path in files must be unique"),
    ({"files": [FILE | {"path": f"/{n}"} for n in range(11)]}, "spec.files"),
    ({"priorityClassName": 1}, "spec.priorityClassName"),
    ({"jsonPatches": [{"op": "merge", "path": "/a"}]}, "spec.jsonPatches[0].op"),
    ({"jsonPatches": [{"op": "add", "value": 1}]}, "spec.jsonPatches[0].path"),
    ({"jsonPatches": [{"op": "add", "path": "a"}]}, "a JSON pointer must start with '/'"),
    ({"jsonPatches": [{"op": "move", "path": "/a"}]}, "from is required"),
    ({"jsonPatches": [{"op": "copy", "path": "/a", "from": "b"}]}, "a JSON pointer must start"),
    ({"jsonPatches": [ENV] * 65}, "spec.jsonPatches"),
    ({"adapters": [ADAPTER | {"name": "A_1"}]}, "spec.adapters[0].name"),
    ({"adapters": [ADAPTER | {"name": "a" * 64}]}, "spec.adapters[0].name"),
    ({"adapters": [ADAPTER | {"url": "ollama://q"}]}, "spec.adapters[0].url"),
    (
        {"cacheProfile": "c", "engine": "LlamaCpp"},
        "cacheProfile is not possible with the LlamaCpp engine",
    ),
    (
        {"adapters": [ADAPTER], "engine": "Infinity"},
        "adapters are only possible with the VLLM engine",
    ),
]


async def test_out_of_bounds_values_are_rejected_by_field(world):
    for change, named in LIMITS:
        said = await refusal(world, **change)
        assert named in said, said


async def test_values_at_the_bounds_are_accepted(world):
    for change in (
        {"name": "n" * 40},
        {"maxReplicas": 1},
        {"minReplicas": 2, "maxReplicas": 2},
        {"scaleDownDelaySeconds": 0, "targetRequests": 1},
        {"loadBalancing": {"prefixHash": {"meanLoadFactor": 100, "prefixCharLength": 0}}},
        {"files": [FILE | {"path": f"/{n}", "content": "x" * 100_000} for n in range(10)]},
        {"features": []},
        {"adapters": [ADAPTER | {"url": "pvc://claim/path"}]},
        {"adapters": [ADAPTER | {"name": "a" * 63}]},
    ):
        await world.create(**{"name": f"m-{secrets.token_hex(4)}", **change})


async def test_fields_that_the_cache_depends_on_are_immutable(world):
    await world.create("cached", cacheProfile="c")
    await world.create("plain")
    for change, why in (
        ({"cacheProfile": "d"}, "cacheProfile is immutable once it is set"),
        ({"cacheProfile": ""}, "cacheProfile is immutable once it is set"),
        ({"cacheProfile": None}, "cacheProfile is immutable once it is set"),
        ({"url": "hf://org/other"}, "url is immutable while cacheProfile is set"),
    ):
        with pytest.raises(ApiError, match=why) as caught:
            await world.kube.patch(MODELS, "cached", {"spec": change})
        assert caught.value.status == 422
    await world.kube.patch(MODELS, "cached", {"spec": {"args": ["--new"], "minReplicas": 1}})
    await world.kube.patch(MODELS, "plain", {"spec": {"url": "hf://org/other"}})
    await world.kube.patch(MODELS, "plain", {"spec": {"cacheProfile": "c"}})
