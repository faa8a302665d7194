"""What `kubeai local` reports: log events for changes of pods and Models, and the table of Models.

:class:`Report` watches the pods and Models of the served namespace. It logs each change of a pod's
state, and why a Model cannot run. On a terminal it also keeps the table at the bottom up to date.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kubeai.api.model import POD_MODEL_LABEL
from kubeai.kube.client import Kube
from kubeai.kube.resources import MODELS, PODS, Resource
from kubeai.local.kubelet.runtime.logs import last_lines
from kubeai.logs import get_logger
from kubeai.podspec.cache import JOB_LABEL, LOAD_JOB_PREFIX
from kubeai.supervisor.console.state import ModelSummary

log = get_logger(__name__)

Object = dict[str, Any]
Show = Callable[[Sequence[Object]], None]
Models = Callable[[], Sequence[ModelSummary]]

TABLE_INTERVAL_S = 0.5
_MOCK_ENGINE = "kubeai.org/mock-engine"
# Reasons of a container that has not started yet, as every container has.
_STARTING = (None, "ContainerCreating", "PodInitializing")


class Report:
    """See the module. :meth:`run` runs until it is cancelled."""

    def __init__(self, kube: Kube, data_dir: Path, show: Show | None, models: Models) -> None:
        """``show`` is called with a summary of each Model; None: there is no table.

        ``models`` returns the summaries.
        """
        self._kube = kube
        self._data_dir = data_dir
        self._show = show
        self._models = models
        self._loaders: dict[str, Object] = {}  # Model → the pod that downloads its files
        self._logged: dict[tuple[str, str], tuple[str, Object]] = {}

    async def run(self) -> None:
        """Log changes and update the table until cancelled."""
        loads = f"{JOB_LABEL}={LOAD_JOB_PREFIX.rstrip('-')}"
        await asyncio.gather(
            self._follow(PODS, "app=model", self._pod_changed),
            self._follow(PODS, loads, self._loader_changed),
            self._follow(MODELS, "", self._model_changed),
            self._update_table(),
        )

    async def _follow(
        self, resource: Resource, labels: str, changed: Callable[[str, Object], None]
    ) -> None:
        def replaced(objects: list[Object]) -> None:
            for obj in objects:
                changed("ADDED", obj)

        await self._kube.follow(
            resource, self._kube.namespace, labels=labels, replaced=replaced, changed=changed
        )

    def _pod_changed(self, kind: str, pod: Object) -> None:
        self._log("pod", kind, pod, pod_state(pod))

    def _loader_changed(self, kind: str, pod: Object) -> None:
        model = pod["metadata"]["labels"].get(POD_MODEL_LABEL, "")
        if kind == "DELETED":
            self._loaders.pop(model, None)
        else:
            self._loaders[model] = pod

    def _model_changed(self, kind: str, model: Object) -> None:
        self._log("model", kind, model, model_problem(model))

    def _log(self, what: str, kind: str, obj: Object, state: tuple[str, Object]) -> None:
        name = obj["metadata"]["name"]
        event, fields = ("gone", {}) if kind == "DELETED" else state
        if event and self._logged.get((what, name)) != (event, fields):
            write = log.warning if "message" in fields else log.info
            write(f"{what} {event}", **{what: name}, **fields)
        self._logged[what, name] = event, fields
        if kind == "DELETED":
            del self._logged[what, name]

    async def _update_table(self) -> None:
        while self._show is not None:
            await asyncio.sleep(TABLE_INTERVAL_S)
            self._show([self._row(summary) for summary in self._models()])

    def _row(self, summary: ModelSummary) -> Object:
        row: Object = msgspec.to_builtins(summary)
        loader = self._loaders.get(summary.name)
        if loader is not None and summary.state == "Starting":
            row["message"] = self._download(loader) or summary.message
        return row

    def _download(self, loader: Object) -> str:
        """The last line of a loader's log, which is its progress; empty if there is none yet."""
        meta, statuses = loader["metadata"], loader.get("status", {}).get("containerStatuses", [])
        if not statuses:
            return ""
        pod = f"{meta['namespace']}_{meta['name']}_{meta['uid']}"
        run = f"{statuses[0].get('restartCount', 0)}.log"
        text = last_lines(self._data_dir / "pods" / pod / statuses[0]["name"] / run)
        return text.rstrip().rpartition("\n")[2]


def model_problem(model: Object) -> tuple[str, Object]:
    """Why a Model is neither ready nor progressing; an empty event otherwise."""
    conditions = _conditions(model)
    ready, progressing = conditions.get("Ready"), conditions.get("Progressing")
    if not ready or not progressing or "True" in (ready["status"], progressing["status"]):
        return "", {}
    return "cannot run", {"reason": ready["reason"], "message": ready["message"]}


def pod_state(pod: Object) -> tuple[str, Object]:
    """A pod's state as a log event. Fields have a ``message`` if something is wrong."""
    status, meta = pod.get("status", {}), pod["metadata"]
    if meta.get("deletionTimestamp"):
        return "terminating", {}
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting") or {}
        last = container.get("lastState", {}).get("terminated")
        if last and waiting.get("reason") == "CrashLoopBackOff":
            message = f"exits with {last['exitCode']}; kubectl logs {meta['name']}"
            return "crashes", {"message": message}
        if waiting.get("reason") not in _STARTING:
            return "waits", {"reason": waiting["reason"], "message": waiting.get("message", "")}
    mock = {"mock_engine": True} if meta.get("annotations", {}).get(_MOCK_ENGINE) == "true" else {}
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return "waits", {"reason": condition["reason"], "message": condition["message"]}
        if condition["type"] == "Ready" and condition["status"] == "True":
            return "ready", {"address": status.get("podIP", ""), **mock}
    return "starting", mock


def _conditions(model: Object) -> dict[str, Object]:
    return {c["type"]: c for c in model.get("status", {}).get("conditions", [])}
