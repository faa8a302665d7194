"""The control plane of one KubeAI replica: wires store, routes, leader, controller, scaling.

Every replica follows Models and pods, publishes routes and answers demand. One of them leads, and
it alone reconciles and autoscales. The supervisor makes one Operator, runs it, and reads `synced`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from kubeai.api.config import SystemConfig
from kubeai.api.model import Model
from kubeai.kube import MODELS, PODS, Kube
from kubeai.logs import get_logger
from kubeai.operator.blocks import BlockTracker
from kubeai.operator.controller import Controller
from kubeai.operator.events import Events
from kubeai.operator.leader import Leader
from kubeai.operator.pods import PodObject
from kubeai.operator.routes import route_of
from kubeai.operator.scaling import Loads, Scaler, Wakes
from kubeai.operator.store import Store
from kubeai.routing import Route

log = get_logger(__name__)
POD_SELECTOR = "app.kubernetes.io/managed-by=kubeai,model"


class Operator:
    """``publish(model, route)`` is called from watch callbacks: it must not block.

    ``synced`` is set once every Model and pod is listed and every route published.
    """

    def __init__(
        self,
        kube: Kube,
        config: SystemConfig,
        namespace: str,
        identity: str,
        publish: Callable[[str, Route | None], None],
        loads: Loads,
    ) -> None:
        self.synced = asyncio.Event()
        self._kube = kube
        self._namespace = namespace
        self._publish = publish
        self._stop = asyncio.Event()
        self._ended = asyncio.Event()
        self._resign = asyncio.Event()
        self._resigned = asyncio.Event()
        for event in (self._ended, self._resigned):
            event.set()  # until `run` begins, there is nothing to wait for
        self.store = Store(self._changed, address_override=config.allow_pod_address_override)
        self._blocks = BlockTracker(config.gateway)
        lease = config.leader_election
        self.leader = Leader(
            kube,
            namespace,
            identity,
            lease_duration_s=lease.lease_duration_s,
            renew_deadline_s=lease.renew_deadline_s,
            retry_period_s=lease.retry_period_s,
            changed=self._turn,
        )
        self._events = Events(kube, namespace)
        fenced = kube.fenced(self.leader.check)  # all that only a leader writes goes through it
        self.controller = Controller(
            fenced, config, namespace, self.store, self.leader, loads, self._events
        )
        self._wakes = Wakes(kube, namespace, self.store, loads, self._events)
        self._scaler = Scaler(
            fenced,
            namespace,
            config.model_autoscaling,
            self.store,
            self.leader,
            loads,
            self._events,
        )

    @property
    def leads(self) -> bool:
        """Whether this replica writes."""
        return self.leader.leads

    def demand(self, model: str) -> None:
        """A request is held for the model: at least one replica is wanted."""
        if not self._stop.is_set():
            self._wakes.demand(model)

    async def run(self) -> None:
        """Until :meth:`stop`. Raises only what is a fault of the program."""
        jobs = (
            self._follow_models(),
            self._follow_pods(),
            self._events.run(),
            self._wakes.run(),
            self._lead(),
            self._stop.wait(),
        )
        self._ended.clear()
        try:
            await _first_of(*jobs)
        finally:
            self._stop.set()
            await self._wakes.stop()
            self._ended.set()

    async def _lead(self) -> None:
        """What only a leader does, until :meth:`resign`; then the lease is given up."""
        self._resigned.clear()
        try:
            await _first_of(
                self.leader.run(),
                self.controller.claims.run(),
                self._scaler.run(),
                self._resign.wait(),
            )
        finally:
            await self.controller.stop()
            with contextlib.suppress(Exception):
                await self.leader.release()
            self._resigned.set()
        await self._stop.wait()

    async def resign(self) -> None:
        """Lead no more, and give up the lease. Routes and demand go on until :meth:`stop`."""
        self._resign.set()
        await self._resigned.wait()

    async def stop(self) -> None:
        """Stop writing, then give up the lease. Returns when ``run`` is at its end."""
        self._stop.set()
        await self._ended.wait()

    # -- what the store and the leader tell ------------------------------------------------------

    def _changed(self, name: str) -> None:
        if not self.synced.is_set():
            return  # `_begin` does them all
        self._route(name)
        self.controller.changed(name)

    def _begin(self) -> None:
        """Once both collections are known: all routes, then all reconciles."""
        if self.synced.is_set() or not self.store.listed:
            return
        for name in self.store.models:
            self._route(name)
        self.synced.set()
        log.info("synced", models=len(self.store.models))
        self.controller.all_changed()

    def _route(self, name: str) -> None:
        model = self.store.models.get(name)
        if model is None:
            self._blocks.forget(name)
            self._publish(name, None)
            return
        pods = self.store.observed_pods(name)
        self._publish(name, route_of(model, pods, self._blocks.observe(model, pods)))

    def _turn(self, leads: bool) -> None:
        if leads:
            self.controller.all_changed()
        else:
            self.controller.rest()

    def _replace_models(self, models: list[Model]) -> None:
        self.store.replace_models(models)
        self._begin()

    def _replace_pods(self, pods: list[PodObject]) -> None:
        self.store.replace_pods(pods)
        self._begin()

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


async def _first_of(*jobs: Coroutine[Any, Any, Any]) -> None:
    """Run them at the same time until one ends; the others have ended too when this returns."""
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
