"""The Kubernetes objects of the Job controller: the fields of Jobs and Pods that it uses."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec

KIND = "Job"
TRACKING = "batch.kubernetes.io/job-tracking"
MANAGED_BY = "kubernetes.io/job-controller"


class _Fields(msgspec.Struct, rename="camel", frozen=True):
    """Fields with Kubernetes' names. Others are ignored."""


class Owner(_Fields, frozen=True):
    """An owner reference."""

    kind: str = ""
    name: str = ""
    uid: str = ""
    controller: bool = False


class Metadata(_Fields, frozen=True):
    """An object's metadata."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resource_version: str = ""
    generation: int = 0
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[Owner, ...] = ()
    deletion_timestamp: datetime | None = None
    deletion_grace_period_seconds: int | None = None


class Condition(_Fields, frozen=True, omit_defaults=True):
    """A condition of a Job."""

    type: str = ""
    status: str = ""
    last_probe_time: datetime | None = None
    last_transition_time: datetime | None = None
    reason: str = ""
    message: str = ""


class _Terminated(_Fields, frozen=True):
    finished_at: datetime | None = None


class _State(_Fields, frozen=True):
    terminated: _Terminated | None = None


class _Container(_Fields, frozen=True):
    restart_count: int = 0
    state: _State = _State()


class _PodSpec(_Fields, frozen=True):
    node_name: str = ""


class _PodCondition(_Fields, frozen=True):
    type: str = ""
    status: str = ""


class _PodStatus(_Fields, frozen=True):
    phase: str = ""
    conditions: tuple[_PodCondition, ...] = ()
    container_statuses: tuple[_Container, ...] = ()
    init_container_statuses: tuple[_Container, ...] = ()


class Pod(_Fields, frozen=True):
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
        """Whether it has the finalizer that keeps it until it is counted."""
        return TRACKING in self.metadata.finalizers

    @property
    def terminating(self) -> bool:
        """Whether it is being deleted and has not finished."""
        return self.metadata.deletion_timestamp is not None and not self.finished

    @property
    def finished(self) -> bool:
        """Whether its phase is final."""
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def active(self) -> bool:
        """Whether it runs, or will: neither finished nor being deleted."""
        return not self.finished and self.metadata.deletion_timestamp is None

    @property
    def ready(self) -> bool:
        """Whether its condition Ready is True."""
        return any((c.type, c.status) == ("Ready", "True") for c in self.status.conditions)

    @property
    def restarts(self) -> int:
        """The number of restarts of all its containers."""
        status = self.status
        containers = (*status.init_container_statuses, *status.container_statuses)
        return sum(container.restart_count for container in containers)


class Uncounted(_Fields, frozen=True):
    """Uids of terminated pods that are not yet in ``succeeded`` or ``failed``."""

    succeeded: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


class JobStatus(_Fields, frozen=True):
    """A Job's status."""

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


class JobSpec(_Fields, frozen=True):
    """A Job's spec."""

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


class Job(_Fields, frozen=True):
    """The fields of a Job that the rules use."""

    metadata: Metadata = Metadata()
    spec: JobSpec = JobSpec()
    status: JobStatus = JobStatus()

    @property
    def deleting(self) -> bool:
        """Whether the Job is being deleted."""
        return self.metadata.deletion_timestamp is not None

    @property
    def replaces_only_failed(self) -> bool:
        """Whether a terminating pod is replaced only once it has terminated."""
        return self.spec.pod_replacement_policy == "Failed"
