"""The Job controller of ``kubeai local``: what kube-controller-manager does for batch/v1 Jobs.

:class:`JobController` reads a Job and its pods, takes the step that `kubeai.local.jobs.rules`
returns, and repeats until there is nothing left to do. ``kubeai local`` runs it in its own process,
beside the operator. It never runs in a real cluster, which has its own Job controller.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Coroutine, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import EVENTS, JOBS, PODS
from kubeai.kube.workqueue import Queue
from kubeai.local.jobs.objects import TRACKING, Job, JobStatus, Metadata, Pod
from kubeai.local.jobs.rules import (
    CreatePods,
    DeletePods,
    Ending,
    ReleasePods,
    Wait,
    WriteStatus,
    endings_of,
    next_step,
)
from kubeai.logs import get_logger

log = get_logger(__name__)

PARALLEL_JOBS_MAX = 8
PARALLEL_WRITES_MAX = 16
CONFLICT_RETRY_S = 0.05
WAIT_MAX_S = 600.0  # timers stop while a machine is suspended; its clock does not


class _JobState(msgspec.Struct):
    """In-memory state of one Job; after a restart, it is recovered from the Job's pods."""

    endings: dict[str, Ending] = {}
    create_error: str = ""  # the last pod creation error that was recorded as an Event


class JobController:
    """Reconciles all Jobs of one API while `run` runs. Only one may run at a time.

    Watches only trigger a reconcile; decisions use objects read at that moment, so that the
    controller always sees its own writes. Reads are cheap: there are few Jobs and the API is local.
    """

    def __init__(
        self, kube: Kube, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._kube = kube
        self._clock = clock
        self._jobs: set[str] = set()
        self._states: dict[str, _JobState] = {}
        self._writes = asyncio.Semaphore(PARALLEL_WRITES_MAX)
        self._queue = Queue(self.reconcile, PARALLEL_JOBS_MAX)

    async def run(self) -> None:
        """Run until cancelled. Raises only on a bug in the program."""
        follow = self._kube.follow
        try:
            async with asyncio.TaskGroup() as tasks:
                jobs, pods = self._jobs_replaced, self._pods_replaced
                tasks.create_task(follow(JOBS, type=Job, replaced=jobs, changed=self._job_changed))
                tasks.create_task(follow(PODS, type=Pod, replaced=pods, changed=self._pod_changed))
        finally:
            await self._queue.stop()

    # -- watch handlers --------------------------------------------------------------------------

    def _jobs_replaced(self, jobs: list[Job]) -> None:
        gone = self._jobs
        self._jobs = {_key(job.metadata) for job in jobs}
        for key in gone | self._jobs:
            self._queue.add(key)

    def _job_changed(self, kind: str, job: Job) -> None:
        key = _key(job.metadata)
        if kind == "DELETED":
            self._jobs.discard(key)
        else:
            self._jobs.add(key)
        self._queue.add(key)

    def _pods_replaced(self, pods: list[Pod]) -> None:
        for key in self._jobs:  # their pods may have been deleted while the watch was down
            self._queue.add(key)
        for pod in pods:
            self._pod_changed("ADDED", pod)

    def _pod_changed(self, _kind: str, pod: Pod) -> None:
        """Enqueue the pod's Job; for a pod with the Job finalizer but no Job, its namespace."""
        namespace, owner = pod.metadata.namespace, pod.controller
        if owner is not None:
            self._queue.add(f"{namespace}/{owner.name}")
        elif pod.tracked:
            self._queue.add(f"{namespace}/")

    # -- reconcile -------------------------------------------------------------------------------

    async def reconcile(self, key: str) -> float | None:
        """Take one step for the Job ``namespace/name``.

        With an empty name, only pods whose owner reference was removed lose their Job finalizer.
        Returns seconds until the next reconcile, or None to wait for a change.
        """
        namespace, _, name = key.partition("/")
        job = await self._read(namespace, name)
        pods, _ = await self._kube.list(PODS, namespace, type=Pod)
        try:
            await self._release(_orphans(pods, name, job))
            if job is None:
                self._states.pop(key, None)
                return None
            state = self._states.setdefault(key, _JobState())
            return await self._step(job, pods, state)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            log.info("conflicting write, retrying", job=key, error=str(error))
            return CONFLICT_RETRY_S

    async def _read(self, namespace: str, name: str) -> Job | None:
        try:
            return await self._kube.get(JOBS, name, namespace, type=Job) if name else None
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _step(self, job: Job, pods: list[Pod], state: _JobState) -> float | None:
        uid, now = job.metadata.uid, self._clock()
        own_pods = [pod for pod in pods if pod.controller is not None and pod.controller.uid == uid]
        state.endings = endings_of(job, own_pods, state.endings, now)
        taken = {pod.metadata.name for pod in pods}
        step = next_step(job, own_pods, now, state.endings, taken)
        if isinstance(step, Wait):
            return None if step.seconds is None else min(step.seconds, WAIT_MAX_S)
        if isinstance(step, WriteStatus):
            await self._write_status(job, step.status)
        elif isinstance(step, ReleasePods):
            await self._release(step.pods)
        elif isinstance(step, DeletePods):
            await self._write_all(self._delete(job, pod, step.fails) for pod in step.pods)
        elif isinstance(step, CreatePods):
            await self._write_all(self._create(job, name, state) for name in step.names)
        else:
            meta = job.metadata
            await self._kube.delete(
                JOBS, meta.name, meta.namespace, uid=meta.uid,
                resource_version=meta.resource_version, propagation="Foreground",
            )  # fmt: skip
        return 0.0

    # -- writes ----------------------------------------------------------------------------------

    async def _write_all(self, writes: Iterable[Coroutine[Any, Any, None]]) -> None:
        """Run all writes even if some fail, then raise the first failure."""

        async def one(write: Coroutine[Any, Any, None]) -> None:
            async with self._writes:
                await write

        results = await asyncio.gather(*map(one, writes), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _write_status(self, job: Job, status: JobStatus) -> None:
        meta = job.metadata
        patch = {
            "metadata": {"uid": meta.uid, "resourceVersion": meta.resource_version},
            "status": _without_zeros(msgspec.to_builtins(status)),
        }
        await self._kube.patch(JOBS, meta.name, patch, meta.namespace, subresource="status")
        for condition in status.conditions:
            old = next((c for c in job.status.conditions if c.type == condition.type), None)
            event = _EVENTS.get((condition.type, condition.status))
            if condition != old and event is not None:
                kind, reason, message = event
                reason, message = reason or condition.reason, message or condition.message
                await self._record_event(job, kind, reason, message)

    async def _release(self, pods: Sequence[Pod]) -> None:
        """Remove the Job finalizer from pods, so that they can be deleted."""
        await self._write_all(self._release_one(pod) for pod in pods)

    async def _release_one(self, pod: Pod) -> None:
        meta = pod.metadata
        left = [finalizer for finalizer in meta.finalizers if finalizer != TRACKING]
        patch = {
            "metadata": {
                "uid": meta.uid,
                "resourceVersion": meta.resource_version,
                "finalizers": left or None,
            }
        }
        await self._kube.patch(PODS, meta.name, patch, meta.namespace)

    async def _delete(self, job: Job, pod: Pod, fails: bool) -> None:
        if pod.tracked and not fails:
            await self._release_one(pod)
        meta = pod.metadata
        await self._kube.delete(PODS, meta.name, meta.namespace, uid=meta.uid)
        await self._record_event(job, "Normal", "SuccessfulDelete", f"Deleted pod: {meta.name}")

    async def _create(self, job: Job, name: str, state: _JobState) -> None:
        namespace = job.metadata.namespace
        try:
            await self._kube.create(PODS, pod_of(job, name), namespace)
        except ApiError as error:
            refused = error.status and error.status != 409
            if refused and str(error) != state.create_error:
                state.create_error = str(error)
                await self._record_event(job, "Warning", "FailedCreate", f"Error creating: {error}")
            raise
        state.create_error = ""
        await self._record_event(job, "Normal", "SuccessfulCreate", f"Created pod: {name}")

    async def _record_event(
        self, job: Job, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """Record an Event about the Job. Best effort: failures are ignored."""
        meta, now = job.metadata, self._clock().replace(microsecond=0)
        time = now.isoformat().replace("+00:00", "Z")
        event = {
            "metadata": {"name": f"{meta.name}.{secrets.token_hex(8)}"},
            "involvedObject": {
                "apiVersion": JOBS.api_version, "kind": JOBS.kind, "name": meta.name,
                "namespace": meta.namespace, "uid": meta.uid,
            },
            "type": kind, "reason": reason, "message": message, "count": 1,
            "firstTimestamp": time, "lastTimestamp": time,
            "source": {"component": "job-controller"},
        }  # fmt: skip
        with contextlib.suppress(ApiError):
            await self._kube.create(EVENTS, event, meta.namespace)


# Event for each condition. An empty reason or message means the condition's own.
_EVENTS: dict[tuple[str, str], tuple[Literal["Normal", "Warning"], str, str]] = {
    ("Complete", "True"): ("Normal", "Completed", "Job completed"),
    ("Failed", "True"): ("Warning", "", ""),
    ("Suspended", "True"): ("Normal", "Suspended", ""),
    ("Suspended", "False"): ("Normal", "Resumed", ""),
}


def pod_of(job: Job, name: str) -> dict[str, Any]:
    """Return the manifest of a Job's pod."""
    template, meta = job.spec.template, job.metadata
    about = template.get("metadata") or {}
    owner = {
        "apiVersion": JOBS.api_version, "kind": JOBS.kind, "name": meta.name, "uid": meta.uid,
        "controller": True, "blockOwnerDeletion": True,
    }  # fmt: skip
    metadata = {key: about[key] for key in ("labels", "annotations") if about.get(key)}
    finalizers = [*(about.get("finalizers") or ()), TRACKING]
    return {
        "metadata": {
            **metadata,
            "name": name,
            "namespace": meta.namespace,
            "finalizers": list(dict.fromkeys(finalizers)),
            "ownerReferences": [owner],
        },
        "spec": template.get("spec") or {},
    }


def _orphans(pods: Iterable[Pod], name: str, job: Job | None) -> list[Pod]:
    """Pods that no Job counts any more: their Job is gone, or their owner reference is."""
    uid = None if job is None else job.metadata.uid
    return [
        pod
        for pod in pods
        if pod.tracked
        and (
            not name
            if (owner := pod.controller) is None
            else owner.name == name and owner.uid != uid
        )
    ]


def _key(meta: Metadata) -> str:
    return f"{meta.namespace}/{meta.name}"


def _without_zeros(status: dict[str, Any]) -> dict[str, Any]:
    """Turn zero and empty values into nulls, so that the merge patch removes them."""
    for name in ("active", "succeeded", "failed"):
        status[name] = status[name] or None
    status["conditions"] = status["conditions"] or None
    uncounted = status["uncountedTerminatedPods"]
    status["uncountedTerminatedPods"] = {kind: uids or None for kind, uids in uncounted.items()}
    return status
