"""A Model's cache against an API in memory, on fake time: loading, failures, eviction."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest
from fakes.kube import World, now_s
from fakes.time import FAKE_TIME

from kubeai.api.config import parse_config
from kubeai.kube import PODS, PVCS, ApiError
from kubeai.operator.cache import FINALIZER
from kubeai.operator.claims import RETRY_MAX_S

pytestmark = FAKE_TIME
CONFIG = parse_config(
    "resourceProfiles: {cpu: {requests: {cpu: 1}}}\n"
    "cacheProfiles: {fast: {sharedFilesystem: {storageClassName: nfs}}}"
)
CLAIM = "persistentvolumeclaims", "shared-model-cache-fast"


@pytest.fixture
async def world():
    world = World()
    yield world
    await world.stop()


def loaded(world, name="m"):
    """The uid that the claim's annotation names."""
    claim = world.kube.objects.get(CLAIM, {"metadata": {}})
    value = claim["metadata"].get("annotations", {}).get(f"models.kubeai.org/{name}")
    return None if value is None else msgspec.json.decode(value)["uid"]


async def test_a_model_is_loaded_and_then_served(world):
    world.start(CONFIG)
    world.job_end = None
    world.apply(replicas=2, cacheProfile="fast")
    await world.until(lambda: world.jobs() == ["load-cache-m"])
    assert world.model()["metadata"]["finalizers"] == [FINALIZER]
    await asyncio.sleep(60.0)
    assert world.pods() == []
    assert world.condition("CacheLoaded") == ("False", "Loading")
    world.end_job("load-cache-m", "Complete")
    await world.settled(2, 2)
    uid = world.model()["metadata"]["uid"]
    assert loaded(world) == uid
    assert world.jobs() == []
    assert world.model()["status"]["cache"] == {"loaded": True}
    assert "Loaded" in world.events.reasons()
    (mount,) = [
        mount
        for mount in world.kube.alive()[0]["spec"]["containers"][0]["volumeMounts"]
        if mount["name"] == "models"
    ]
    assert mount["mountPath"] == f"/models/m-{uid}"


def made(world, plural):
    """When objects of a kind were made (or tried to be), and their names."""
    return [
        (at_s, name)
        for at_s, verb, kind, name in world.kube.writes
        if (verb, kind) == ("create", plural)
    ]


async def test_two_models_share_a_claim(world):
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    world.apply("n", replicas=1, cacheProfile="fast")
    await world.until(lambda: len(world.pods()) == 2)
    assert [name for plural, name in world.kube.objects if plural == CLAIM[0]] == [CLAIM[1]]
    assert loaded(world)
    assert loaded(world, "n")
    world.delete("n")
    await world.until(lambda: ("models", "n") not in world.kube.objects)
    assert loaded(world)
    assert not loaded(world, "n")


async def test_a_load_that_fails_is_told_and_tried_again_less_and_less_often(world):
    world.start(CONFIG)
    world.job_end = "Failed"
    world.apply(replicas=1, cacheProfile="fast")
    await world.until(lambda: world.condition("CacheLoaded") == ("False", "LoadFailed"))
    assert world.condition("Degraded") == ("True", "CacheFailed")
    assert world.condition("Ready") == ("False", "CacheNotLoaded")
    await asyncio.sleep(3600.0)
    tries = [at_s for at_s, _ in made(world, "jobs")]
    rests = [b - a for a, b in itertools.pairwise(tries)]
    assert 8 <= len(tries) <= 20
    assert rests[0] >= 5.0
    assert RETRY_MAX_S / 2 <= rests[-1] <= RETRY_MAX_S + 5.0
    world.job_end = "Complete"
    await world.settled(1, 1, limit_s=RETRY_MAX_S + 60.0)
    assert world.condition("Degraded") == ("False", "AsExpected")
    world.job_end = None  # and what failed once is no news when the files are loaded again
    world.kube._keep(PVCS, world.kube.objects[CLAIM], "DELETED")
    await world.until(lambda: world.condition("CacheLoaded") == ("False", "Loading"))
    await asyncio.sleep(5.0)
    assert world.condition("Degraded") == ("False", "AsExpected")


async def test_a_claim_that_was_deleted_is_made_and_filled_anew(world):
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.settled(1, 1)
    world.kube._keep(PVCS, world.kube.objects[CLAIM], "DELETED")
    await world.until(lambda: CLAIM in world.kube.objects and loaded(world))
    await world.settled(1, 1)
    assert world.kube.count("create", "jobs") == 2


async def test_a_restarted_operator_says_nothing_of_a_cache_before_it_knows(world):
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.settled(1, 1)
    await world.stop()
    writes = len(world.kube.writes)
    world.kube.list_s = 20.0
    world.start(CONFIG)
    await asyncio.sleep(10.0)
    assert len(world.kube.writes) == writes
    world.apply(replicas=2)
    await world.settled(2, 2)
    assert world.kube.count("create", "jobs") == 1


async def test_a_cache_that_cannot_be_read_is_told(world):
    world.kube.missing.add("persistentvolumeclaims")
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.until(lambda: world.condition("CacheLoaded") == ("False", "Unknown"))
    assert world.pods() == []
    world.kube.missing.clear()
    await world.settled(1, 1)


async def test_a_models_files_concern_no_other_model(world):
    world.start(CONFIG)
    for n in range(20):
        world.apply(f"m{n}", replicas=0, cacheProfile="fast")
    await world.until(lambda: all(loaded(world, f"m{n}") for n in range(20)))
    await asyncio.sleep(5.0)
    looked_at = []
    add = world.controller.queue.add
    world.controller.queue.add = lambda name: (looked_at.append(name), add(name))
    world.delete("m7")
    await world.until(lambda: ("models", "m7") not in world.kube.objects)
    assert set(looked_at) == {"m7"}


async def test_an_unreadable_annotation_is_no_cache(world):
    world.start(CONFIG)
    annotations = {"models.kubeai.org/m": "{"}
    meta = {"name": CLAIM[1], "uid": "c", "annotations": annotations}
    world.kube._keep(PVCS, {"metadata": meta}, "ADDED")
    world.apply(replicas=1, cacheProfile="fast")
    await world.settled(1, 1)
    assert loaded(world) == world.model()["metadata"]["uid"]


async def test_a_deleted_models_files_are_removed_before_it_goes(world):
    world.start(CONFIG)
    world.apply(replicas=2, cacheProfile="fast")
    await world.settled(2, 2)
    for pod in world.kube.alive():
        pod["spec"]["nodeName"] = "one"  # a pod on a node takes its time to go
    world.delete()
    await asyncio.sleep(60.0)
    assert world.jobs() == []  # pods still read the files
    for key in [key for key in world.kube.objects if key[0] == "pods"]:
        world.kube._keep(PODS, world.kube.objects[key], "DELETED")
    await world.until(lambda: ("models", "m") not in world.kube.objects)
    assert loaded(world) is None
    assert CLAIM in world.kube.objects  # it is others' too
    assert [name for _, name in made(world, "jobs")] == ["load-cache-m", "evict-cache-m"]


@pytest.mark.parametrize("without", ["profile", "claim", "jobs", "success"])
async def test_a_model_with_a_cache_can_always_be_deleted(world, without):
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.settled(1, 1)
    await world.stop()
    if without == "profile":
        world.start()
    else:
        world.start(CONFIG)
    if without == "claim":
        world.leader.leads = False
        world.kube._keep(PVCS, world.kube.objects[CLAIM], "DELETED")
    if without == "jobs":
        await world.stop()
        world.kube.missing.add("jobs")
        world.start(CONFIG)
    if without == "success":
        world.job_end = "Failed"
    world.delete()
    world.leader.leads = True
    world.controller.all_changed()
    await world.until(lambda: ("models", "m") not in world.kube.objects)
    assert world.pods() == []
    assert not any(name == "m" for name in world.store.models)


async def test_a_model_that_cannot_be_evicted_says_why(world):
    world.start(CONFIG)
    world.apply(replicas=0, cacheProfile="fast")
    await world.until(lambda: world.condition("CacheLoaded") == ("True", "Loaded"))
    world.job_end = None
    world.delete()
    await world.until(lambda: world.condition("CacheLoaded") == ("False", "Evicting"))
    assert world.condition("Ready") == ("False", "Deleting")
    world.end_job("evict-cache-m", "Failed")
    await world.until(lambda: ("models", "m") not in world.kube.objects)


async def test_a_model_of_the_same_name_is_loaded_into_a_folder_of_its_own(world):
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.settled(1, 1)
    first = world.model()["metadata"]["uid"]
    world.delete()
    await world.until(lambda: ("models", "m") not in world.kube.objects)
    world.apply(replicas=1, cacheProfile="fast")
    await world.settled(1, 1)
    second = world.model()["metadata"]["uid"]
    assert first != second
    assert loaded(world) == second


async def test_what_keeps_the_job_from_getting_on_is_told(world):
    world.auto_ready = False
    world.start(CONFIG)
    world.job_end = None
    world.apply(replicas=1, cacheProfile="fast")
    await world.until(lambda: world.jobs() == ["load-cache-m"])
    job = world.kube.objects["jobs", "load-cache-m"]
    labels = job["spec"]["template"]["metadata"]["labels"]
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off"}
    status = {"containerStatuses": [{"name": "loader", "state": {"waiting": waiting}}]}
    meta = {"name": "load-cache-m-xyz", "uid": "j", "labels": labels}
    world.kube._keep(PODS, {"metadata": meta, "status": status}, "ADDED")

    def told():
        conditions = world.model().get("status", {}).get("conditions", [])
        message = next((c["message"] for c in conditions if c["type"] == "CacheLoaded"), "")
        return "ImagePullBackOff: the image of container loader cannot be pulled" in message

    await world.until(told)
    assert world.replicas() == {"all": 0, "ready": 0}


@pytest.mark.parametrize("status", [409, 429, 500, 0])
async def test_a_storm_of_errors_is_met_with_patience_and_ends_well(world, status):
    def storm(verb, plural, name):
        if now_s() < calm_s and plural in ("jobs", "persistentvolumeclaims"):
            raise ApiError(status, "Storm", "not now")

    calm_s = now_s() + 60.0
    world.kube.before = storm
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await asyncio.sleep(60.0)
    writes = [w for w in world.kube.writes if w[2] in ("jobs", "persistentvolumeclaims")]
    assert len(writes) <= 2 * 60
    await world.settled(1, 1, limit_s=120.0)
