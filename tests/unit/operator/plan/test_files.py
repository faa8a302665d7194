"""A Model with a cache: its files are loaded before its first pod and evicted after its last."""

from __future__ import annotations

import pytest
from fakes.plans import NOW, conditions, make_model, make_pod
from msgspec.structs import replace

from kubeai.api.config.system import parse_config
from kubeai.operator.cache.plan import (
    FINALIZER,
    AnnotateClaim,
    CacheView,
    Claim,
    CreateClaim,
    CreateJob,
    DeleteJob,
    Job,
)
from kubeai.operator.plan import CreatePod, DeletePod, Observed, PatchModel, PatchStatus, plan
from kubeai.operator.pods import Trouble
from kubeai.podspec.cache import job_hash, load_job

CLAIM = Claim("shared-model-cache-fast", "claim-1")
LOADED = replace(CLAIM, loaded={"m": "u1"})
LOAD = Job("load-cache-m", "job-1", "u1")
EVICT = Job("evict-cache-m", "job-2", "u1")
OURS = {"finalizers": [FINALIZER]}
DELETED = OURS | {"deletionTimestamp": "2026-01-01T00:00:00Z"}


CACHE_CONFIG = parse_config(
    "resourceProfiles: {cpu: {requests: {cpu: 1}}}\n"
    "cacheProfiles: {fast: {sharedFilesystem: {storageClassName: nfs}}}"
)


def cached_model(meta=OURS, **spec):
    return make_model(meta, **({"cacheProfile": "fast", "replicas": 1} | spec))


def cache_plan(model, view, *pods):
    """Return the steps as "verb name" or the patch of the Model, and the plan's status."""
    done, status = [], None
    for action in plan(model, CACHE_CONFIG, Observed(pods=pods, cache=view), NOW):
        match action:
            case CreateClaim() | CreateJob() | CreatePod():
                kind = action.manifest["kind"]
                done.append(f"create {kind}")
            case DeleteJob() | DeletePod():
                done.append(f"delete {action.name}")
            case AnnotateClaim():
                done.append("note loaded" if action.value else "note gone")
            case PatchModel():
                done.append(action.patch)
            case PatchStatus():
                status = action.status
    return done, status


NO_LOAD = replace(LOAD, owner="u0")
REFUSED = Trouble("PodRefused", "exceeded quota")
LOAD_HASH = job_hash(load_job(cached_model(), CACHE_CONFIG))
LOADING_STEPS = [
    # the Model's finalizers, the observed state, the steps, the condition's reason
    ("first the finalizer", {}, CacheView(), [{"metadata": OURS}], "Loading"),
    ("then the claim", OURS, CacheView(), ["create PersistentVolumeClaim"], "Loading"),
    ("then the Job", OURS, CacheView(claim=CLAIM), ["create Job"], "Loading"),
    ("it is waited for", OURS, CacheView(claim=CLAIM, load=LOAD), [], "Loading"),
    ("then it is recorded", OURS, CacheView(claim=CLAIM, load=replace(LOAD, complete=True)),
     ["note loaded"], "Loading"),
    ("then the Job is deleted", OURS, CacheView(claim=LOADED, load=replace(LOAD, complete=True)),
     ["delete load-cache-m", "create Pod"], "Loaded"),
    ("the Job is deleted once", OURS, CacheView(claim=LOADED, load=replace(LOAD, terminating=True)),
     ["create Pod"], "Loaded"),
    ("another Model's Job is deleted first", OURS, CacheView(claim=CLAIM, load=NO_LOAD),
     ["delete load-cache-m"], "Loading"),
    ("another Model's files do not count", OURS,
     CacheView(claim=replace(CLAIM, loaded={"m": "u0"})), ["create Job"], "Loading"),
    ("a failed Job waits", OURS,
     CacheView(claim=CLAIM, load=replace(LOAD, failed="x"), may_load=False, failure="x"),
     [], "LoadFailed"),
    ("and is created again", OURS,
     CacheView(claim=CLAIM, load=replace(LOAD, failed="x"), failure="x"),
     ["delete load-cache-m"], "Loading"),
    ("a Job without a pod is waited for", OURS,
     CacheView(claim=CLAIM, load=replace(LOAD, hash=LOAD_HASH), trouble=REFUSED), [],
     "PodRefused"),
    ("and recreated if its spec has changed", OURS,
     CacheView(claim=CLAIM, load=replace(LOAD, hash="old"), trouble=REFUSED),
     ["delete load-cache-m"], "PodRefused"),
    ("not while it progresses", OURS, CacheView(claim=CLAIM, load=replace(LOAD, hash="old")), [],
     "Loading"),
    ("nothing before all lists are synced", OURS, CacheView(unknown="not read yet"), [], "Unknown"),
    ("a terminating claim is waited for", OURS, CacheView(claim=replace(LOADED, terminating=True)),
     [], "ClaimDeleted"),
    ("an API without Jobs", OURS, CacheView(claim=CLAIM, has_jobs=False), [], "NoJobs"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("meta", "view", "done", "reason"),
    [step[1:] for step in LOADING_STEPS],
    ids=[step[0] for step in LOADING_STEPS],
)
def test_files_are_loaded_before_the_first_pod(meta, view, done, reason):
    got, status = cache_plan(cached_model(meta), view)
    assert got == done
    loaded = reason == "Loaded"
    assert conditions(status)["CacheLoaded"] == (str(loaded), reason)
    assert status.cache.loaded == loaded
    if not loaded:
        assert conditions(status)["Ready"] == ("False", "CacheNotLoaded")


def test_a_failed_load_is_reported_with_its_reason():
    view = CacheView(claim=CLAIM, may_load=False, failure="BackoffLimitExceeded")
    _, status = cache_plan(cached_model(), view)
    assert conditions(status)["Degraded"] == ("True", "CacheFailed")
    assert "BackoffLimitExceeded" in status.conditions[0].message


@pytest.mark.parametrize("trouble", [REFUSED, Trouble("ImagePullBackOff", "no such image")])
def test_a_stuck_load_is_degraded(trouble):
    view = CacheView(claim=CLAIM, load=replace(LOAD, hash=LOAD_HASH), trouble=trouble)
    _, status = cache_plan(cached_model(), view)
    assert conditions(status)["Degraded"] == ("True", "CacheFailed")
    assert trouble.message in next(c.message for c in status.conditions if c.type == "Degraded")
    deleted = cached_model(DELETED | {"finalizers": [FINALIZER]})
    _, status = cache_plan(deleted, replace(view, load=None, evict=EVICT, claim=LOADED))
    assert conditions(status)["Degraded"] == ("True", "CacheFailed")


def test_a_missing_cache_profile_is_reported_and_the_pods_stay():
    model = cached_model(cacheProfile="gone")
    done, status = cache_plan(model, CacheView(), make_pod("a"))
    assert done == []
    assert conditions(status)["CacheLoaded"] == ("False", "InvalidProfile")
    assert "'gone'" in status.conditions[0].message


EVICTION_STEPS = [
    ("first its pods", CacheView(claim=LOADED), [make_pod("a")], ["delete a"], "Evicting"),
    ("they are waited for", CacheView(claim=LOADED), [make_pod("a", terminating=True)], [],
     "Evicting"),
    ("then the Job that loads", CacheView(claim=CLAIM, load=LOAD), [], ["delete load-cache-m"],
     "Evicting"),
    ("it is waited for", CacheView(claim=CLAIM, load=replace(LOAD, terminating=True)), [], [],
     "Evicting"),
    ("then the Job", CacheView(claim=LOADED), [], ["create Job"], "Evicting"),
    ("not another Model's", CacheView(claim=LOADED, evict=replace(EVICT, owner="u0")), [],
     ["delete evict-cache-m"], "Evicting"),
    ("it is waited for", CacheView(claim=LOADED, evict=EVICT), [], [], "Evicting"),
    ("then it is recorded", CacheView(claim=LOADED, evict=replace(EVICT, complete=True)), [],
     ["note gone"], "Evicting"),
    ("then the Model is removed", CacheView(claim=CLAIM, evict=replace(EVICT, complete=True)), [],
     [{"metadata": {"finalizers": ["theirs"]}}], "Evicted"),
    ("also if the Job failed", CacheView(claim=CLAIM, evict=replace(EVICT, failed="x")), [],
     [{"metadata": {"finalizers": ["theirs"]}}], "EvictFailed"),
    ("also without a claim", CacheView(), [], [{"metadata": {"finalizers": ["theirs"]}}],
     "Evicted"),
    ("also if the claim was never bound",
     CacheView(claim=replace(CLAIM, unbound=True), evict=EVICT), [],
     [{"metadata": {"finalizers": ["theirs"]}}], "Evicted"),
    ("but not before the Job that loads is gone",
     CacheView(claim=replace(CLAIM, unbound=True), load=LOAD), [], ["delete load-cache-m"],
     "Evicting"),
    ("also if the claim is deleted",
     CacheView(claim=replace(LOADED, terminating=True), load=LOAD), [],
     [{"metadata": {"finalizers": ["theirs"]}}], "Evicted"),
    ("also without Jobs", CacheView(claim=LOADED, load=LOAD, has_jobs=False), [],
     [{"metadata": {"finalizers": ["theirs"]}}], "EvictFailed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("view", "pods", "done", "reason"),
    [step[1:] for step in EVICTION_STEPS],
    ids=[step[0] for step in EVICTION_STEPS],
)
@pytest.mark.parametrize("profile", ["fast", "gone"])
def test_files_are_evicted_after_the_last_pod(profile, view, pods, done, reason):
    meta = DELETED | {"finalizers": ["theirs", FINALIZER]}
    model = cached_model(meta, cacheProfile=profile, resourceProfile="gone:1")
    got, status = cache_plan(model, view, *pods)
    assert got == done
    assert conditions(status)["CacheLoaded"] == ("False", reason)
    assert conditions(status)["Ready"] == ("False", "Deleting")
