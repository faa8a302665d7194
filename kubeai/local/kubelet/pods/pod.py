"""Typed access to the fields of a Pod that the kubelet uses. Pure.

Owns decoding (:func:`decode_pod`), environment variables and ``$(VAR)`` expansion under Kubernetes'
rules (:func:`container_environment`, :func:`expand`), and the names of the objects that a pod's
environment refers to.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    pass


class KeyRef(_Camel, frozen=True):
    name: str = ""
    key: str = ""
    optional: bool = False


class FieldRef(_Camel, frozen=True):
    field_path: str


class ResourceFieldRef(_Camel, frozen=True):
    resource: str
    container_name: str = ""
    divisor: str | int = "1"


class ValueFrom(_Camel, frozen=True):
    field_ref: FieldRef | None = None
    secret_key_ref: KeyRef | None = None
    config_map_key_ref: KeyRef | None = None
    resource_field_ref: ResourceFieldRef | None = None


class EnvVar(_Camel, frozen=True):
    name: str
    value: str = ""
    value_from: ValueFrom | None = None


class SourceRef(_Camel, frozen=True):
    name: str = ""
    optional: bool = False


class EnvFrom(_Camel, frozen=True):
    prefix: str = ""
    config_map_ref: SourceRef | None = None
    secret_ref: SourceRef | None = None


class Header(_Camel, frozen=True):
    name: str
    value: str = ""


class HTTPGet(_Camel, frozen=True):
    port: int | str
    path: str = "/"
    host: str = ""
    scheme: str = "HTTP"
    http_headers: tuple[Header, ...] = ()


class TCPSocket(_Camel, frozen=True):
    port: int | str
    host: str = ""


class ExecAction(_Camel, frozen=True):
    command: tuple[str, ...] = ()


class Sleep(_Camel, frozen=True):
    seconds: int


class Handler(_Camel, frozen=True):
    """A lifecycle hook."""

    exec: ExecAction | None = None
    http_get: HTTPGet | None = None
    sleep: Sleep | None = None


class Lifecycle(_Camel, frozen=True):
    pre_stop: Handler | None = None
    post_start: Handler | None = None


class Probe(_Camel, frozen=True):
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
    container_port: int
    name: str = ""
    protocol: str = "TCP"


class Resources(_Camel, frozen=True):
    limits: dict[str, str | int | float] = {}
    requests: dict[str, str | int | float] = {}


class VolumeMount(_Camel, frozen=True):
    name: str
    mount_path: str
    sub_path: str = ""
    sub_path_expr: str = ""
    read_only: bool = False


TERMINATION_LOG = "/dev/termination-log"  # the API's default for terminationMessagePath


class Container(_Camel, frozen=True):
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
        limit = self.resources.limits.get("memory")
        return None if limit is None else _amount(limit) // 10**9


class EmptyDir(_Camel, frozen=True):
    medium: str = ""


class KeyToPath(_Camel, frozen=True):
    key: str
    path: str
    mode: int | None = None


class ConfigMapVolume(_Camel, frozen=True):
    name: str = ""
    items: tuple[KeyToPath, ...] = ()
    default_mode: int | None = None
    optional: bool = False


class SecretVolume(_Camel, frozen=True):
    secret_name: str = ""
    items: tuple[KeyToPath, ...] = ()
    default_mode: int | None = None
    optional: bool = False


class HostPath(_Camel, frozen=True):
    path: str
    type: str = ""


class ClaimVolume(_Camel, frozen=True):
    claim_name: str
    read_only: bool = False


class Volume(_Camel, frozen=True):
    name: str
    empty_dir: EmptyDir | None = None
    config_map: ConfigMapVolume | None = None
    secret: SecretVolume | None = None
    host_path: HostPath | None = None
    persistent_volume_claim: ClaimVolume | None = None


class ReadinessGate(_Camel, frozen=True):
    condition_type: str


class PodSpec(_Camel, frozen=True):
    containers: tuple[Container, ...]
    init_containers: tuple[Container, ...] = ()
    volumes: tuple[Volume, ...] = ()
    node_name: str = ""
    service_account_name: str = ""
    restart_policy: RestartPolicy = "Always"
    termination_grace_period_seconds: int = 30
    active_deadline_seconds: int | None = None
    readiness_gates: tuple[ReadinessGate, ...] = ()


class ObjectMeta(_Camel, frozen=True):
    name: str
    namespace: str
    uid: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    generation: int = 0
    deletion_timestamp: datetime | None = None
    deletion_grace_period_seconds: int | None = None


class Condition(_Camel, frozen=True):
    type: str
    status: str
    reason: str = ""
    message: str = ""
    last_transition_time: str | None = None


class Waiting(_Camel, frozen=True):
    reason: str = ""
    message: str = ""


class Running(_Camel, frozen=True):
    started_at: str


class Terminated(_Camel, frozen=True):
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
    name: str
    state: ContainerState = ContainerState()
    last_state: ContainerState = ContainerState()
    restart_count: int = 0


class PodStatus(_Camel, frozen=True):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    start_time: str | None = None
    conditions: tuple[Condition, ...] = ()
    container_statuses: tuple[ContainerStatus, ...] = ()
    init_container_statuses: tuple[ContainerStatus, ...] = ()


class Pod(_Camel, frozen=True):
    metadata: ObjectMeta
    spec: PodSpec
    status: PodStatus = PodStatus()

    @property
    def key(self) -> str:
        return f"{self.metadata.namespace}/{self.metadata.name}"


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
        except PodError as error:
            raise PodError(f"container {container.name}: {error}", "InvalidPod") from None
    if not pod.spec.containers:
        raise PodError("spec.containers: is empty", "InvalidPod")
    return pod


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


# -- references and environment ------------------------------------------------------------------


def environment_references(container: Container) -> tuple[set[str], set[str]]:
    """Names of the ConfigMaps and Secrets that the container's environment refers to."""
    maps: set[str] = set()
    secrets: set[str] = set()
    for source in container.env_from:
        if source.config_map_ref:
            maps.add(source.config_map_ref.name)
        if source.secret_ref:
            secrets.add(source.secret_ref.name)
    for variable in container.env:
        if variable.value_from and variable.value_from.config_map_key_ref:
            maps.add(variable.value_from.config_map_key_ref.name)
        if variable.value_from and variable.value_from.secret_key_ref:
            secrets.add(variable.value_from.secret_key_ref.name)
    return maps, secrets


Data = Mapping[str, bytes]  # of a ConfigMap or Secret


def container_environment(
    pod: Pod,
    container: Container,
    fields: Mapping[str, str],
    maps: Mapping[str, Data | None],
    secrets: Mapping[str, Data | None],
) -> dict[str, str]:
    """The environment from the manifest: envFrom, then env, with ``$(VAR)`` expanded.

    ``fields``: values of fieldRefs that are not in the manifest (status.podIP, …). ``maps`` and
    ``secrets``: the data of each referenced object, None if it does not exist. PodError if
    something that is not optional is missing.
    """
    env: dict[str, str] = {}
    for source in container.env_from:
        for kind, ref, objects in (
            ("configmap", source.config_map_ref, maps),
            ("secret", source.secret_ref, secrets),
        ):
            if ref is not None:
                data = _found(kind, ref.name, ref.optional, objects)
                env |= {source.prefix + key: _text(value) for key, value in data.items()}
    for variable in container.env:
        if variable.value_from is None:
            env[variable.name] = expand(variable.value, env)
            continue
        value = _value_from(pod, container, variable, fields, maps, secrets)
        if value is not None:
            env[variable.name] = value
    return env


def _value_from(
    pod: Pod,
    container: Container,
    variable: EnvVar,
    fields: Mapping[str, str],
    maps: Mapping[str, Data | None],
    secrets: Mapping[str, Data | None],
) -> str | None:
    source = variable.value_from
    assert source is not None
    if source.field_ref is not None:
        return _field(pod, source.field_ref.field_path, fields)
    if source.resource_field_ref is not None:
        return _resource_field(pod, container, source.resource_field_ref)
    for kind, ref, objects in (
        ("configmap", source.config_map_key_ref, maps),
        ("secret", source.secret_key_ref, secrets),
    ):
        if ref is None:
            continue
        data = _found(kind, ref.name, ref.optional, objects)
        if ref.key in data:
            return _text(data[ref.key])
        if not ref.optional:
            raise PodError(f"couldn't find key {ref.key} in {kind} {ref.name!r}")
        return None
    raise PodError(f"env {variable.name}: valueFrom has no supported source")


def _found(kind: str, name: str, optional: bool, objects: Mapping[str, Data | None]) -> Data:
    data = objects.get(name)
    if data is None and not optional:
        raise PodError(f"{kind} {name!r} not found")
    return data or {}


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _field(pod: Pod, path: str, fields: Mapping[str, str]) -> str:
    meta = pod.metadata
    match = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path)
    if match:
        return (meta.labels if match[1] == "labels" else meta.annotations).get(match[2], "")
    known = {
        "metadata.name": meta.name,
        "metadata.namespace": meta.namespace,
        "metadata.uid": meta.uid,
        "spec.nodeName": pod.spec.node_name,
        "spec.serviceAccountName": pod.spec.service_account_name,
        **fields,
    }
    if path not in known:
        raise PodError(f"fieldRef {path!r} is not supported")
    return known[path]


def _resource_field(pod: Pod, container: Container, ref: ResourceFieldRef) -> str:
    containers = (*pod.spec.containers, *pod.spec.init_containers)
    of = next((c for c in containers if c.name == ref.container_name), container)
    kind, _, name = ref.resource.partition(".")
    amounts = of.resources.limits if kind == "limits" else of.resources.requests
    if name not in amounts:
        raise PodError(f"resourceFieldRef {ref.resource!r}: container {of.name} does not set it")
    divisor = _amount(ref.divisor) or 10**9  # "0" is how Kubernetes writes the default
    return str(-(-_amount(amounts[name]) // divisor))


def _amount(text: str | int | float) -> int:
    try:
        return parse_quantity(text).nanos
    except ValueError as error:
        raise PodError(str(error)) from None


_REFERENCE = re.compile(r"\$(?:\$|\(([^()]*)\))")


def expand(text: str, env: Mapping[str, str]) -> str:
    """Expand ``$(VAR)``; unknown ones are kept. ``$$`` becomes ``$``, so ``$$(VAR)`` is literal."""

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        return "$" if name is None else env.get(name, match[0])

    return _REFERENCE.sub(replace, text)
