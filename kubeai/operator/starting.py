"""What the starting replicas of a Model do, and how long a start takes. For held requests.

:class:`StartTracker` describes the replica that is closest to ready in a short phrase, which
clients see while they wait, and measures the time from a pod's creation until it is ready. Each
replica of KubeAI does so by itself. No I/O. Called by the operator for the routes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median

import msgspec

from kubeai.api.model import Model
from kubeai.operator.blocks import NEEDS_NODE
from kubeai.operator.plan import wanted_replicas
from kubeai.operator.pods import STEPS, Pod
from kubeai.podspec.cache import LOAD_JOB_PREFIX

STARTS_MAX = 5  # the latest measured starts of a Model, whose median is its start time

_PHRASES = {
    "Pending": "waiting for a node",
    "Preparing": "creating the container",
    "PullingImage": "pulling image",
    "Initializing": "running init containers",
    "Loading": "loading the model",
}
_TROUBLES = dict.fromkeys(NEEDS_NODE, "waiting for a node") | {
    "NoLeaderPod": "waiting for the pods of the replica",
    "ImagePullBackOff": "image cannot be pulled, trying again",
    "ContainerExited": "engine exited, restarting",
    "CrashLoopBackOff": "engine keeps exiting, restarting",
    "OOMKilled": "engine ran out of memory, restarting",
}
_LOAD_JOB = LOAD_JOB_PREFIX.rstrip("-")


class Start(msgspec.Struct, frozen=True):
    """A Model's start, as its Route describes it."""

    progress: str = ""
    start_s: int = 0


NO_START = Start()


class _Memory(msgspec.Struct):
    uid: str  # the Model's
    measured: frozenset[str] = frozenset()  # uids of the present pods that have been ready
    starts_s: tuple[float, ...] = ()


class StartTracker:
    """Remembers the start times of each Model's latest replicas."""

    def __init__(self) -> None:
        self._memories: dict[str, _Memory] = {}

    def observe(self, model: Model, pods: Iterable[Pod]) -> Start:
        """Call for every change of the Model or its pods, including the pods of its Jobs."""
        name, uid = model.metadata.name, model.metadata.uid
        memory = self._memories.get(name)
        if memory is None or memory.uid != uid:
            memory = self._memories[name] = _Memory(uid)
        pods = list(pods)
        replicas = [pod for pod in pods if pod.owner == uid]
        _measure(replicas, memory)
        start_s = max(1, math.ceil(median(memory.starts_s))) if memory.starts_s else 0
        jobs = [pod for pod in pods if pod.job == _LOAD_JOB and not pod.terminating]
        return Start(_progress(model, [pod for pod in replicas if pod.counts], jobs), start_s)

    def forget(self, name: str) -> None:
        """The Model is gone."""
        self._memories.pop(name, None)


def _measure(replicas: Sequence[Pod], memory: _Memory) -> None:
    """Add the start times of replicas that are ready for the first time.

    A pod whose engine has restarted may have been ready before it was first seen.
    """
    for pod in replicas:
        if pod.ready_since_s and pod.uid not in memory.measured and not pod.restarts:
            took_s = pod.ready_since_s - pod.created_s
            if pod.created_s and took_s >= 0:  # the two clocks may differ
                memory.starts_s = (*memory.starts_s, took_s)[-STARTS_MAX:]
    ready = {pod.uid for pod in replicas if pod.ready_since_s}
    memory.measured = frozenset((memory.measured | ready) & {pod.uid for pod in replicas})


def _progress(model: Model, replicas: Sequence[Pod], jobs: Sequence[Pod]) -> str:
    if any(pod.serves for pod in replicas):
        return ""
    wanted = wanted_replicas(model)
    if replicas:
        return _of_replicas(replicas, wanted)
    loaded = next((c for c in model.status.conditions if c.type == "CacheLoaded"), None)
    if model.spec.cache_profile and wanted and (loaded is None or loaded.status != "True"):
        running = any(pod.step == "Loading" for pod in jobs)
        return "downloading to the cache" if running else "preparing the download to the cache"
    return "creating a replica"


def _of_replicas(replicas: Sequence[Pod], wanted: int) -> str:
    """The phrase for the replica that is closest to ready, and how many are as far as it."""
    best = max(replicas, key=lambda pod: (pod.trouble is None, STEPS.index(pod.step)))
    phrase = _phrase(best)
    total = max(wanted, len(replicas))
    alike = sum(_phrase(pod) == phrase for pod in replicas)
    return phrase if total == 1 else f"{phrase}, {alike} of {total}"


def _phrase(pod: Pod) -> str:
    if pod.trouble is not None:
        return _TROUBLES.get(pod.trouble.reason, pod.trouble.reason)
    return _PHRASES[pod.step]


__all__ = ["NO_START", "Start", "StartTracker"]
