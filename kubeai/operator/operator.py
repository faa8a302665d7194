"""The control plane of one KubeAI replica: wires store, routes, leader, controller and scaling.

Each watches Models, pods and API keys, publishes routes and keys, and scales Models up
from zero on demand. Only the leader reconciles and autoscales. The supervisor creates one Operator,
runs it, and reads `synced`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from kubeai.api.api_key import ApiKey
from kubeai.api.config.profiles import replica_requests
from kubeai.api.config.system import SystemConfig
from kubeai.api.model import Model
from kubeai.kube.client import Kube
from kubeai.kube.resources import MODELS, PODS
from kubeai.logs import get_logger
from kubeai.operator.controller import Controller
from kubeai.operator.events import Events
from kubeai.operator.groups import SetObject, needs_set
from kubeai.operator.keys import KeyWatch, Known
from kubeai.operator.leader import Leadership
from kubeai.operator.pods import PodObject
from kubeai.operator.route_publisher import RoutePublisher
from kubeai.operator.scaling.scaler import Activator, Loads, Scaler
from kubeai.operator.scaling.swap import Swap
from kubeai.operator.scaling.timeline import Step, Timeline
from kubeai.operator.sets import Sets
from kubeai.operator.store import Store
from kubeai.operator.view import ModelView, view_of
from kubeai.routing.routes import Route

log = get_logger(__name__)
POD_SELECTOR = "app.kubernetes.io/managed-by=kubeai,model"


class Operator:
    """``publish(model, route)`` is called from watch callbacks and must not block.

    So is ``publish_key(secret, key)``; without it, keys are not watched. ``synced`` is set once
    all Models, pods and keys are listed and all routes are published.
    """

    def __init__(
        self,
        kube: Kube,
        config: SystemConfig,
        namespace: str,
        identity: str,
        publish: Callable[[str, Route | None], None],
        loads: Loads,
        publish_key: Callable[[str, ApiKey | None], None] | None = None,
    ) -> None:
        self.synced = asyncio.Event()
        self._kube = kube
        self._config = config
        self._namespace = namespace
        self._stop = _End()
        self._resign = _End()
        self.store = Store(
            self._changed, address_override=config.allow_pod_address_override, follows_sets=True
        )
        self._routes = RoutePublisher(self.store, config, publish)
        self.leader = Leadership(kube, namespace, identity, config.leader_election, self._turn)
        self._events = Events(kube, namespace)
        self._keys: KeyWatch | None = None
        if publish_key is not None:
            self._keys = KeyWatch(publish_key, self._emit_about_key, self._begin)
        fenced = kube.fenced(self.leader.check)  # for all writes that are reserved to the leader
        self._sets = Sets(
            kube,
            namespace,
            POD_SELECTOR,
            replaced=self._replace_sets,
            changed=self.store.set_changed,
            needed=lambda: any(map(needs_set, self.store.models.values())),
            changed_problem=self._sets_came_or_went,
        )
        self.controller = Controller(
            fenced,
            config,
            namespace,
            self.store,
            self.leader,
            loads,
            self._events,
            no_sets=lambda: self._sets.problem,
            names=self._routes.names.resolve,
        )
        self._timeline = Timeline()
        self._activator = Activator(
            kube, namespace, self.store, loads, self._events, self._timeline
        )
        self._scaler = Scaler(
            fenced,
            namespace,
            config.model_autoscaling,
            self.store,
            self.leader,
            loads,
            self._events,
            self._timeline,
        )

    def enable_swap(self, allocatable: Mapping[str, int]) -> None:
        """Let idle Models make room for demanded ones, on a machine with these resources.

        ``allocatable``: in billionths, by resource; others are not counted.
        """
        self._scaler.enable_swap(Swap(allocatable, partial(replica_requests, self._config)))

    @property
    def leads(self) -> bool:
        """Whether this KubeAI replica is the leader."""
        return self.leader.leads

    def demand(self, model: str) -> None:
        """Report that a request is held for the model, so at least one replica is wanted."""
        if not self._stop.requested.is_set():
            self._activator.demand(model)

    async def run(self) -> None:
        """Run until :meth:`stop`. Raises only on a programming error."""
        jobs = [
            self._follow_models(),
            self._follow_pods(),
            self._sets.run(),
            self._events.run(),
            self._lead(),
            self._stop.requested.wait(),
        ]
        if not self._config.external:  # else no request is seen here
            jobs.append(self._activator.run())
        if self._keys is not None:
            jobs.append(self._keys.run(self._kube, self._namespace))
        self._stop.reached.clear()
        try:
            await _first_of(*jobs)
        finally:
            self._stop.requested.set()
            await self._activator.stop()
            self._stop.reached.set()

    async def _lead(self) -> None:
        """Run the leader's part until :meth:`resign`, then release the lease."""
        self._resign.reached.clear()
        try:
            jobs = [
                self.leader.run(),
                self.controller.claims.run(),
                self.controller.services.run(),
                self._resign.requested.wait(),
            ]
            if not self._config.external:
                jobs.append(self._scaler.run())
            await _first_of(*jobs)
        finally:
            await self.controller.stop()
            with contextlib.suppress(Exception):
                await self.leader.release()
            self._resign.reached.set()
        await self._stop.requested.wait()

    async def resign(self) -> None:
        """Stop leading and release the lease. Routes and demand continue until :meth:`stop`."""
        await self._resign.request()

    async def stop(self) -> None:
        """Stop writing, then release the lease. Returns when ``run`` has finished."""
        await self._stop.request()

    # -- what people see (view.py) ---------------------------------------------------------------

    def models(self) -> Iterable[ModelView]:
        """All Models."""
        now_s = time.time()
        for name, model in self.store.models.items():
            yield view_of(model, self.store.observed_pods(name), now_s)

    def model(self, name: str) -> ModelView | None:
        """One Model, if it exists."""
        model = self.store.models.get(name)
        if model is None:
            return None
        return view_of(model, self.store.observed_pods(name), time.time())

    def timeline(self, name: str) -> Sequence[Step]:
        """The last changes of a Model's spec.replicas, the newest first."""
        return self._timeline.steps(name)

    # -- callbacks of the store and the leader ---------------------------------------------------

    def _changed(self, name: str) -> None:
        if not self.synced.is_set():
            return  # `_begin` handles all models
        # Those that gain an alias come first, so that it always belongs to a Model.
        for other in sorted(self._routes.names.observe(name, self.store.models.get(name))):
            self._route(other)
            self.controller.changed(other)
        self._route(name)
        self.controller.changed(name)

    def _begin(self) -> None:
        """Once all collections are listed, publish all routes, then reconcile all Models."""
        if self.synced.is_set() or not self.store.listed:
            return
        if self._keys is not None and not self._keys.listed:
            return
        self._routes.names.begin(self.store.models)
        for name in self.store.models:
            self._route(name)
        self.synced.set()
        log.info("synced", models=len(self.store.models))
        self.controller.all_changed()

    def _route(self, name: str) -> None:
        model = self.store.models.get(name)
        if model is None:
            self._timeline.forget(name)
        else:
            self._timeline.observed(model)
        self._routes.publish(name)

    def _turn(self, leads: bool) -> None:
        if leads:
            self.controller.all_changed()
            if self._keys is not None:
                self._keys.report()
        else:
            self.controller.stopped_leading()

    def _emit_about_key(self, subject: Known, reason: str, message: str, *, warning: bool) -> None:
        if self.leader.leads:
            self._events.emit(subject, reason, message, warning=warning)

    def _replace_models(self, models: list[Model]) -> None:
        self.store.replace_models(models)
        self._begin()

    def _replace_pods(self, pods: list[PodObject]) -> None:
        self.store.replace_pods(pods)
        self._begin()

    def _replace_sets(self, sets: list[SetObject]) -> None:
        self.store.replace_sets(sets)
        self._begin()

    def _sets_came_or_went(self) -> None:
        if self.synced.is_set():
            for name in [n for n, model in self.store.models.items() if needs_set(model)]:
                self.controller.changed(name)

    async def _follow_models(self) -> None:
        await self._kube.follow(
            MODELS,
            self._namespace,
            type=Model,
            replaced=self._replace_models,
            changed=self.store.model_changed,
        )

    async def _follow_pods(self) -> None:
        await self._kube.follow(
            PODS,
            self._namespace,
            labels=POD_SELECTOR,
            type=PodObject,
            replaced=self._replace_pods,
            changed=self.store.pod_changed,
        )


class _End:
    """The end of a part of :meth:`Operator.run`: first it is requested, then reached."""

    def __init__(self) -> None:
        self.requested, self.reached = asyncio.Event(), asyncio.Event()
        self.reached.set()  # until `run` starts, there is nothing to wait for

    async def request(self) -> None:
        self.requested.set()
        await self.reached.wait()


async def _first_of(*jobs: Coroutine[Any, Any, Any]) -> None:
    """Run the jobs concurrently until one ends, then cancel the others and wait for them."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["Operator"]
