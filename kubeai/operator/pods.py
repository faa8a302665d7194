"""The operator's compact representation of a pod, decoded from the watch.

:class:`PodObject` is the part that is decoded; :class:`Pod` is what the store keeps (about 500
bytes, so 10,000 pods fit easily), with its :class:`Trouble`. Pure. The store creates Pods; plan,
routes and status read them.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from kubeai.api.model import (
    DRAINING_ANNOTATION,
    MODEL_LABEL,
    MODEL_UID_LABEL,
    POD_HASH_LABEL,
    POD_IP_ANNOTATION,
    POD_MODEL_LABEL,
    POD_PORT_ANNOTATION,
)
from kubeai.api.objects import ObjectMeta
from kubeai.operator.pod_object import PodObject, seconds
from kubeai.operator.pod_trouble import Trouble, trouble_of
from kubeai.podspec import SERVER_CONTAINER
from kubeai.podspec.adapters import (
    LABEL_PREFIX,
    LOADER_CONTAINER,
    LOADING,
    RESTARTS_ANNOTATION,
)
from kubeai.podspec.cache import JOB_LABEL
from kubeai.podspec.files import config_map_name
from kubeai.podspec.groups import SET_LABEL, WORKER_LABEL

# Set in addition to the pod-hash label: it marks hashes computed by *our* function. A pod without
# it was created by KubeAI in Go, whose hashes are not comparable.
HASH_ANNOTATION = "kubeai.org/pod-hash"
PORT_NAME, PORT_DEFAULT = "http", 8000

# What a pod does until it is ready, in order.
Step = Literal["Pending", "Preparing", "PullingImage", "Initializing", "Loading"]
STEPS: tuple[Step, ...] = get_args(Step)


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """One replica as last observed, or as created and not yet observed (then without a uid)."""

    name: str
    uid: str = ""
    model: str = ""
    owner: str = ""  # uid of the Model that it belongs to
    hash: str | None = None  # None: created by KubeAI in Go
    ready: bool = False
    started: bool = False  # the engine has passed its startup probe since it last started
    scheduled: bool = False
    terminating: bool = False
    draining_since_s: float = 0.0  # Unix time; 0: not draining
    finished: bool = False  # Failed or Succeeded: it will never be ready again
    phase: str = ""
    address: str = ""  # "ip:port", or empty while it has none
    adapters: tuple[tuple[str, str], ...] = ()  # from its labels: (adapter name, hash of its URL)
    adapters_current: bool = True  # False: the engine has restarted and lost its adapters
    restarts: int = 0  # of the engine's container
    has_loader: bool = False  # whether the adapter loader is running
    claims: frozenset[str] = frozenset()  # that it mounts
    job: str = ""  # the Job's purpose, if this is a Job's pod and not a replica
    version: int = 0  # resourceVersion
    created_s: float = 0.0  # Unix time
    ready_since_s: float = 0.0  # Unix time; 0: it is not ready, or since when is unknown
    step: Step = "Pending"  # what it does until it is ready
    mounts_files: bool = False  # whether it mounts the ConfigMap with the Model's files
    selected: bool = True  # whether it has the labels that the Model's Service selects
    # Of a pod of a LeaderWorkerSet: the set's name, and which of its pods this is. 0 is the leader.
    set: str = ""
    worker: int = 0
    # Of a whole LeaderWorkerSet (see `kubeai.operator.groups`): its pods by name and uid.
    grouped: bool = False
    members: tuple[tuple[str, str], ...] = ()
    # Why it is not ready. A ready pod has one only if it is crash looping.
    trouble: Trouble | None = None
    trouble_until_s: float = math.inf  # Unix time; finite while the container runs again
    trouble_from_s: float = 0.0  # Unix time; later than now if it may still go well

    def trouble_at(self, now_s: float) -> Trouble | None:
        """The pod's trouble at a Unix time: None once the container has run for long enough."""
        return self.trouble if self.trouble_from_s <= now_s < self.trouble_until_s else None

    @property
    def pods(self) -> tuple[tuple[str, str], ...]:
        """Name and uid of its pods, the one that serves requests first."""
        return self.members if self.grouped else ((self.name, self.uid),)

    @property
    def incarnation(self) -> str:
        """Another value once any of its pods has been replaced."""
        return ",".join(uid for _, uid in self.pods)

    @property
    def counts(self) -> bool:
        """Whether it counts as a replica: not terminating, finished or draining."""
        return not self.terminating and not self.finished and not self.draining_since_s

    @property
    def serves(self) -> bool:
        """Whether requests may be sent to it."""
        return self.ready and self.counts and bool(self.address)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The adapters that its engine serves."""
        if not self.adapters_current:
            return ()
        return tuple(name for name, value in self.adapters if value != LOADING)


def observe(obj: PodObject, *, address_override: bool = False) -> Pod:
    """Convert a decoded pod. ``address_override``: its annotations may override its address."""
    meta, status = obj.metadata, obj.status
    set_ = meta.labels.get(SET_LABEL, "")
    owner = owner_of(meta) or (meta.labels.get(MODEL_UID_LABEL, "") if set_ else "")
    adapters = (
        (label.removeprefix(LABEL_PREFIX), value)
        for label, value in meta.labels.items()
        if label.startswith(LABEL_PREFIX)
    )
    ready, ready_since_s = _readiness(obj)
    containers = {container.name: container for container in status.container_statuses}
    server, loader = containers.get(SERVER_CONTAINER), containers.get(LOADER_CONTAINER)
    restarts = server.restart_count if server is not None else 0
    name = meta.labels.get(POD_MODEL_LABEL, "")
    trouble, trouble_until_s = trouble_of(obj, ready)
    return Pod(
        name=meta.name,
        uid=meta.uid,
        model=name,
        owner=owner,
        hash=meta.annotations.get(HASH_ANNOTATION),
        ready=ready,
        started=server is not None and server.state.running is not None and bool(server.started),
        scheduled=bool(obj.spec.node_name),
        terminating=meta.deletion_timestamp is not None,
        draining_since_s=seconds_of(meta.annotations.get(DRAINING_ANNOTATION)),
        finished=status.phase in ("Failed", "Succeeded"),
        phase=status.phase,
        address=_address(obj, address_override),
        adapters=tuple(sorted(adapters)),
        adapters_current=meta.annotations.get(RESTARTS_ANNOTATION, "0") == str(restarts),
        restarts=restarts,
        has_loader=loader is not None and loader.state.running is not None,
        claims=frozenset(
            volume.persistent_volume_claim.claim_name
            for volume in obj.spec.volumes
            if volume.persistent_volume_claim is not None
        ),
        job=meta.labels.get(JOB_LABEL, ""),
        version=meta.version,
        created_s=seconds(meta.creation_timestamp),
        ready_since_s=ready_since_s,
        step=_step(obj),
        mounts_files=any(
            volume.config_map is not None and volume.config_map.name == config_map_name(name)
            for volume in obj.spec.volumes
        ),
        set=set_,
        worker=int(index) if (index := meta.labels.get(WORKER_LABEL, "")).isdecimal() else 0,
        selected=MODEL_LABEL in meta.labels and MODEL_UID_LABEL in meta.labels,
        trouble=trouble,
        trouble_until_s=trouble_until_s,
    )


def owner_of(meta: ObjectMeta) -> str:
    """The uid of the Model that owns an object; empty if none does."""
    owners = meta.owner_references
    return next((one.uid for one in owners if one.kind == "Model" and one.controller), "")


def seconds_of(text: str | None) -> float:
    """An annotation as a Unix time; an invalid value counts as a time long ago."""
    if text is None:
        return 0.0
    return float(text) if text.isdecimal() and int(text) else 1.0


def _is_true(obj: PodObject, condition: str) -> bool:
    return any(c.type == condition and c.status == "True" for c in obj.status.conditions)


def _readiness(obj: PodObject) -> tuple[bool, float]:
    """Whether the pod is ready, and since when (Unix time; 0 if that is unknown)."""
    for condition in obj.status.conditions:
        if condition.type == "Ready" and condition.status == "True":
            return True, seconds(condition.last_transition_time)
    return False, 0.0


def _step(obj: PodObject) -> Step:
    """How far the pod is. A kubelet before 1.29 does not report that it pulls images."""
    status = obj.status
    if not obj.spec.node_name:
        return "Pending"
    if any(container.state.running is not None for container in status.container_statuses):
        return "Loading"
    if any(container.state.running is not None for container in status.init_container_statuses):
        return "Initializing"
    return "PullingImage" if _is_true(obj, "PodReadyToStartContainers") else "Preparing"


def _address(obj: PodObject, override: bool) -> str:
    ip, port = obj.status.pod_ip, ""
    if override:
        ip = obj.metadata.annotations.get(POD_IP_ANNOTATION) or ip
        port = obj.metadata.annotations.get(POD_PORT_ANNOTATION) or ""
    if not ip:
        return ""
    if not port.isdecimal():
        ports = (p for c in obj.spec.containers for p in c.ports if p.name == PORT_NAME)
        found = next(ports, None)
        port = str(found.container_port if found is not None else PORT_DEFAULT)
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


__all__ = [
    "DRAINING_ANNOTATION",
    "HASH_ANNOTATION",
    "POD_HASH_LABEL",
    "Pod",
    "PodObject",
    "Trouble",
    "observe",
]
