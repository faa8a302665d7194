"""The part of a Kubernetes Pod that the operator decodes. Pure."""

from __future__ import annotations

from datetime import datetime

import msgspec

from kubeai.api.objects import ObjectMeta


def seconds(when: datetime | None) -> float:
    """A time as Unix time; 0 if there is none."""
    return when.timestamp() if when is not None else 0.0


class _Part(msgspec.Struct, rename="camel"):
    pass


class _Port(_Part):
    name: str = ""
    container_port: int = 0


class _Container(_Part):
    name: str = ""
    ports: list[_Port] = []


class _ConfigMap(_Part):
    name: str = ""


class _Claim(_Part):
    claim_name: str = ""


class _Volume(_Part):
    config_map: _ConfigMap | None = None
    persistent_volume_claim: _Claim | None = None


class _Spec(_Part):
    node_name: str = ""
    restart_policy: str = "Always"
    containers: list[_Container] = []
    volumes: list[_Volume] = []


class _Condition(_Part):
    type: str = ""
    status: str = ""
    reason: str = ""
    message: str = ""
    last_transition_time: datetime | None = None


class Waiting(_Part):
    """Why a container waits."""

    reason: str = ""
    message: str = ""


class Exit(_Part):
    """How a container ended."""

    reason: str = ""
    message: str = ""
    exit_code: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None

    @property
    def ran_s(self) -> float:
        """How long the container ran; 0 if unknown."""
        return max(0.0, seconds(self.finished_at) - seconds(self.started_at))


class _Running(_Part):
    started_at: datetime | None = None


class _State(_Part):
    waiting: Waiting | None = None
    running: _Running | None = None
    terminated: Exit | None = None


class ContainerStatus(_Part):
    """One container's status, as the kubelet reports it."""

    name: str = ""
    ready: bool = False
    started: bool | None = None
    restart_count: int = 0
    state: _State = msgspec.field(default_factory=_State)
    last_state: _State = msgspec.field(default_factory=_State)


class Status(_Part):
    """The pod's status."""

    phase: str = ""
    reason: str = ""
    message: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    conditions: list[_Condition] = []
    init_container_statuses: list[ContainerStatus] = []
    container_statuses: list[ContainerStatus] = []


class PodObject(msgspec.Struct, rename="camel"):
    """The part of a Kubernetes Pod that is decoded."""

    metadata: ObjectMeta
    spec: _Spec = msgspec.field(default_factory=_Spec)
    status: Status = msgspec.field(default_factory=Status)
