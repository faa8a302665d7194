"""What to do next for one Model: from what is wanted and what is observed to a list of actions.

Pure, level-based: :func:`plan` looks only at the present, and applying its actions in their order
brings the Model closer to what is wanted. Called by the controller for every reconcile; an empty
list means that nothing is to be done.

Replacing outdated pods keeps these promises, which the tests check on random histories:

- never more than replicas + surge pods (pods that are going away are not counted);
- outdated pods that are not ready go at once: they serve nobody;
- outdated pods that are ready go one at a time, and only while the wanted number is ready without
  them (with surge 0: while all wanted are ready); so a broken new version stops after ``surge``
  pods, and the old ones go on serving;
- a new pod counts as ready for that once it serves the adapters that the old ones serve.

No pod goes while requests are sent to it: it is drained first, for at most ``drainTimeout``. One
that is being drained is no replica, and becomes one again if more are wanted before it is gone.

No pod is made before the Model's files are in its cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import msgspec

from kubeai.api.config import ModelRollouts, SystemConfig
from kubeai.api.model import FEATURE_LABEL_PREFIX, POD_MODEL_LABEL, Model, ModelStatus
from kubeai.engines import build_pod
from kubeai.errors import ModelError
from kubeai.operator.adapters import AdaptersView
from kubeai.operator.cache import (
    FINALIZER,
    CacheAction,
    CachePlan,
    CacheView,
    has_cache,
    plan_cache,
    plan_eviction,
)
from kubeai.operator.conditions import Facts, dated, status_of
from kubeai.operator.pods import HASH_ANNOTATION, POD_HASH_LABEL, Pod, Trouble

MANAGED_BY_LABEL, MANAGED_BY = "app.kubernetes.io/managed-by", "kubeai"
SUFFIX_CHARS = 5
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # no vowels: no words by accident


def _idle(_: str) -> int:
    return 0


def _unused(_: str) -> bool:
    return False


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller knows of one Model's pods, its own unobserved writes included."""

    pods: tuple[Pod, ...] = ()  # owned by this very Model (uid)
    taken: frozenset[str] = frozenset()  # pod names that cannot be had
    replace_finished: bool = True  # False: pods failed lately, wait before making new ones
    create_error: Trouble | None = None  # why the last creation of a pod was refused
    in_flight: Callable[[str], int] = _idle  # requests that a pod, by its name, serves
    # Whether a worker of any replica of KubeAI may still send a pod requests, or has some there.
    in_use: Callable[[str], bool] = _unused
    cache: CacheView = CacheView(unknown="the cache is not looked at yet")
    adapters: AdaptersView | None = None  # None: the Model has none


class CreatePod(msgspec.Struct, frozen=True):
    name: str
    manifest: dict[str, Any]
    hash: str


class DeletePod(msgspec.Struct, frozen=True):
    name: str
    uid: str
    why: str


class DrainPod(msgspec.Struct, frozen=True):
    """Send it no new requests from now on."""

    name: str
    uid: str
    why: str


class UndrainPod(msgspec.Struct, frozen=True):
    """It is wanted again."""

    name: str
    uid: str


class AdoptPod(msgspec.Struct, frozen=True):
    """Write down that a pod of upstream's counts as made from the Model as it is now."""

    name: str
    uid: str
    hash: str


class PatchModel(msgspec.Struct, frozen=True):
    """Merge patch of metadata.labels, metadata.finalizers and spec.replicas."""

    patch: dict[str, Any]


class PatchStatus(msgspec.Struct, frozen=True):
    status: ModelStatus


PodAction = DrainPod | UndrainPod | DeletePod
Action = CreatePod | PodAction | AdoptPod | PatchModel | PatchStatus | CacheAction


class Template(msgspec.Struct, frozen=True):
    """What a new pod of the Model would be."""

    manifest: dict[str, Any]
    hash: str


def plan(
    model: Model,
    config: SystemConfig,
    observed: Observed,
    now: datetime,
    template: Template | ModelError | None = None,
) -> list[Action]:
    """The next actions, in order. ``now``: the time of changed conditions, and the end of drains.

    ``template``: what :func:`template_of` gave for this Model, should the caller have kept it.
    """
    if model.metadata.deletion_timestamp is not None:
        return _end(model, config, observed, now)
    template = template or template_of(model, config)
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
        creates = 0  # they would end as the last ones did
    if cache is not None:
        actions += cache.actions
        creates = creates if cache.loaded else 0
    if isinstance(template, ModelError):
        creates = 0
    else:
        actions += _adopt(change.left, template.hash)
        used = observed.taken | {pod.name for pod in observed.pods}
        for name in free_names(model, template.hash, used, creates):
            actions.append(CreatePod(name, template.manifest, template.hash))
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
        now_s=now.timestamp(),
    )
    return actions + _patch_status(model, facts, now)


def _end(model: Model, config: SystemConfig, observed: Observed, now: datetime) -> list[Action]:
    """A Model that is being deleted: its pods go, then its files, then our finalizer."""
    doomed = [pod for pod in observed.pods if not pod.terminating and pod.uid]
    actions: list[Action] = [
        DeletePod(pod.name, pod.uid, "its Model is being deleted") for pod in doomed
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
    """How many replicas there should be: spec.replicas within its bounds.

    With autoscaling disabled the number is the user's, as it stands.
    """
    spec = model.spec
    if spec.autoscaling_disabled:
        return spec.replicas or 0
    return bounded(model, spec.min_replicas if spec.replicas is None else spec.replicas)


def bounded(model: Model, replicas: int) -> int:
    """``replicas`` within minReplicas and maxReplicas (which wins, should they contradict)."""
    spec = model.spec
    replicas = max(replicas, spec.min_replicas)
    return replicas if spec.max_replicas is None else min(replicas, spec.max_replicas)


def free_names(model: Model, hash_: str, used: frozenset[str], count: int) -> list[str]:
    """The first ``count`` names of pods that nobody has.

    They follow from the Model's uid, the hash and an ordinal alone, so two leaders that want the
    same replica ask for the same name, and one of them is refused. And a replica that is made
    again gets its old place on the hash ring.
    """
    names: list[str] = []
    ordinal = 0
    while len(names) < count:
        name = pod_name(model, hash_, ordinal)
        if name not in used and name not in names:
            names.append(name)
        ordinal += 1
    return names


def pod_name(model: Model, hash_: str, ordinal: int) -> str:
    """``model-<name>-<hash>-<suffix>``; the suffix hides uid and ordinal."""
    digest = hashlib.blake2b(f"{model.metadata.uid}/{ordinal}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    suffix = ""
    for _ in range(SUFFIX_CHARS):
        number, index = divmod(number, len(_ALPHABET))
        suffix += _ALPHABET[index]
    return f"model-{model.metadata.name}-{hash_}-{suffix}"


# -- pods ----------------------------------------------------------------------------------------


def template_of(model: Model, config: SystemConfig) -> Template | ModelError:
    """What a new pod would be, or why there can be none: from the spec and the annotations."""
    try:
        pod = build_pod(model, config)
    except ModelError as error:
        return error
    meta = pod["metadata"]
    hash_: str = meta["labels"][POD_HASH_LABEL]
    # How the operator finds it again, whatever a patch of the config has done to its labels:
    meta["labels"] |= {POD_MODEL_LABEL: model.metadata.name, MANAGED_BY_LABEL: MANAGED_BY}
    meta["annotations"][HASH_ANNOTATION] = hash_
    return Template(pod, hash_)


class _Change(msgspec.Struct):
    """What becomes of the pods: ``left`` are the replicas that stay, beside those that come."""

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
    """Which pods go, and how many new ones come. No hash: no pod is outdated, none is made."""
    surge = rollouts.surge
    change = _Change([pod for pod in observed.pods if pod.counts], [])
    left = change.left
    draining = _go_on_draining(observed, change, wanted, rollouts, hash_, now)
    for pod in [pod for pod in left if _outdated(pod, hash_) and not pod.ready and pod.uid]:
        _remove(change, pod, "outdated and not ready", observed)
    limit = wanted + (surge if wanted and any(_outdated(pod, hash_) for pod in left) else 0)
    if len(left) > limit:
        for pod in _removal_order(left, hash_, observed.in_flight)[: len(left) - limit]:
            _remove(change, pod, "more than wanted", observed)
    outdated = [pod for pod in left if _outdated(pod, hash_) and pod.uid]
    ready = _as_able(model, left, outdated)
    enough = ready > wanted if surge else ready >= wanted
    if outdated and enough:
        pod = _removal_order(outdated, hash_, observed.in_flight)[0]
        _remove(change, pod, "outdated, and enough others are ready", observed)
        outdated.remove(pod)
        draining += observed.in_use(pod.name)
    current = len(left) - len(outdated)
    # An outdated pod that is drained has its node still. But many of them, after a step down, hold
    # up no more than a rollout may have anyway.
    room = wanted + (surge if outdated and wanted else 0) - min(draining, max(surge, 1))
    change.creates = max(0, min(wanted - current, room - len(left)))
    return change


def _remove(change: _Change, pod: Pod, why: str, observed: Observed) -> None:
    """Delete it, or drain it first if somebody may send it requests."""
    change.left.remove(pod)
    action = DrainPod if observed.in_use(pod.name) else DeletePod
    change.actions.append(action(pod.name, pod.uid, why))


def _go_on_draining(
    observed: Observed,
    change: _Change,
    wanted: int,
    rollouts: ModelRollouts,
    hash_: str | None,
    now: datetime,
) -> int:
    """Delete what is drained; take back what is wanted again. How many outdated ones are left."""
    draining = [
        pod
        for pod in observed.pods
        if pod.draining_since_s and not pod.terminating and not pod.finished
    ]
    latest_s = now.timestamp() - rollouts.drain_timeout_s
    count = 0
    for pod in sorted(draining, key=lambda pod: pod.name):
        if pod.ready and not _outdated(pod, hash_) and len(change.left) < wanted:
            change.actions.append(UndrainPod(pod.name, pod.uid))
            change.left.append(pod)
        elif not observed.in_use(pod.name):
            change.actions.append(DeletePod(pod.name, pod.uid, "drained"))
        elif pod.draining_since_s < latest_s:
            why = f"not drained within {rollouts.drain_timeout_s:g} s"
            change.actions.append(DeletePod(pod.name, pod.uid, why))
        else:
            count += _outdated(pod, hash_)
    return count


def _as_able(model: Model, left: Sequence[Pod], outdated: Sequence[Pod]) -> int:
    """How many are ready, new ones only with the adapters that outdated ones serve.

    An adapter that no outdated pod serves (it cannot be loaded) keeps nothing from being replaced.
    """
    declared = {adapter.name for adapter in model.spec.adapters}
    needed = declared & {name for pod in outdated for name in pod.loaded}
    return sum(pod.ready and (pod in outdated or needed.issubset(pod.loaded)) for pod in left)


def _outdated(pod: Pod, hash_: str | None) -> bool:
    return hash_ is not None and pod.hash is not None and pod.hash != hash_


def _removal_order(
    pods: Sequence[Pod], hash_: str | None, in_flight: Callable[[str], int]
) -> list[Pod]:
    """Those that can go, the one that is missed least first.

    Not ready, not scheduled, outdated, serving the fewest requests, youngest. A pod without uid
    is not observed yet: a delete of it could not be told from a delete of its successor, so it
    waits.
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
    return [DeletePod(pod.name, pod.uid, "it ended and will not come back") for pod in finished]


def _adopt(left: Sequence[Pod], hash_: str) -> list[AdoptPod]:
    foreign = (pod for pod in left if pod.hash is None and pod.uid)
    return [AdoptPod(pod.name, pod.uid, hash_) for pod in foreign]


# -- the Model itself ----------------------------------------------------------------------------


def _patch_model(model: Model, cache: CachePlan | None) -> list[PatchModel]:
    """Bounds on spec.replicas, a label for each feature, and what keeps a Model with a cache."""
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
