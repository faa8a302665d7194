"""Jobs on one machine: what a cluster's controller-manager does for batch/v1 Jobs.

:func:`next_step` is the whole of the rules, and pure: from a Job, its pods and the time it tells
the one write that comes next. :class:`JobController` reads both anew, takes that step, and looks
again until there is nothing to do. ``kubeai local`` runs it beside the operator, in its own
process; a real cluster has a controller of its own, so it never runs there.

How a pod is counted exactly once, whoever is killed when: a pod is made with the finalizer
``batch.kubernetes.io/job-tracking``. Once it has ended, its uid is written into
``status.uncountedTerminatedPods``; then it loses the finalizer; then the uid becomes one more in
``succeeded`` or ``failed``. Each of these can be told from what the API holds, and is done again
if it was not done. A decision (a condition) is written before it is acted on. A new pod's name
follows from the Job and how many pods it had, so a create whose answer was lost is not repeated
under another name.

Not supported, and said so by the Job's condition Failed: Indexed Jobs, podFailurePolicy,
successPolicy and limits per index. Pods without an owner are not adopted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, NamedTuple

import msgspec
import structlog
from msgspec.structs import replace

from kubeai.kube import EVENTS, JOBS, PODS, ApiError, Kube
from kubeai.operator.queue import Queue

log = structlog.get_logger(__name__)

TRACKING = "batch.kubernetes.io/job-tracking"
MANAGED_BY = "kubernetes.io/job-controller"
BACKOFF_FIRST_S, BACKOFF_MAX_S = 10.0, 360.0  # between pods that fail
UNCOUNTED_PODS_MAX, CREATES_AT_ONCE_MAX = 500, 50
PARALLEL_JOBS_MAX = 8
PARALLEL_WRITES_MAX = 16
CONFLICT_AGAIN_S = 0.05
WAIT_MAX_S = 600.0  # timers stand still while a machine sleeps; its clock does not
NAME_PREFIX_MAX_CHARS = 58
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # no vowels: no words
_SUFFIX_CHARS = 5


# What is read of the objects.


class _Part(msgspec.Struct, rename="camel", frozen=True):
    pass


class Owner(_Part, frozen=True):
    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool = False


class Metadata(_Part, frozen=True):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[Owner, ...] = ()
    deletion_timestamp: datetime | None = None
    deletion_grace_period_seconds: int | None = None


class Condition(_Part, frozen=True, omit_defaults=True):
    type: str = ""
    status: str = ""
    last_probe_time: datetime | None = None
    last_transition_time: datetime | None = None
    reason: str = ""
    message: str = ""


class _Ended(_Part, frozen=True):
    finished_at: datetime | None = None


class _State(_Part, frozen=True):
    terminated: _Ended | None = None


class _Container(_Part, frozen=True):
    restart_count: int = 0
    state: _State = _State()


class _PodSpec(_Part, frozen=True):
    node_name: str = ""


class _PodCondition(_Part, frozen=True):
    type: str = ""
    status: str = ""


class _PodStatus(_Part, frozen=True):
    phase: str = ""
    conditions: tuple[_PodCondition, ...] = ()
    container_statuses: tuple[_Container, ...] = ()
    init_container_statuses: tuple[_Container, ...] = ()


class Pod(_Part, frozen=True):
    """What is known of a pod."""

    metadata: Metadata = Metadata()
    spec: _PodSpec = _PodSpec()
    status: _PodStatus = _PodStatus()

    @property
    def controller(self) -> Owner | None:
        """The Job whose pod it is."""
        for owner in self.metadata.owner_references:
            if owner.controller:
                return owner if owner.kind == JOBS.kind else None
        return None

    @property
    def tracked(self) -> bool:
        return TRACKING in self.metadata.finalizers

    @property
    def terminating(self) -> bool:
        return self.metadata.deletion_timestamp is not None and not self.over

    @property
    def over(self) -> bool:
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def active(self) -> bool:
        return not self.over and self.metadata.deletion_timestamp is None

    @property
    def ready(self) -> bool:
        return any((c.type, c.status) == ("Ready", "True") for c in self.status.conditions)

    @property
    def restarts(self) -> int:
        status = self.status
        containers = (*status.init_container_statuses, *status.container_statuses)
        return sum(container.restart_count for container in containers)


class Uncounted(_Part, frozen=True):
    """Uids of pods that have ended and are not in the numbers yet."""

    succeeded: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


class JobStatus(_Part, frozen=True):
    conditions: tuple[Condition, ...] = ()
    start_time: datetime | None = None
    completion_time: datetime | None = None
    active: int = 0
    ready: int | None = None
    terminating: int | None = None
    succeeded: int = 0
    failed: int = 0
    uncounted: Uncounted = msgspec.field(default=Uncounted(), name="uncountedTerminatedPods")

    def condition(self, *types: str) -> Condition | None:
        """The first condition of these types that is True."""
        held = (c for c in self.conditions if c.type in types and c.status == "True")
        return next(held, None)


class JobSpec(_Part, frozen=True):
    template: dict[str, Any] = {}
    parallelism: int = 1
    completions: int | None = None
    backoff_limit: int = 6
    active_deadline_seconds: int | None = None
    ttl_seconds_after_finished: int | None = None
    suspend: bool = False
    pod_replacement_policy: str = ""
    managed_by: str = MANAGED_BY
    completion_mode: str = "NonIndexed"
    pod_failure_policy: Any = None
    success_policy: Any = None
    backoff_limit_per_index: int | None = None
    max_failed_indexes: int | None = None


class Job(_Part, frozen=True):
    metadata: Metadata = Metadata()
    spec: JobSpec = JobSpec()
    status: JobStatus = JobStatus()

    @property
    def deleted(self) -> bool:
        return self.metadata.deletion_timestamp is not None

    @property
    def replaces_only_failed(self) -> bool:
        """Whether a pod that is going away keeps its place until it has gone."""
        return self.spec.pod_replacement_policy == "Failed"


# The rules. Pure.


class WriteStatus(NamedTuple):
    status: JobStatus


class ReleasePods(NamedTuple):
    """Take the finalizer off."""

    pods: tuple[Pod, ...]


class DeletePods(NamedTuple):
    pods: tuple[Pod, ...]
    fails: bool  # whether they count as failed


class CreatePods(NamedTuple):
    names: tuple[str, ...]


class DeleteJob(NamedTuple):
    pass


class Wait(NamedTuple):
    seconds: float | None  # None: until something changes


Step = WriteStatus | ReleasePods | DeletePods | CreatePods | DeleteJob | Wait


class Ending(NamedTuple):
    """How and when a pod ended."""

    failed: bool
    at: datetime


def next_step(
    job: Job,
    pods: Collection[Pod],
    now: datetime,
    endings: Mapping[str, Ending],
    taken: Collection[str] = (),
) -> Step:
    """The next write for the Job whose pods these are, or how long there is none.

    ``endings``: of its pods by uid, see :func:`endings_of`. ``taken``: names that no new pod may
    have.
    """
    if job.spec.managed_by != MANAGED_BY:
        return Wait(None)
    over = job.status.condition("Complete", "Failed")
    if over is not None:
        return _after_end(job, pods, over, now)
    status = _finish(_judge(job, pods, _count(job, pods), now), pods, now)
    if _is_urgent(job.status, status):
        return WriteStatus(status)
    told = {*status.uncounted.succeeded, *status.uncounted.failed}
    held = tuple(pod for pod in pods if pod.tracked and (job.deleted or pod.metadata.uid in told))
    if held:
        return ReleasePods(held)
    step = _manage(job, pods, now, endings, taken)
    if not isinstance(step, Wait):
        return step
    if status != job.status:
        return WriteStatus(status)
    return Wait(_sooner(step.seconds, _deadline_s(job, now)))


def _after_end(job: Job, pods: Iterable[Pod], over: Condition, now: datetime) -> Step:
    held = tuple(pod for pod in pods if pod.tracked)
    if held:
        return ReleasePods(held)
    ttl_s = job.spec.ttl_seconds_after_finished
    if ttl_s is None or job.deleted:
        return Wait(None)
    since = over.last_transition_time or now
    left_s = (since + timedelta(seconds=ttl_s) - now).total_seconds()
    return Wait(left_s) if left_s > 0 else DeleteJob()


def _is_urgent(old: JobStatus, new: JobStatus) -> bool:
    """Whether it says more than which pods are there: that is written before it is acted on."""
    there = {name: getattr(new, name) for name in ("active", "ready", "terminating")}
    return replace(old, **there) != new


def _count(job: Job, pods: Collection[Pod]) -> JobStatus:
    """The status with the pods that have ended, and those that are there."""
    old = job.status
    held = {pod.metadata.uid for pod in pods if pod.tracked}
    before = old.uncounted
    known = {*before.succeeded, *before.failed}
    news = [pod for pod in pods if pod.tracked and pod.metadata.uid not in known]
    room = max(0, UNCOUNTED_PODS_MAX - len(known))
    succeeded = [p.metadata.uid for p in news if p.status.phase == "Succeeded"][:room]
    room -= len(succeeded)
    failed = [p.metadata.uid for p in news if _has_failed(job, p)][:room]
    left = Uncounted(
        tuple(uid for uid in before.succeeded if uid in held) + tuple(succeeded),
        tuple(uid for uid in before.failed if uid in held) + tuple(failed),
    )
    return replace(
        old,
        active=sum(pod.active for pod in pods),
        ready=sum(pod.active and pod.ready for pod in pods),
        terminating=sum(pod.terminating for pod in pods),
        succeeded=old.succeeded + sum(uid not in held for uid in before.succeeded),
        failed=old.failed + sum(uid not in held for uid in before.failed),
        uncounted=left,
    )


def _has_failed(job: Job, pod: Pod) -> bool:
    """A pod that is going away counts as failed: nobody may be left to tell how it ended."""
    if not pod.terminating:
        return pod.status.phase == "Failed"
    return not job.replaces_only_failed or pod.metadata.deletion_grace_period_seconds == 0


def _judge(job: Job, pods: Iterable[Pod], status: JobStatus, now: datetime) -> JobStatus:
    """The status with the decision that ends the Job, suspends it, or lets it run."""
    spec, now = job.spec, now.replace(microsecond=0)
    if not spec.suspend and status.start_time is None:
        status = replace(status, start_time=now)
    if status.condition("FailureTarget", "SuccessCriteriaMet"):
        return status
    failed = status.failed + len(status.uncounted.failed)
    if missing := _unsupported(spec):
        why = f"kubeai local does not support {missing}"
        return _with(status, now, "FailureTarget", "NotSupported", why)
    if failed > spec.backoff_limit or _restarts_too_often(spec, pods):
        why = "Job has reached the specified backoff limit"
        return _with(status, now, "FailureTarget", "BackoffLimitExceeded", why)
    deadline_s = _deadline_s(job, now)
    if deadline_s is not None and deadline_s <= 0:
        why = "Job was active longer than specified deadline"
        return _with(status, now, "FailureTarget", "DeadlineExceeded", why)
    if _is_complete(spec, status):
        why = "Reached expected number of succeeded pods"
        return _with(status, now, "SuccessCriteriaMet", "CompletionsReached", why)
    if spec.suspend:
        status = replace(status, start_time=None)
        if status.condition("Suspended"):
            return status
        return _with(status, now, "Suspended", "JobSuspended", "Job suspended")
    if status.condition("Suspended"):
        status = replace(status, start_time=now)
        return _with(status, now, "Suspended", "JobResumed", "Job resumed", "False")
    return status


def _unsupported(spec: JobSpec) -> str:
    if spec.completion_mode != "NonIndexed":
        return f"spec.completionMode {spec.completion_mode}"
    for name in (
        "pod_failure_policy", "success_policy", "backoff_limit_per_index", "max_failed_indexes",
    ):  # fmt: skip
        if getattr(spec, name) is not None:
            first, *others = name.split("_")
            return "spec." + first + "".join(word.capitalize() for word in others)
    return ""


def _restarts_too_often(spec: JobSpec, pods: Iterable[Pod]) -> bool:
    if (spec.template.get("spec") or {}).get("restartPolicy") != "OnFailure":
        return False
    restarts = sum(pod.restarts for pod in pods if not pod.over)
    return restarts >= max(1, spec.backoff_limit)


def _is_complete(spec: JobSpec, status: JobStatus) -> bool:
    succeeded = status.succeeded + len(status.uncounted.succeeded)
    if spec.completions is None:  # one success is enough; the others may end as they like
        return succeeded > 0 and not status.active
    return succeeded >= spec.completions


def _deadline_s(job: Job, now: datetime) -> float | None:
    limit_s, began = job.spec.active_deadline_seconds, job.status.start_time
    if limit_s is None or began is None or job.spec.suspend:
        return None
    return (began + timedelta(seconds=limit_s) - now).total_seconds()


def _finish(status: JobStatus, pods: Iterable[Pod], now: datetime) -> JobStatus:
    """The status with the last condition, once no pod is left that could still count."""
    target = status.condition("FailureTarget", "SuccessCriteriaMet")
    if target is None or any(pod.tracked or not pod.over for pod in pods):
        return status
    now = now.replace(microsecond=0)
    status = replace(status, start_time=status.start_time or now)
    if target.type == "SuccessCriteriaMet":
        status = replace(status, completion_time=now)
        return _with(status, now, "Complete", target.reason, target.message)
    return _with(status, now, "Failed", target.reason, target.message)


def _with(
    status: JobStatus, now: datetime, type_: str, reason: str, message: str, value: str = "True"
) -> JobStatus:
    kept = tuple(condition for condition in status.conditions if condition.type != type_)
    new = Condition(type_, value, now, now, reason, message)
    return replace(status, conditions=(*kept, new))


def _manage(
    job: Job,
    pods: Collection[Pod],
    now: datetime,
    endings: Mapping[str, Ending],
    taken: Collection[str],
) -> Step:
    """Pods to delete or to make; each pod that has ended is in the numbers."""
    active = [pod for pod in pods if pod.active]
    if job.status.condition("FailureTarget", "SuccessCriteriaMet"):
        return DeletePods(tuple(active), fails=True) if active else Wait(None)
    if job.deleted:
        return Wait(None)
    wanted = _wanted(job, len(active))
    if len(active) > wanted:
        spare = sorted(active, key=_worth)[: len(active) - wanted]
        return DeletePods(tuple(spare), fails=False)
    missing = wanted - len(active)
    if job.replaces_only_failed:
        missing -= sum(pod.terminating for pod in pods)
    if missing <= 0:
        return Wait(None)
    rest_s = _rest_s(endings.values(), now)
    if rest_s > 0:
        return Wait(rest_s)
    missing = min(missing, CREATES_AT_ONCE_MAX)
    used = {*taken, *(pod.metadata.name for pod in pods)}
    return CreatePods(_free_names(job, len(active), used, missing))


def _wanted(job: Job, active: int) -> int:
    """How many pods are to run at the same time."""
    spec, status = job.spec, job.status
    if spec.suspend:
        return 0
    if spec.completions is None:
        return active if status.succeeded else spec.parallelism
    return max(0, min(spec.parallelism, spec.completions - status.succeeded))


def _worth(pod: Pod) -> tuple[bool, bool, bool, str]:
    """The smallest is deleted first: what has done least."""
    status = pod.status
    return bool(pod.spec.node_name), status.phase == "Running", pod.ready, pod.metadata.name


def _rest_s(endings: Iterable[Ending], now: datetime) -> float:
    """What is left of the rest after pods that failed, in seconds."""
    endings = list(endings)
    success = max((ending.at for ending in endings if not ending.failed), default=None)
    failures = [e.at for e in endings if e.failed and (success is None or e.at > success)]
    if not failures:
        return 0.0
    rest_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(len(failures) - 1, 32))
    return (max(failures) + timedelta(seconds=rest_s) - now).total_seconds()


def _free_names(job: Job, active: int, used: Collection[str], count: int) -> tuple[str, ...]:
    """``<job>-<5 characters>``; the same ones for as long as the Job and its pods are the same."""
    ordinal = job.status.succeeded + job.status.failed + active
    prefix = f"{job.metadata.name}-"[:NAME_PREFIX_MAX_CHARS]
    names: list[str] = []
    while len(names) < count:
        seed = f"{job.metadata.uid}/{job.metadata.generation}/{ordinal}".encode()
        digest = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest())
        suffix = ""
        for _ in range(_SUFFIX_CHARS):
            digest, index = divmod(digest, len(_ALPHABET))
            suffix += _ALPHABET[index]
        if (name := prefix + suffix) not in used:
            names.append(name)
        ordinal += 1
    return tuple(names)


def endings_of(
    job: Job, pods: Iterable[Pod], known: Mapping[str, Ending], now: datetime
) -> dict[str, Ending]:
    """The endings known before, and those of the Job's pods that have ended since.

    A pod that was deleted because it was one too many lost its finalizer before, and did not fail.
    """
    endings = dict(known)
    for pod in pods:
        succeeded = pod.status.phase == "Succeeded"
        counts = pod.tracked or pod.metadata.deletion_timestamp is None
        if counts and pod.metadata.uid not in known and (succeeded or _has_failed(job, pod)):
            ends = [c.state.terminated for c in pod.status.container_statuses]
            times = [end.finished_at for end in ends if end is not None and end.finished_at]
            endings[pod.metadata.uid] = Ending(not succeeded, max(times, default=now))
    return endings


# The steps taken.


class _Memory(msgspec.Struct):
    """What is remembered of one Job; after a restart, its pods tell enough of it."""

    endings: dict[str, Ending] = {}
    refusal: str = ""  # why its pods could not be made, as it was told


class JobController:
    """All Jobs of one API, as long as `run` runs. There may be one at a time.

    It decides on what it has read in that moment and not on what a watch told (a watch only says
    when): here are few Jobs and an API close by, and what was just written is always seen.
    """

    def __init__(
        self, kube: Kube, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._kube = kube
        self._clock = clock
        self._jobs: set[str] = set()
        self._memories: dict[str, _Memory] = {}
        self._writes = asyncio.Semaphore(PARALLEL_WRITES_MAX)
        self._queue = Queue(self.reconcile, PARALLEL_JOBS_MAX)

    async def run(self) -> None:
        """Until cancelled. Raises only what is a fault of the program."""
        follow = self._kube.follow
        try:
            async with asyncio.TaskGroup() as tasks:
                jobs, pods = self._jobs_replaced, self._pods_replaced
                tasks.create_task(follow(JOBS, type=Job, replaced=jobs, changed=self._job_changed))
                tasks.create_task(follow(PODS, type=Pod, replaced=pods, changed=self._pod_changed))
        finally:
            await self._queue.stop()

    # -- what the watches tell -------------------------------------------------------------------

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
        for key in self._jobs:  # some of their pods may have gone unseen
            self._queue.add(key)
        for pod in pods:
            self._pod_changed("ADDED", pod)

    def _pod_changed(self, _kind: str, pod: Pod) -> None:
        """Its Job has news; a pod that has a Job's finalizer and no Job is the namespace's."""
        namespace, owner = pod.metadata.namespace, pod.controller
        if owner is not None:
            self._queue.add(f"{namespace}/{owner.name}")
        elif pod.tracked:
            self._queue.add(f"{namespace}/")

    # -- one look at one Job ---------------------------------------------------------------------

    async def reconcile(self, key: str) -> float | None:
        """Take one step; seconds until the next look, None when only news brings it."""
        namespace, _, name = key.partition("/")
        job = await self._read(namespace, name)
        pods, _ = await self._kube.list(PODS, namespace, type=Pod)
        try:
            await self._release(_strays(pods, name, job))
            if job is None:
                self._memories.pop(key, None)
                return None
            memory = self._memories.setdefault(key, _Memory())
            return await self._step(job, pods, memory)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            log.info("something else was faster", job=key, error=str(error))
            return CONFLICT_AGAIN_S

    async def _read(self, namespace: str, name: str) -> Job | None:
        try:
            return await self._kube.get(JOBS, name, namespace, type=Job) if name else None
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def _step(self, job: Job, pods: list[Pod], memory: _Memory) -> float | None:
        uid, now = job.metadata.uid, self._clock()
        ours = [pod for pod in pods if pod.controller is not None and pod.controller.uid == uid]
        memory.endings = endings_of(job, ours, memory.endings, now)
        taken = {pod.metadata.name for pod in pods}
        step = next_step(job, ours, now, memory.endings, taken)
        if isinstance(step, Wait):
            return None if step.seconds is None else min(step.seconds, WAIT_MAX_S)
        if isinstance(step, WriteStatus):
            await self._write_status(job, step.status)
        elif isinstance(step, ReleasePods):
            await self._release(step.pods)
        elif isinstance(step, DeletePods):
            await self._together(self._delete(job, pod, step.fails) for pod in step.pods)
        elif isinstance(step, CreatePods):
            await self._together(self._create(job, name, memory) for name in step.names)
        else:
            meta = job.metadata
            await self._kube.delete(
                JOBS, meta.name, meta.namespace, uid=meta.uid,
                resource_version=meta.resource_version, propagation="Foreground",
            )  # fmt: skip
        return 0.0

    # -- writes ----------------------------------------------------------------------------------

    async def _together(self, writes: Iterable[Coroutine[Any, Any, None]]) -> None:
        """All of them, even if one fails; then the first failure."""

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
                await self._tell(job, kind, reason, message)

    async def _release(self, pods: Sequence[Pod]) -> None:
        await self._together(self._release_one(pod) for pod in pods)

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
        await self._tell(job, "Normal", "SuccessfulDelete", f"Deleted pod: {meta.name}")

    async def _create(self, job: Job, name: str, memory: _Memory) -> None:
        namespace = job.metadata.namespace
        try:
            await self._kube.create(PODS, pod_of(job, name), namespace)
        except ApiError as error:
            refused = error.status and error.status != 409
            if refused and str(error) != memory.refusal:
                memory.refusal = str(error)
                await self._tell(job, "Warning", "FailedCreate", f"Error creating: {error}")
            raise
        memory.refusal = ""
        await self._tell(job, "Normal", "SuccessfulCreate", f"Created pod: {name}")

    async def _tell(
        self, job: Job, kind: Literal["Normal", "Warning"], reason: str, message: str
    ) -> None:
        """An Event about the Job. Nothing depends on it, so one that is lost is lost."""
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


# What `kubectl describe job` shows of a condition; no reason or message: the condition's.
_EVENTS: dict[tuple[str, str], tuple[Literal["Normal", "Warning"], str, str]] = {
    ("Complete", "True"): ("Normal", "Completed", "Job completed"),
    ("Failed", "True"): ("Warning", "", ""),
    ("Suspended", "True"): ("Normal", "Suspended", ""),
    ("Suspended", "False"): ("Normal", "Resumed", ""),
}


def pod_of(job: Job, name: str) -> dict[str, Any]:
    """The manifest of a Job's pod."""
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


def _strays(pods: Iterable[Pod], name: str, job: Job | None) -> list[Pod]:
    """Pods that nobody counts any more: their Job is gone, or they were taken from it."""
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
    """As a merge patch: what is none is taken away."""
    for name in ("active", "succeeded", "failed"):
        status[name] = status[name] or None
    status["conditions"] = status["conditions"] or None
    uncounted = status["uncountedTerminatedPods"]
    status["uncountedTerminatedPods"] = {kind: uids or None for kind, uids in uncounted.items()}
    return status


def _sooner(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)
