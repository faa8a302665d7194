"""Observes and writes the cache claims and their Jobs.

Owns the view of both collections, including our own writes not yet observed, and the back-off of
failed loads. Used by the controller: `view` for the plan, `apply` for its actions.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from kubeai.api.model import Model
from kubeai.api.objects import ObjectMeta
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import JOBS, PVCS
from kubeai.logs import get_logger
from kubeai.operator.cache.plan import (
    AnnotateClaim,
    CacheAction,
    CacheView,
    Claim,
    CreateClaim,
    CreateJob,
    DeleteJob,
    Job,
)
from kubeai.operator.leader import Writes
from kubeai.operator.leftovers import delete_unchanged
from kubeai.operator.pod_trouble import MESSAGE_MAX_CHARS, Trouble
from kubeai.operator.refusals import Refusals
from kubeai.podspec import cache as manifests

log = get_logger(__name__)
RETRY_FIRST_S, RETRY_MAX_S = 10.0, 600.0  # before a failed load is retried
NO_JOBS_AFTER_S = 10.0  # an API server that is just starting may not serve Jobs yet


class _Condition(msgspec.Struct):
    type: str = ""
    status: str = ""
    message: str = ""


class _JobStatus(msgspec.Struct):
    active: int = 0
    terminating: int = 0
    conditions: list[_Condition] = []


class JobObject(msgspec.Struct):
    """The part of a Job that is decoded."""

    metadata: ObjectMeta
    status: _JobStatus = msgspec.field(default_factory=_JobStatus)


class _ClaimStatus(msgspec.Struct):
    phase: str = ""


class ClaimObject(msgspec.Struct):
    """The part of a PersistentVolumeClaim that is decoded."""

    metadata: ObjectMeta
    status: _ClaimStatus = msgspec.field(default_factory=_ClaimStatus)


class _Annotation(msgspec.Struct):
    """The value of a claim's annotation for one Model, as KubeAI in Go writes it."""

    uid: str
    timestamp: str = ""


class _Patience(msgspec.Struct):
    """The back-off of one Model's failed loads since this KubeAI replica became the leader."""

    job: str = ""  # uid of the Job that failed last
    failure: str = ""
    until_s: float = -math.inf
    backoff: Backoff = msgspec.field(default_factory=lambda: Backoff(RETRY_FIRST_S, RETRY_MAX_S))


class Claims:
    """Claims and Jobs of a namespace. ``changed(model)`` is called when a Job of a Model changes.

    The watches start with the first Model that has a cache.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        writes: Writes,
        changed: Callable[[str], None],
        all_changed: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._writes = writes
        self._changed = changed
        self._all_changed = all_changed
        self._clock = clock
        self._claims: dict[str, tuple[int, Claim]] = {}  # name → (resourceVersion, claim)
        self._jobs: dict[str, tuple[int, Job]] = {}
        self._unlisted = {PVCS.plural: "", JOBS.plural: ""}  # not listed yet → the last error
        self._has_jobs, self._no_jobs_since_s = True, math.inf
        self._needed = asyncio.Event()
        self._patience: dict[str, _Patience] = {}  # by Model uid
        self._outputs: dict[str, str] = {}  # Model uid → last output of its failing loader
        self._refusals = Refusals(kube, namespace, self._refusal_changed, clock)

    async def run(self) -> None:
        """Watch both collections forever, starting once :attr:`pending` has been read."""
        await self._needed.wait()
        await asyncio.gather(
            self._kube.follow(
                PVCS,
                self._namespace,
                type=ClaimObject,
                replaced=self._replace_claims,
                changed=self._claim_changed,
                failed=partial(self._not_listed, PVCS.plural),
            ),
            self._kube.follow(
                JOBS,
                self._namespace,
                type=JobObject,
                replaced=self._replace_jobs,
                changed=self._job_changed,
                failed=self._jobs_failed,
            ),
            self._refusals.run(),
        )

    def stopped_leading(self) -> None:
        """This KubeAI replica is no longer the leader."""
        self._refusals.stopped_leading()

    # -- reading ---------------------------------------------------------------------------------

    @property
    def pending(self) -> bool:
        """Whether the first lists are still in progress. Reading this starts the watches."""
        self._needed.set()
        return any(not why for why in self._unlisted.values())

    def view(self, model: Model, troubles: dict[str, Trouble]) -> tuple[CacheView, float | None]:
        """The state of the Model's cache, and seconds until it may change without an event.

        ``troubles``: why Jobs' pods are stuck, by the Job's purpose.
        """
        if unknown := self._unknown():
            return CacheView(unknown=unknown), None
        name, uid = model.metadata.name, model.metadata.uid
        load = self._job(manifests.LOAD_JOB_PREFIX + name)
        evict = self._job(manifests.EVICT_JOB_PREFIX + name)
        leaving = model.metadata.deletion_timestamp is not None
        trouble, podless_s = self._trouble(evict if leaving else load, troubles)
        if trouble is not None and trouble.output:
            self._outputs[uid] = trouble.output
        wait_s = self._wait_s(uid, load)
        patience = self._patience.get(uid)
        view = CacheView(
            claim=self._claims.get(manifests.claim_name(model), (0, None))[1],
            load=load,
            evict=evict,
            has_jobs=self._has_jobs,
            may_load=wait_s is None,
            failure="" if patience is None else patience.failure,
            trouble=trouble,
        )
        return view, min((s for s in (wait_s, podless_s) if s is not None), default=None)

    def _trouble(
        self, job: Job | None, troubles: dict[str, Trouble]
    ) -> tuple[Trouble | None, float | None]:
        """Why a Job is stuck, and seconds until the result may change."""
        if job is None:
            return None, None
        purpose = job.name.removesuffix(_model_of(job.name)).rstrip("-")
        trouble, wait_s = self._refusals.trouble(job)
        return troubles.get(purpose, trouble), wait_s

    def _unknown(self) -> str:
        """Why the state is unknown; empty once everything has been listed."""
        for plural, why in self._unlisted.items():
            if plural != JOBS.plural or self._has_jobs:
                return f"{plural} have not been listed yet" + (f": {why}" if why else "")
        return ""

    def _job(self, name: str) -> Job | None:
        return self._jobs.get(name, (0, None))[1]

    def _wait_s(self, uid: str, load: Job | None) -> float | None:
        if load is not None and load.owner == uid and load.complete:
            self.forget(uid)
        patience = self._patience.get(uid)
        if load is not None and load.owner == uid and load.failed:
            patience = self._patience.setdefault(uid, _Patience())
            if patience.job != load.uid:
                output = self._outputs.get(uid)
                patience.job = load.uid
                patience.failure = f"{load.failed}: {output}" if output else load.failed
                patience.until_s = self._clock() + patience.backoff.next_s()
        if patience is None or patience.until_s <= self._clock():
            return None
        return patience.until_s - self._clock()

    def forget(self, uid: str) -> None:
        """The Model is gone, or its files are loaded."""
        self._patience.pop(uid, None)
        self._outputs.pop(uid, None)

    # -- writing ---------------------------------------------------------------------------------

    async def apply(self, action: CacheAction) -> None:
        """Apply one action. Concurrent changes are handled by the next reconcile."""
        match action:
            case CreateClaim():
                await self._create_claim(action.manifest)
            case CreateJob():
                await self._create_job(action.manifest)
            case AnnotateClaim():
                await self._annotate(action)
            case DeleteJob():
                await self._delete_job(action)

    async def _create_claim(self, manifest: dict[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        async with self._writes:
            try:
                made = await self._kube.create(PVCS, manifest, self._namespace, type=ClaimObject)
                log.info("claim created", claim=name)
            except ApiError as error:
                if error.status != 409:
                    raise
                made = await self._kube.get(PVCS, name, self._namespace, type=ClaimObject)
        self._put_claim(made)

    async def _create_job(self, manifest: dict[str, Any]) -> None:
        name = manifest["metadata"]["name"]
        async with self._writes:
            try:
                made = await self._kube.create(JOBS, manifest, self._namespace, type=JobObject)
                log.info("job created", job=name)
            except ApiError as error:
                if error.status != 409:
                    raise
                made = await self._kube.get(JOBS, name, self._namespace, type=JobObject)
        self._put_job(made)

    async def _annotate(self, action: AnnotateClaim) -> None:
        key = manifests.ANNOTATION_PREFIX + action.model
        patch = {"metadata": {"uid": action.uid, "annotations": {key: action.value}}}
        async with self._writes:
            try:
                made = await self._kube.patch(
                    PVCS, action.name, patch, self._namespace, type=ClaimObject
                )
            except ApiError as error:
                if error.status not in (404, 409, 422):  # else the claim has been replaced
                    raise
                self._claims.pop(action.name, None)
                return
        self._put_claim(made)
        log.info("claim annotated", claim=action.name, model=action.model, value=action.value)

    async def _delete_job(self, action: DeleteJob) -> None:
        async with self._writes:
            await delete_unchanged(
                self._kube,
                JOBS,
                action.name,
                self._namespace,
                uid=action.uid,
                propagation="Foreground",  # the Job remains until its pods are gone
            )
        version, job = self._jobs.get(action.name, (0, None))
        if job is not None and job.uid == action.uid:
            self._jobs[action.name] = version, msgspec.structs.replace(job, terminating=True)
        log.info("job deleted", job=action.name, why=action.why)

    # -- watch events ----------------------------------------------------------------------------

    def _replace_claims(self, objects: list[ClaimObject]) -> None:
        self._claims.clear()
        for obj in objects:
            self._put_claim(obj)
        self._unlisted.pop(PVCS.plural, None)
        self._all_changed()

    def _claim_changed(self, kind: str, obj: ClaimObject) -> None:
        name = obj.metadata.name
        _, before = self._claims.get(name, (0, None))
        if kind != "DELETED":
            self._put_claim(obj)
        elif before is not None and before.uid == obj.metadata.uid:
            del self._claims[name]
        _, after = self._claims.get(name, (0, None))
        if before is not None and after is not None and _same_claim(before, after):
            for model, _ in before.loaded.items() ^ after.loaded.items():
                self._changed(model)  # not each of the hundreds that share the claim
        elif before is not after:
            self._all_changed()

    def _put_claim(self, obj: ClaimObject) -> None:
        meta = obj.metadata
        version, _ = self._claims.get(meta.name, (0, None))
        if meta.name.startswith(manifests.CLAIM_PREFIX) and meta.version >= version:
            loaded = {
                key.removeprefix(manifests.ANNOTATION_PREFIX): _loaded_uid(value)
                for key, value in meta.annotations.items()
                if key.startswith(manifests.ANNOTATION_PREFIX)
            }
            claim = Claim(
                name=meta.name,
                uid=meta.uid,
                terminating=meta.deletion_timestamp is not None,
                unbound=obj.status.phase == "Pending" and not loaded,
                loaded=loaded,
            )
            self._claims[meta.name] = meta.version, claim

    def _replace_jobs(self, objects: list[JobObject]) -> None:
        self._jobs.clear()
        for obj in objects:
            self._put_job(obj)
        self._unlisted.pop(JOBS.plural, None)
        self._has_jobs, self._no_jobs_since_s = True, math.inf
        self._all_changed()

    def _job_changed(self, kind: str, obj: JobObject) -> None:
        if kind == "DELETED":
            _, job = self._jobs.get(obj.metadata.name, (0, None))
            if job is not None and job.uid == obj.metadata.uid:  # and not its successor
                del self._jobs[obj.metadata.name]
            self._refusals.forget(obj.metadata.uid)
        else:
            self._put_job(obj)
        self._refusal_changed(obj.metadata.name)

    def _refusal_changed(self, job: str) -> None:
        model = _model_of(job)
        if model:
            self._changed(model)

    def _not_listed(self, plural: str, error: ApiError) -> None:
        if self._unlisted.get(plural, str(error)) != str(error):
            self._unlisted[plural] = str(error)
            self._all_changed()

    def _jobs_failed(self, error: ApiError) -> None:
        self._not_listed(JOBS.plural, error)
        if error.status != 404:  # the response to a list of an unknown resource
            self._no_jobs_since_s = math.inf
        else:
            self._no_jobs_since_s = min(self._no_jobs_since_s, self._clock())
        served = self._clock() - self._no_jobs_since_s < NO_JOBS_AFTER_S
        if served != self._has_jobs:
            self._has_jobs = served
            self._all_changed()

    def _put_job(self, obj: JobObject) -> None:
        meta = obj.metadata
        version, _ = self._jobs.get(meta.name, (0, None))
        if not _model_of(meta.name) or meta.version < version:
            return
        ends = {c.type: c.message for c in obj.status.conditions if c.status == "True"}
        terminating, status = meta.deletion_timestamp is not None, obj.status
        ended = terminating or ends.keys() & {"Complete", "Failed", "Suspended"}
        failed = (ends["Failed"] or "it failed")[:MESSAGE_MAX_CHARS] if "Failed" in ends else ""
        self._jobs[meta.name] = (
            meta.version,
            Job(
                name=meta.name,
                uid=meta.uid,
                owner=next((o.uid for o in meta.owner_references if o.controller), ""),
                terminating=terminating,
                complete="Complete" in ends,
                failed=failed,
                podless=not ended and not status.active and not status.terminating,
                hash=meta.annotations.get(manifests.JOB_HASH_ANNOTATION, ""),
            ),
        )


def _same_claim(one: Claim, other: Claim) -> bool:
    return (one.uid, one.terminating, one.unbound) == (other.uid, other.terminating, other.unbound)


def _model_of(job: str) -> str:
    for prefix in (manifests.LOAD_JOB_PREFIX, manifests.EVICT_JOB_PREFIX):
        if job.startswith(prefix):
            return job.removeprefix(prefix)
    return ""


def _loaded_uid(value: str) -> str:
    try:
        return msgspec.json.decode(value, type=_Annotation).uid
    except msgspec.MsgspecError:
        return ""
