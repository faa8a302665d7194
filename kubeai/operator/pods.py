"""What the operator keeps of a pod: a few facts, read from the watch's bytes and no more.

:class:`PodObject` is what is decoded; :class:`Pod` is what the store keeps (some 500 bytes, so
that 10,000 fit well). Pure. The store makes Pods; plan, routes and status read them.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from kubeai.api.model import (
    POD_HASH_LABEL,
    POD_IP_ANNOTATION,
    POD_MODEL_LABEL,
    POD_PORT_ANNOTATION,
    ObjectMeta,
)
from kubeai.engines import SERVER_CONTAINER
from kubeai.engines.adapters import (
    LABEL_PREFIX,
    LOADER_CONTAINER,
    LOADING,
    RESTARTS_ANNOTATION,
)
from kubeai.engines.cache import JOB_LABEL

# Beside the label of the same meaning: it says that *our* hash function made it. A pod without it
# is upstream's, whose hashes mean nothing here.
HASH_ANNOTATION = "kubeai.org/pod-hash"
# When the leader began to drain it (Unix seconds): nobody sends it new requests.
DRAINING_ANNOTATION = "kubeai.org/draining-since"
PORT_NAME, PORT_DEFAULT = "http", 8000
MESSAGE_MAX_CHARS = 500

# What a container waits for is worth telling, but for these without a message.
_STARTING = ("", "ContainerCreating", "PodInitializing")


class _Part(msgspec.Struct, rename="camel"):
    pass


class _Port(_Part):
    name: str = ""
    container_port: int = 0


class _Container(_Part):
    name: str = ""
    ports: list[_Port] = []


class _Spec(_Part):
    node_name: str = ""
    containers: list[_Container] = []


class _Condition(_Part):
    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""


class _Reason(_Part):
    reason: str = ""
    message: str = ""
    exit_code: int = 0


class _Running(_Part):
    pass


class _State(_Part):
    waiting: _Reason | None = None
    running: _Running | None = None
    terminated: _Reason | None = None


class _ContainerStatus(_Part):
    name: str = ""
    restart_count: int = 0
    state: _State = msgspec.field(default_factory=_State)
    last_state: _State = msgspec.field(default_factory=_State)


class _Status(_Part):
    phase: str = ""
    reason: str = ""
    message: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    conditions: list[_Condition] = []
    container_statuses: list[_ContainerStatus] = []


class PodObject(msgspec.Struct, rename="camel"):
    """The part of a Kubernetes Pod that is decoded."""

    metadata: ObjectMeta
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: _Status = msgspec.field(default_factory=_Status)


class Trouble(msgspec.Struct, frozen=True):
    """Why a pod is not ready, when it says so. ``reason`` is one word."""

    reason: str
    message: str


class Pod(msgspec.Struct, frozen=True, kw_only=True):
    """One replica, as last observed (or as created and not yet observed: then without uid)."""

    name: str
    uid: str = ""
    model: str = ""
    owner: str = ""  # uid of the Model that it belongs to
    hash: str | None = None  # None: made by upstream
    ready: bool = False
    scheduled: bool = False
    terminating: bool = False
    draining_since_s: float = 0.0  # Unix time; 0: it is not drained
    finished: bool = False  # Failed or Succeeded: it will never be ready again
    address: str = ""  # "ip:port", or empty while it has none
    adapters: tuple[tuple[str, str], ...] = ()  # its labels: an adapter's name, hash of its URL
    adapters_current: bool = True  # False: the engine has started anew and has none of them
    restarts: int = 0  # of the engine's container
    has_loader: bool = False  # the loader of adapters runs
    job: str = ""  # of a Job's pod, which is no replica: what the Job does
    version: int = 0  # its resourceVersion
    created_s: float = 0.0  # Unix time
    trouble: Trouble | None = None

    @property
    def counts(self) -> bool:
        """Whether it is a replica: neither going away nor done."""
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
    """The facts of a pod. ``address_override``: its annotations may say where it really is."""
    meta, status = obj.metadata, obj.status
    owner = next((o.uid for o in meta.owner_references if o.kind == "Model" and o.controller), "")
    adapters = (
        (label.removeprefix(LABEL_PREFIX), value)
        for label, value in meta.labels.items()
        if label.startswith(LABEL_PREFIX)
    )
    ready = _is_true(obj, "Ready")
    containers = {container.name: container for container in status.container_statuses}
    server, loader = containers.get(SERVER_CONTAINER), containers.get(LOADER_CONTAINER)
    restarts = server.restart_count if server is not None else 0
    return Pod(
        name=meta.name,
        uid=meta.uid,
        model=meta.labels.get(POD_MODEL_LABEL, ""),
        owner=owner,
        hash=meta.annotations.get(HASH_ANNOTATION),
        ready=ready,
        scheduled=bool(obj.spec.node_name),
        terminating=meta.deletion_timestamp is not None,
        draining_since_s=_number(meta.annotations.get(DRAINING_ANNOTATION)),
        finished=status.phase in ("Failed", "Succeeded"),
        address=_address(obj, address_override),
        adapters=tuple(sorted(adapters)),
        adapters_current=meta.annotations.get(RESTARTS_ANNOTATION, "0") == str(restarts),
        restarts=restarts,
        has_loader=loader is not None and loader.state.running is not None,
        job=meta.labels.get(JOB_LABEL, ""),
        version=meta.version,
        created_s=_seconds(meta.creation_timestamp),
        trouble=None if ready else _trouble(obj),
    )


def _seconds(when: datetime | None) -> float:
    return when.timestamp() if when is not None else 0.0


def _number(text: str | None) -> float:
    """What an annotation says; what is no time counts as one long ago."""
    if text is None:
        return 0.0
    return float(text) if text.isdecimal() and int(text) else 1.0


def _is_true(obj: PodObject, condition: str) -> bool:
    return any(c.type == condition and c.status == "True" for c in obj.status.conditions)


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


def _trouble(obj: PodObject) -> Trouble | None:
    status = obj.status
    if status.phase == "Failed":
        return Trouble(_word(status.reason) or "Failed", status.message[:MESSAGE_MAX_CHARS])
    for condition in status.conditions:
        if condition.type == "PodScheduled" and condition.status == "False":
            return Trouble(
                _word(condition.reason) or "Unschedulable", condition.message[:MESSAGE_MAX_CHARS]
            )
    for container in status.container_statuses:
        last = container.last_state.terminated or container.state.terminated
        if last is not None and last.reason == "OOMKilled":
            return Trouble("OOMKilled", f"container {container.name} ran out of memory")
        waiting = container.state.waiting
        if waiting is None or (waiting.reason in _STARTING and not waiting.message):
            continue
        if waiting.reason == "CrashLoopBackOff":  # its message counts seconds: not for a status
            code = f" (exit code {last.exit_code})" if last is not None else ""
            return Trouble(
                waiting.reason, f"container {container.name} keeps exiting{code}; see its logs"
            )
        if waiting.reason in ("ErrImagePull", "ImagePullBackOff"):  # they come in turns
            return Trouble(
                "ImagePullBackOff", f"the image of container {container.name} cannot be pulled"
            )
        return Trouble(_word(waiting.reason) or "Waiting", waiting.message[:MESSAGE_MAX_CHARS])
    return None


def _word(reason: str) -> str:
    """A reason as conditions allow it: letters, digits, ``_``, ``,`` and ``:``."""
    return "".join(c for c in reason if c.isascii() and (c.isalnum() or c in "_,:")).strip("_,:")


__all__ = ["HASH_ANNOTATION", "POD_HASH_LABEL", "Pod", "PodObject", "Trouble", "observe"]
