"""Pods: defaults and validation of pod specs, QoS classes, grace periods.

The defaults are the subset of a real API server's that KubeAI relies on: probes, grace period,
restart policy and pull policy, and port protocols. Validation covers common mistakes only.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from kubeai.local.apiserver.errors import Cause
from kubeai.local.apiserver.kinds.metadata import check_metadata
from kubeai.local.apiserver.kinds.strategy import Strategy, canonicalize

Object = dict[str, Any]

DEFAULT_MODE = 0o644


@dataclass(slots=True, frozen=True)
class PodStrategy(Strategy):
    """The strategy of Pods. A new pod's phase is Pending; its spec is mostly immutable."""

    metadata_with_status: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        """Set the spec's defaults, and on creation the status."""
        spec = obj.get("spec")
        if not isinstance(spec, dict):
            return
        default_pod_spec(spec)
        if old is None:
            obj["status"] = {"phase": "Pending", "qosClass": qos_class(spec)}

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        """Validate a new spec, or what changed in it."""
        if old is None:
            return check_pod_spec(obj.get("spec"))
        if subresource:
            return []
        return _check_pod_change(obj.get("spec") or {}, old["spec"])

    def grace_s(self, obj: Object, requested_s: int | None) -> int:
        """Return the requested period, or the pod's; 0 if no process runs."""
        spec, phase = obj["spec"], obj.get("status", {}).get("phase")
        if not spec.get("nodeName") or phase in ("Failed", "Succeeded"):
            return 0  # no kubelet has to stop it
        chosen = spec["terminationGracePeriodSeconds"] if requested_s is None else requested_s
        return max(0, int(chosen))


def default_pod_spec(spec: Object) -> None:
    """Set a pod spec's defaults in place, like a real API server."""
    for name, value in (
        ("restartPolicy", "Always"), ("terminationGracePeriodSeconds", 30),
        ("dnsPolicy", "ClusterFirst"), ("securityContext", {}),
        ("schedulerName", "default-scheduler"), ("enableServiceLinks", True),
    ):  # fmt: skip
        if spec.get(name) is None:
            spec[name] = copy.copy(value)
    for container in _containers(spec):
        _default_container(container)
    for volume in spec.get("volumes") or ():
        _default_volume(volume)


def _containers(spec: Object) -> list[Object]:
    return [*(spec.get("initContainers") or ()), *(spec.get("containers") or ())]


def _default_container(container: Object) -> None:
    image = str(container.get("image", ""))
    tag = image.rpartition("/")[2].partition(":")[2]
    floats = "@" not in image and tag in ("", "latest")
    for name, value in (
        ("terminationMessagePath", "/dev/termination-log"), ("terminationMessagePolicy", "File"),
        ("imagePullPolicy", "Always" if floats else "IfNotPresent"), ("resources", {}),
    ):  # fmt: skip
        if container.get(name) is None:
            container[name] = value
    resources = container["resources"]
    for amounts in ("limits", "requests"):
        canonicalize(resources.get(amounts))
    for name, limit in (resources.get("limits") or {}).items():
        resources.setdefault("requests", {}).setdefault(name, limit)
    for port in container.get("ports") or ():
        port.setdefault("protocol", "TCP")
    for name in ("livenessProbe", "readinessProbe", "startupProbe"):
        if container.get(name) is not None:
            _default_probe(container[name])
    for variable in container.get("env") or ():
        reference = (variable.get("valueFrom") or {}).get("fieldRef")
        if reference is not None:
            reference.setdefault("apiVersion", "v1")
    for hook in (container.get("lifecycle") or {}).values():
        _default_http_get(hook)


def _default_probe(probe: Object) -> None:
    for name, value in (
        ("timeoutSeconds", 1), ("periodSeconds", 10), ("successThreshold", 1),
        ("failureThreshold", 3),
    ):  # fmt: skip
        if not probe.get(name):
            probe[name] = value
    _default_http_get(probe)
    if probe.get("grpc") is not None:
        probe["grpc"].setdefault("service", "")


def _default_http_get(handler: Object) -> None:
    if isinstance(handler, dict) and handler.get("httpGet") is not None:
        handler["httpGet"].setdefault("path", "/")
        handler["httpGet"].setdefault("scheme", "HTTP")


def _default_volume(volume: Object) -> None:
    if len(volume) == 1 and "name" in volume:
        volume["emptyDir"] = {}
    for name in ("secret", "configMap", "projected", "downwardAPI"):
        if volume.get(name) is not None:
            volume[name].setdefault("defaultMode", DEFAULT_MODE)


def qos_class(spec: Object) -> str:
    """Return the QoS class, from cpu and memory of all containers."""
    used, equal = False, True
    for container in _containers(spec):
        resources = container.get("resources") or {}
        requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
        for name in ("cpu", "memory"):
            used = used or name in requests or name in limits
            equal = equal and name in limits and requests.get(name) == limits[name]
    if not used:
        return "BestEffort"
    return "Guaranteed" if equal else "Burstable"


def check_pod_spec(spec: Any) -> list[Cause]:
    """Validate a new pod's spec; covers common mistakes only."""
    if not isinstance(spec, dict) or not spec.get("containers"):
        return [Cause("FieldValueRequired", "Required value", "spec.containers")]
    causes: list[Cause] = []
    volumes = {volume.get("name") for volume in spec.get("volumes") or ()}
    seen: set[str] = set()
    for group in ("initContainers", "containers"):
        for index, container in enumerate(spec.get(group) or ()):
            causes += _check_container(container, f"spec.{group}[{index}]", volumes, seen)
    return causes


def _check_container(
    container: Object, path: str, volumes: set[Any], seen: set[str]
) -> list[Cause]:
    causes: list[Cause] = []
    name = container.get("name", "")
    if not name:
        causes.append(Cause("FieldValueRequired", "Required value", f"{path}.name"))
    elif name in seen:
        causes.append(Cause("FieldValueDuplicate", f'Duplicate value: "{name}"', f"{path}.name"))
    elif check_metadata({"name": name}, one_label=True):
        found = check_metadata({"name": name}, one_label=True)[0]
        causes.append(found._replace(field=f"{path}.name"))
    seen.add(name)
    if not container.get("image"):
        causes.append(Cause("FieldValueRequired", "Required value", f"{path}.image"))
    for index, mount in enumerate(container.get("volumeMounts") or ()):
        if mount.get("name") not in volumes:
            why = f'Not found: "{mount.get("name", "")}"'
            causes.append(Cause("FieldValueNotFound", why, f"{path}.volumeMounts[{index}].name"))
    for index, variable in enumerate(container.get("env") or ()):
        if not variable.get("name"):
            field = f"{path}.env[{index}].name"
            causes.append(Cause("FieldValueRequired", "Required value", field))
    for index, port in enumerate(container.get("ports") or ()):
        number = port.get("containerPort", 0)
        if not 0 < number < 65536:
            why = f"Invalid value: {number}: must be between 1 and 65535, inclusive"
            causes.append(Cause("FieldValueInvalid", why, f"{path}.ports[{index}].containerPort"))
    return causes


def _check_pod_change(spec: Object, old: Object) -> list[Cause]:
    """Allow changes to images and the deadline, and additional tolerations only."""
    if _fixed(spec) == _fixed(old) and _extends(spec, old, "tolerations"):
        return []
    why = (
        "Forbidden: pod updates may not change fields other than `spec.containers[*].image`,"
        "`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only "
        "additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be "
        "set to 1 if it was previously negative)"
    )
    return [Cause("FieldValueForbidden", why, "spec")]


def _fixed(spec: Object) -> Object:
    fixed = {k: v for k, v in spec.items() if k not in ("tolerations", "activeDeadlineSeconds")}
    for group in ("containers", "initContainers"):
        if group in fixed:
            fixed[group] = [{**container, "image": ""} for container in fixed[group]]
    return fixed


def _extends(spec: Object, old: Object, name: str) -> bool:
    return all(item in (spec.get(name) or ()) for item in old.get(name) or ())
