"""A Model's cache against an API in memory, on fake time: loading, failures, eviction."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest
from fakes.kube import now_s
from fakes.time import FAKE_TIME

from kubeai.api.config.system import parse_config
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import PODS, PVCS
from kubeai.operator.cache.claims import RETRY_MAX_S
from kubeai.operator.cache.plan import FINALIZER

pytestmark = FAKE_TIME
CONFIG = parse_config(
    "resourceProfiles: {cpu: {requests: {cpu: 1}}}\n"
    "cacheProfiles: {fast: {sharedFilesystem: {storageClassName: nfs}}}"
)
CLAIM = "persistentvolumeclaims", "shared-model-cache-fast"


def loaded(world, name="m"):
    """The Model uid in the claim's annotation."""
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


async def test_an_incomplete_cache_profile_fails_only_the_models_using_it(world):
    config = parse_config(
        "resourceProfiles: {cpu: {requests: {cpu: 1}}}\n"
        "cacheProfiles: {none: {}, fast: {sharedFilesystem: {storageClassName: nfs}}}"
    )
    world.start(config)
    world.apply("bad", replicas=1, cacheProfile="none")
    world.apply(replicas=1, cacheProfile="fast")
    await world.settled(1, 1)
    assert world.condition("CacheLoaded", "bad") == ("False", "InvalidProfile")
    assert world.condition("Degraded", "bad") == ("True", "InvalidProfile")
    assert world.condition("CacheLoaded") == ("True", "Loaded")


def made(world, plural):
    """When objects of a kind were created (or attempted), and their names."""
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


async def test_a_failing_load_is_reported_and_retried_with_back_off(world):
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
    world.job_end = None  # an earlier failure is not reported when the files are loaded again
    world.kube._keep(PVCS, world.kube.objects[CLAIM], "DELETED")
    await world.until(lambda: world.condition("CacheLoaded") == ("False", "Loading"))
    await asyncio.sleep(5.0)
    assert world.condition("Degraded") == ("False", "AsExpected")


async def test_a_deleted_claim_is_recreated_and_filled_again(world):
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.settled(1, 1)
    world.kube._keep(PVCS, world.kube.objects[CLAIM], "DELETED")
    await world.until(lambda: CLAIM in world.kube.objects and loaded(world))
    await world.settled(1, 1)
    assert world.kube.count("create", "jobs") == 2


async def test_a_restarted_operator_writes_no_status_before_its_caches_are_synced(world):
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


async def test_an_unreadable_cache_is_reported(world):
    world.kube.missing.add("persistentvolumeclaims")
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.until(lambda: world.condition("CacheLoaded") == ("False", "Unknown"))
    assert world.pods() == []
    world.kube.missing.clear()
    await world.settled(1, 1)


async def test_loading_a_models_files_enqueues_no_other_model(world):
    world.start(CONFIG)
    for n in range(20):
        world.apply(f"m{n}", replicas=0, cacheProfile="fast")
    await world.until(lambda: all(loaded(world, f"m{n}") for n in range(20)))
    await asyncio.sleep(5.0)
    looked_at = []
    add = world.controller.queue.add

    def noted(name):
        looked_at.append(name)
        add(name)

    world.controller.queue.add = noted
    world.delete("m7")
    await world.until(lambda: ("models", "m7") not in world.kube.objects)
    assert set(looked_at) == {"m7"}


async def test_files_are_loaded_again_if_the_annotation_is_invalid(world):
    world.start(CONFIG)
    annotations = {"models.kubeai.org/m": "{"}
    meta = {"name": CLAIM[1], "uid": "c", "annotations": annotations}
    world.kube._keep(PVCS, {"metadata": meta}, "ADDED")
    world.apply(replicas=1, cacheProfile="fast")
    await world.settled(1, 1)
    assert loaded(world) == world.model()["metadata"]["uid"]


async def test_a_deleted_models_files_are_evicted_before_the_model_is_removed(world):
    world.start(CONFIG)
    world.apply(replicas=2, cacheProfile="fast")
    await world.settled(2, 2)
    for pod in world.kube.alive():
        pod["spec"]["nodeName"] = "one"  # a scheduled pod takes time to terminate
    world.delete()
    await asyncio.sleep(60.0)
    assert world.jobs() == []  # pods still read the files
    for key in [key for key in world.kube.objects if key[0] == "pods"]:
        world.kube._keep(PODS, world.kube.objects[key], "DELETED")
    await world.until(lambda: ("models", "m") not in world.kube.objects)
    assert loaded(world) is None
    assert CLAIM in world.kube.objects  # other models share it
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


async def test_a_failing_eviction_is_reported(world):
    world.start(CONFIG)
    world.apply(replicas=0, cacheProfile="fast")
    await world.until(lambda: world.condition("CacheLoaded") == ("True", "Loaded"))
    world.job_end = None
    world.delete()
    await world.until(lambda: world.condition("CacheLoaded") == ("False", "Evicting"))
    assert world.condition("Ready") == ("False", "Deleting")
    world.end_job("evict-cache-m", "Failed")
    await world.until(lambda: ("models", "m") not in world.kube.objects)


async def test_a_recreated_model_is_loaded_into_its_own_folder(world):
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


async def test_the_reason_a_load_job_is_stuck_is_reported(world):
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


def message(world, type_):
    conditions = world.model().get("status", {}).get("conditions", [])
    return next((c["message"] for c in conditions if c["type"] == type_), "")


async def test_the_reason_a_jobs_pods_are_rejected_is_reported_until_it_has_one(world):
    world.refusal = "exceeded quota: must specify cpu"
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.until(lambda: world.condition("CacheLoaded") == ("False", "PodRefused"))
    assert world.condition("Degraded") == ("True", "CacheFailed")
    words = 'pods "load-cache-m" is forbidden: exceeded quota: must specify cpu'
    assert words in message(world, "Degraded")
    writes = len(world.kube.writes)
    await asyncio.sleep(600.0)  # the Events stay, and so does the status
    assert len(world.kube.writes) == writes
    world.refusal = None
    world.start_job("load-cache-m")
    await world.settled(1, 1)
    assert world.condition("Degraded") == ("False", "AsExpected")


@pytest.mark.parametrize("forbidden", [False, True])
async def test_a_job_without_a_pod_is_reported_even_without_an_event(world, forbidden):
    world.refusal = "exceeded quota" if forbidden else ""
    if forbidden:
        world.kube.missing.add("events")
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    waited_s = await world.until(lambda: world.condition("CacheLoaded") == ("False", "NoPod"), 90.0)
    assert waited_s >= 60.0
    assert "kubectl describe job load-cache-m" in message(world, "Degraded")


async def test_job_events_are_listed_once_for_all_jobs_and_only_while_a_job_has_no_pod(world):
    world.refusal = "exceeded quota"
    world.start(CONFIG)
    names = [f"m{n}" for n in range(20)]
    for name in names:
        world.apply(name, replicas=0, cacheProfile="fast")
    refused = ("False", "PodRefused")
    await world.until(lambda: all(world.condition("CacheLoaded", n) == refused for n in names))
    before = world.kube.lists.count("events")
    await asyncio.sleep(300.0)
    assert world.kube.lists.count("events") - before <= 11
    world.refusal = None
    for name in names:
        world.start_job(f"load-cache-{name}")
    await world.until(lambda: all(loaded(world, name) for name in names))
    await asyncio.sleep(30.0)
    before = world.kube.lists.count("events")
    await asyncio.sleep(300.0)
    assert world.kube.lists.count("events") == before


async def test_a_rejected_job_is_recreated_after_the_configuration_changes(world):
    world.refusal = "exceeded quota"
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.until(lambda: world.condition("CacheLoaded") == ("False", "PodRefused"))
    await world.stop()
    world.refusal = None
    loading = parse_config("modelLoading: {resources: {requests: {cpu: 1}}}").model_loading
    world.start(msgspec.structs.replace(CONFIG, model_loading=loading))
    await world.settled(1, 1, limit_s=120.0)
    assert world.kube.count("create", "jobs") == 2


async def test_a_model_whose_claim_was_never_bound_is_removed_at_once(world):
    world.kube.admit = pending
    world.job_end = None
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.until(lambda: world.jobs() == ["load-cache-m"])
    world.delete()
    await world.until(lambda: ("models", "m") not in world.kube.objects)
    assert [name for _, name in made(world, "jobs")] == ["load-cache-m"]


async def test_files_are_evicted_from_a_claim_that_was_bound_late(world):
    world.kube.admit = pending
    world.job_end = None
    world.start(CONFIG)
    world.apply(replicas=1, cacheProfile="fast")
    await world.until(lambda: world.jobs() == ["load-cache-m"])
    claim = world.kube.objects[CLAIM] | {"status": {"phase": "Bound"}}
    world.kube._keep(PVCS, claim, "MODIFIED")
    world.delete()
    await world.until(lambda: world.jobs() == ["evict-cache-m"])
    world.end_job("evict-cache-m", "Complete")
    await world.until(lambda: ("models", "m") not in world.kube.objects)


def pending(obj):
    """A claim as the API admits it."""
    if obj.get("kind") == "PersistentVolumeClaim":
        return obj | {"status": {"phase": "Pending"}}
    return obj


@pytest.mark.parametrize("status", [409, 429, 500, 0])
async def test_it_backs_off_during_an_error_storm_and_recovers(world, status):
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


async def test_a_failed_load_shows_the_loaders_last_output(world):
    world.start(CONFIG)
    world.job_end = None
    world.apply(replicas=1, cacheProfile="fast")
    await world.until(lambda: world.jobs() == ["load-cache-m"])
    job = world.kube.objects["jobs", "load-cache-m"]
    labels = job["spec"]["template"]["metadata"]["labels"]
    ended = {"exitCode": 1, "reason": "Error", "message": "401: no such token\n"}
    loader = {"name": "loader", "state": {"terminated": ended}}
    status = {"phase": "Running", "containerStatuses": [loader]}
    meta = {"name": "load-cache-m-xyz", "uid": "j", "labels": labels}
    pod = {"metadata": meta, "spec": {"restartPolicy": "OnFailure"}, "status": status}
    world.kube._keep(PODS, pod, "ADDED")
    await world.until(lambda: "401: no such token" in message(world, "CacheLoaded"))
    world.kube._keep(PODS, world.kube.objects["pods", "load-cache-m-xyz"], "DELETED")
    world.end_job("load-cache-m", "Failed")
    await world.until(lambda: world.condition("CacheLoaded") == ("False", "LoadFailed"))
    assert "load-cache-m is Failed: 401: no such token" in message(world, "CacheLoaded")
