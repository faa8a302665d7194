"""Plans a Model's cached files: loaded before its first pod, evicted after its last.

:func:`plan_cache` and :func:`plan_eviction` are level-based: from the observed state they derive
the next actions and the Model's ``CacheLoaded`` condition. All progress is stored in the API: the
finalizer on the Model, the claim, the Job, and the claim's annotation that the files are complete.
Pure; `kubeai.operator.cache.claims` observes and writes. Called by `plan`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

from kubeai.api.config.system import SystemConfig
from kubeai.api.model import Model
from kubeai.errors import ModelError
from kubeai.operator.pod_trouble import Trouble
from kubeai.podspec import cache as manifests

FINALIZER = "kubeai.org/cache-eviction"


class Job(msgspec.Struct, frozen=True):
    """One load or evict Job, as last observed."""

    name: str
    uid: str
    owner: str = ""  # uid of its Model
    terminating: bool = False  # being deleted
    complete: bool = False
    failed: str = ""  # why it failed for good
    podless: bool = False  # it should have a pod and has none
    hash: str = ""  # of the manifest that it was created from


class Claim(msgspec.Struct, frozen=True):
    """A cache claim, as last observed."""

    name: str
    uid: str
    terminating: bool = False
    unbound: bool = False  # it never had a volume, so nothing was ever written to it
    loaded: dict[str, str] = {}  # Model name → uid of the Model whose files are complete


class CacheView(msgspec.Struct, frozen=True, kw_only=True):
    """The observed state of one Model's cache."""

    unknown: str = ""  # why nothing is known yet
    claim: Claim | None = None
    load: Job | None = None
    evict: Job | None = None
    has_jobs: bool = True  # False: the API does not serve Jobs
    may_load: bool = True  # False: loading failed recently, wait before the next attempt
    failure: str = ""  # why the last attempt failed
    trouble: Trouble | None = None  # why the Job's pod is stuck, or why there is no pod


class CreateClaim(msgspec.Struct, frozen=True):
    """Create the PersistentVolumeClaim that holds the Model's files."""

    manifest: dict[str, Any]


class AnnotateClaim(msgspec.Struct, frozen=True):
    """Record that the Model's files are complete; with ``value`` None, that they are gone."""

    name: str
    uid: str
    model: str
    value: str | None


class CreateJob(msgspec.Struct, frozen=True):
    """Create a Job that loads or evicts the Model's files."""

    manifest: dict[str, Any]


class DeleteJob(msgspec.Struct, frozen=True):
    """Delete exactly the Job with this uid; ``why`` is for the log."""

    name: str
    uid: str
    why: str


CacheAction = CreateClaim | AnnotateClaim | CreateJob | DeleteJob


class CachePlan(msgspec.Struct, frozen=True):
    """The next actions and the ``CacheLoaded`` condition. ``loaded``: pods may be created."""

    actions: tuple[CacheAction, ...] = ()
    loaded: bool = False
    reason: str = "Loading"
    message: str = ""
    failed: bool = False  # needs a person's attention
    finalizer: bool = True  # whether the Model must keep (or get) our finalizer


def has_cache(model: Model) -> bool:
    """Whether the Model uses a cache, or may still have files in one."""
    return bool(model.spec.cache_profile) or FINALIZER in model.metadata.finalizers


def plan_cache(model: Model, config: SystemConfig, view: CacheView, now: datetime) -> CachePlan:
    """The next step of loading the Model's files."""
    if view.unknown:
        return CachePlan(reason="Unknown", message=view.unknown)
    name, uid, claim, job = model.metadata.name, model.metadata.uid, view.claim, view.load
    loaded = claim is not None and not claim.terminating and claim.loaded.get(name) == uid
    stale = job is not None and (loaded or job.owner != uid)
    actions: list[CacheAction] = []
    if job is not None and stale and not job.terminating:
        why = "it has completed" if job.owner == uid else "it belongs to another Model"
        actions.append(DeleteJob(job.name, job.uid, why))
    if loaded:
        message = "all files are in the cache"
        return CachePlan(tuple(actions), True, "Loaded", message)
    try:
        manifests.cache_profile(model, config)
    except ModelError as error:
        return CachePlan(tuple(actions), reason=error.reason, message=str(error), failed=True)
    if FINALIZER not in model.metadata.finalizers:  # first, so that no files are left behind
        return CachePlan(tuple(actions), message="the files are about to be loaded")
    if claim is None:
        return CachePlan((*actions, CreateClaim(manifests.claim(model, config))))
    if claim.terminating:
        message = f"the claim {claim.name} is being deleted and will then be recreated"
        return CachePlan(tuple(actions), reason="ClaimDeleted", message=message)
    if not view.has_jobs:
        message = "the Kubernetes API does not serve batch/v1 Jobs"
        return CachePlan(reason="NoJobs", message=message, failed=True)
    if job is None and view.may_load:
        actions.append(CreateJob(manifests.load_job(model, config)))
    elif job is not None and not stale and not job.terminating:
        if job.complete:
            value = {"uid": uid, "timestamp": now.isoformat().replace("+00:00", "Z")}
            text = msgspec.json.encode(value).decode()
            actions.append(AnnotateClaim(claim.name, claim.uid, name, text))
        elif job.failed and view.may_load:
            actions.append(DeleteJob(job.name, job.uid, "it failed and will be retried"))
        elif not job.failed:
            actions += _renew(job, manifests.load_job(model, config), view)
    return CachePlan(
        tuple(actions),
        reason=_loading_reason(view),
        message=_loading(model, view),
        failed=bool(view.failure) or view.trouble is not None,
    )


def _renew(job: Job, manifest: dict[str, Any], view: CacheView) -> list[DeleteJob]:
    """Delete a stuck Job if its manifest has changed since it was created: Jobs are immutable."""
    if view.trouble is None or job.terminating or job.hash == manifests.job_hash(manifest):
        return []
    return [DeleteJob(job.name, job.uid, "it is stuck and the configuration has changed")]


def _loading_reason(view: CacheView) -> str:
    if not view.may_load:
        return "LoadFailed"
    if view.trouble is not None and view.trouble.reason in ("PodRefused", "NoPod"):
        return view.trouble.reason
    return "Loading"


def _loading(model: Model, view: CacheView) -> str:
    message = f"loading {model.spec.url} into the claim {manifests.claim_name(model)}"
    if view.trouble is not None:
        message += f", but {view.trouble.reason}: {view.trouble.text}"
    if view.failure:
        message += f"; the last attempt failed ({view.failure}) and is retried with back-off"
    return message


def plan_eviction(model: Model, config: SystemConfig, view: CacheView, pods_left: int) -> CachePlan:
    """The next step of removing the files of a Model that is being deleted.

    Eviction does not block deletion forever: the finalizer is removed if there is no claim, if the
    claim was never bound, if the API serves no Jobs, and when the Job has failed (after
    EVICT_LIMIT_S at the latest).
    """
    if not model.spec.cache_profile:
        return CachePlan(finalizer=False)
    if pods_left:
        return CachePlan(reason="Evicting", message=f"{pods_left} pods may still read the files")
    if view.unknown:
        return CachePlan(reason="Unknown", message=view.unknown)
    name, uid, claim, job = model.metadata.name, model.metadata.uid, view.claim, view.evict
    folder = manifests.directory(model)
    if claim is None or claim.terminating:
        message = f"the claim {manifests.claim_name(model)} and its files no longer exist"
        return CachePlan(reason="Evicted", message=message, finalizer=False)
    if claim.unbound and view.load is None:  # an existing load Job may still get a volume
        message = f"the claim {claim.name} was never bound, so there are no files"
        return CachePlan(reason="Evicted", message=message, finalizer=False)
    if not view.has_jobs:
        message = f"{folder} is left in the claim {claim.name}: the API serves no batch/v1 Jobs"
        return CachePlan(reason="EvictFailed", message=message, failed=True, finalizer=False)
    doing = CachePlan(
        reason="Evicting",
        message=_evicting(folder, claim, view),
        failed=view.trouble is not None,
    )
    others = [one for one in (view.load, job) if one and (one is view.load or one.owner != uid)]
    if others:  # a load Job would keep writing
        why = "its Model is being deleted"
        deletes = [DeleteJob(one.name, one.uid, why) for one in others if not one.terminating]
        return msgspec.structs.replace(doing, actions=tuple(deletes))
    if job is None:
        create = CreateJob(manifests.evict_job(model, config))
        return msgspec.structs.replace(doing, actions=(create,))
    if not job.complete and not job.failed:
        renew = _renew(job, manifests.evict_job(model, config), view)
        return msgspec.structs.replace(doing, actions=tuple(renew))
    if claim.loaded.get(name) == uid:
        forget = AnnotateClaim(claim.name, claim.uid, name, None)
        return msgspec.structs.replace(doing, actions=(forget,))
    if job.failed:
        message = f"{folder} is left in the claim {claim.name}: {job.failed}"
        return CachePlan(reason="EvictFailed", message=message, failed=True, finalizer=False)
    return CachePlan(reason="Evicted", message=f"{folder} has been removed", finalizer=False)


def _evicting(folder: str, claim: Claim, view: CacheView) -> str:
    message = f"removing {folder} from the claim {claim.name}"
    if view.trouble is not None:
        message += f", but {view.trouble.reason}: {view.trouble.text}"
    return message
