"""Writes spec.replicas: any KubeAI replica scales from zero at once, the leader scales up and down.

:class:`Activator` scales a Model up from zero on demand. This is the only write that needs no
leadership: the patch carries the Model's resourceVersion, so only a real 0 → 1 transition is
accepted, even if several KubeAI replicas try or one has stale data. :class:`Scaler` runs the
autoscaler and, on one machine, swaps Models.
Every KubeAI replica collects samples, so that it has a history when it becomes the leader. Only the
leader writes, and it stores its averages in a ConfigMap for a next leader that has just started.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Protocol

import msgspec

from kubeai.api.config.system import ModelAutoscaling
from kubeai.api.model import Model
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS, MODELS
from kubeai.logs import get_logger
from kubeai.operator.controller import PodLoads
from kubeai.operator.events import Events
from kubeai.operator.leader import Leadership, NotLeader
from kubeai.operator.plan import bounded
from kubeai.operator.scaling.autoscaler import Autoscaler, Decision, Sample
from kubeai.operator.scaling.swap import ModelLoad, Swap
from kubeai.operator.scaling.timeline import Timeline
from kubeai.operator.store import Store

log = get_logger(__name__)
SCALE_UP_ATTEMPTS_MAX = 5
HELD_INTERVAL_S = 0.5  # between checks for held requests whose notification was lost
BACKOFF_FIRST_S, BACKOFF_MAX_S = 1.0, 5.0  # short, because requests are held meanwhile
LOOKS_AN_INTERVAL = 10
LOOK_MIN_S = 1.0
STATE_NAME_DEFAULT = "kubeai-autoscaler-state"
STATE_KEY = "models"


class Loads(PodLoads, Protocol):
    """Loads by model name, from the load table. The supervisor implements it."""

    def active(self, model: str) -> int:
        """In-flight and held requests in all replicas of KubeAI."""
        ...

    def held(self, model: str) -> int:
        """Requests that wait for an endpoint in this KubeAI replica."""
        ...

    def ended(self, model: str) -> int:
        """Requests that have ended so far, successfully or not. Falls only if a counter is lost."""
        ...

    def complete(self) -> bool:
        """Whether the numbers include all replicas of KubeAI."""
        ...


def scaled_to_zero(model: Model) -> bool:
    """Whether the Model is scaled to zero and demand should scale it up."""
    spec = model.spec
    return (
        not spec.replicas
        and not spec.autoscaling_disabled
        and model.metadata.deletion_timestamp is None
    )


class Activator:
    """Scales from zero: at most one in-flight write per model, however many requests wait."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        store: Store,
        loads: Loads,
        events: Events,
        timeline: Timeline,
    ) -> None:
        self._timeline = timeline
        self._kube = kube
        self._namespace = namespace
        self._store = store
        self._loads = loads
        self._events = events
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._backoffs: dict[str, Backoff] = {}

    def demand(self, name: str) -> None:
        """Request at least one replica. Returns at once, and usually does nothing."""
        model = self._store.models.get(name)
        if model is None or name in self._tasks or not scaled_to_zero(model):
            return
        task = asyncio.get_running_loop().create_task(self._activate(name, model))
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def run(self) -> None:
        """Check Models at zero for held requests, forever, in case a notification was lost."""
        while True:
            for name, model in list(self._store.models.items()):
                if scaled_to_zero(model) and self._loads.held(name) > 0:
                    self.demand(name)
            await asyncio.sleep(HELD_INTERVAL_S)

    async def stop(self) -> None:
        """Cancel the writes in flight and wait until they have ended."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _activate(self, name: str, model: Model) -> None:
        try:
            await self._raise(name, model)
            self._backoffs.pop(name, None)
        except ApiError as error:
            # The demand remains: `run` retries it. This task stays alive through the back-off, so
            # nothing is sent meanwhile.
            backoff = self._backoffs.setdefault(name, Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S))
            log.warning(
                "scaling from zero failed", model=name, status=error.status, error=str(error)
            )
            await asyncio.sleep(max(backoff.next_s(), error.retry_after_s or 0.0))

    async def _raise(self, name: str, model: Model) -> None:
        retries = Backoff(0.02, 0.5)
        for _ in range(SCALE_UP_ATTEMPTS_MAX):
            if not scaled_to_zero(model):
                return
            replicas = bounded(model, 1)
            patch = {
                "metadata": {"resourceVersion": model.metadata.resource_version},
                "spec": {"replicas": replicas},
            }
            self._timeline.announce(name, replicas, "a request is waiting")
            try:
                scaled = await self._kube.patch(MODELS, name, patch, self._namespace, type=Model)
            except ApiError as error:
                if error.status == 404:
                    return
                if error.status != 409:
                    raise
                await asyncio.sleep(retries.next_s())
                model = await self._kube.get(MODELS, name, self._namespace, type=Model)
                self._store.model_written(model)
                continue
            log.info("model scaled from zero", model=name, replicas=scaled.spec.replicas)
            self._events.emit(scaled, "ScaledUp", "scaled up from 0 replicas on request")
            self._store.model_written(scaled)
            return
        raise ApiError(409, "Conflict", f"{name} conflicted on {SCALE_UP_ATTEMPTS_MAX} attempts")


class _ModelState(msgspec.Struct, rename="camel"):
    average_active_requests: float = 0.0


class _State(msgspec.Struct, rename="camel"):
    """The ConfigMap's value under the key ``models``."""

    models: dict[str, _ModelState] = {}
    last_calculation_time: datetime | None = None


class Scaler:
    """Feeds the autoscaler with samples and, while this process leads, patches spec.replicas."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        config: ModelAutoscaling,
        store: Store,
        leader: Leadership,
        loads: Loads,
        events: Events,
        timeline: Timeline,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kube = kube
        self._timeline = timeline
        self._namespace = namespace
        self._config = config
        self._store = store
        self._leader = leader
        self._loads = loads
        self._events = events
        self._clock = clock
        self._state_name = config.state_config_map_name or STATE_NAME_DEFAULT
        self._core = Autoscaler(config.interval_s, config.time_window_s)
        self._look_s = min(
            config.interval_s, max(LOOK_MIN_S, config.interval_s / LOOKS_AN_INTERVAL)
        )
        self._next_s = clock()  # when the next interval's decisions are due
        self._saved: dict[str, float] | None = None  # None: not read in this leadership
        self._version = ""  # the ConfigMap's resourceVersion; empty if there is none
        self._swap: Swap | None = None

    def enable_swap(self, swap: Swap) -> None:
        """Scale idle Models down when another one is demanded and does not fit."""
        self._swap = swap

    async def run(self) -> None:
        """Take several samples per interval and decide at its end, forever."""
        while True:
            began_s = self._clock()
            try:
                if self._store.listed:
                    await self._look()
            except NotLeader:
                self._saved = None
            except ApiError as error:
                log.warning("autoscaling failed", status=error.status, error=str(error))
            except Exception:
                log.exception("autoscaling failed")
            await asyncio.sleep(max(0.01, self._look_s - (self._clock() - began_s)))

    async def _look(self) -> None:
        if not self._leader.leads:
            self._saved = None
        elif self._saved is None:  # a new leader decides at once, from its own samples
            self._core.observe(self._samples(), self._clock())
            await self._restore()
            self._next_s = self._clock()
        now_s = self._clock()
        if self._swap is not None and self._saved is not None:
            await self._make_room(self._swap, now_s)
        if now_s < self._next_s - self._look_s / 2:
            self._core.observe(self._samples(), now_s)
            return
        self._next_s = max(now_s, self._next_s + self._config.interval_s)
        decisions = self._core.step(self._samples(), now_s)
        if self._saved is not None:
            await self._apply(decisions)

    async def _apply(self, decisions: Mapping[str, Decision]) -> None:
        for name, decision in decisions.items():
            model = self._store.models.get(name)
            if model is None or decision.replicas == model.spec.replicas:
                continue
            if model.spec.replicas is None:
                continue  # the controller is about to set it
            if decision.replicas == 0 and self._loads.active(name):
                continue  # a request has arrived since the sample was taken
            why = self._reason(model, decision.replicas, decision.average)
            await self._scale(model, decision.replicas, why)
        await self._save({name: decision.average for name, decision in decisions.items()})

    async def _make_room(self, swap: Swap, now_s: float) -> None:
        loads = [
            ModelLoad(
                model,
                [p for p in self._store.pods_of(name) if p.owner == model.metadata.uid],
                self._loads.active(name),
                self._loads.ended(name),
            )
            for name, model in self._store.models.items()
        ]
        for eviction in swap.step(loads, now_s):
            model = self._store.models.get(eviction.model)
            if model is None or self._loads.active(eviction.model):
                continue  # a request has arrived since the sample was taken
            why = f"to make room for {eviction.room_for}"
            await self._scale(model, model.spec.min_replicas, why)
            self._core.forget(eviction.model)

    def _samples(self) -> dict[str, Sample]:
        complete = self._loads.complete()
        return {
            name: self._sample(model, complete)
            for name, model in self._store.models.items()
            if not model.spec.autoscaling_disabled and model.metadata.deletion_timestamp is None
        }

    def _sample(self, model: Model, complete: bool) -> Sample:
        name, uid, spec = model.metadata.name, model.metadata.uid, model.spec
        pods = self._store.observed_pods(name)
        return Sample(
            active=self._loads.active(name),
            ended=self._loads.ended(name),
            ready=sum(pod.serves and pod.owner == uid for pod in pods),
            replicas=spec.replicas or 0,
            target_requests=spec.target_requests,
            min_replicas=spec.min_replicas,
            max_replicas=spec.max_replicas,
            scale_down_delay_s=spec.scale_down_delay_seconds,
            complete=complete,
        )

    async def _scale(self, model: Model, replicas: int, why: str) -> None:
        name = model.metadata.name
        patch = {
            "metadata": {"resourceVersion": model.metadata.resource_version},
            "spec": {"replicas": replicas},
        }
        self._leader.check()
        before = model.spec.replicas or 0
        self._timeline.announce(name, replicas, why)
        try:
            answer = await self._kube.patch(MODELS, name, patch, self._namespace, type=Model)
        except ApiError as error:  # the next interval decides again
            log.info("model not scaled", model=name, status=error.status, error=str(error))
            return
        log.info(
            "model scaled",
            model=name,
            before=model.spec.replicas,
            replicas=replicas,
            why=why,
        )
        if replicas < before:
            self._core.shrunk(name, replicas)
        self._events.emit(
            answer,
            "ScaledUp" if replicas > before else "ScaledDown",
            f"scaled from {before} to {replicas} replicas: {why}",
        )
        self._store.model_written(answer)

    def _reason(self, model: Model, replicas: int, average: float) -> str:
        """Why the averages lead to this number of replicas, for people."""
        spec = model.spec
        reason = (
            f"average of {average:g} active requests over {self._config.time_window_s:g} s, "
            f"target {spec.target_requests} per replica"
        )
        if replicas < (spec.replicas or 0):
            reason += f", for longer than the scale-down delay of {spec.scale_down_delay_seconds} s"
        return reason

    # -- state for the next leader -----------------------------------------------------------------

    async def _restore(self) -> None:
        state = _parse_state((await self._read()).get(STATE_KEY) or "{}")
        averages = {name: m.average_active_requests for name, m in state.models.items()}
        age_s = 0.0
        if state.last_calculation_time is not None:
            age_s = (datetime.now(UTC) - state.last_calculation_time).total_seconds()
        # State older than the window would have no samples left in it.
        self._core.restore(averages if age_s <= self._config.time_window_s else {})
        self._saved = averages
        log.info("autoscaler state restored", models=len(averages), age_s=round(age_s, 1))

    async def _read(self) -> dict[str, str]:
        """Read the ConfigMap's data and remember its version."""
        try:
            found = await self._kube.get(CONFIGMAPS, self._state_name, self._namespace)
        except ApiError as error:
            if error.status != 404:
                raise
            found = {"metadata": {"resourceVersion": ""}}
        self._version = found["metadata"]["resourceVersion"]
        return found.get("data") or {}

    async def _save(self, averages: Mapping[str, float]) -> None:
        """Write the averages with at most one request; never overwrite an unknown version."""
        if averages == self._saved and self._version:
            return
        data = {STATE_KEY: _text(averages)}
        self._leader.check()
        try:
            if self._version:
                patch = {"metadata": {"resourceVersion": self._version}, "data": data}
                kept = await self._kube.patch(CONFIGMAPS, self._state_name, patch, self._namespace)
            else:
                state = {"metadata": {"name": self._state_name}, "data": data}
                kept = await self._kube.create(CONFIGMAPS, state, self._namespace)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            await self._read()  # deleted or changed by others: the next interval writes again
            return
        self._version = kept["metadata"]["resourceVersion"]
        self._saved = dict(averages)


def _text(averages: Mapping[str, float]) -> str:
    models = {name: _ModelState(average) for name, average in averages.items()}
    return msgspec.json.encode(_State(models, datetime.now(UTC))).decode()


def _parse_state(text: str) -> _State:
    try:
        return msgspec.json.decode(text, type=_State)
    except msgspec.DecodeError as error:
        log.warning("autoscaler state is unreadable and is discarded", error=str(error))
        return _State()
