"""Typed access to the fields of a Pod that the kubelet uses. Pure.

The classes are Kubernetes' types of these names, shortened where that is clear. :func:`decode_pod`
creates them from an object of the API.
"""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any, Literal

import msgspec

from kubeai.api.config.quantity import parse_quantity
from kubeai.errors import KubeAIError

Object = dict[str, Any]
RestartPolicy = Literal["Always", "OnFailure", "Never"]


class PodError(KubeAIError):
    """A pod is invalid, or an object that it refers to is missing.

    ``reason`` becomes the reason of the container's waiting state.
    """

    def __init__(self, message: str, reason: str = "CreateContainerConfigError") -> None:
        super().__init__(message)
        self.reason = reason


class _Camel(msgspec.Struct, rename="camel", frozen=True):
    """Fields with Kubernetes' names. Others are ignored."""


class KeyRef(_Camel, frozen=True):
    """One key of a ConfigMap or Secret."""

    name: str = ""
    key: str = ""
    optional: bool = False


class FieldRef(_Camel, frozen=True):
    """A field of the pod, as an environment variable's value."""

    field_path: str


class ResourceFieldRef(_Camel, frozen=True):
    """A container's limit or request, as an environment variable's value."""

    resource: str
    container_name: str = ""
    divisor: str | int = "1"


class ValueFrom(_Camel, frozen=True):
    """The source of an environment variable's value; one is set."""

    field_ref: FieldRef | None = None
    secret_key_ref: KeyRef | None = None
    config_map_key_ref: KeyRef | None = None
    resource_field_ref: ResourceFieldRef | None = None


class EnvVar(_Camel, frozen=True):
    """An environment variable."""

    name: str
    value: str = ""
    value_from: ValueFrom | None = None


class SourceRef(_Camel, frozen=True):
    """A ConfigMap or Secret, all of whose keys become variables."""

    name: str = ""
    optional: bool = False


class EnvFrom(_Camel, frozen=True):
    """A source of environment variables; one reference is set."""

    prefix: str = ""
    config_map_ref: SourceRef | None = None
    secret_ref: SourceRef | None = None


class Header(_Camel, frozen=True):
    """An HTTP header of a probe or hook."""

    name: str
    value: str = ""


class HTTPGet(_Camel, frozen=True):
    """An HTTP request of a probe or hook. The host defaults to the pod's address."""

    port: int | str
    path: str = "/"
    host: str = ""
    scheme: str = "HTTP"
    http_headers: tuple[Header, ...] = ()


class TCPSocket(_Camel, frozen=True):
    """A connection attempt of a probe."""

    port: int | str
    host: str = ""


class ExecAction(_Camel, frozen=True):
    """A command of a probe or hook, run in the container."""

    command: tuple[str, ...] = ()


class Sleep(_Camel, frozen=True):
    """A hook that only waits."""

    seconds: int


class Handler(_Camel, frozen=True):
    """A lifecycle hook."""

    exec: ExecAction | None = None
    http_get: HTTPGet | None = None
    sleep: Sleep | None = None


class Lifecycle(_Camel, frozen=True):
    """A container's hooks."""

    pre_stop: Handler | None = None
    post_start: Handler | None = None


class Probe(_Camel, frozen=True):
    """A startup, readiness or liveness probe; one action is set."""

    exec: ExecAction | None = None
    http_get: HTTPGet | None = None
    tcp_socket: TCPSocket | None = None
    initial_delay_seconds: int = 0
    period_seconds: int = 10
    timeout_seconds: int = 1
    success_threshold: int = 1
    failure_threshold: int = 3
    termination_grace_period_seconds: int | None = None


class Port(_Camel, frozen=True):
    """A port of a container, which probes can refer to by name."""

    container_port: int
    name: str = ""
    protocol: str = "TCP"


class Resources(_Camel, frozen=True):
    """A container's limits and requests, as quantities."""

    limits: dict[str, str | int | float] = {}
    requests: dict[str, str | int | float] = {}


class VolumeMount(_Camel, frozen=True):
    """Where a volume appears in a container."""

    name: str
    mount_path: str
    sub_path: str = ""
    sub_path_expr: str = ""
    read_only: bool = False


GPU = "nvidia.com/gpu"
TERMINATION_LOG = "/dev/termination-log"  # the API's default for terminationMessagePath


class Container(_Camel, frozen=True):
    """A container, init container or sidecar."""

    name: str
    image: str = ""
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    working_dir: str = ""
    env: tuple[EnvVar, ...] = ()
    env_from: tuple[EnvFrom, ...] = ()
    ports: tuple[Port, ...] = ()
    resources: Resources = Resources()
    volume_mounts: tuple[VolumeMount, ...] = ()
    startup_probe: Probe | None = None
    readiness_probe: Probe | None = None
    liveness_probe: Probe | None = None
    lifecycle: Lifecycle = Lifecycle()
    termination_message_path: str = TERMINATION_LOG
    termination_message_policy: Literal["File", "FallbackToLogsOnError"] = "File"
    restart_policy: RestartPolicy | None = None  # an init container's: Always makes it a sidecar

    def port(self, wanted: int | str) -> int:
        """Resolve a port number or name."""
        if isinstance(wanted, str) and not wanted.isdecimal():
            for port in self.ports:
                if port.name == wanted:
                    return port.container_port
            raise PodError(f"container {self.name} has no port named {wanted!r}")
        return int(wanted)

    def memory_limit_bytes(self) -> int | None:
        """The memory limit, rounded down; PodError if it is not a quantity."""
        limit = self.resources.limits.get("memory")
        return None if limit is None else quantity_nanos(limit) // 10**9

    def requests(self) -> dict[str, int]:
        """The requests in billionths; a limit without a request is one. PodError if invalid."""
        amounts = self.resources.limits | self.resources.requests
        return {name: quantity_nanos(amount) for name, amount in amounts.items()}

    def gpus(self) -> int:
        """The number of NVIDIA GPUs; PodError if it is not a whole number."""
        count, fraction = divmod(self.requests().get(GPU, 0), 10**9)
        if fraction or count < 0:
            raise PodError(f"{GPU}: must be a whole number of GPUs", "InvalidPod")
        return count


class EmptyDir(_Camel, frozen=True):
    """A directory that lives as long as the pod."""

    medium: str = ""


class KeyToPath(_Camel, frozen=True):
    """The file of one key of a ConfigMap or Secret."""

    key: str
    path: str
    mode: int | None = None


class ConfigMapVolume(_Camel, frozen=True):
    """A ConfigMap's keys as files."""

    name: str = ""
    items: tuple[KeyToPath, ...] = ()
    default_mode: int | None = None
    optional: bool = False


class SecretVolume(_Camel, frozen=True):
    """A Secret's keys as files."""

    secret_name: str = ""
    items: tuple[KeyToPath, ...] = ()
    default_mode: int | None = None
    optional: bool = False


class HostPath(_Camel, frozen=True):
    """A path of this machine."""

    path: str
    type: str = ""


class ClaimVolume(_Camel, frozen=True):
    """A PersistentVolumeClaim."""

    claim_name: str
    read_only: bool = False


class ImageVolume(_Camel, frozen=True):
    """An image whose files are the volume. Not supported; it is decoded for the error message."""

    reference: str = ""


class Volume(_Camel, frozen=True):
    """A volume; one source is set."""

    name: str
    empty_dir: EmptyDir | None = None
    config_map: ConfigMapVolume | None = None
    secret: SecretVolume | None = None
    host_path: HostPath | None = None
    persistent_volume_claim: ClaimVolume | None = None
    image: ImageVolume | None = None


class ReadinessGate(_Camel, frozen=True):
    """A condition that others set, and that the pod's readiness requires."""

    condition_type: str


class ResourceClaim(_Camel, frozen=True):
    """A claim of devices (dynamic resource allocation), which is not supported."""

    name: str = ""


class PodSpec(_Camel, frozen=True):
    """A pod's spec."""

    containers: tuple[Container, ...]
    init_containers: tuple[Container, ...] = ()
    volumes: tuple[Volume, ...] = ()
    node_name: str = ""
    service_account_name: str = ""
    restart_policy: RestartPolicy = "Always"
    termination_grace_period_seconds: int = 30
    active_deadline_seconds: int | None = None
    readiness_gates: tuple[ReadinessGate, ...] = ()
    resource_claims: tuple[ResourceClaim, ...] = ()


class ObjectMeta(_Camel, frozen=True):
    """A pod's metadata."""

    name: str
    namespace: str
    uid: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    generation: int = 0
    deletion_timestamp: datetime | None = None
    deletion_grace_period_seconds: int | None = None


class Condition(_Camel, frozen=True):
    """A condition of a pod's status."""

    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: str | None = None


class Waiting(_Camel, frozen=True):
    """The state of a container that is not started, or is about to be restarted."""

    reason: str = ""
    message: str = ""


class Running(_Camel, frozen=True):
    """The state of a container whose main process runs."""

    started_at: str


class Terminated(_Camel, frozen=True):
    """The state of a container whose main process has ended."""

    exit_code: int
    reason: str = ""
    message: str = ""
    signal: int = 0
    started_at: str | None = None
    finished_at: str | None = None
    container_id: str = msgspec.field(default="", name="containerID")


class ContainerState(_Camel, frozen=True):
    """At most one of the states is set."""

    waiting: Waiting | None = None
    running: Running | None = None
    terminated: Terminated | None = None


class ContainerStatus(_Camel, frozen=True):
    """A container's status, as an earlier kubelet wrote it."""

    name: str
    state: ContainerState = ContainerState()
    last_state: ContainerState = ContainerState()
    restart_count: int = 0


class PodStatus(_Camel, frozen=True):
    """A pod's status, as an earlier kubelet wrote it."""

    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    start_time: str | None = None
    conditions: tuple[Condition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()
    init_container_statuses: tuple[ContainerStatus, ...] = ()


class Pod(_Camel, frozen=True):
    """A pod."""

    metadata: ObjectMeta
    spec: PodSpec
    status: PodStatus = PodStatus()

    @property
    def key(self) -> str:
        """``namespace/name``, as logs show it."""
        return f"{self.metadata.namespace}/{self.metadata.name}"

    def requests(self) -> dict[str, int]:
        """What the pod needs at the same time, in billionths, by kube-scheduler's rules.

        Sidecars run beside all containers that start after them, other init containers alone.
        """
        most: dict[str, int] = {}
        beside: dict[str, int] = {}
        for container in self.spec.init_containers:
            now = _plus(beside, container.requests())
            most = {n: max(most.get(n, 0), now.get(n, 0)) for n in most | now}
            if container.restart_policy == "Always":
                beside = now
        for container in self.spec.containers:
            beside = _plus(beside, container.requests())
        return {name: max(most.get(name, 0), beside.get(name, 0)) for name in most | beside}

    def gpus(self) -> int:
        """The number of NVIDIA GPUs that the pod needs."""
        return self.requests().get(GPU, 0) // 10**9


def _plus(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in one | other}


def decode_pod(obj: Object) -> Pod:
    """Decode a Pod from the API; PodError names an invalid field."""
    try:
        pod = msgspec.convert(_without_nulls(obj), Pod)
    except msgspec.ValidationError as error:
        raise PodError(str(error), "InvalidPod") from None
    names = [c.name for c in (*pod.spec.init_containers, *pod.spec.containers)]
    for name in names:
        # Names are used as directory names, and the embedded API does not validate pods.
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name) or names.count(name) > 1:
            raise PodError(f"spec: container name {name!r} is invalid or duplicate", "InvalidPod")
    for volume in pod.spec.volumes:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", volume.name):
            raise PodError(f"spec: volume name {volume.name!r} is invalid", "InvalidPod")
    for container in (*pod.spec.init_containers, *pod.spec.containers):
        try:
            container.memory_limit_bytes()  # report an invalid quantity now, not during the run
            container.gpus()
        except PodError as error:
            raise PodError(f"container {container.name}: {error}", "InvalidPod") from None
    if not pod.spec.containers:
        raise PodError("spec.containers: is empty", "InvalidPod")
    if pod.spec.resource_claims:
        raise PodError(
            "spec.resourceClaims: this kubelet has no dynamic resource allocation; use a resource "
            f"profile with limits, such as {GPU}",
            "InvalidPod",
        )
    return pod


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def quantity_nanos(text: str | int | float) -> int:
    """Parse a quantity, in billionths. PodError if it is invalid."""
    try:
        return parse_quantity(text).nanos
    except ValueError as error:
        raise PodError(str(error)) from None
