"""Decides why a Model or adapter has no endpoint, and from when requests for it fail.

Each replica of KubeAI decides this by itself, from the Model's conditions (which the leader writes)
and from its pods. Conditions of an earlier generation are ignored, so a Model that has just been
edited is not judged by its former spec.

| problem | requests fail |
|---|---|
| an invalid Model, or the API rejects its pods (``AT_ONCE``, ``POD_REFUSED``) | at once |
| a pod that cannot recover by waiting (``POD_AT_ONCE``) | at once |
| a pod that waits for a node (``NEEDS_NODE``) | after ``unschedulableGrace`` |
| any other pod trouble, or a failed cache or adapter load | after ``startFailureGrace`` |
| none known, or a container that exited once: replicas are starting | after ``holdTimeout`` only |

A grace period starts when this replica of KubeAI first sees the trouble, not when a request
arrives. It restarts with a new pod template, and after a replica was ready or none was wanted, so a
Model that is scaled up from zero always gets a new attempt. A ready replica, or one that starts
without trouble, lifts every block of its Model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from kubeai.api.config.system import GatewayConfig
from kubeai.api.model import Model
from kubeai.api.objects import Condition
from kubeai.operator.plan import wanted_replicas
from kubeai.operator.pods import Pod
from kubeai.podspec.cache import LOAD_JOB_PREFIX
from kubeai.routing.routes import Block

# Reasons of a ModelError: only a change to the Model or to the system config helps.
AT_ONCE = frozenset(
    (
        "InvalidArgs",
        "InvalidFeatures",
        "InvalidFile",
        "InvalidModel",
        "InvalidPatch",
        "InvalidProfile",
        "InvalidURL",
        "NoImage",
        "NoLeaderWorkerSets",
    )
)
POD_REFUSED = "PodRefused"  # the leader retries: a quota may have room by then
# Reasons of pods. Except for InvalidImageName, they come from `kubeai local`.
POD_AT_ONCE = frozenset(
    (
        "EngineNotInstalled",
        "InvalidImageName",
        "InvalidPod",
        "UnknownImage",
        "UnsupportedVolume",
        "VolumeNotFound",
    )
)
NEEDS_NODE = frozenset(("Unschedulable", "SchedulingGated"))
# A container that has exited once is restarted; its start may take minutes.
STARTS_AGAIN = frozenset(("ContainerExited",))
# Reasons of CacheLoaded that are failures; the others are progress.
CACHE_FAILED = frozenset(("LoadFailed", "NoJobs", "NoPod", "PodRefused"))
ADAPTERS_FAILED = "AdaptersFailed"
TROUBLES_MAX = 64  # remembered pod troubles per model

_LOAD_JOB = LOAD_JOB_PREFIX.rstrip("-")
_CACHE, _ADAPTER = "cache", "adapter"


class Blocks(msgspec.Struct, frozen=True):
    """Why one Model, or some of its adapters, cannot serve."""

    model: Block | None = None
    adapters: dict[str, Block] = {}


NO_BLOCKS = Blocks()


class _Memory(msgspec.Struct):
    uid: str  # the Model's
    since_s: dict[tuple[str, ...], float] = {}  # a trouble → when it was first seen


class BlockTracker:
    """Tracks since when each Model has been in trouble. Used by the operator for the routes."""

    def __init__(
        self,
        config: GatewayConfig,
        clock: Callable[[], float] = time.monotonic,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._clock = clock
        self._unix_time = unix_time
        self._memories: dict[str, _Memory] = {}

    def observe(self, model: Model, pods: Iterable[Pod]) -> Blocks:
        """Call for every change of the Model or its pods, including the pods of its Jobs."""
        name, uid = model.metadata.name, model.metadata.uid
        memory = self._memories.get(name)
        if memory is None or memory.uid != uid:
            memory = self._memories[name] = _Memory(uid)
        now_s = self._unix_time()
        pods = [
            msgspec.structs.replace(pod, trouble=pod.trouble_at(now_s))
            for pod in pods
            if not pod.terminating
        ]
        replicas = [pod for pod in pods if pod.owner == uid and not pod.draining_since_s]
        serving = [pod for pod in replicas if pod.serves]
        if serving:
            return Blocks(None, self._adapters(model, serving, memory))
        jobs = [pod for pod in pods if pod.job == _LOAD_JOB and not pod.finished]
        return Blocks(self._model(model, replicas, jobs, memory))

    def forget(self, name: str) -> None:
        """The Model is gone."""
        self._memories.pop(name, None)

    # -- the Model itself --------------------------------------------------------------------------

    def _model(
        self, model: Model, replicas: Sequence[Pod], jobs: Sequence[Pod], memory: _Memory
    ) -> Block | None:
        _forget_former(model, [*replicas, *jobs], memory)
        if _starting(replicas):
            return _progress(model, replicas)
        if refused := _refused(model):
            return refused
        if failed := self._cache(model, jobs, memory):
            return failed
        troubled = [pod for pod in replicas if pod.trouble is not None]
        if troubled and wanted_replicas(model):
            return self._last([self._pod(pod, memory) for pod in troubled])
        return _progress(model, replicas)

    def _cache(self, model: Model, jobs: Sequence[Pod], memory: _Memory) -> Block | None:
        """The block of a Model whose files are not loaded yet."""
        loaded = _condition(model, "CacheLoaded")
        if loaded is None or loaded.status != "False" or _starting(jobs):
            return None
        if jobs:
            return self._last([self._pod(pod, memory) for pod in jobs])
        if loaded.reason not in CACHE_FAILED:
            return None
        since_s = self._since_s((_CACHE, loaded.reason), memory)
        fails_at_s = since_s + self._config.start_failure_grace_s
        return Block(loaded.reason, loaded.message, fails_at_s)

    def _pod(self, pod: Pod, memory: _Memory) -> Block:
        assert pod.trouble is not None, "the caller looks for pods in trouble"
        reason, message = pod.trouble.reason, pod.trouble.message
        if reason in POD_AT_ONCE:
            return Block(reason, message, 0.0, retry=False)
        needs_node = reason in NEEDS_NODE
        config = self._config
        grace_s = config.unschedulable_grace_s if needs_node else config.start_failure_grace_s
        return Block(reason, message, self._since_s((_group(pod), reason), memory) + grace_s)

    @staticmethod
    def _last(blocks: Sequence[Block]) -> Block:
        """The block that fails requests last: another replica may still start within its grace."""
        return max(blocks, key=lambda block: (block.fails_at_s, block.reason, block.message))

    # -- adapters ----------------------------------------------------------------------------------

    def _adapters(self, model: Model, serving: Sequence[Pod], memory: _Memory) -> dict[str, Block]:
        """The blocks of adapters that failed to load and that no replica serves."""
        loaded = {name for pod in serving for name in pod.loaded}
        current = _condition(model, "AdaptersLoaded") is not None
        failed = {one.name: one.message for one in model.status.failed_adapters if current}
        keys = {
            one.name: (_ADAPTER, one.name, one.url)
            for one in model.spec.adapters
            if one.name in failed and one.name not in loaded
        }
        for key in memory.since_s.keys() - keys.values():  # pods' troubles too: a replica serves
            del memory.since_s[key]
        grace_s = self._config.start_failure_grace_s
        return {
            name: Block(ADAPTERS_FAILED, failed[name], self._since_s(key, memory) + grace_s)
            for name, key in keys.items()
        }

    def _since_s(self, trouble: tuple[str, ...], memory: _Memory) -> float:
        return memory.since_s.setdefault(trouble, self._clock())


def _group(pod: Pod) -> str:
    """The group of pods that share a trouble: one template's pods, or those loading the cache."""
    return _CACHE if pod.job else pod.hash or ""


def _forget_former(model: Model, pods: Sequence[Pod], memory: _Memory) -> None:
    """Drop troubles of other templates, of earlier attempts, and of pods since scheduled.

    Nothing is dropped while a crashing engine runs between two crashes, or during the moment
    between the end of a pod and its replacement.
    """
    wanted = wanted_replicas(model) > 0
    templates = {_group(pod) for pod in pods if not pod.job}
    present = {(_group(pod), pod.trouble.reason) for pod in pods if pod.trouble is not None}
    for key in list(memory.since_s):
        group, reason = key[:2]
        former = not wanted or (templates and group not in templates)
        if (former and group != _CACHE) or (reason in NEEDS_NODE and key not in present):
            del memory.since_s[key]
    while len(memory.since_s) > TROUBLES_MAX:
        del memory.since_s[next(iter(memory.since_s))]


def _starting(pods: Sequence[Pod]) -> bool:
    """Whether any of the pods may still become ready, as far as known."""
    return any(
        (pod.trouble is None or pod.trouble.reason in STARTS_AGAIN) and not pod.finished
        for pod in pods
    )


def _refused(model: Model) -> Block | None:
    """The block of a Model for which no pod can be created."""
    for type_ in ("Ready", "Progressing"):
        found = _condition(model, type_)
        if found is None or found.status != "False":
            continue
        if found.reason in AT_ONCE or found.reason == POD_REFUSED:
            return Block(found.reason, found.message, 0.0, retry=found.reason == POD_REFUSED)
    return None


def _progress(model: Model, replicas: Sequence[Pod]) -> Block | None:
    """What the Model is waiting for, as a block that never fails requests."""
    ready = _condition(model, "Ready")
    if ready is None or ready.status != "False":
        return None
    # The condition's message ends with the container's last lines, which are not for API clients.
    messages = (
        pod.trouble.message
        for pod in replicas
        if pod.trouble is not None and pod.trouble.reason == ready.reason
    )
    return Block(ready.reason, next(messages, ready.message), math.inf)


def _condition(model: Model, type_: str) -> Condition | None:
    """The condition, if it was observed at the Model's current generation."""
    found = next((c for c in model.status.conditions if c.type == type_), None)
    if found is None or (found.observed_generation or 0) < model.metadata.generation:
        return None
    return found


__all__ = ["NO_BLOCKS", "BlockTracker", "Blocks"]
