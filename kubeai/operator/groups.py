"""Replicas on several nodes: a LeaderWorkerSet and its pods as one `Pod`. Pure.

:func:`compose` turns a set and its pods into the value that plan, routes and status handle like any
other replica: ready while its leader is, with the leader's address, and in trouble if one of its
pods is. Used by the store and the operator; `kubeai.operator.sets` follows the sets.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from kubeai.api.config.profiles import size_of
from kubeai.api.model import POD_MODEL_LABEL, Model
from kubeai.api.objects import ObjectMeta
from kubeai.errors import ModelError
from kubeai.operator.pod_object import seconds
from kubeai.operator.pods import (
    DRAINING_ANNOTATION,
    HASH_ANNOTATION,
    STEPS,
    Pod,
    Trouble,
    owner_of,
    seconds_of,
)

NO_LEADER_AFTER_S = 30.0  # from the creation of a set until it is in trouble without a leader


class _LeaderWorkerTemplate(msgspec.Struct):
    size: int = 1


class _Spec(msgspec.Struct, rename="camel"):
    leader_worker_template: _LeaderWorkerTemplate = msgspec.field(
        default_factory=_LeaderWorkerTemplate
    )


class SetObject(msgspec.Struct):
    """The part of a LeaderWorkerSet that is decoded."""

    metadata: ObjectMeta
    spec: _Spec = msgspec.field(default_factory=_Spec)

    @property
    def model(self) -> str:
        """The name of its Model."""
        return self.metadata.labels.get(POD_MODEL_LABEL, "")


def compose(one: SetObject, members: Sequence[Pod]) -> Pod:
    """The set and its pods as one replica. Its name and uid are the set's.

    The members that are being deleted are about to be replaced by pods of the same names.
    """
    meta, size = one.metadata, one.spec.leader_worker_template.size
    created_s = seconds(meta.creation_timestamp)
    present = sorted((pod for pod in members if not pod.terminating), key=lambda pod: pod.worker)
    leader = present[0] if present and present[0].worker == 0 else Pod(name=f"{meta.name}-0")
    whole = len(present) == size
    trouble, until_s, from_s = leader.trouble, leader.trouble_until_s, 0.0
    for pod in present:
        if trouble is None and pod.trouble is not None:
            trouble, until_s = pod.trouble, pod.trouble_until_s
            trouble = msgspec.structs.replace(trouble, message=f"{pod.name}: {trouble.message}")
    if not present:
        hint = f"see `kubectl describe lws {meta.name}`"
        message = f"the LeaderWorkerSet {meta.name} has no pods; {hint}"
        trouble, from_s = Trouble("NoLeaderPod", message), created_s + NO_LEADER_AFTER_S
    steps = [STEPS.index(pod.step) for pod in present]
    return msgspec.structs.replace(
        leader,
        name=meta.name,
        uid=meta.uid,
        model=one.model,
        owner=owner_of(meta),
        hash=meta.annotations.get(HASH_ANNOTATION),
        scheduled=whole and all(pod.scheduled for pod in present),
        terminating=meta.deletion_timestamp is not None,
        draining_since_s=seconds_of(meta.annotations.get(DRAINING_ANNOTATION)),
        finished=False,  # its StatefulSets replace pods that have ended
        has_loader=whole and all(pod.has_loader for pod in present),
        created_s=created_s,
        step=STEPS[min(steps)] if whole else "Pending",
        mounts_files=any(pod.mounts_files for pod in members),
        grouped=True,
        members=tuple((pod.name, pod.uid) for pod in present),
        trouble=trouble,
        trouble_from_s=from_s,
        trouble_until_s=until_s,
    )


def needs_set(model: Model) -> bool:
    """Whether the Model's replicas are on several nodes."""
    if model.spec.resource_profile.count(":") < 2:
        return False
    try:
        return size_of(model.spec.resource_profile).nodes > 1
    except ModelError:
        return False
