"""`kubeai uninstall` deletes Models first, while the operator can still evict their caches."""

from __future__ import annotations

import asyncio

import pytest
from operators import until

from kubeai.errors import KubeAIError
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import MODELS, PVCS
from kubeai.operator.uninstall import uninstall

FINALIZER = "kubeai.org/cache-eviction"
CLAIM = {
    "accessModes": ["ReadWriteMany"],
    "storageClassName": "nfs",
    "resources": {"requests": {"storage": "1Gi"}},
}


async def claim(world, name, **labels):
    await world.kube.create(PVCS, {"metadata": {"name": name, "labels": labels}, "spec": CLAIM})


async def claims(world):
    """Those that nobody has deleted: where nothing else runs, a claim keeps its finalizer."""
    found, _ = await world.kube.list(PVCS, world.kube.namespace)
    return [c["metadata"]["name"] for c in found if "deletionTimestamp" not in c["metadata"]]


async def test_models_and_then_the_claims_of_their_caches_go_and_nothing_else(world):
    ours = {"app.kubernetes.io/managed-by": "kubeai"}
    await claim(world, "shared-model-cache-fast", **ours)
    await claim(world, "shared-model-cache-mine")
    await claim(world, "somebodys", **ours)
    await world.create("a")
    await world.create("b")
    await uninstall(world.kube, world.kube.namespace, 10.0)
    assert (await world.kube.list(MODELS, world.kube.namespace))[0] == []
    assert await claims(world) == ["shared-model-cache-mine", "somebodys"]


async def test_uninstall_waits_for_cache_eviction_and_names_remaining_models(world):
    await world.create("kept")
    await world.kube.patch(MODELS, "kept", {"metadata": {"finalizers": [FINALIZER]}})
    await claim(world, "shared-model-cache-fast", **{"app.kubernetes.io/managed-by": "kubeai"})
    with pytest.raises(KubeAIError, match="Models not deleted within 0 s: kept"):
        await uninstall(world.kube, world.kube.namespace, 0.0)
    assert await claims(world) == ["shared-model-cache-fast"], "its files are still there"
    waiting = asyncio.create_task(uninstall(world.kube, world.kube.namespace, 20.0))
    await until(lambda: going(world, "kept"), "the Model is told to go")
    await world.kube.patch(MODELS, "kept", {"metadata": {"finalizers": None}})
    await waiting
    assert await claims(world) == []


async def going(world, name):
    return "deletionTimestamp" in (await world.kube.get(MODELS, name))["metadata"]


async def test_uninstall_without_models_does_nothing(world):
    await uninstall(world.kube, world.kube.namespace, 1.0)
    with pytest.raises(ApiError):
        await world.kube.get(MODELS, "any")
