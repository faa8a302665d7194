"""Reconciles one Model at a time: brings its pods and status in line with its spec.

Owns all of the leader's writes except scaling. ``changed(name)`` enqueues a model. Reconciling it
means reading the store, the cache and the adapters, calling :func:`plan`, and applying the actions.
Promises: no write unless this replica is the leader at that moment; a create or delete that has not
been observed yet is not repeated; deletes carry the pod's uid, and patches of a Model its
resourceVersion; no write while nothing changes; at most two writes per second to one object.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

import msgspec

from kubeai.api.config.system import SystemConfig
from kubeai.api.model import Model, ModelStatus
from kubeai.errors import ModelError
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import MODELS, PODS
from kubeai.kube.workqueue import Queue
from kubeai.logs import get_logger
from kubeai.operator.adapters import Adapters, AdaptersView
from kubeai.operator.cache.claims import Claims
from kubeai.operator.cache.plan import CacheAction, CacheView, has_cache
from kubeai.operator.conditions import only_counts, timeless
from kubeai.operator.events import Events
from kubeai.operator.files import Files
from kubeai.operator.leader import Leader, NotLeader, Writes
from kubeai.operator.plan import (
    Action,
    AdoptPod,
    CreatePod,
    DeletePod,
    DrainPod,
    Observed,
    PatchModel,
    PatchStatus,
    Template,
    UndrainPod,
    plan,
    template_of,
)
from kubeai.operator.pods import (
    DRAINING_ANNOTATION,
    HASH_ANNOTATION,
    MESSAGE_MAX_CHARS,
    Pod,
    PodObject,
    Trouble,
)
from kubeai.operator.store import EXPECTATION_TIMEOUT_S, Store

log = get_logger(__name__)
PARALLEL_MODELS_MAX = 64
CREATES_AT_FIRST_MAX = 8
PARALLEL_WRITES_MAX = 32
STATUS_SETTLE_S = 0.1  # changes come in bursts: batch them into one status write
# Between a write to a Model or its status and the second write after it: two writes per interval.
MODEL_WRITES_INTERVAL_S = 1.05
# Between any write to a Model and a status write that only updates replica counts. With 50 Models
# starting at once these were a fifth of all writes. Each costs the API as much as several pod
# writes, which were delayed by it.
COUNTING_INTERVAL_S = 5.0
CONFLICT_REST_S = 0.5
NAMES_MAX = 8  # in one Event
DRAINED_INTERVAL_S = 0.5  # between checks of draining pods
FINISHED_FIRST_S, FINISHED_MAX_S = 2.0, 300.0  # back-off before finished pods are replaced


class _Memory(msgspec.Struct):
    """State kept for one Model between reconciles. It need not survive a restart."""

    uid: str  # the Model's
    create_error: Trouble | None = None
    taken: dict[str, float] = {}  # pod names in use by others → assumed taken until
    template: tuple[Any, Template | ModelError] | None = None  # (inputs, result)
    sent_s: tuple[float, float] = (-math.inf, -math.inf)  # the last two writes to the Model
    status_due_s: float = math.inf  # when a changed status will have settled
    status_sent: tuple[ModelStatus, ModelStatus] | None = None  # (sent, as returned by the API)
    finished: Backoff = msgspec.field(
        default_factory=lambda: Backoff(FINISHED_FIRST_S, FINISHED_MAX_S)
    )
    finished_until_s: float = -math.inf


class PodLoads(Protocol):
    """Per-endpoint loads of all KubeAI replicas. The supervisor implements it."""

    def in_flight(self, model: str, endpoint: str) -> int:
        """In-flight requests at one endpoint, from all replicas of KubeAI."""
        ...

    def in_use(self, model: str, endpoint: str) -> bool:
        """Whether any worker of any replica may still send requests to it or has some in flight."""
        ...


class Controller:
    """Runs on every replica, but writes only while ``leader`` leads.

    ``loads`` decides which pods to delete first, and whether a pod must be drained before that.
    """

    def __init__(
        self,
        kube: Kube,
        config: SystemConfig,
        namespace: str,
        store: Store,
        leader: Leader,
        loads: PodLoads,
        events: Events,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._config = config
        self._namespace = namespace
        self._store = store
        self._leader = leader
        self._loads = loads
        self._events = events
        self._clock = clock
        self._memories: dict[str, _Memory] = {}
        self._writes = Writes(leader, PARALLEL_WRITES_MAX)
        self.queue = Queue(self.reconcile, PARALLEL_MODELS_MAX)
        self.claims = Claims(
            kube, namespace, self._writes, self.changed, self._caches_changed, clock
        )
        self._files = Files(kube, namespace, self._writes)
        self._adapters = Adapters(kube, namespace, self._writes, self.changed, clock)

    def changed(self, name: str) -> None:
        """Enqueue the model for reconciliation."""
        if self._leader.leads and self._store.listed:
            self.queue.add(name)

    def all_changed(self) -> None:
        """Enqueue every model: this replica has become the leader or has just synced."""
        for name in self._store.names():
            self.changed(name)

    def _caches_changed(self) -> None:
        for name, model in self._store.models.items():
            if has_cache(model):
                self.changed(name)

    def rest(self) -> None:
        """This replica is no longer the leader."""
        self._adapters.rest()
        self.claims.rest()
        self._files.rest()

    async def stop(self) -> None:
        await self.queue.stop()
        await self._adapters.stop()

    async def reconcile(self, name: str) -> float | None:
        """Reconcile one model. Returns seconds until the next try, or None to wait for an event."""
        if not self._leader.leads or not self._store.listed:
            return None
        try:
            model = self._store.models.get(name)
            again_s = await self._sweep(name, model)
            if model is None:
                self._forget(name)
                return again_s
            uid = model.metadata.uid
            if name in self._memories and self._memories[name].uid != uid:
                self._forget(name)
            memory = self._memories.setdefault(name, _Memory(uid))
            if has_cache(model) and self.claims.pending:
                return again_s  # nothing is known about its files yet; their list is an event
            return _sooner(again_s, await self._round(model, memory))
        except NotLeader:
            return None

    def _forget(self, name: str) -> None:
        memory = self._memories.pop(name, None)
        if memory is not None:
            self.claims.forget(memory.uid)
            self._files.forget(memory.uid)
        self._adapters.forget(name)

    async def _round(self, model: Model, memory: _Memory) -> float | None:
        leaving = model.metadata.deletion_timestamp is not None
        if model.spec.files and not leaving:
            await self._files.ensure(model)
        observed, wait_s = self._observe(model, memory)
        actions = self._plan(model, memory, observed)
        if memory.create_error and not any(isinstance(a, CreatePod) for a in actions):
            memory.create_error = None  # there is nothing left to create
            actions = self._plan(
                model, memory, msgspec.structs.replace(observed, create_error=None)
            )
        changes = [action for action in actions if not isinstance(action, PatchStatus)]
        try:
            again_s = await self._apply(model, memory, changes)
        except ApiError as error:
            await self._tell(model, memory, error)
            raise
        if again_s is not None:
            return again_s
        for action in actions:
            if isinstance(action, PatchStatus):
                again_s = await self._patch_status(model, memory, action.status)
        if not model.spec.files and not leaving:
            await self._files.remove(model, self._store.pods_of(model.metadata.name))
        expected_s = self._store.oldest_expectation_s(model.metadata.name)
        return _sooner(again_s, _sooner(wait_s, expected_s))

    def _plan(self, model: Model, memory: _Memory, observed: Observed) -> list[Action]:
        kept = memory.template
        made_from = (model.spec, model.metadata.uid, model.metadata.annotations)
        if kept is None or kept[0] != made_from:  # building the template is most of a plan's cost
            kept = memory.template = made_from, template_of(model, self._config)
        now = datetime.fromtimestamp(int(time.time()), UTC)
        return plan(model, self._config, observed, now, kept[1])

    def _observe(self, model: Model, memory: _Memory) -> tuple[Observed, float | None]:
        """The plan's input, and seconds until it may change without an event."""
        now_s = self._clock()
        name, uid = model.metadata.name, model.metadata.uid
        memory.taken = {n: until_s for n, until_s in memory.taken.items() if until_s > now_s}
        pods = tuple(self._store.pods_of(name))
        wait_s, replace_finished = None, True
        if any(p.finished and not p.terminating and p.owner == uid for p in pods):
            if now_s >= memory.finished_until_s:
                if now_s > memory.finished_until_s + FINISHED_MAX_S:
                    memory.finished.reset()
                memory.finished_until_s = now_s + memory.finished.next_s()
            else:
                wait_s, replace_finished = memory.finished_until_s - now_s, False
        unix_s = time.time()
        for pod in pods:
            if pod.trouble is not None and unix_s < pod.trouble_until_s < math.inf:
                # The plan's `now` is in whole seconds.
                wait_s = _sooner(wait_s, pod.trouble_until_s - unix_s + 1.0)
        if any(pod.draining_since_s and not pod.terminating for pod in pods):
            wait_s = _sooner(wait_s, DRAINED_INTERVAL_S)
        cache, cache_wait_s = self._observe_cache(model, pods)
        adapters, adapters_wait_s = self._observe_adapters(model, pods)
        observed = Observed(
            pods=tuple(pod for pod in pods if pod.owner == uid),
            taken=frozenset(memory.taken) | {pod.name for pod in pods if pod.owner != uid},
            replace_finished=replace_finished,
            create_error=memory.create_error,
            in_flight=partial(self._loads.in_flight, name),
            in_use=partial(self._loads.in_use, name),
            cache=cache,
            adapters=adapters,
        )
        return observed, _sooner(wait_s, _sooner(cache_wait_s, adapters_wait_s))

    def _observe_cache(self, model: Model, pods: Sequence[Pod]) -> tuple[CacheView, float | None]:
        if not has_cache(model):
            return CacheView(), None
        found = ((pod.job, pod.trouble_at(time.time())) for pod in pods if pod.job)
        troubles = {job: trouble for job, trouble in found if trouble is not None}
        return self.claims.view(model, troubles)

    def _observe_adapters(
        self, model: Model, pods: Sequence[Pod]
    ) -> tuple[AdaptersView | None, float | None]:
        """The state of the adapters. Starts loading those that are missing."""
        if model.metadata.deletion_timestamp is not None:
            self._adapters.forget(model.metadata.name)
            return None, None
        if not model.spec.adapters and not any(pod.adapters for pod in pods):
            return None, None
        ours = [pod for pod in pods if pod.owner == model.metadata.uid]
        return self._adapters.look(model, ours)

    # -- apply -----------------------------------------------------------------------------------

    async def _apply(
        self, model: Model, memory: _Memory, actions: Sequence[Action]
    ) -> float | None:
        """Apply the actions. Returns seconds until the next plan, or None if none is needed.

        Deletes go first, so that no node is added for a pod that fits where another is leaving.
        """
        again_s = None
        deletes = [action for action in actions if isinstance(action, DeletePod)]
        await _together([self._delete(action) for action in deletes])
        for why in dict.fromkeys(action.why for action in deletes):
            names = _names([action.name for action in deletes if action.why == why])
            self._events.tell(model, "PodsDeleted", f"deleted {names}: {why}")
        made = [action for action in actions if isinstance(action, CreatePod)]
        creates = [self._create(model, memory, action) for action in made]
        if deletes or creates:
            again_s = 0.0
        # What rejects one pod (a quota, a webhook) usually rejects them all: start with a few.
        few = CREATES_AT_FIRST_MAX if memory.create_error is None else 1
        first, rest = creates[:few], creates[few:]
        for action in actions:
            if isinstance(action, AdoptPod):
                first.append(self._adopt(action))
            elif isinstance(action, DrainPod | UndrainPod):
                first.append(self._drain(action))
                again_s = 0.0
            elif isinstance(action, CacheAction):
                first.append(self.claims.apply(action))
                again_s = 0.0
            elif isinstance(action, PatchModel):
                wait_s = memory.sent_s[0] + MODEL_WRITES_INTERVAL_S - self._clock()
                again_s = _sooner(again_s, max(0.0, wait_s))
                if wait_s <= 0:
                    first.append(self._patch_model(model, memory, action))
        try:
            await _together(first)
        except BaseException:
            for coroutine in rest:
                coroutine.close()
            raise
        await _together(rest)
        if made:
            names = _names([action.name for action in made])
            self._events.tell(model, "PodsCreated", f"created {names}")
        return again_s

    async def _create(self, model: Model, memory: _Memory, create: CreatePod) -> None:
        meta = {"name": create.name, "namespace": self._namespace}
        manifest = {**create.manifest, "metadata": {**create.manifest["metadata"], **meta}}
        pod = Pod(
            name=create.name,
            model=model.metadata.name,
            owner=model.metadata.uid,
            hash=create.hash,
            created_s=time.time(),
            mounts_files=bool(model.spec.files),
        )
        try:
            async with self._writes:
                self._store.creating(pod)
                await self._kube.create(PODS, manifest, self._namespace, type=PodObject)
        except ApiError as error:
            if error.status == 409 and await self._is_ours(model, create.name):
                memory.create_error = None
                return
            self._store.not_created(pod)
            if error.status != 409:
                raise
            memory.taken[create.name] = self._clock() + EXPECTATION_TIMEOUT_S
            return
        except BaseException:
            self._store.not_created(pod)
            raise
        memory.create_error = None
        log.info("pod created", model=model.metadata.name, pod=create.name)

    async def _is_ours(self, model: Model, name: str) -> bool:
        """Whether the existing pod of this name belongs to the Model and is not terminating."""
        try:
            obj = await self._kube.get(PODS, name, self._namespace, type=PodObject)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        owners = {owner.uid for owner in obj.metadata.owner_references}
        return model.metadata.uid in owners and obj.metadata.deletion_timestamp is None

    async def _delete(self, delete: DeletePod) -> None:
        try:
            async with self._writes:
                self._store.deleting(delete.uid)
                await self._kube.delete(PODS, delete.name, self._namespace, uid=delete.uid)
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
        if await self._annotate(adopt.name, adopt.uid, HASH_ANNOTATION, adopt.hash):
            log.info("pod adopted", pod=adopt.name)

    async def _drain(self, action: DrainPod | UndrainPod) -> None:
        since = f"{time.time():.0f}" if isinstance(action, DrainPod) else None
        if not await self._annotate(action.name, action.uid, DRAINING_ANNOTATION, since):
            return
        if isinstance(action, DrainPod):
            log.info("pod draining", pod=action.name, why=action.why)
        else:
            log.info("pod no longer draining", pod=action.name)

    async def _annotate(self, name: str, uid: str, annotation: str, value: str | None) -> bool:
        """Set an annotation of a pod; False if the pod is gone or has been replaced."""
        patch = {"metadata": {"uid": uid, "annotations": {annotation: value}}}
        try:
            async with self._writes:
                answer = await self._kube.patch(PODS, name, patch, self._namespace, type=PodObject)
        except ApiError as error:
            if error.status not in (404, 409, 422):
                raise
            return False
        self._store.pod_written(answer)
        return True

    async def _patch_model(self, model: Model, memory: _Memory, action: PatchModel) -> None:
        name = model.metadata.name
        meta = action.patch.get("metadata", {})
        version = {"resourceVersion": model.metadata.resource_version}
        patch = action.patch | {"metadata": {**meta, **version}}
        try:
            async with self._writes:
                memory.sent_s = memory.sent_s[1], self._clock()
                answer = await self._kube.patch(MODELS, name, patch, self._namespace, type=Model)
        except ApiError as error:
            if error.status != 409:
                raise
            # Another writer was faster: plan again from the new version, without back-off.
            answer = await self._kube.get(MODELS, name, self._namespace, type=Model)
            if answer.metadata.resource_version == model.metadata.resource_version:
                raise
        self._store.model_written(answer)

    async def _patch_status(
        self, model: Model, memory: _Memory, status: ModelStatus
    ) -> float | None:
        if memory.status_sent == (timeless(status), model.status):
            return None  # the API stores something else (a CRD without conditions): leave it
        now_s = self._clock()
        if only_counts(status, model.status):
            memory.status_due_s = math.inf  # the next real change settles from the start
            due_s = memory.sent_s[1] + COUNTING_INTERVAL_S
        else:
            memory.status_due_s = min(memory.status_due_s, now_s + STATUS_SETTLE_S)
            due_s = max(memory.status_due_s, memory.sent_s[0] + MODEL_WRITES_INTERVAL_S)
        if now_s < due_s:
            return due_s - now_s
        memory.status_due_s = math.inf
        patch = {
            "metadata": {"resourceVersion": model.metadata.resource_version},
            "status": _status_patch(status, model.status),
        }
        try:
            async with self._writes:
                memory.sent_s = memory.sent_s[1], self._clock()
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
                return CONFLICT_REST_S
            raise
        memory.status_sent = (timeless(status), answer.status)
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
                self._events.tell(model, c.reason, text, warning=warning)

    async def _tell(self, model: Model, memory: _Memory, error: ApiError) -> None:
        """Report a rejected write that a person has to fix in the Model's conditions."""
        if not 400 <= error.status < 500 or error.status in (409, 429):
            return
        memory.create_error = Trouble("PodRefused", str(error)[:MESSAGE_MAX_CHARS])
        observed, _ = self._observe(model, memory)
        for action in self._plan(model, memory, observed):
            if isinstance(action, PatchStatus):
                await self._patch_status(model, memory, action.status)

    async def _sweep(self, name: str, model: Model | None) -> float | None:
        """Delete pods whose Model is gone, in case Kubernetes' garbage collection does not."""
        uid = model.metadata.uid if model is not None else None
        orphans = [
            pod
            for pod in self._store.pods_of(name)
            if pod.owner and pod.uid and pod.owner != uid and not pod.terminating
        ]
        if not orphans:
            return None
        try:  # the store's two watches are not synchronised: ask the API before deleting
            live = await self._kube.get(MODELS, name, self._namespace)
            uid = str(live["metadata"]["uid"])
        except ApiError as error:
            if error.status != 404:
                raise
            uid = None
        for pod in orphans:
            if pod.owner != uid:
                await self._delete(DeletePod(pod.name, pod.uid, "its Model no longer exists"))
        return EXPECTATION_TIMEOUT_S


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


def _sooner(a: float | None, b: float | None) -> float | None:
    return b if a is None else a if b is None else min(a, b)
