"""Applies a plan's actions to the cluster: creates, deletes and patches pods, Models and statuses.

Promises: no write unless this KubeAI replica is the leader at that moment; the store expects each
create and delete before it is sent, so that one not observed yet is not repeated; deletes carry the
pod's uid, and patches of a Model its resourceVersion; at most two writes per second to one object.
Used by the controller, which decides when to plan and keeps the `WriteState` of each Model.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import msgspec

from kubeai.api.model import MODEL_LABEL, MODEL_UID_LABEL, Model, ModelStatus
from kubeai.api.objects import ObjectMeta
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import MODELS, PODS, SETS, Resource
from kubeai.logs import get_logger
from kubeai.operator.cache.claims import Claims
from kubeai.operator.cache.plan import CacheAction
from kubeai.operator.conditions import is_growing, only_counts, timeless
from kubeai.operator.events import Events
from kubeai.operator.groups import SetObject
from kubeai.operator.leader import Writes
from kubeai.operator.plan import (
    Action,
    AdoptPod,
    CreatePod,
    DeletePod,
    DrainPod,
    LabelPod,
    PatchModel,
    UndrainPod,
)
from kubeai.operator.pods import DRAINING_ANNOTATION, HASH_ANNOTATION, Pod, PodObject, Trouble
from kubeai.operator.store import EXPECTATION_TIMEOUT_S, Store

log = get_logger(__name__)
CREATES_AT_FIRST_MAX = 8
STATUS_SETTLE_S = 0.05  # changes come in bursts: batch them into one status write
# The same where some replicas are ready and others start: they often follow within half a second.
STATUS_GROWING_SETTLE_S = 0.5
# Between a write to a Model or its status and the second write after it: two writes per interval.
MODEL_WRITES_INTERVAL_S = 1.05
# Between any write to a Model and a status write that only updates replica counts. With 50 Models
# starting at once these were a fifth of all writes. Each costs the API as much as several pod
# writes, which were delayed by it.
COUNTING_INTERVAL_S = 5.0
CONFLICT_BACKOFF_S = 0.5
NAMES_MAX = 8  # in one Event


class _Owned(msgspec.Struct):
    """The part of a pod or a LeaderWorkerSet that says whose it is."""

    metadata: ObjectMeta


class WriteState(msgspec.Struct):
    """What recent writes for one Model mean for the next ones."""

    create_error: Trouble | None = None
    taken: dict[str, float] = {}  # pod names in use by others → assumed taken until
    sent_s: tuple[float, float] = (-math.inf, -math.inf)  # the last two writes to the Model
    status_due_s: float = math.inf  # when a changed status will have settled
    status_sent: tuple[ModelStatus, ModelStatus] | None = None  # (sent, as returned by the API)


class Applier:
    """Applies actions, each for one Model with its `WriteState`."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        store: Store,
        writes: Writes,
        claims: Claims,
        events: Events,
        clock: Callable[[], float],
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._store = store
        self._writes = writes
        self._claims = claims
        self._events = events
        self._clock = clock

    async def apply(
        self, model: Model, state: WriteState, actions: Sequence[Action]
    ) -> float | None:
        """Apply the actions. Returns seconds until the next plan, or None if none is needed.

        Deletes go first, so that no node is added for a pod that fits where another is leaving.
        """
        again_s = None
        deletes = [action for action in actions if isinstance(action, DeletePod)]
        await _together([self.delete(action) for action in deletes])
        for why in dict.fromkeys(action.why for action in deletes):
            names = _names([action.name for action in deletes if action.why == why])
            self._events.emit(model, "PodsDeleted", f"deleted {names}: {why}")
        made = [action for action in actions if isinstance(action, CreatePod)]
        creates = [self._create(model, state, action) for action in made]
        if deletes or creates:
            again_s = 0.0
        # What rejects one pod (a quota, a webhook) usually rejects them all: start with a few.
        few = CREATES_AT_FIRST_MAX if state.create_error is None else 1
        first, remaining = creates[:few], creates[few:]
        for action in actions:
            if isinstance(action, AdoptPod):
                first.append(self._adopt(action))
            elif isinstance(action, LabelPod):
                first.append(self._label(model, action))
            elif isinstance(action, DrainPod | UndrainPod):
                first.append(self._drain(action))
                again_s = 0.0
            elif isinstance(action, CacheAction):
                first.append(self._claims.apply(action))
                again_s = 0.0
            elif isinstance(action, PatchModel):
                wait_s = state.sent_s[0] + MODEL_WRITES_INTERVAL_S - self._clock()
                again_s = sooner(again_s, max(0.0, wait_s))
                if wait_s <= 0:
                    first.append(self._patch_model(model, state, action))
        try:
            await _together(first)
        except BaseException:
            for coroutine in remaining:
                coroutine.close()
            raise
        await _together(remaining)
        if made:
            names = _names([action.name for action in made])
            self._events.emit(model, "PodsCreated", f"created {names}")
        return again_s

    async def _create(self, model: Model, state: WriteState, create: CreatePod) -> None:
        meta = {"name": create.name, "namespace": self._namespace}
        manifest = {**create.manifest, "metadata": {**create.manifest["metadata"], **meta}}
        pod = Pod(
            name=create.name,
            model=model.metadata.name,
            owner=model.metadata.uid,
            hash=create.hash,
            created_s=time.time(),
            mounts_files=bool(model.spec.files),
            grouped=create.grouped,
        )
        kind = SETS if create.grouped else PODS
        try:
            async with self._writes:
                self._store.creating(pod)
                await self._kube.create(kind, manifest, self._namespace)
        except ApiError as error:
            if error.status == 409 and await self._is_ours(model, kind, create.name):
                state.create_error = None
                return
            self._store.not_created(pod)
            if error.status != 409:
                raise
            state.taken[create.name] = self._clock() + EXPECTATION_TIMEOUT_S
            return
        except BaseException:
            self._store.not_created(pod)
            raise
        state.create_error = None
        log.info("pod created", model=model.metadata.name, pod=create.name, kind=kind.kind)

    async def _is_ours(self, model: Model, kind: Resource, name: str) -> bool:
        """Whether the existing object of this name belongs to the Model and is not terminating."""
        try:
            obj = await self._kube.get(kind, name, self._namespace, type=_Owned)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        owners = {owner.uid for owner in obj.metadata.owner_references}
        return model.metadata.uid in owners and obj.metadata.deletion_timestamp is None

    async def delete(self, delete: DeletePod) -> None:
        """Delete exactly the pod or set with this uid. It is fine if it no longer exists."""
        kind = SETS if delete.grouped else PODS
        try:
            async with self._writes:
                self._store.deleting(delete.uid)
                await self._kube.delete(kind, delete.name, self._namespace, uid=delete.uid)
        except ApiError as error:
            if error.status == 404:
                return
            self._store.not_deleted(delete.uid)
            raise
        except BaseException:
            self._store.not_deleted(delete.uid)
            raise
        log.info("pod deleted", pod=delete.name, why=delete.why)

    async def _adopt(self, adopt: AdoptPod) -> None:
        if await self._patch_pod(adopt.name, adopt.uid, annotations={HASH_ANNOTATION: adopt.hash}):
            log.info("pod adopted", pod=adopt.name)

    async def _label(self, model: Model, action: LabelPod) -> None:
        labels: dict[str, str | None] = {
            MODEL_LABEL: model.metadata.name,
            MODEL_UID_LABEL: model.metadata.uid,
        }
        if await self._patch_pod(action.name, action.uid, labels=labels):
            log.info("pod labelled", pod=action.name)

    async def _drain(self, action: DrainPod | UndrainPod) -> None:
        since = f"{time.time():.0f}" if isinstance(action, DrainPod) else None
        annotations = {DRAINING_ANNOTATION: since}
        patch = self._patch_set if action.grouped else self._patch_pod
        if not await patch(action.name, action.uid, annotations=annotations):
            return
        if isinstance(action, DrainPod):
            log.info("pod draining", pod=action.name, why=action.why)
        else:
            log.info("pod no longer draining", pod=action.name)

    async def _patch_pod(self, name: str, uid: str, **metadata: dict[str, str | None]) -> bool:
        """Patch metadata of a pod; False if the pod is gone or has been replaced."""
        patch = {"metadata": {"uid": uid, **metadata}}
        try:
            async with self._writes:
                answer = await self._kube.patch(PODS, name, patch, self._namespace, type=PodObject)
        except ApiError as error:
            if error.status not in (404, 409, 422):
                raise
            return False
        self._store.pod_written(answer)
        return True

    async def _patch_set(self, name: str, uid: str, **metadata: dict[str, str | None]) -> bool:
        """The same for a LeaderWorkerSet."""
        patch = {"metadata": {"uid": uid, **metadata}}
        try:
            async with self._writes:
                answer = await self._kube.patch(SETS, name, patch, self._namespace, type=SetObject)
        except ApiError as error:
            if error.status not in (404, 409, 422):
                raise
            return False
        self._store.set_changed("MODIFIED", answer)
        return True

    async def _patch_model(self, model: Model, state: WriteState, action: PatchModel) -> None:
        name = model.metadata.name
        meta = action.patch.get("metadata", {})
        version = {"resourceVersion": model.metadata.resource_version}
        patch = action.patch | {"metadata": {**meta, **version}}
        try:
            async with self._writes:
                state.sent_s = state.sent_s[1], self._clock()
                answer = await self._kube.patch(MODELS, name, patch, self._namespace, type=Model)
        except ApiError as error:
            if error.status != 409:
                raise
            # Another writer was faster: plan again from the new version, without back-off.
            answer = await self._kube.get(MODELS, name, self._namespace, type=Model)
            if answer.metadata.resource_version == model.metadata.resource_version:
                raise
        self._store.model_written(answer)

    async def patch_status(
        self, model: Model, state: WriteState, status: ModelStatus
    ) -> float | None:
        """Write the status if it is due. Returns seconds until it is, or None if all is written."""
        if state.status_sent == (timeless(status), model.status):
            return None  # the API stores something else (a CRD without conditions): leave it
        now_s = self._clock()
        if only_counts(status, model.status):
            state.status_due_s = math.inf  # the next real change settles from the start
            due_s = state.sent_s[1] + COUNTING_INTERVAL_S
        else:
            settle_s = STATUS_GROWING_SETTLE_S if is_growing(status) else STATUS_SETTLE_S
            state.status_due_s = min(state.status_due_s, now_s + settle_s)
            due_s = max(state.status_due_s, state.sent_s[0] + MODEL_WRITES_INTERVAL_S)
        if now_s < due_s:
            return due_s - now_s
        state.status_due_s = math.inf
        patch = {
            "metadata": {"resourceVersion": model.metadata.resource_version},
            "status": _status_patch(status, model.status),
        }
        try:
            async with self._writes:
                state.sent_s = state.sent_s[1], self._clock()
                answer = await self._kube.patch(
                    MODELS,
                    model.metadata.name,
                    patch,
                    self._namespace,
                    subresource="status",
                    type=Model,
                )
        except ApiError as error:
            if error.status == 404:
                return None
            if error.status == 409:  # the Model has changed; its watch event will follow
                return CONFLICT_BACKOFF_S
            raise
        state.status_sent = (timeless(status), answer.status)
        self._announce(model, status)
        self._store.model_written(answer)
        return None

    def _announce(self, model: Model, status: ModelStatus) -> None:
        """Emit Events for the condition changes that users wait for or need to see."""
        before = {c.type: (c.status, c.reason) for c in model.status.conditions}
        for c in status.conditions:
            old = before.get(c.type, ("", ""))
            turned = old[0] != c.status and "True" in (old[0], c.status)
            if c.type == "Degraded":
                news = turned or (c.status == "True" and old[1] != c.reason)
            elif c.type in ("CacheLoaded", "AdaptersLoaded"):
                news = old != (c.status, c.reason) and c.reason != "NoReplicas"
            else:
                news = c.type == "Ready" and turned
            if news:
                text = f"{c.type} is {c.status}: {c.message}"
                warning = c.type == "Degraded" and c.status == "True"
                self._events.emit(model, c.reason, text, warning=warning)


def _status_patch(new: ModelStatus, old: ModelStatus) -> dict[str, Any]:
    """A merge patch. Fields at their default are not encoded, so null removes the old value."""
    fields: dict[str, Any] = msgspec.to_builtins(new)
    return dict.fromkeys(msgspec.to_builtins(old).keys() - fields.keys()) | fields


def _names(pods: Sequence[str]) -> str:
    shown, more = pods[:NAMES_MAX], len(pods) - NAMES_MAX
    return f"pod{'s' * (len(pods) > 1)} {', '.join(shown)}" + (f" and {more} more" * (more > 0))


async def _together(writes: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all of them even if one fails, then raise the first error."""
    for result in await asyncio.gather(*writes, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


def sooner(a: float | None, b: float | None) -> float | None:
    """The smaller of two waits, of which None is the longest."""
    return b if a is None else a if b is None else min(a, b)
