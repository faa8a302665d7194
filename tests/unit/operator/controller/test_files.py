"""A Model's files are kept in config maps, which go with the last pod that mounts them."""

from __future__ import annotations

import asyncio

import pytest
from fakes.time import FAKE_TIME

from kubeai.kube.resources import CONFIGMAPS

pytestmark = FAKE_TIME


async def test_files_are_kept_in_a_config_map(world):
    world.start()
    world.apply(replicas=1, files=[{"path": "/a/b", "content": "one"}])
    await world.settled(1, 1)
    found = world.kube.objects["configmaps", "model-m-files"]
    assert found["data"] == {"_a_b": "one"}
    assert found["metadata"]["ownerReferences"][0]["uid"] == world.model()["metadata"]["uid"]
    world.apply(files=[{"path": "/c", "content": "two"}])
    await world.settled(1, 1)
    assert world.kube.objects["configmaps", "model-m-files"]["data"] == {"_c": "two"}


FILES = "configmaps", "model-m-files"


async def test_a_config_map_is_deleted_with_the_last_pod_that_mounts_it(world):
    world.start()
    world.apply(replicas=2, files=[{"path": "/a", "content": "one"}])
    await world.settled(2, 2)
    world.auto_ready = False  # the rollout stalls and the old pods go on serving
    world.apply(files=None)
    await world.until(lambda: len(world.pods()) == 3)
    await asyncio.sleep(60.0)
    assert FILES in world.kube.objects
    world.auto_ready = True
    world.make_ready(next(name for name in world.pods() if not is_ready(world, name)))
    await world.settled(2, 2)
    assert FILES not in world.kube.objects
    world.apply(files=[{"path": "/a", "content": "one"}])
    await world.settled(2, 2)
    assert world.kube.objects[FILES]["data"] == {"_a": "one"}


def is_ready(world, name):
    status = world.kube.objects["pods", name].get("status", {})
    return status.get("conditions") == [{"type": "Ready", "status": "True"}]


@pytest.mark.parametrize("may_list", [True, False])
async def test_a_new_leader_deletes_leftover_config_maps(world, may_list):
    """It lists them once, regardless of the number of Models."""
    world.start()
    names = [f"m{n}" for n in range(10)]
    for name in names:
        world.apply(name, replicas=0, files=[{"path": "/a", "content": "one"}])
    maps = [("configmaps", f"model-{name}-files") for name in names]
    await world.until(lambda: all(key in world.kube.objects for key in maps))
    await world.kube.create(CONFIGMAPS, {"metadata": {"name": "model-x-files"}, "data": {}})
    await world.stop()
    for name in names:
        world.apply(name, files=None)
    if not may_list:
        world.kube.missing.add("configmaps")
    world.kube.lists.clear()
    world.start()
    await asyncio.sleep(10.0)
    assert [key for key in maps if key in world.kube.objects] == ([] if may_list else maps)
    assert ("configmaps", "model-x-files") in world.kube.objects  # belongs to no Model
    assert sorted(world.kube.lists) == ["configmaps", "services"]


async def test_the_files_of_a_deleted_model_of_the_same_name_are_not_reused(world):
    stale = {"metadata": {"name": "model-m-files", "ownerReferences": [{"uid": "former"}]}}
    await world.kube.create(CONFIGMAPS, stale | {"data": {"_a": "old"}})
    world.start()
    world.apply(replicas=1, files=[{"path": "/a", "content": "new"}])
    await world.settled(1, 1)
    found = world.kube.objects["configmaps", "model-m-files"]
    assert found["data"] == {"_a": "new"}
    assert found["metadata"]["ownerReferences"][0]["uid"] == world.model()["metadata"]["uid"]
