"""Tables (meta.k8s.io/v1 Table): what ``kubectl get`` prints.

Columns and cells of built-in resources follow a real API server. A custom resource has the columns
of its CRD, evaluated with the JSONPath subset that CRDs may use.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import orjson

from kubeai.local.apiserver.kinds.metadata import parse_time
from kubeai.local.apiserver.kinds.resources import Resource

Object = dict[str, Any]
Row = Callable[[Object, datetime], list[Any]]

_PARTIAL = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1"}


def table(
    resource: Resource,
    objects: Iterable[Object],
    list_metadata: Object,
    include: str = "Metadata",
    headers: bool = True,
) -> Object:
    """Return a Table of objects. `include` selects each row's object: Metadata, Object or None."""
    columns, row = _printer(resource)
    at = datetime.now(UTC)
    return {
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": list_metadata,
        "columnDefinitions": columns if headers else [],
        "rows": [
            {"cells": row(obj, at), "object": _row_object(obj, include)}
            if include != "None"
            else {"cells": row(obj, at)}
            for obj in objects
        ],
    }


def _row_object(obj: Object, include: str) -> Object:
    return obj if include == "Object" else partial(obj)


def partial(obj: Object) -> Object:
    """Return the object as a PartialObjectMetadata."""
    return {**_PARTIAL, "metadata": obj["metadata"]}


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


def _printer(resource: Resource) -> tuple[list[Object], Row]:
    if resource.columns is not None:
        return _custom(resource.columns)
    return _PRINTERS.get(resource.key, ([NAME, AGE], lambda obj, at: [_name(obj), _age(obj, at)]))


# Values.


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


def _name(obj: Object) -> str:
    return str(obj["metadata"]["name"])


def _age(obj: Object, at: datetime) -> str:
    return since(obj["metadata"].get("creationTimestamp"), at)


def _labels(labels: Object | None) -> str:
    pairs = ",".join(f"{key}={value}" for key, value in sorted((labels or {}).items()))
    return pairs or "<none>"


# Custom resources.


def _custom(columns: tuple[Object, ...]) -> tuple[list[Object], Row]:
    if not columns:
        columns = ({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},)
    definitions = [NAME] + [
        {
            "name": c["name"],
            "type": c["type"],
            "format": c.get("format", ""),
            "description": c.get("description", ""),
            "priority": c.get("priority", 0),
        }
        for c in columns
    ]
    paths = [(parse_path(c["jsonPath"]), c["type"]) for c in columns]

    def row(obj: Object, at: datetime) -> list[Any]:
        return [_name(obj), *(_cell(find(path, obj), kind, at) for path, kind in paths)]

    return definitions, row


def _cell(values: list[Any], kind: str, at: datetime) -> Any:
    if not values or values[0] is None:
        return None
    value = values[0]
    if kind == "date":
        return since(value, at) if isinstance(value, str) else "<invalid>"
    if kind == "integer":
        return int(value) if isinstance(value, (int, float)) else None
    if kind == "number":
        return value if isinstance(value, (int, float)) else None
    if kind == "boolean":
        return value if isinstance(value, bool) else None
    if isinstance(value, (dict, list)):
        return orjson.dumps(value).decode()
    return str(value).lower() if isinstance(value, bool) else str(value)


Step = tuple[str, Any]
_STEP = re.compile(
    r"""\.(?P<name>(?:\\.|[^.\[\]\\])+)
      | \[\?\(\s*@\.(?P<where>[^=!\s]+)\s*==\s*(?P<q>["'])(?P<is>.*?)(?P=q)\s*\)\]
      | \[(?P<index>-?\d+)\]
      | \[(?P<star>\*)\]
      | \[(?P<quote>["'])(?P<key>.*?)(?P=quote)\]""",
    re.VERBOSE,
)


def parse_path(text: str) -> list[Step]:
    """Parse a JSONPath such as ``.status.conditions[?(@.type=="Ready")].status``."""
    text = text.strip().removeprefix("{").removesuffix("}").removeprefix("$")
    steps: list[Step] = []
    position = 0
    while position < len(text):
        match = _STEP.match(text, position)
        if match is None:
            raise ValueError(f"{text}: cannot read {text[position:]!r}")
        if match["name"]:
            steps.append(("name", re.sub(r"\\(.)", r"\1", match["name"])))
        elif match["where"]:
            steps.append(("where", (match["where"].split("."), match["is"])))
        elif match["index"]:
            steps.append(("index", int(match["index"])))
        elif match["star"]:
            steps.append(("all", None))
        else:
            steps.append(("name", match["key"]))
        position = match.end()
    return steps


def find(steps: list[Step], obj: Any) -> list[Any]:
    """Return all values that the path matches."""
    found = [obj]
    for kind, what in steps:
        found = [value for place in found for value in _step(kind, what, place)]
    return found


def _step(kind: str, what: Any, place: Any) -> Iterator[Any]:
    if (kind == "name" and isinstance(place, dict) and what in place) or (
        kind == "index" and isinstance(place, list) and -len(place) <= what < len(place)
    ):
        yield place[what]
    elif kind == "all" and isinstance(place, (dict, list)):
        yield from place.values() if isinstance(place, dict) else place
    elif kind == "where" and isinstance(place, list):
        path, wanted = what
        for item in place:
            value: Any = item
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if value == wanted:
                yield item


# Pods.


def _pod(pod: Object, at: datetime) -> list[Any]:
    spec, status = pod["spec"], pod.get("status", {})
    ready, restarts, last = _containers_of(status, at)
    address = status.get("podIP") or next((ip.get("ip") for ip in status.get("podIPs") or ()), None)
    gates = spec.get("readinessGates")
    return [
        _name(pod),
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
        _name(node), state, ",".join(roles) or "<none>", _age(node, at),
        info.get("kubeletVersion", ""), addresses.get("InternalIP", "<none>"),
        addresses.get("ExternalIP", "<none>"), info.get("osImage", "<unknown>"),
        info.get("kernelVersion", "<unknown>"), info.get("containerRuntimeVersion", "<unknown>"),
    ]  # fmt: skip


def _service(service: Object, at: datetime) -> list[Any]:
    spec = service.get("spec", {})
    ports = ",".join(f"{p.get('port')}/{p.get('protocol')}" for p in spec.get("ports") or ())
    return [
        _name(service), spec.get("type"), spec.get("clusterIP") or "<none>", "<none>",
        ports or "<none>", _age(service, at), _labels(spec.get("selector")),
    ]  # fmt: skip


_MODES = {"ReadWriteOnce": "RWO", "ReadOnlyMany": "ROX", "ReadWriteMany": "RWX",
          "ReadWriteOncePod": "RWOP"}  # fmt: skip


def _claim(claim: Object, at: datetime) -> list[Any]:
    spec, status = claim.get("spec", {}), claim.get("status", {})
    phase = "Terminating" if claim["metadata"].get("deletionTimestamp") else status.get("phase")
    modes = ",".join(_MODES.get(mode, mode) for mode in status.get("accessModes") or ())
    return [
        _name(claim), phase, spec.get("volumeName", ""),
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
        _name(job), state, f"{status.get('succeeded', 0)}/{_completions(spec)}", lasted,
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
        _name(event),
    ]  # fmt: skip


def _data(obj: Object) -> int:
    return len(obj.get("data") or ()) + len(obj.get("binaryData") or ())


def _columns(*names: str) -> list[Object]:
    """Return columns. A leading ``*`` marks a column of ``-o wide``."""
    return [
        column(name.removeprefix("*"), wide=name.startswith("*"), form="name" * (name == "Name"))
        for name in names
    ]


_PRINTERS: dict[str, tuple[list[Object], Row]] = {
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
        lambda obj, at: [_name(obj), obj.get("status", {}).get("phase"), _age(obj, at)],
    ),
    "configmaps": (
        [*_columns("Name"), column("Data", "integer"), AGE],
        lambda obj, at: [_name(obj), _data(obj), _age(obj, at)],
    ),
    "secrets": (
        [*_columns("Name", "Type"), column("Data", "integer"), AGE],
        lambda obj, at: [_name(obj), obj.get("type", ""), _data(obj), _age(obj, at)],
    ),
    "leases.coordination.k8s.io": (
        _columns("Name", "Holder", "Age"),
        lambda obj, at: [
            _name(obj), (obj.get("spec") or {}).get("holderIdentity", ""), _age(obj, at)],
    ),
    "customresourcedefinitions.apiextensions.k8s.io": (
        [*_columns("Name"), column("Created At", "date")],
        lambda obj, at: [_name(obj), obj["metadata"].get("creationTimestamp")],
    ),
}  # fmt: skip
