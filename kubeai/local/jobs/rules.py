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
from typing import NamedTuple

from msgspec.structs import replace

from kubeai.local.jobs.objects import (
    MANAGED_BY,
    Condition,
    Job,
    JobSpec,
    JobStatus,
    Pod,
    Uncounted,
)

BACKOFF_FIRST_S, BACKOFF_MAX_S = 10.0, 360.0  # between failing pods
UNCOUNTED_PODS_MAX, CREATES_AT_ONCE_MAX = 500, 50
NAME_PREFIX_MAX_CHARS = 58
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # no vowels, so that no words appear
_SUFFIX_CHARS = 5


class WriteStatus(NamedTuple):
    """Replace the Job's status."""

    status: JobStatus


class ReleasePods(NamedTuple):
    """Remove the tracking finalizer."""

    pods: tuple[Pod, ...]


class DeletePods(NamedTuple):
    """Delete pods that the Job does not need."""

    pods: tuple[Pod, ...]
    fails: bool  # whether they count as failed


class CreatePods(NamedTuple):
    """Create pods with these names."""

    names: tuple[str, ...]


class DeleteJob(NamedTuple):
    """Delete the Job: its ttlSecondsAfterFinished has passed."""


class Wait(NamedTuple):
    """Do nothing for a time."""

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
    finished = job.status.condition("Complete", "Failed")
    if finished is not None:
        return _after_end(job, pods, finished, now)
    status = _finish(_decide(job, pods, _count(job, pods), now), pods, now)
    if _is_urgent(job.status, status):
        return WriteStatus(status)
    uncounted = {*status.uncounted.succeeded, *status.uncounted.failed}
    tracked = tuple(
        pod for pod in pods if pod.tracked and (job.deleting or pod.metadata.uid in uncounted)
    )
    if tracked:
        return ReleasePods(tracked)
    step = _manage(job, pods, now, endings, taken)
    if not isinstance(step, Wait):
        return step
    if status != job.status:
        return WriteStatus(status)
    return Wait(_earlier(step.seconds, _deadline_s(job, now)))


def _after_end(job: Job, pods: Iterable[Pod], finished: Condition, now: datetime) -> Step:
    tracked = tuple(pod for pod in pods if pod.tracked)
    if tracked:
        return ReleasePods(tracked)
    ttl_s = job.spec.ttl_seconds_after_finished
    if ttl_s is None or job.deleting:
        return Wait(None)
    since = finished.last_transition_time or now
    left_s = (since + timedelta(seconds=ttl_s) - now).total_seconds()
    return Wait(left_s) if left_s > 0 else DeleteJob()


def _is_urgent(old: JobStatus, new: JobStatus) -> bool:
    """Whether more than pod counts changed: such a change is written before it is acted on."""
    counts = {name: getattr(new, name) for name in ("active", "ready", "terminating")}
    return replace(old, **counts) != new


def _count(job: Job, pods: Collection[Pod]) -> JobStatus:
    """Return the status with updated counts of terminated and current pods."""
    old = job.status
    held = {pod.metadata.uid for pod in pods if pod.tracked}
    before = old.uncounted
    known = {*before.succeeded, *before.failed}
    new = [pod for pod in pods if pod.tracked and pod.metadata.uid not in known]
    room = max(0, UNCOUNTED_PODS_MAX - len(known))
    succeeded = [p.metadata.uid for p in new if p.status.phase == "Succeeded"][:room]
    room -= len(succeeded)
    failed = [p.metadata.uid for p in new if _has_failed(job, p)][:room]
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


def _decide(job: Job, pods: Iterable[Pod], status: JobStatus, now: datetime) -> JobStatus:
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
    restarts = sum(pod.restarts for pod in pods if not pod.finished)
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
    if target is None or any(pod.tracked or not pod.finished for pod in pods):
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
    if job.deleting:
        return Wait(None)
    wanted = _wanted(job, len(active))
    if len(active) > wanted:
        spare = sorted(active, key=_deletion_order)[: len(active) - wanted]
        return DeletePods(tuple(spare), fails=False)
    missing = wanted - len(active)
    if job.replaces_only_failed:
        missing -= sum(pod.terminating for pod in pods)
    if missing <= 0:
        return Wait(None)
    backoff_s = _backoff_s(endings.values(), now)
    if backoff_s > 0:
        return Wait(backoff_s)
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


def _deletion_order(pod: Pod) -> tuple[bool, bool, bool, str]:
    """Sort key for deletion: the pods that have made the least progress come first."""
    status = pod.status
    return bool(pod.spec.node_name), status.phase == "Running", pod.ready, pod.metadata.name


def _backoff_s(endings: Iterable[Ending], now: datetime) -> float:
    """Return the remaining back-off after failed pods, in seconds; 0 or less if it is over.

    Only failures since the last success count.
    """
    endings = list(endings)
    success = max((ending.at for ending in endings if not ending.failed), default=None)
    failures = [e.at for e in endings if e.failed and (success is None or e.at > success)]
    if not failures:
        return 0.0
    backoff_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(len(failures) - 1, 32))
    return (max(failures) + timedelta(seconds=backoff_s) - now).total_seconds()


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


def _earlier(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)
