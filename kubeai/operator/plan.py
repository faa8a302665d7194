"""Plans the next actions for one Model from its desired and observed state.

Pure and level-based: :func:`plan` depends only on the current state, and applying its actions in
order moves the Model towards the desired state. Called by the controller for every reconcile; an
empty list means that there is nothing to do.

Replacing outdated pods keeps these promises, which the tests check on random histories:

- never more than replicas + surge pods (terminating pods are not counted);
- outdated pods that are not ready are deleted at once: they serve nobody. If there is a surge, one
  that has served is kept while no pod is ready: it may only be overloaded, and serve again before
  the new ones do;
- outdated pods that are ready are removed one at a time, and only while the wanted number is ready
  without them (with surge 0: while all wanted pods are ready); so the rollout of a broken version
  stops after ``surge`` pods, and the old pods keep serving;
- a new pod counts as ready for this purpose once it serves the adapters that the old pods serve.

No pod is deleted while requests are sent to it: it is drained first, for at most ``drainTimeout``.
A draining pod is not a replica, but becomes one again if more replicas are wanted before it is
deleted.

No pod is created before the Model's files are in its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import msgspec

from kubeai.api.config.system import ModelRollouts, SystemConfig
from kubeai.api.model import FEATURE_LABEL_PREFIX, POD_MODEL_LABEL, Model, ModelStatus
from kubeai.errors import ModelError
from kubeai.operator.adapter_steps import AdaptersView
from kubeai.operator.cache.plan import (
    FINALIZER,
    CacheAction,
    CachePlan,
    CacheView,
    has_cache,
    plan_cache,
    plan_eviction,
)
from kubeai.operator.conditions import Facts, dated, status_of
from kubeai.operator.names import NO_NAMES, ResolvedNames
from kubeai.operator.pods import HASH_ANNOTATION, POD_HASH_LABEL, Pod, Trouble
from kubeai.podspec import build_replica
from kubeai.podspec.groups import set_name, suffix

MANAGED_BY_LABEL, MANAGED_BY = "app.kubernetes.io/managed-by", "kubeai"


def _idle(_: str) -> int:
    return 0


def _unused(_: str) -> bool:
    return False


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """The observed state of one Model, including the controller's own unobserved writes."""

    pods: tuple[Pod, ...] = ()  # owned by this very Model (uid)
    taken: frozenset[str] = frozenset()  # pod names that are not available
    replace_finished: bool = True  # False: pods failed recently, wait before creating new ones
    create_error: Trouble | None = None  # why the last pod creation was rejected
    in_flight: Callable[[str], int] = _idle  # in-flight requests by pod name
    # Whether any worker of any KubeAI replica may still send requests to a pod or has some there.
    in_use: Callable[[str], bool] = _unused
    no_sets: str = ""  # why replicas on several nodes cannot be created, if they cannot
    cache: CacheView = CacheView(unknown="the cache has not been observed yet")
    adapters: AdaptersView | None = None  # None: the Model has none
    names: ResolvedNames = NO_NAMES


class CreatePod(msgspec.Struct, frozen=True):
    """Create a replica under a name that is available; ``hash`` is of its template.

    ``grouped``, here and below: it is a LeaderWorkerSet rather than a pod.
    """

    name: str
    manifest: dict[str, Any]
    hash: str
    grouped: bool = False


class DeletePod(msgspec.Struct, frozen=True):
    """Delete exactly the pod with this uid; ``why`` is for the Model's Events."""

    name: str
    uid: str
    why: str
    grouped: bool = False


class DrainPod(msgspec.Struct, frozen=True):
    """Stop sending new requests to the pod."""

    name: str
    uid: str
    why: str
    grouped: bool = False


class UndrainPod(msgspec.Struct, frozen=True):
    """Return a draining pod to service."""

    name: str
    uid: str
    grouped: bool = False


class AdoptPod(msgspec.Struct, frozen=True):
    """Annotate a pod created by KubeAI in Go as created from the current Model."""

    name: str
    uid: str
    hash: str


class LabelPod(msgspec.Struct, frozen=True):
    """Give a pod of an earlier version the labels that the Model's Service selects."""

    name: str
    uid: str


class PatchModel(msgspec.Struct, frozen=True):
    """Merge patch of metadata.labels, metadata.finalizers and spec.replicas."""

    patch: dict[str, Any]


class PatchStatus(msgspec.Struct, frozen=True):
    """Write the status that the Model will have once the other actions are applied."""

    status: ModelStatus


PodAction = DrainPod | UndrainPod | DeletePod
Action = CreatePod | PodAction | AdoptPod | LabelPod | PatchModel | PatchStatus | CacheAction


class Template(msgspec.Struct, frozen=True):
    """The manifest and hash of the Model's new pods, or LeaderWorkerSets."""

    manifest: dict[str, Any]
    hash: str
    grouped: bool = False  # whether it is a LeaderWorkerSet


def plan(
    model: Model,
    config: SystemConfig,
    observed: Observed,
    now: datetime,
    template: Template | ModelError | None = None,
) -> list[Action]:
    """The next actions, in order. ``now``: time of condition changes, and for drain timeouts.

    ``template``: the result of :func:`template_of` for this Model, if the caller has cached it.
    """
    if model.metadata.deletion_timestamp is not None:
        return _end(model, config, observed, now)
    template = _creatable(template or template_of(model, config), observed)
    error = template if isinstance(template, ModelError) else None
    hash_ = template.hash if isinstance(template, Template) else None
    cache = plan_cache(model, config, observed.cache, now) if has_cache(model) else None
    wanted = wanted_replicas(model)
    change = _change_pods(model, observed, wanted, config.model_rollouts, hash_, now)
    creates = change.creates
    actions: list[Action] = [*_patch_model(model, cache), *change.actions]
    if observed.replace_finished:
        actions += _clear_finished(observed)
    elif any(pod.finished for pod in observed.pods):
        creates = 0  # new pods would end like the last ones
    if cache is not None:
        actions += cache.actions
        creates = creates if cache.loaded else 0
    if isinstance(template, ModelError):
        creates = 0
    else:
        actions += _adopt(change.left, template.hash)
        used = observed.taken | {pod.name for pod in observed.pods}
        for name in free_names(model, template, used, creates):
            actions.append(CreatePod(name, template.manifest, template.hash, template.grouped))
    if config.external:
        unlabelled = (pod for pod in change.left if pod.uid and not pod.selected)
        actions += [LabelPod(pod.name, pod.uid) for pod in unlabelled]
    facts = Facts(
        pods=observed.pods,
        left=change.left,
        made=creates if observed.create_error is None else 0,
        wanted=wanted,
        outdated=sum(_outdated(pod, hash_) for pod in change.left),
        error=error,
        create_error=observed.create_error,
        cache=cache,
        adapters=observed.adapters,
        names=observed.names,
        external=config.external,
        now_s=now.timestamp(),
    )
    return actions + _patch_status(model, facts, now)


def _end(model: Model, config: SystemConfig, observed: Observed, now: datetime) -> list[Action]:
    """For a Model being deleted: remove its pods, then its cached files, then our finalizer."""
    doomed = [pod for pod in observed.pods if not pod.terminating and pod.uid]
    actions: list[Action] = [
        DeletePod(pod.name, pod.uid, "its Model is being deleted", pod.grouped) for pod in doomed
    ]
    if FINALIZER not in model.metadata.finalizers:
        return actions
    cache = plan_eviction(model, config, observed.cache, len(observed.pods))
    actions += cache.actions
    if not cache.finalizer:
        finalizers = [one for one in model.metadata.finalizers if one != FINALIZER]
        actions.append(PatchModel({"metadata": {"finalizers": finalizers}}))
    return actions + _patch_status(model, Facts(pods=(), left=(), cache=cache), now)


def _patch_status(model: Model, facts: Facts, now: datetime) -> list[Action]:
    status = status_of(model, facts)
    return [PatchStatus(dated(status, now))] if status != model.status else []


def wanted_replicas(model: Model) -> int:
    """The desired number of replicas: spec.replicas within minReplicas and maxReplicas.

    With autoscaling disabled, spec.replicas is used as it is.
    """
    spec = model.spec
    if spec.autoscaling_disabled:
        return spec.replicas or 0
    return bounded(model, spec.min_replicas if spec.replicas is None else spec.replicas)


def bounded(model: Model, replicas: int) -> int:
    """``replicas`` within minReplicas and maxReplicas; maxReplicas wins if they contradict."""
    spec = model.spec
    replicas = max(replicas, spec.min_replicas)
    return replicas if spec.max_replicas is None else min(replicas, spec.max_replicas)


def free_names(model: Model, template: Template, used: frozenset[str], count: int) -> list[str]:
    """The first ``count`` unused names of replicas.

    Names depend only on the Model's uid, the hash and an ordinal, so if two leaders create the same
    replica they use the same name and the API rejects one. A recreated replica also gets its former
    place on the hash ring.
    """
    name_of = set_name if template.grouped else pod_name
    names: list[str] = []
    ordinal = 0
    while len(names) < count:
        name = name_of(model, template.hash, ordinal)
        if name not in used and name not in names:
            names.append(name)
        ordinal += 1
    return names


def pod_name(model: Model, hash_: str, ordinal: int) -> str:
    """``model-<name>-<hash>-<suffix>``; the suffix is derived from uid and ordinal."""
    return f"model-{model.metadata.name}-{hash_}-{suffix(model, ordinal)}"


# -- pods ----------------------------------------------------------------------------------------


def template_of(model: Model, config: SystemConfig) -> Template | ModelError:
    """The pod template from the Model's spec and annotations, or why there can be none."""
    try:
        manifest = build_replica(model, config)
    except ModelError as error:
        return error
    meta = manifest["metadata"]
    hash_: str = meta["labels"][POD_HASH_LABEL]
    # The operator's watch selects by these, so set them whatever the config's patches have done.
    meta["labels"] |= {POD_MODEL_LABEL: model.metadata.name, MANAGED_BY_LABEL: MANAGED_BY}
    meta["annotations"][HASH_ANNOTATION] = hash_
    return Template(manifest, hash_, manifest["kind"] != "Pod")


def _creatable(template: Template | ModelError, observed: Observed) -> Template | ModelError:
    """An error for a replica on several nodes where there are no LeaderWorkerSets."""
    if not isinstance(template, Template) or not template.grouped or not observed.no_sets:
        return template
    return ModelError("spec.resourceProfile", observed.no_sets, "NoLeaderWorkerSets")


class _Change(msgspec.Struct):
    """Changes to the pods: ``left`` are the replicas kept, ``creates`` the number of new ones."""

    left: list[Pod]
    actions: list[PodAction]
    creates: int = 0


def _change_pods(
    model: Model,
    observed: Observed,
    wanted: int,
    rollouts: ModelRollouts,
    hash_: str | None,
    now: datetime,
) -> _Change:
    """Which pods to remove and how many to create. Without a hash no pod counts as outdated."""
    surge = rollouts.surge
    change = _Change([pod for pod in observed.pods if pod.counts], [])
    left = change.left
    draining = _go_on_draining(observed, change, wanted, rollouts, hash_, now)
    idle = [pod for pod in left if _outdated(pod, hash_) and not pod.ready and pod.uid]
    if surge and not any(pod.ready for pod in left):
        idle = _without_last_that_served(idle, hash_, observed.in_flight)
    for pod in idle:
        _remove(change, pod, "outdated and not ready", observed)
    limit = wanted + (surge if wanted and any(_outdated(pod, hash_) for pod in left) else 0)
    if len(left) > limit:
        for pod in _removal_order(left, hash_, observed.in_flight)[: len(left) - limit]:
            _remove(change, pod, "more replicas than wanted", observed)
    outdated = [pod for pod in left if _outdated(pod, hash_) and pod.uid]
    ready = _as_able(model, left, outdated)
    enough = ready > wanted if surge else ready >= wanted
    if outdated and enough:
        pod = _removal_order(outdated, hash_, observed.in_flight)[0]
        _remove(change, pod, "outdated, and enough others are ready", observed)
        outdated.remove(pod)
        draining += observed.in_use(pod.name)
    current = len(left) - len(outdated)
    # A draining outdated pod still occupies its node. But if many are draining after a scale-down,
    # they reduce the room by no more than the surge.
    room = wanted + (surge if outdated and wanted else 0) - min(draining, max(surge, 1))
    change.creates = max(0, min(wanted - current, room - len(left)))
    return change


def _without_last_that_served(
    pods: Sequence[Pod], hash_: str | None, in_flight: Callable[[str], int]
) -> list[Pod]:
    """The pods without the least expendable of those whose engine runs and has been up.

    An engine that hangs is not kept for long: its liveness probe restarts it.
    """
    served = [pod for pod in pods if pod.started and pod.trouble is None]
    kept = _removal_order(served, hash_, in_flight)[-1:]
    return [pod for pod in pods if pod not in kept]


def _remove(change: _Change, pod: Pod, why: str, observed: Observed) -> None:
    """Delete the pod, or drain it first if it is still in use."""
    change.left.remove(pod)
    action = DrainPod if observed.in_use(pod.name) else DeletePod
    change.actions.append(action(pod.name, pod.uid, why, pod.grouped))


def _go_on_draining(
    observed: Observed,
    change: _Change,
    wanted: int,
    rollouts: ModelRollouts,
    hash_: str | None,
    now: datetime,
) -> int:
    """Delete drained pods and undrain those wanted again. Returns how many outdated ones remain."""
    draining = [
        pod
        for pod in observed.pods
        if pod.draining_since_s and not pod.terminating and not pod.finished
    ]
    latest_s = now.timestamp() - rollouts.drain_timeout_s
    count = 0
    for pod in sorted(draining, key=lambda pod: pod.name):
        if pod.ready and not _outdated(pod, hash_) and len(change.left) < wanted:
            change.actions.append(UndrainPod(pod.name, pod.uid, pod.grouped))
            change.left.append(pod)
        elif not observed.in_use(pod.name):
            change.actions.append(DeletePod(pod.name, pod.uid, "drained", pod.grouped))
        elif pod.draining_since_s < latest_s:
            why = f"not drained within {rollouts.drain_timeout_s:g} s"
            change.actions.append(DeletePod(pod.name, pod.uid, why, pod.grouped))
        else:
            count += _outdated(pod, hash_)
    return count


def _as_able(model: Model, left: Sequence[Pod], outdated: Sequence[Pod]) -> int:
    """How many pods are ready; new ones only if they serve the adapters that outdated ones serve.

    An adapter that no outdated pod serves (because it cannot be loaded) does not block a rollout.
    """
    declared = {adapter.name for adapter in model.spec.adapters}
    needed = declared & {name for pod in outdated for name in pod.loaded}
    return sum(pod.ready and (pod in outdated or needed.issubset(pod.loaded)) for pod in left)


def _outdated(pod: Pod, hash_: str | None) -> bool:
    return hash_ is not None and pod.hash is not None and pod.hash != hash_


def _removal_order(
    pods: Sequence[Pod], hash_: str | None, in_flight: Callable[[str], int]
) -> list[Pod]:
    """Removable pods, the most expendable first.

    The order is: not ready, not scheduled, outdated, fewest in-flight requests, youngest. A pod
    without a uid has not been observed yet. It is left out, because a delete without a uid could
    hit its successor.
    """
    return sorted(
        (pod for pod in pods if pod.uid),
        key=lambda p: (
            p.ready,
            p.scheduled,
            not _outdated(p, hash_),
            in_flight(p.name),
            -p.created_s,
            p.name,
        ),
    )


def _clear_finished(observed: Observed) -> list[DeletePod]:
    finished = [pod for pod in observed.pods if pod.finished and not pod.terminating and pod.uid]
    return [DeletePod(pod.name, pod.uid, "it has finished") for pod in finished]


def _adopt(left: Sequence[Pod], hash_: str) -> list[AdoptPod]:
    foreign = (pod for pod in left if pod.hash is None and pod.uid and not pod.grouped)
    return [AdoptPod(pod.name, pod.uid, hash_) for pod in foreign]


# -- the Model itself ----------------------------------------------------------------------------


def _patch_model(model: Model, cache: CachePlan | None) -> list[PatchModel]:
    """Patch spec.replicas to its bounds, the feature labels, and the cache finalizer."""
    patch: dict[str, Any] = {}
    spec = model.spec
    if not spec.autoscaling_disabled and spec.replicas != wanted_replicas(model):
        patch["spec"] = {"replicas": wanted_replicas(model)}
    features = {FEATURE_LABEL_PREFIX + feature: "true" for feature in spec.features}
    labels: dict[str, str | None] = {
        label: value for label, value in features.items() if label not in model.metadata.labels
    }
    for label in model.metadata.labels:
        if label.startswith(FEATURE_LABEL_PREFIX) and label not in features:
            labels[label] = None
    if labels:
        patch["metadata"] = {"labels": labels}
    finalizers = model.metadata.finalizers
    if cache is not None and FINALIZER not in finalizers:
        patch.setdefault("metadata", {})["finalizers"] = [*finalizers, FINALIZER]
    return [PatchModel(patch)] if patch else []
