"""The columns and cells of built-in resources, as a real API server prints them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from kubeai.local.apiserver.kinds.metadata import parse_time
from kubeai.local.apiserver.kinds.resources import Resource

Object = dict[str, Any]
Row = Callable[[Object, datetime], list[Any]]
Printer = tuple[list[Object], Row]  # column definitions, and the cells of one object


def column(name: str, kind: str = "string", wide: bool = False, form: str = "") -> Object:
    """Return a column definition of a Table. `wide` columns appear with ``-o wide``."""
    return {
        "name": name,
        "type": kind,
        "format": form,
        "description": "",
        "priority": 1 if wide else 0,
    }


NAME = column("Name", form="name")
AGE = column("Age")


def human_duration(seconds: float) -> str:
    """Format a duration, coarser the longer it is: 65s, 2m5s, 3h, 2d4h, 1y20d."""
    if seconds < -1:
        return "<invalid>"
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if whole < 120:
        return f"{whole}s"
    if minutes < 10:
        return _two(minutes, "m", whole % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if hours < 192:
        return _two(days, "d", hours % 24, "h")
    if days < 730:
        return f"{days}d"
    return _two(days // 365, "y", days % 365, "d") if days < 2920 else f"{days // 365}y"


def _two(big: int, unit: str, small: int, small_unit: str) -> str:
    return f"{big}{unit}{small}{small_unit}" if small else f"{big}{unit}"


def since(time: str | None, at: datetime) -> str:
    """Return the age that a Table shows for a timestamp."""
    if not time:
        return "<unknown>"
    try:
        return human_duration((at - parse_time(time)).total_seconds())
    except (TypeError, ValueError):
        return "<invalid>"


def name_of(obj: Object) -> str:
    """Return the cell of the Name column."""
    return str(obj["metadata"]["name"])


def _age(obj: Object, at: datetime) -> str:
    return since(obj["metadata"].get("creationTimestamp"), at)


def _labels(labels: Object | None) -> str:
    pairs = ",".join(f"{key}={value}" for key, value in sorted((labels or {}).items()))
    return pairs or "<none>"


# Pods.


def _pod(pod: Object, at: datetime) -> list[Any]:
    spec, status = pod["spec"], pod.get("status", {})
    ready, restarts, last = _containers_of(status, at)
    address = status.get("podIP") or next((ip.get("ip") for ip in status.get("podIPs") or ()), None)
    gates = spec.get("readinessGates")
    return [
        name_of(pod),
        f"{ready}/{len(spec['containers'])}",
        pod_status(pod),
        f"{restarts} ({last} ago)" if restarts and last else str(restarts),
        _age(pod, at),
        address or "<none>",
        spec.get("nodeName") or "<none>",
        status.get("nominatedNodeName") or "<none>",
        f"0/{len(gates)}" if gates else "<none>",
    ]


def _containers_of(status: Object, at: datetime) -> tuple[int, int, str]:
    """Return the ready containers, the restarts, and the time since the last restart."""
    ready = restarts = 0
    last = ""
    for container in status.get("containerStatuses") or ():
        restarts += container.get("restartCount", 0)
        ended = ((container.get("lastState") or {}).get("terminated") or {}).get("finishedAt", "")
        last = max(last, ended or "")
        if container.get("ready") and (container.get("state") or {}).get("running") is not None:
            ready += 1
    return ready, restarts, since(last, at) if last else ""


def pod_status(pod: Object) -> str:
    """Return the STATUS column, derived from phase, container reasons and deletion."""
    status = pod.get("status", {})
    reason = status.get("reason") or status.get("phase") or "Unknown"
    starting = _init_reason(pod)
    if starting:
        reason = starting
    else:
        running = False
        for container in reversed(status.get("containerStatuses") or ()):
            state = container.get("state") or {}
            running = running or bool(container.get("ready") and "running" in state)
            reason = _state_reason(state) or reason
        if reason == "Completed" and running:
            reason = "Running" if _is_ready(status) else "NotReady"
    if pod["metadata"].get("deletionTimestamp"):
        if status.get("reason") == "NodeLost":
            return "Unknown"
        if status.get("phase") not in ("Failed", "Succeeded"):
            return "Terminating"
    return str(reason)


def _init_reason(pod: Object) -> str:
    statuses = pod.get("status", {}).get("initContainerStatuses") or ()
    sidecars = {
        c.get("name")
        for c in pod["spec"].get("initContainers") or ()
        if c.get("restartPolicy") == "Always"
    }
    for index, container in enumerate(statuses):
        state = container.get("state") or {}
        ended = state.get("terminated")
        if ended is not None and ended.get("exitCode") == 0:
            continue
        if container.get("name") in sidecars and container.get("started"):
            continue
        if ended is not None:
            return "Init:" + _state_reason(state)
        waiting = (state.get("waiting") or {}).get("reason", "")
        if waiting and waiting != "PodInitializing":
            return f"Init:{waiting}"
        return f"Init:{index}/{len(statuses)}"
    return ""


def _state_reason(state: Object) -> str:
    waiting, ended = state.get("waiting"), state.get("terminated")
    if waiting is not None:
        return str(waiting.get("reason") or "")
    if ended is None:
        return ""
    if ended.get("reason"):
        return str(ended["reason"])
    if ended.get("signal"):
        return f"Signal:{ended['signal']}"
    return f"ExitCode:{ended.get('exitCode', 0)}"


def _is_ready(status: Object) -> bool:
    return _condition(status, "Ready") == "True"


def _condition(status: Object, kind: str) -> str:
    for condition in status.get("conditions") or ():
        if condition.get("type") == kind:
            return str(condition.get("status"))
    return ""


# The other built-in resources.


def _node(node: Object, at: datetime) -> list[Any]:
    status, info = node.get("status", {}), node.get("status", {}).get("nodeInfo", {})
    state = {"True": "Ready", "False": "NotReady"}.get(_condition(status, "Ready"), "Unknown")
    if node.get("spec", {}).get("unschedulable"):
        state += ",SchedulingDisabled"
    prefix = "node-role.kubernetes.io/"
    labels = node["metadata"].get("labels") or {}
    roles = sorted(key[len(prefix):] for key in labels if key.startswith(prefix))  # fmt: skip
    addresses = {a.get("type"): a.get("address") for a in status.get("addresses") or ()}
    return [
        name_of(node), state, ",".join(roles) or "<none>", _age(node, at),
        info.get("kubeletVersion", ""), addresses.get("InternalIP", "<none>"),
        addresses.get("ExternalIP", "<none>"), info.get("osImage", "<unknown>"),
        info.get("kernelVersion", "<unknown>"), info.get("containerRuntimeVersion", "<unknown>"),
    ]  # fmt: skip


def _service(service: Object, at: datetime) -> list[Any]:
    spec = service.get("spec", {})
    ports = ",".join(f"{p.get('port')}/{p.get('protocol')}" for p in spec.get("ports") or ())
    return [
        name_of(service), spec.get("type"), spec.get("clusterIP") or "<none>", "<none>",
        ports or "<none>", _age(service, at), _labels(spec.get("selector")),
    ]  # fmt: skip


_MODES = {"ReadWriteOnce": "RWO", "ReadOnlyMany": "ROX", "ReadWriteMany": "RWX",
          "ReadWriteOncePod": "RWOP"}  # fmt: skip


def _claim(claim: Object, at: datetime) -> list[Any]:
    spec, status = claim.get("spec", {}), claim.get("status", {})
    phase = "Terminating" if claim["metadata"].get("deletionTimestamp") else status.get("phase")
    modes = ",".join(_MODES.get(mode, mode) for mode in status.get("accessModes") or ())
    return [
        name_of(claim), phase, spec.get("volumeName", ""),
        (status.get("capacity") or {}).get("storage", ""), modes,
        spec.get("storageClassName", ""), spec.get("volumeAttributesClassName") or "<unset>",
        _age(claim, at), spec.get("volumeMode", ""),
    ]  # fmt: skip


def _job(job: Object, at: datetime) -> list[Any]:
    spec, status = job.get("spec", {}), job.get("status", {})
    pod = spec.get("template", {}).get("spec", {})
    containers = pod.get("containers") or ()
    state = "Running"
    for kind in ("Complete", "Failed", "Suspended", "FailureTarget", "SuccessCriteriaMet"):
        if _condition(status, kind) == "True":
            state = kind
            break
    if job["metadata"].get("deletionTimestamp"):
        state = "Terminating"
    started, ended = status.get("startTime"), status.get("completionTime")
    lasted = "" if not started else since(started, parse_time(ended) if ended else at)
    return [
        name_of(job), state, f"{status.get('succeeded', 0)}/{_completions(spec)}", lasted,
        _age(job, at), ",".join(c["name"] for c in containers),
        ",".join(c.get("image", "") for c in containers),
        _labels((spec.get("selector") or {}).get("matchLabels")),
    ]  # fmt: skip


def _completions(spec: Object) -> str:
    if spec.get("completions") is not None:
        return str(spec["completions"])
    parallelism = spec.get("parallelism", 0)
    return f"1 of {parallelism}" if parallelism > 1 else "1"


def _event(event: Object, at: datetime) -> list[Any]:
    about, source = event.get("involvedObject", {}), event.get("source") or {}
    first = event.get("firstTimestamp") or event.get("eventTime")
    last = (event.get("series") or {}).get("lastObservedTime") or event.get("lastTimestamp")
    return [
        since(last or first, at), event.get("type", ""), event.get("reason", ""),
        f"{about.get('kind', '').lower()}/{about.get('name', '')}", about.get("fieldPath", ""),
        source.get("component") or event.get("reportingComponent") or "",
        str(event.get("message", "")).strip(), since(first, at), event.get("count") or 1,
        name_of(event),
    ]  # fmt: skip


def _data(obj: Object) -> int:
    return len(obj.get("data") or ()) + len(obj.get("binaryData") or ())


def _columns(*names: str) -> list[Object]:
    """Return columns. A leading ``*`` marks a column of ``-o wide``."""
    return [
        column(name.removeprefix("*"), wide=name.startswith("*"), form="name" * (name == "Name"))
        for name in names
    ]


_PRINTERS: dict[str, Printer] = {
    "pods": (
        _columns("Name", "Ready", "Status", "Restarts", "Age", "*IP", "*Node",
                 "*Nominated Node", "*Readiness Gates"),
        _pod,
    ),
    "nodes": (
        _columns("Name", "Status", "Roles", "Age", "Version", "*Internal-IP", "*External-IP",
                 "*OS-Image", "*Kernel-Version", "*Container-Runtime"),
        _node,
    ),
    "services": (
        _columns("Name", "Type", "Cluster-IP", "External-IP", "Port(s)", "Age", "*Selector"),
        _service,
    ),
    "persistentvolumeclaims": (
        _columns("Name", "Status", "Volume", "Capacity", "Access Modes", "StorageClass",
                 "VolumeAttributesClass", "Age", "*VolumeMode"),
        _claim,
    ),
    "jobs.batch": (
        _columns("Name", "Status", "Completions", "Duration", "Age", "*Containers", "*Images",
                 "*Selector"),
        _job,
    ),
    "events": (
        _columns("Last Seen", "Type", "Reason", "Object", "*Subobject", "*Source", "Message",
                 "*First Seen", "*Count", "*Name"),
        _event,
    ),
    "namespaces": (
        _columns("Name", "Status", "Age"),
        lambda obj, at: [name_of(obj), obj.get("status", {}).get("phase"), _age(obj, at)],
    ),
    "configmaps": (
        [*_columns("Name"), column("Data", "integer"), AGE],
        lambda obj, at: [name_of(obj), _data(obj), _age(obj, at)],
    ),
    "secrets": (
        [*_columns("Name", "Type"), column("Data", "integer"), AGE],
        lambda obj, at: [name_of(obj), obj.get("type", ""), _data(obj), _age(obj, at)],
    ),
    "leases.coordination.k8s.io": (
        _columns("Name", "Holder", "Age"),
        lambda obj, at: [
            name_of(obj), (obj.get("spec") or {}).get("holderIdentity", ""), _age(obj, at)],
    ),
    "customresourcedefinitions.apiextensions.k8s.io": (
        [*_columns("Name"), column("Created At", "date")],
        lambda obj, at: [name_of(obj), obj["metadata"].get("creationTimestamp")],
    ),
}  # fmt: skip


def built_in_printer(resource: Resource) -> Printer:
    """Return the columns of a built-in resource, and the function that makes a row."""
    return _PRINTERS.get(resource.key, ([NAME, AGE], lambda obj, at: [name_of(obj), _age(obj, at)]))
