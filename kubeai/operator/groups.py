"""Replicas on several nodes: a LeaderWorkerSet and its pods as one `Pod`; the watch of the sets.

:func:`compose` turns a set and its pods into the value that plan, routes and status handle like any
other replica: ready while its leader is, with the leader's address, and in trouble if one of its
pods is. Pure. :class:`Sets` follows the collection where the API is installed, and notices when
that changes. Used by the store and the operator.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from kubeai.api.config.profiles import size_of
from kubeai.api.model import POD_MODEL_LABEL, Model
from kubeai.api.objects import ObjectMeta
from kubeai.errors import ModelError
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import SETS
from kubeai.logs import get_logger
from kubeai.operator.pods import (
    DRAINING_ANNOTATION,
    HASH_ANNOTATION,
    STEPS,
    Pod,
    Trouble,
    owner_of,
    seconds,
    seconds_of,
)

log = get_logger(__name__)
PROBE_INTERVAL_S = 10.0  # while a Model needs the API and it is not installed
NO_LEADER_AFTER_S = 30.0  # from the creation of a set until it is in trouble without a leader
_NOT_INSTALLED = (
    "a replica on several nodes needs the LeaderWorkerSet API (leaderworkerset.x-k8s.io/v1), which "
    "is not installed; install LeaderWorkerSet, or use <profile>:<count>"
)


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


class Sets:
    """Follows the LeaderWorkerSets of a namespace, where their API is installed.

    ``replaced`` and ``changed`` are those of :meth:`Kube.follow`. ``needed`` says whether a Model
    asks for several nodes; only then is an API that is not installed looked for again. `problem`
    says why sets cannot be created, if they cannot; `changed_problem` is called when it changes.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        labels: str,
        *,
        replaced: Callable[[list[SetObject]], None],
        changed: Callable[[str, SetObject], None],
        needed: Callable[[], bool],
        changed_problem: Callable[[], None],
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._labels = labels
        self._replaced = replaced
        self._changed = changed
        self._needed = needed
        self._changed_problem = changed_problem
        self._known = False
        self._gone = asyncio.Event()
        self.problem = "the LeaderWorkerSets have not been listed yet"

    async def run(self) -> None:
        """Look for the API and follow the sets, forever."""
        looks = True
        while True:
            if looks:
                if await self._installed():
                    await self._follow()
                self._replaced([])
                self._set_problem(_NOT_INSTALLED)
            await asyncio.sleep(PROBE_INTERVAL_S)
            looks = self._needed()

    async def _installed(self) -> bool:
        """Whether the API may be there: only a 404 says that it is not."""
        try:
            await self._kube.list(SETS, self._namespace, metadata_only=True)
        except ApiError as error:
            return error.status != 404
        return True

    async def _follow(self) -> None:
        """Follow the sets until their API is gone."""
        self._gone.clear()
        follow = asyncio.create_task(
            self._kube.follow(
                SETS,
                self._namespace,
                labels=self._labels,
                type=SetObject,
                replaced=self._listed,
                changed=self._changed,
                failed=self._failed,
            )
        )
        gone = asyncio.create_task(self._gone.wait())
        try:
            await asyncio.wait((follow, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (follow, gone):
                task.cancel()
            await asyncio.gather(follow, gone, return_exceptions=True)

    def _listed(self, sets: list[SetObject]) -> None:
        self._replaced(sets)
        self._known = True
        self._set_problem("")

    def _failed(self, error: ApiError) -> None:
        """Without this API, or the permission to use it, everything else works."""
        if error.status == 404:
            self._gone.set()
        elif not self._known:
            self._replaced([])
            self._set_problem(f"the LeaderWorkerSets cannot be listed: {error}")

    def _set_problem(self, problem: str) -> None:
        if problem != self.problem:
            self.problem = problem
            self._changed_problem()


def needs_set(model: Model) -> bool:
    """Whether the Model's replicas are on several nodes."""
    if model.spec.resource_profile.count(":") < 2:
        return False
    try:
        return size_of(model.spec.resource_profile).nodes > 1
    except ModelError:
        return False
