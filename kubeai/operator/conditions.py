"""Builds a Model's status: replica counts, and conditions with reasons and messages. Pure.

| condition | true when |
|---|---|
| Ready | requests are answered, or would be after a cold start |
| Progressing | pods remain to be created, deleted or replaced |
| CacheLoaded | all files are in the cache (Models with a cacheProfile) |
| AdaptersLoaded | every ready replica serves every adapter (Models with adapters) |
| AliasesAccepted | all aliases belong to the Model (Models with aliases) |
| FallbacksAccepted | all fallbacks and the canary count (Models with one of these) |
| Degraded | part of the Model does not work and needs a person's attention |

Each reason is one word. docs/explain/life-of-a-model.md lists them. Called by `plan`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

import msgspec

from kubeai.api.model import (
    POD_MODEL_LABEL,
    Model,
    ModelStatus,
    ModelStatusCache,
    ModelStatusReplicas,
)
from kubeai.api.objects import Condition
from kubeai.errors import ModelError
from kubeai.operator.adapter_steps import AdaptersView
from kubeai.operator.cache.plan import CachePlan
from kubeai.operator.names import NO_NAMES, Ignored, ResolvedNames
from kubeai.operator.pods import Pod, Trouble

OURS = (
    "Ready",
    "Progressing",
    "CacheLoaded",
    "AdaptersLoaded",
    "AliasesAccepted",
    "FallbacksAccepted",
    "Degraded",
)
IGNORED_MAX = 10  # entries that a condition lists


class Facts(msgspec.Struct, kw_only=True):
    """Input of the conditions: the state once the plan's other actions are applied."""

    pods: Sequence[Pod]  # as observed
    left: Sequence[Pod]  # the observed replicas that are kept
    made: int = 0  # new replicas
    wanted: int = 0
    outdated: int = 0  # outdated pods among `left`
    error: ModelError | None = None  # why no pod can be built from the Model
    create_error: Trouble | None = None  # why the API rejected the last pod creation
    cache: CachePlan | None = None
    adapters: AdaptersView | None = None
    names: ResolvedNames = NO_NAMES
    external: bool = False  # another gateway sends the requests (proxy.mode)
    now_s: float = 0.0  # Unix time

    @property
    def all(self) -> int:
        """Replicas that will exist, ready or not."""
        return len(self.left) + self.made

    @property
    def ready(self) -> int:
        """Kept replicas that are ready; a new one cannot be yet."""
        return sum(pod.ready for pod in self.left)

    def trouble(self, pods: Sequence[Pod]) -> Trouble | None:
        """The first of the pods' troubles."""
        troubles = (pod.trouble_at(self.now_s) for pod in pods)
        return next((trouble for trouble in troubles if trouble is not None), None)


def status_of(model: Model, facts: Facts) -> ModelStatus:
    """The complete status. Changed conditions have no transition time yet: see `dated`."""
    if model.metadata.deletion_timestamp is not None:
        ours = [_condition("Ready", False, "Deleting", "the Model is being deleted")]
    else:
        ours = [_ready(model, facts), _progressing(facts)]
    if facts.cache is not None:
        ours.append(_cache_loaded(facts.cache))
    if facts.adapters is not None and model.spec.adapters:
        ours.append(_adapters_loaded(facts.adapters))
    if model.metadata.deletion_timestamp is None:
        ours += _names_accepted(model, facts.names)
    ours.append(_degraded(facts))
    others = [c for c in model.status.conditions if c.type not in OURS]
    cache = (
        ModelStatusCache(loaded=facts.cache.loaded)
        if facts.cache is not None
        else model.status.cache
    )
    return msgspec.structs.replace(
        model.status,
        replicas=ModelStatusReplicas(all=facts.all, ready=facts.ready),
        selector=f"app=model,{POD_MODEL_LABEL}={model.metadata.name}",
        cache=cache,
        failed_adapters=facts.adapters.failed if facts.adapters is not None else (),
        conditions=tuple(_since(model, c) for c in ours) + tuple(others),
    )


def dated(status: ModelStatus, now: datetime) -> ModelStatus:
    """The status with ``now`` as the transition time of our changed conditions."""
    conditions = (
        msgspec.structs.replace(c, last_transition_time=now)
        if c.type in OURS and c.last_transition_time is None
        else c
        for c in status.conditions
    )
    return msgspec.structs.replace(status, conditions=tuple(conditions))


def timeless(status: ModelStatus) -> ModelStatus:
    """The status without its conditions' transition times, for comparison."""
    conditions = (msgspec.structs.replace(c, last_transition_time=None) for c in status.conditions)
    return msgspec.structs.replace(status, conditions=tuple(conditions))


def only_counts(new: ModelStatus, old: ModelStatus) -> bool:
    """Whether only replica counts have changed, and more changes are expected."""
    now = {c.type: (c.status, c.reason) for c in new.conditions}
    before = {c.type: (c.status, c.reason) for c in old.conditions}
    _, counting = now["Ready"]
    if counting not in ("ReplicasStarting", "SomeReplicasReady"):
        return False
    if now["Progressing"][0] != "True":
        return False
    status_stays = all(before.get(t, ("False",))[0] == now[t][0] for t in now if t != "Progressing")
    others = now.keys() - {"Ready", "Progressing"}
    return status_stays and all(before.get(t, now[t]) == now[t] for t in others)


def is_growing(status: ModelStatus) -> bool:
    """Whether some replicas are ready and others, which may follow soon, are starting."""
    reasons = {c.type: (c.status, c.reason) for c in status.conditions}
    progressing = reasons.get("Progressing", ("False", ""))[0]
    return reasons["Ready"][1] == "SomeReplicasReady" and progressing == "True"


def _ready(model: Model, facts: Facts) -> Condition:
    ready, wanted = facts.ready, facts.wanted
    if facts.error is not None:
        return _condition("Ready", False, facts.error.reason, str(facts.error))
    if ready and ready >= wanted:
        return _condition("Ready", True, "AllReplicasReady", _of(ready, max(ready, wanted)))
    if ready:
        return _condition("Ready", True, "SomeReplicasReady", _of(ready, wanted))
    if wanted == 0 and model.spec.autoscaling_disabled:
        message = "replicas is 0 and autoscaling is disabled: requests wait for a replica"
        return _condition("Ready", False, "ScaledToZero", message)
    if wanted == 0 and facts.external:
        message = "replicas is 0, and KubeAI does not scale it (proxy.mode: external); set replicas"
        return _condition("Ready", False, "ScaledToZero", message)
    if wanted == 0:
        return _condition("Ready", True, "ScaledToZero", "the next request starts a replica")
    if facts.cache is not None and not facts.cache.loaded:
        return _condition("Ready", False, "CacheNotLoaded", facts.cache.message)
    trouble = facts.create_error or facts.trouble(facts.left) or facts.trouble(facts.pods)
    if trouble is not None:
        return _condition("Ready", False, trouble.reason, trouble.text)
    return _condition("Ready", False, "ReplicasStarting", _of(0, wanted))


def _progressing(facts: Facts) -> Condition:
    if facts.error is not None:
        message = "no pods can be created from this Model"
        return _condition("Progressing", False, facts.error.reason, message)
    if facts.create_error is not None:
        trouble = facts.create_error
        return _condition("Progressing", False, trouble.reason, trouble.message)
    but = _but(facts)
    if facts.outdated:
        message = f"{facts.outdated} of {facts.all} replicas are outdated and will be replaced"
        return _condition("Progressing", True, "RollingOut", message + but)
    if facts.all > facts.wanted:
        message = f"scaling from {facts.all} to {facts.wanted} replicas"
        return _condition("Progressing", True, "ScalingDown", message)
    if facts.ready < facts.wanted:
        message = _of(facts.ready, facts.wanted)
        return _condition("Progressing", True, "ReplicasStarting", message + but)
    return _condition("Progressing", False, "UpToDate", "all replicas are up to date")


def _cache_loaded(cache: CachePlan) -> Condition:
    return _condition("CacheLoaded", cache.loaded, cache.reason, cache.message)


def _adapters_loaded(adapters: AdaptersView) -> Condition:
    ready, complete = adapters.ready, adapters.complete
    if adapters.trouble is not None:
        return _condition("AdaptersLoaded", False, "LoadFailed", adapters.trouble.message)
    if not ready:
        message = "no replica is ready; each replica loads the adapters when it starts"
        return _condition("AdaptersLoaded", False, "NoReplicas", message)
    message = f"{complete} of {ready} ready replica{'s' * (ready > 1)} serve{'s' * (ready == 1)}"
    done = complete == ready
    reason = "Loaded" if done else "Loading"
    return _condition("AdaptersLoaded", done, reason, message + " every adapter")


def _names_accepted(model: Model, names: ResolvedNames) -> Iterator[Condition]:
    spec = model.spec
    if spec.aliases:
        yield _accepted("AliasesAccepted", names.ignored_aliases, "aliases")
    if spec.fallbacks or spec.canary is not None:
        yield _accepted("FallbacksAccepted", names.ignored_references, "fallbacks")


def _accepted(type_: str, ignored: Sequence[Ignored], what: str) -> Condition:
    if not ignored:
        return _condition(type_, True, "Accepted", f"all {what} are in use")
    messages = [one.message for one in ignored[:IGNORED_MAX]]
    if len(ignored) > IGNORED_MAX:
        messages.append(f"and {len(ignored) - IGNORED_MAX} more")
    return _condition(type_, False, ignored[0].reason, "; ".join(messages))


def _degraded(facts: Facts) -> Condition:
    troubles = [
        Trouble(facts.error.reason, str(facts.error)) if facts.error is not None else None,
        facts.create_error,
        _cache_trouble(facts.cache),
        facts.trouble(facts.left),
        _adapters_trouble(facts.adapters),
    ]
    trouble = next((one for one in troubles if one is not None), None)
    if trouble is None:
        return _condition("Degraded", False, "AsExpected", "no problems detected")
    return _condition("Degraded", True, trouble.reason, trouble.text)


def _cache_trouble(cache: CachePlan | None) -> Trouble | None:
    return Trouble("CacheFailed", cache.message) if cache is not None and cache.failed else None


def _adapters_trouble(adapters: AdaptersView | None) -> Trouble | None:
    if adapters is None or adapters.trouble is None:
        return None
    return Trouble("AdaptersFailed", adapters.trouble.message)


def _but(facts: Facts) -> str:
    """A suffix for a message: why a replica does not become ready."""
    trouble = facts.trouble(facts.left)
    return "" if trouble is None else f", but {trouble.reason}: {trouble.text}"


def _of(ready: int, wanted: int) -> str:
    return f"{ready} of {wanted} replica{'s are' if wanted != 1 else ' is'} ready"


def _condition(type_: str, holds: bool, reason: str, message: str) -> Condition:
    return Condition(
        type=type_, status="True" if holds else "False", reason=reason, message=message
    )


def _since(model: Model, new: Condition) -> Condition:
    """The condition with its transition time kept if the status is unchanged, else without one."""
    old = next((c for c in model.status.conditions if c.type == new.type), None)
    return msgspec.structs.replace(
        new,
        last_transition_time=(
            old.last_transition_time if old is not None and old.status == new.status else None
        ),
        observed_generation=model.metadata.generation,
    )
