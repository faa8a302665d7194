"""Strategies of the built-in resources: defaults, validation, status, grace periods.

A `Strategy` holds what differs from a plain resource; `STRATEGIES[""]` is the plain one. Defaulting
covers the subset of a real API server's defaults that KubeAI relies on: a pod's probes, grace
period, restart policy and pull policy, and port protocols.
"""

from __future__ import annotations

import base64
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import orjson

from kubeai.api.config.quantity import parse_quantity
from kubeai.local.apiserver.errors import Cause, bad_request
from kubeai.local.apiserver.kinds import metadata as meta
from kubeai.local.apiserver.kinds.definitions import check_definition, prepare_definition

if TYPE_CHECKING:
    from kubeai.local.apiserver.kinds.resources import Resource

Object = dict[str, Any]

DEFAULT_MODE = 0o644


@dataclass(slots=True, frozen=True)
class Strategy:
    """The strategy of a plain resource, custom or built-in."""

    resets_status: bool = True  # drop the status on creation
    name_is_label: bool = False
    default_propagation: str | None = None
    waits_for_contents: bool = False  # a namespace: the collector removes it once empty
    metadata_with_status: bool = False  # a write to /status may also change metadata
    sets_spec: bool = False  # spec is set by the API only

    def prepare(self, obj: Object, old: Object | None) -> None:
        """Set defaults and API-owned fields in `obj`. `old` (None on creation) is unchanged."""

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        return []

    def only_status(self, obj: Object, old: Object, resource: Resource) -> Object:
        """Apply a write to ``/status`` to `old` (a copy), and return it."""
        if "status" in obj:
            old["status"] = obj["status"]
        else:
            old.pop("status", None)
        if self.metadata_with_status:
            owners = old["metadata"].get("ownerReferences")
            old["metadata"] = obj["metadata"]
            old["metadata"].pop("ownerReferences", None)
            if owners:
                old["metadata"]["ownerReferences"] = owners
        return old

    def grace_s(self, obj: Object, asked_s: int | None) -> int:
        """Return the deletion grace period in seconds."""
        return 0

    def mark_deleted(self, obj: Object) -> None:
        """Update `obj` when its deletion has begun but is not finished."""


@dataclass(slots=True, frozen=True)
class _Pods(Strategy):
    metadata_with_status: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        spec = obj.get("spec")
        if not isinstance(spec, dict):
            return
        default_pod_spec(spec)
        if old is None:
            obj["status"] = {"phase": "Pending", "qosClass": qos_class(spec)}

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        if old is None:
            return check_pod_spec(obj.get("spec"))
        if subresource:
            return []
        return _check_pod_change(obj.get("spec") or {}, old["spec"])

    def grace_s(self, obj: Object, asked_s: int | None) -> int:
        spec, phase = obj["spec"], obj.get("status", {}).get("phase")
        if not spec.get("nodeName") or phase in ("Failed", "Succeeded"):
            return 0  # no kubelet has to stop it
        chosen = spec["terminationGracePeriodSeconds"] if asked_s is None else asked_s
        return max(0, int(chosen))


@dataclass(slots=True, frozen=True)
class _Namespaces(Strategy):
    name_is_label: bool = True
    waits_for_contents: bool = True
    sets_spec: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        metadata = obj["metadata"]
        labels = metadata.setdefault("labels", {})
        if "name" in metadata:
            labels["kubernetes.io/metadata.name"] = metadata["name"]
        if old is None:
            obj["spec"] = {"finalizers": ["kubernetes"]}
            obj["status"] = {"phase": "Active"}
        else:
            obj["spec"] = copy.deepcopy(old["spec"])

    def mark_deleted(self, obj: Object) -> None:
        obj["status"] = {**obj.get("status", {}), "phase": "Terminating"}


@dataclass(slots=True, frozen=True)
class _Nodes(Strategy):
    resets_status: bool = False
    metadata_with_status: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        obj.setdefault("spec", {})
        for amounts in ("capacity", "allocatable"):
            canonical(obj.get("status", {}).get(amounts))


@dataclass(slots=True, frozen=True)
class _Secrets(Strategy):
    def prepare(self, obj: Object, old: Object | None) -> None:
        _text_to_data(obj)
        _drop_empty(obj, "data")
        obj.setdefault("type", "Opaque")

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        return _check_immutable(obj, old, ("data", "immutable")) + _check_type(obj, old)


@dataclass(slots=True, frozen=True)
class _ConfigMaps(Strategy):
    def prepare(self, obj: Object, old: Object | None) -> None:
        _drop_empty(obj, "data", "binaryData")

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        return _check_immutable(obj, old, ("data", "binaryData", "immutable"))


@dataclass(slots=True, frozen=True)
class _Claims(Strategy):
    metadata_with_status: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        spec = obj.setdefault("spec", {})
        spec.setdefault("volumeMode", "Filesystem")
        canonical((spec.get("resources") or {}).get("requests"))
        if old is None:
            obj["status"] = {"phase": "Pending"}


@dataclass(slots=True, frozen=True)
class _Jobs(Strategy):
    # Kubernetes keeps this default from before garbage collection existed.
    default_propagation: str | None = "Orphan"
    metadata_with_status: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        spec = obj["spec"] = obj.get("spec") or {}
        if spec.get("parallelism") is None and spec.get("completions") is None:
            spec["completions"] = 1  # with parallelism alone, one success is enough
        for name, value in (
            ("parallelism", 1), ("backoffLimit", 6), ("suspend", False),
            ("completionMode", "NonIndexed"), ("manualSelector", False),
            ("podReplacementPolicy", "TerminatingOrFailed"),
        ):  # fmt: skip
            if spec.get(name) is None:
                spec[name] = value
        template = spec.setdefault("template", {})
        if isinstance(template.get("spec"), dict):
            default_pod_spec(template["spec"])
        if old is None:
            obj["status"] = {}
            _select_own_pods(obj)

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        spec = obj.get("spec") or {}
        causes = _check_job_numbers(spec)
        if old is not None:
            return causes + _check_job_change(spec, old["spec"])
        template = spec.get("template") or {}
        causes += _check_job_selector(spec, obj["metadata"].get("uid"))
        causes += [
            cause._replace(field="spec.template." + cause.field)
            for cause in check_pod_spec(template.get("spec"))
        ]
        if (template.get("spec") or {}).get("restartPolicy") not in ("Never", "OnFailure"):
            why = 'Required value: valid values: "OnFailure", "Never"'
            field = "spec.template.spec.restartPolicy"
            causes.append(Cause("FieldValueRequired", why, field))
        return causes


@dataclass(slots=True, frozen=True)
class _Services(Strategy):
    name_is_label: bool = True
    metadata_with_status: bool = True

    def prepare(self, obj: Object, old: Object | None) -> None:
        spec = obj.setdefault("spec", {})
        for name, value in (("type", "ClusterIP"), ("sessionAffinity", "None")):
            spec.setdefault(name, value)
        for port in spec.get("ports") or ():
            port.setdefault("protocol", "TCP")
            port.setdefault("targetPort", port.get("port"))
        obj.setdefault("status", {"loadBalancer": {}})


@dataclass(slots=True, frozen=True)
class _Definitions(Strategy):
    def prepare(self, obj: Object, old: Object | None) -> None:
        prepare_definition(obj, old)

    def check(self, obj: Object, old: Object | None, subresource: str) -> list[Cause]:
        return check_definition(obj, old)


STRATEGIES: dict[str, Strategy] = {
    "": Strategy(),
    "pods": _Pods(),
    "namespaces": _Namespaces(),
    "nodes": _Nodes(),
    "secrets": _Secrets(),
    "configmaps": _ConfigMaps(),
    "persistentvolumeclaims": _Claims(),
    "services": _Services(),
    "jobs.batch": _Jobs(),
    "customresourcedefinitions.apiextensions.k8s.io": _Definitions(),
}


def strategy_of(resource: Resource) -> Strategy:
    return STRATEGIES.get(resource.key, STRATEGIES[""])


def canonical(amounts: Object | None) -> None:
    """Convert quantities to canonical form, in place: 1 → "1", "1000m" → "1"."""
    for name, amount in (amounts or {}).items():
        try:
            amounts[name] = str(parse_quantity(str(amount)))  # type: ignore[index]
        except ValueError:
            why = f"quantities must match the regular expression, not {amount!r}"
            raise bad_request(f"{name}: {why}") from None


def _drop_empty(obj: Object, *names: str) -> None:
    """Drop empty maps, as Go's ``omitempty`` does."""
    for name in names:
        if obj.get(name) == {}:
            del obj[name]


def _text_to_data(secret: Object) -> None:
    """Move the write-only ``stringData`` to ``data``."""
    for name, text in (secret.pop("stringData", None) or {}).items():
        secret.setdefault("data", {})[name] = base64.b64encode(text.encode()).decode()


def _check_immutable(obj: Object, old: Object | None, names: tuple[str, ...]) -> list[Cause]:
    if old is None or not old.get("immutable"):
        return []
    why = "Forbidden: field is immutable when `immutable` is set"
    return [
        Cause("FieldValueForbidden", why, name) for name in names if obj.get(name) != old.get(name)
    ]


def _check_type(obj: Object, old: Object | None) -> list[Cause]:
    if old is None or obj.get("type") == old.get("type"):
        return []
    why = f'Invalid value: "{obj.get("type")}": field is immutable'
    return [Cause("FieldValueInvalid", why, "type")]


# Jobs.

JOB_UID_LABEL, JOB_NAME_LABEL = "batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name"
_JOB_NUMBERS = (
    "parallelism", "completions", "activeDeadlineSeconds", "backoffLimit",
    "ttlSecondsAfterFinished",
)  # fmt: skip
_JOB_FIXED = ("completions", "selector", "template", "completionMode")


def _select_own_pods(job: Object) -> None:
    """Add labels unique to the Job's pods, and a selector on the Job's uid."""
    spec, metadata = job["spec"], job["metadata"]
    template = spec["template"].setdefault("metadata", {})
    if not spec["manualSelector"]:
        uid, name = metadata["uid"], metadata["name"]
        ours = {JOB_UID_LABEL: uid, JOB_NAME_LABEL: name, "controller-uid": uid, "job-name": name}
        template["labels"] = {**(template.get("labels") or {}), **ours}
        selector = spec.setdefault("selector", {})
        selector.setdefault("matchLabels", {})[JOB_UID_LABEL] = uid
    if template.get("labels") and not metadata.get("labels"):
        metadata["labels"] = dict(template["labels"])


def _check_job_numbers(spec: Object) -> list[Cause]:
    return [
        Cause(
            "FieldValueInvalid",
            f"Invalid value: {spec[name]}: must be greater than or equal to 0",
            f"spec.{name}",
        )
        for name in _JOB_NUMBERS
        if (spec.get(name) or 0) < 0
    ]


def _check_job_selector(spec: Object, uid: Any) -> list[Cause]:
    selector = spec.get("selector") or {}
    labels = (spec["template"].get("metadata") or {}).get("labels") or {}
    if not spec["manualSelector"]:
        if selector == {"matchLabels": {JOB_UID_LABEL: uid}}:
            return []
        shown = orjson.dumps(selector).decode()
        why = f"Invalid value: {shown}: `selector` not auto-generated"
        return [Cause("FieldValueInvalid", why, "spec.selector")]
    if not selector:
        return [Cause("FieldValueRequired", "Required value", "spec.selector")]
    wanted = selector.get("matchLabels") or {}
    if all(labels.get(name) == value for name, value in wanted.items()):
        return []
    why = "Invalid value: `selector` does not match template `labels`"
    return [Cause("FieldValueInvalid", why, "spec.template.metadata.labels")]


def _check_job_change(spec: Object, old: Object) -> list[Cause]:
    return [
        Cause("FieldValueInvalid", "Invalid value: field is immutable", f"spec.{name}")
        for name in _JOB_FIXED
        if spec.get(name) != old.get(name)
    ]


# Pods.


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
        canonical(resources.get(amounts))
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
    elif meta.check({"name": name}, one_label=True):
        found = meta.check({"name": name}, one_label=True)[0]
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
