"""Reconciles one Model at a time: brings its pods and status in line with its spec.

Owns all of the leader's writes except scaling. ``changed(name)`` enqueues a model. Reconciling it
means reading the store, the cache and the adapters, calling :func:`plan`, and applying the actions
(see `kubeai.operator.apply`).
Promises: no write unless this KubeAI replica is the leader at that moment; no write while nothing
changes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Protocol

import msgspec

from kubeai.api.config.system import SystemConfig
from kubeai.api.model import Model
from kubeai.errors import ModelError
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import MODELS
from kubeai.kube.workqueue import Queue
from kubeai.logs import get_logger
from kubeai.operator.adapter_steps import AdaptersView
from kubeai.operator.adapters import Adapters
from kubeai.operator.apply import Applier, WriteState, sooner
from kubeai.operator.cache.claims import Claims
from kubeai.operator.cache.plan import CacheView, has_cache
from kubeai.operator.events import Events
from kubeai.operator.files import Files
from kubeai.operator.leader import Leadership, NotLeader, Writes
from kubeai.operator.names import NO_NAMES, ResolvedNames
from kubeai.operator.plan import (
    Action,
    CreatePod,
    DeletePod,
    Observed,
    PatchStatus,
    Template,
    plan,
    template_of,
)
from kubeai.operator.pod_trouble import MESSAGE_MAX_CHARS, Trouble
from kubeai.operator.pods import Pod
from kubeai.operator.services import Services
from kubeai.operator.store import EXPECTATION_TIMEOUT_S, Store

log = get_logger(__name__)
PARALLEL_MODELS_MAX = 64
PARALLEL_WRITES_MAX = 32
DRAINED_INTERVAL_S = 0.5  # between checks of draining pods
SERVICE_RETRY_S = 10.0
FINISHED_FIRST_S, FINISHED_MAX_S = 2.0, 300.0  # back-off before finished pods are replaced


class _Memory(msgspec.Struct):
    """State kept for one Model between reconciles. It need not survive a restart."""

    uid: str  # the Model's
    writes: WriteState = msgspec.field(default_factory=WriteState)
    template: tuple[Any, Template | ModelError] | None = None  # (inputs, result)
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
        """Whether any KubeAI replica may still send it requests or has some in flight."""
        ...


class Controller:
    """Runs on every KubeAI replica, but writes only while ``leader`` leads.

    ``loads`` decides which pods to delete first, and whether a pod must be drained before that.
    """

    def __init__(
        self,
        kube: Kube,
        config: SystemConfig,
        namespace: str,
        store: Store,
        leader: Leadership,
        loads: PodLoads,
        events: Events,
        clock: Callable[[], float] = time.monotonic,
        no_sets: Callable[[], str] = lambda: "",
        names: Callable[[str], ResolvedNames] = lambda _: NO_NAMES,
    ) -> None:
        self.no_sets = no_sets  # why there are no LeaderWorkerSets, if there are none
        self._names = names
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
        self._applier = Applier(kube, namespace, store, self._writes, self.claims, events, clock)
        self._files = Files(kube, namespace, self._writes)
        self.services = Services(
            kube,
            namespace,
            self._writes,
            external=config.external,
            changed=self.changed,
            all_changed=self.all_changed,
        )
        self._adapters = Adapters(kube, namespace, self._writes, self.changed, clock)

    def changed(self, name: str) -> None:
        """Enqueue the model for reconciliation."""
        if self._leader.leads and self._store.listed:
            self.queue.add(name)

    def all_changed(self) -> None:
        """Enqueue every model: this KubeAI replica has become the leader or has just synced."""
        for name in self._store.names():
            self.changed(name)

    def _caches_changed(self) -> None:
        for name, model in self._store.models.items():
            if has_cache(model):
                self.changed(name)

    def stopped_leading(self) -> None:
        """This KubeAI replica is no longer the leader."""
        self._adapters.stopped_leading()
        self.claims.stopped_leading()
        self._files.stopped_leading()
        self.services.stopped_leading()

    async def stop(self) -> None:
        """End the reconciles and the loading of adapters, and close its connections."""
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
            return sooner(again_s, await self._round(model, memory))
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
        if memory.writes.create_error and not any(isinstance(a, CreatePod) for a in actions):
            memory.writes.create_error = None  # there is nothing left to create
            actions = self._plan(
                model, memory, msgspec.structs.replace(observed, create_error=None)
            )
        changes = [action for action in actions if not isinstance(action, PatchStatus)]
        try:
            again_s = await self._applier.apply(model, memory.writes, changes)
        except ApiError as error:
            await self._report_rejection(model, memory, error)
            raise
        if again_s is not None:
            return again_s
        for action in actions:
            if isinstance(action, PatchStatus):
                again_s = await self._applier.patch_status(model, memory.writes, action.status)
        if not model.spec.files and not leaving:
            await self._files.remove(model, self._store.pods_of(model.metadata.name))
        if not leaving:
            again_s = sooner(again_s, await self._ensure_service(model))
        expected_s = self._store.oldest_expectation_s(model.metadata.name)
        return sooner(again_s, sooner(wait_s, expected_s))

    async def _ensure_service(self, model: Model) -> float | None:
        """Write the Model's Service. One that the API refuses is reported, and delays nothing else.

        Returns seconds until the next try, or None if none is needed.
        """
        try:
            await self.services.ensure(model)
        except ApiError as error:
            log.info("service not written", model=model.metadata.name, error=str(error))
            if 400 <= error.status < 500 and error.status not in (404, 429):
                text = f"the Model's Service cannot be written: {error}"
                self._events.emit(model, "ServiceRefused", text, warning=True)
            return SERVICE_RETRY_S
        return None

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
        memory.writes.taken = {
            n: until_s for n, until_s in memory.writes.taken.items() if until_s > now_s
        }
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
            for turn_s in (pod.trouble_from_s, pod.trouble_until_s):
                if pod.trouble is not None and unix_s < turn_s < math.inf:
                    # The plan's `now` is in whole seconds.
                    wait_s = sooner(wait_s, turn_s - unix_s + 1.0)
        if any(pod.draining_since_s and not pod.terminating for pod in pods):
            wait_s = sooner(wait_s, DRAINED_INTERVAL_S)
        cache, cache_wait_s = self._observe_cache(model, pods)
        adapters, adapters_wait_s = self._observe_adapters(model, pods)
        observed = Observed(
            pods=tuple(pod for pod in pods if pod.owner == uid),
            taken=frozenset(memory.writes.taken) | {pod.name for pod in pods if pod.owner != uid},
            replace_finished=replace_finished,
            create_error=memory.writes.create_error,
            in_flight=partial(self._loads.in_flight, name),
            in_use=partial(self._loads.in_use, name),
            no_sets=self.no_sets(),
            names=self._names(name),
            cache=cache,
            adapters=adapters,
        )
        return observed, sooner(wait_s, sooner(cache_wait_s, adapters_wait_s))

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

    async def _report_rejection(self, model: Model, memory: _Memory, error: ApiError) -> None:
        """Report a rejected write that a person has to fix in the Model's conditions."""
        if not 400 <= error.status < 500 or error.status in (409, 429):
            return
        memory.writes.create_error = Trouble("PodRefused", str(error)[:MESSAGE_MAX_CHARS])
        observed, _ = self._observe(model, memory)
        for action in self._plan(model, memory, observed):
            if isinstance(action, PatchStatus):
                await self._applier.patch_status(model, memory.writes, action.status)

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
                await self._applier.delete(
                    DeletePod(pod.name, pod.uid, "its Model no longer exists", pod.grouped)
                )
        return EXPECTATION_TIMEOUT_S
