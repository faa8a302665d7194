"""Computes a pod's status from its containers' records. Pure.

Owns the rules for phase and conditions, which are those of the Kubernetes kubelet. The runner keeps
the records; the agent writes the status when it changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from kubeai.local.kubelet.pods.pod import (
    Condition,
    Pod,
    Running,
    Terminated,
    Waiting,
)

Object = dict[str, Any]
TERMINATION_MESSAGES_MAX_BYTES = 12 << 10  # per pod, shared equally by its containers
OUR_CONDITIONS = ("PodScheduled", "Initialized", "ContainersReady", "Ready")


class ContainerRecord(msgspec.Struct):
    """The state of one container."""

    name: str
    image: str
    state: Waiting | Running | Terminated
    last: Terminated | None = None
    restarts: int = 0
    ready: bool = False
    started: bool = False
    container_id: str = ""
    program: str = ""


class PhaseOverride(msgspec.Struct, frozen=True):
    """A phase that does not follow from the containers' states."""

    phase: str
    reason: str = ""
    message: str = ""


def timestamp(seconds: float) -> str:
    """Format seconds since the epoch like the API."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def pod_status(
    pod: Pod,
    init: Sequence[ContainerRecord],
    main: Sequence[ContainerRecord],
    *,
    sidecars: frozenset[str],
    initialized: bool,
    ip: str,
    host_ip: str,
    start_time: str,
    now: str,
    before: Mapping[str, Condition],
    override: PhaseOverride | None = None,
) -> Object:
    """The whole ``status``. ``before``: our previous conditions, for their transition times."""
    phase = override.phase if override else _phase(pod, init, main, sidecars, initialized)
    conditions = [
        _since(condition, before, now)
        for condition in _conditions(pod, init, main, sidecars, initialized, phase)
    ]
    # Conditions of others (a readiness gate's) are kept: a merge patch replaces the whole list.
    conditions += [c for c in pod.status.conditions if c.type not in OUR_CONDITIONS]
    share_bytes = TERMINATION_MESSAGES_MAX_BYTES // max(1, len(init) + len(main))
    return {
        "phase": phase,
        "reason": override.reason or None if override else None,
        "message": override.message or None if override else _why_pending(init, main, phase),
        "conditions": [_condition(c) for c in conditions],
        "hostIP": host_ip,
        "hostIPs": [{"ip": host_ip}],
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "startTime": start_time,
        "qosClass": _qos(pod),
        "initContainerStatuses": [_container_status(r, share_bytes) for r in init] or None,
        "containerStatuses": [_container_status(r, share_bytes) for r in main],
    }


def _phase(
    pod: Pod,
    init: Sequence[ContainerRecord],
    main: Sequence[ContainerRecord],
    sidecars: frozenset[str],
    initialized: bool,
) -> str:
    if not initialized:
        failed = any(
            isinstance(r.state, Terminated) and r.state.exit_code
            for r in init
            if r.name not in sidecars
        )
        return "Failed" if failed and pod.spec.restart_policy == "Never" else "Pending"
    states = [r.last or r.state if isinstance(r.state, Waiting) else r.state for r in main]
    if any(isinstance(state, Waiting) for state in states):
        return "Pending"
    if any(isinstance(state, Running) for state in states):
        return "Running"
    if pod.spec.restart_policy == "Always":
        return "Running"
    if any(isinstance(r.state, Waiting) for r in main):
        return "Running"  # ended, and about to be restarted
    if all(isinstance(state, Terminated) and state.exit_code == 0 for state in states):
        return "Succeeded"
    return "Failed" if pod.spec.restart_policy == "Never" else "Running"


def _why_pending(
    init: Sequence[ContainerRecord], main: Sequence[ContainerRecord], phase: str
) -> str | None:
    """What the first container waits for: `kubectl describe` only shows the pod's message."""
    waiting = [r.state.message for r in (*init, *main) if isinstance(r.state, Waiting)]
    return next(filter(None, waiting), None) if phase == "Pending" else None


def _conditions(
    pod: Pod,
    init: Sequence[ContainerRecord],
    main: Sequence[ContainerRecord],
    sidecars: frozenset[str],
    initialized: bool,
    phase: str,
) -> Iterable[Condition]:
    yield Condition("PodScheduled", "True")
    if initialized:
        yield Condition("Initialized", "True")
    else:
        waiting = [r.name for r in init if not _finished(r, sidecars)]
        yield Condition(
            "Initialized",
            "False",
            "ContainersNotInitialized",
            f"containers with incomplete status: [{' '.join(waiting)}]",
        )
    containers = _containers_ready(init, main, sidecars, phase)
    yield containers
    unmet = [
        gate.condition_type
        for gate in pod.spec.readiness_gates
        if not any(
            c.type == gate.condition_type and c.status == "True" for c in pod.status.conditions
        )
    ]
    if containers.status == "True" and unmet:
        message = f"conditions of readiness gates are not met: [{' '.join(unmet)}]"
        yield Condition("Ready", "False", "ReadinessGatesNotReady", message)
    else:
        yield Condition("Ready", containers.status, containers.reason, containers.message)


def _containers_ready(
    init: Sequence[ContainerRecord],
    main: Sequence[ContainerRecord],
    sidecars: frozenset[str],
    phase: str,
) -> Condition:
    if phase in ("Succeeded", "Failed"):
        reason = "PodCompleted" if phase == "Succeeded" else "PodFailed"
        return Condition("ContainersReady", "False", reason)
    counted = [*(r for r in init if r.name in sidecars), *main]
    unready = [r.name for r in counted if not r.ready]
    if not unready:
        return Condition("ContainersReady", "True")
    message = f"containers with unready status: [{' '.join(unready)}]"
    return Condition("ContainersReady", "False", "ContainersNotReady", message)


def _finished(record: ContainerRecord, sidecars: frozenset[str]) -> bool:
    if record.name in sidecars:
        return record.started
    return isinstance(record.state, Terminated) and record.state.exit_code == 0


def _since(condition: Condition, before: Mapping[str, Condition], now: str) -> Condition:
    old = before.get(condition.type)
    since = old.last_transition_time if old and old.status == condition.status else None
    return msgspec.structs.replace(condition, last_transition_time=since or now)


def _condition(condition: Condition) -> Object:
    # kubectl and clients expect these keys to be absent, not empty.
    fields = msgspec.to_builtins(condition)
    return {key: value for key, value in fields.items() if value}


def _container_status(record: ContainerRecord, message_max_bytes: int) -> Object:
    return {
        "name": record.name,
        "image": record.image,
        "imageID": record.program,
        "containerID": record.container_id,
        "ready": record.ready,
        "started": record.started,
        "restartCount": record.restarts,
        "state": _state(record.state, message_max_bytes),
        "lastState": _state(record.last, message_max_bytes) if record.last else {},
    }


def _state(state: Waiting | Running | Terminated, message_max_bytes: int) -> Object:
    fields = msgspec.to_builtins(state)
    if isinstance(state, Terminated):
        message = state.message.encode()[:message_max_bytes]
        fields["message"] = message.decode(errors="ignore")
    kept = {key: value for key, value in fields.items() if value or key == "exitCode"}
    return {type(state).__name__.lower(): kept}


def _qos(pod: Pod) -> str:
    resources = [c.resources for c in (*pod.spec.containers, *pod.spec.init_containers)]
    if not any(_of_node(r.limits) or _of_node(r.requests) for r in resources):
        return "BestEffort"
    guaranteed = all(
        len(_of_node(r.limits)) == 2 and _of_node(r.requests or r.limits) == _of_node(r.limits)
        for r in resources
    )
    return "Guaranteed" if guaranteed else "Burstable"


def _of_node(amounts: Mapping[str, str | int | float]) -> dict[str, str]:
    return {name: str(amounts[name]) for name in ("cpu", "memory") if name in amounts}
