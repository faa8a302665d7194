"""The rules of batch/v1 Jobs, as implemented by kube-controller-manager. Pure.

:func:`next_step` is the entry point: given a Job, its pods and the time, it returns the one write
to make next. `kubeai.local.jobs.controller` carries out the steps.

Each pod is counted exactly once, no matter which process is killed when. A pod is created with the
finalizer ``batch.kubernetes.io/job-tracking``. Once it has terminated, its uid is written to
``status.uncountedTerminatedPods``; then the finalizer is removed; then the uid is removed and
``succeeded`` or ``failed`` is incremented. Progress can be derived from what the API holds at every
point, so a step that was missed is repeated. A decision (a condition) is written before it is acted
on. A new pod's name is derived from the Job and the number of pods it has had, so retrying a create
whose response was lost does not create a second pod.

Indexed Jobs, podFailurePolicy, successPolicy and per-index limits are not supported; such a Job
gets the condition Failed. Pods without an owner are not adopted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from msgspec.structs import replace

KIND = "Job"
TRACKING = "batch.kubernetes.io/job-tracking"
MANAGED_BY = "kubernetes.io/job-controller"
BACKOFF_FIRST_S, BACKOFF_MAX_S = 10.0, 360.0  # between failing pods
UNCOUNTED_PODS_MAX, CREATES_AT_ONCE_MAX = 500, 50
NAME_PREFIX_MAX_CHARS = 58
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # no vowels, so that no words appear
_SUFFIX_CHARS = 5


# The fields that are read from the objects.


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
    """The fields of a pod that the rules use."""

    metadata: Metadata = Metadata()
    spec: _PodSpec = _PodSpec()
    status: _PodStatus = _PodStatus()

    @property
    def controller(self) -> Owner | None:
        """The owner reference to the Job that controls the pod."""
        for owner in self.metadata.owner_references:
            if owner.controller:
                return owner if owner.kind == KIND else None
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
    """Uids of terminated pods that are not yet in ``succeeded`` or ``failed``."""

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
        """Return the first condition of these types that is True."""
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
        """Whether a terminating pod is replaced only once it has terminated."""
        return self.spec.pod_replacement_policy == "Failed"


# The rules. Pure.


class WriteStatus(NamedTuple):
    status: JobStatus


class ReleasePods(NamedTuple):
    """Remove the tracking finalizer."""

    pods: tuple[Pod, ...]


class DeletePods(NamedTuple):
    pods: tuple[Pod, ...]
    fails: bool  # whether they count as failed


class CreatePods(NamedTuple):
    names: tuple[str, ...]


class DeleteJob(NamedTuple):
    pass


class Wait(NamedTuple):
    seconds: float | None  # None: wait for a change


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
    """Return the next write for the Job, or how long to wait.

    ``pods`` are the Job's pods; ``endings`` maps their uids to how they ended, see
    :func:`endings_of`; ``taken`` holds names that no new pod may use.
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
    """Whether more than pod counts changed: such a change is written before it is acted on."""
    there = {name: getattr(new, name) for name in ("active", "ready", "terminating")}
    return replace(old, **there) != new


def _count(job: Job, pods: Collection[Pod]) -> JobStatus:
    """Return the status with updated counts of terminated and current pods."""
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
    """A terminating pod counts as failed: its final phase may never be reported."""
    if not pod.terminating:
        return pod.status.phase == "Failed"
    return not job.replaces_only_failed or pod.metadata.deletion_grace_period_seconds == 0


def _judge(job: Job, pods: Iterable[Pod], status: JobStatus, now: datetime) -> JobStatus:
    """Return the status with the decision to end, suspend or resume the Job."""
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
    if spec.completions is None:  # one success is enough; the other pods may end either way
        return succeeded > 0 and not status.active
    return succeeded >= spec.completions


def _deadline_s(job: Job, now: datetime) -> float | None:
    limit_s, began = job.spec.active_deadline_seconds, job.status.start_time
    if limit_s is None or began is None or job.spec.suspend:
        return None
    return (began + timedelta(seconds=limit_s) - now).total_seconds()


def _finish(status: JobStatus, pods: Iterable[Pod], now: datetime) -> JobStatus:
    """Return the status with its final condition, once no pod is left to be counted."""
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
    """Return the pods to delete or create. All terminated pods have been counted."""
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
    """Return the desired number of active pods."""
    spec, status = job.spec, job.status
    if spec.suspend:
        return 0
    if spec.completions is None:
        return active if status.succeeded else spec.parallelism
    return max(0, min(spec.parallelism, spec.completions - status.succeeded))


def _worth(pod: Pod) -> tuple[bool, bool, bool, str]:
    """Sort key for deletion: the pods that have made the least progress come first."""
    status = pod.status
    return bool(pod.spec.node_name), status.phase == "Running", pod.ready, pod.metadata.name


def _rest_s(endings: Iterable[Ending], now: datetime) -> float:
    """Return the remaining back-off after failed pods, in seconds."""
    endings = list(endings)
    success = max((ending.at for ending in endings if not ending.failed), default=None)
    failures = [e.at for e in endings if e.failed and (success is None or e.at > success)]
    if not failures:
        return 0.0
    rest_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(len(failures) - 1, 32))
    return (max(failures) + timedelta(seconds=rest_s) - now).total_seconds()


def _free_names(job: Job, active: int, used: Collection[str], count: int) -> tuple[str, ...]:
    """Return names ``<job>-<5 characters>``, a pure function of the Job and its pod counts."""
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
    """Return ``known`` plus the endings of the Job's pods that have ended since.

    A surplus pod loses its finalizer before it is deleted, and does not count as failed.
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


def _sooner(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)
