"""Runs one pod: from its manifest to processes, probes and a status.

Owns a pod's containers and their files in the pod's directory. Independent of the API: it gets the
objects that the pod refers to from :class:`~.volumes.Objects` and reports status changes through a
callback. Called by agent.py; tests call it with plain pods.

Lifecycle: volumes → init containers in order (sidecars are started and keep running) → containers,
each restarted under its policy with back-off → when all have ended, the sidecars are ended.
``stop`` ends it earlier: preStop, SIGTERM, the grace period, SIGKILL to every descendant.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kubeai.errors import KubeAIError
from kubeai.local.kubelet.pods.container import ContainerRunner, log_failure
from kubeai.local.kubelet.pods.devices import NO_DEVICES
from kubeai.local.kubelet.pods.host import Host
from kubeai.local.kubelet.pods.pod import Condition, Pod, PodError, Terminated, Waiting
from kubeai.local.kubelet.pods.status import PhaseOverride, pod_status, timestamp
from kubeai.local.kubelet.pods.volumes import Claims, prepare_volumes
from kubeai.logs import get_logger

log = get_logger(__name__)


class PodRunner:
    """A pod on this machine. ``changed`` is called whenever :meth:`status` may differ."""

    def __init__(
        self,
        pod: Pod,
        ip: str,
        host: Host,
        changed: Callable[[], None],
        devices: Mapping[str, tuple[str, ...]] = NO_DEVICES,
    ) -> None:
        """``devices``: the GPUs of each container that requests some."""
        self.pod = pod
        self.ip = ip
        self.host = host
        self.devices = devices
        self._changed = changed
        self.volume_paths: dict[str, Path] = {}
        self.terminated = asyncio.Event()  # no process is left, and none will be started
        self._stopping = asyncio.Event()
        self._deadline = float("inf")
        self._initialized = False
        self._override: PhaseOverride | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._start_time = pod.status.start_time or timestamp(time.time())
        self._conditions: dict[str, Condition] = {c.type: c for c in pod.status.conditions}
        policy = pod.spec.restart_policy
        init_policy = "Never" if policy == "Never" else "OnFailure"
        self._init = [
            ContainerRunner(self, spec, spec.restart_policy or init_policy)
            for spec in pod.spec.init_containers
        ]
        self._main = [ContainerRunner(self, spec, policy) for spec in pod.spec.containers]
        self._sidecars = [c for c in self._init if c.spec.restart_policy == "Always"]
        self._restore()

    def _restore(self) -> None:
        status = self.pod.status
        for statuses, containers, rerun in (
            (status.init_container_statuses, self._init, True),
            (status.container_statuses, self._main, False),
        ):
            by_name = {s.name: s for s in statuses}
            for container in containers:
                if container.spec.name in by_name:
                    container.restore(by_name[container.spec.name], rerun=rerun)

    def changed(self) -> None:
        """Report that the status may differ."""
        self._changed()

    # -- lifecycle -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run until all containers have ended for good, or :meth:`stop`; leaves no process."""
        alarm: asyncio.TimerHandle | None = None
        if (limit_s := self.pod.spec.active_deadline_seconds) is not None:
            loop = asyncio.get_running_loop()
            alarm = loop.call_later(limit_s, self._out_of_time)
        try:
            if await self._prepare() and await self._initialize():
                self._initialized = True
                self.changed()
                await asyncio.gather(*(container.run() for container in self._main))
        except Exception:
            log.exception("pod runner failed", pod=self.pod.key)
            self._override = PhaseOverride("Failed", "KubeletError", "see the kubelet's log")
            self.spawn(self.stop(0))
        finally:
            if alarm is not None:
                alarm.cancel()
        await self._end_sidecars()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._stopping.is_set() and self._override is None:
            self._override = PhaseOverride("Succeeded" if self._all_well() else "Failed")
        self.terminated.set()
        self.changed()

    def _all_well(self) -> bool:
        states = [c.record.state for c in self._main]
        return all(isinstance(state, Terminated) and state.exit_code == 0 for state in states)

    async def stop(self, grace_s: float) -> None:
        """End all containers; another call can only shorten the grace period."""
        loop = asyncio.get_running_loop()
        self._deadline = min(self._deadline, loop.time() + grace_s)
        self._stopping.set()
        ending = [c for c in (*self._init, *self._main) if c not in self._sidecars]
        await asyncio.gather(*(c.stop(grace_s) for c in ending))
        await self._end_sidecars()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run a task alongside the containers; the pod is not over before it ends."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(log_failure)

    async def _prepare(self) -> bool:
        timing = self.host.timing
        wait_s = timing.config_first_s
        while not self._stopping.is_set():
            try:
                directory = self.host.pod_directory(self.pod.metadata)
                directory.mkdir(parents=True, exist_ok=True)
                claims = Claims(self.host.data_dir / "volumes", self.host.volumes)
                self.volume_paths = await prepare_volumes(
                    self.pod, directory, claims, self.host.objects
                )
                return True
            except (KubeAIError, OSError) as error:
                reason = error.reason if isinstance(error, PodError) else "ContainerCreating"
                for container in (*self._init, *self._main):
                    if isinstance(container.record.state, Waiting):
                        container.record.state = Waiting(reason, str(error))
                self.changed()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stopping.wait()
            wait_s = min(timing.config_max_s, 2 * wait_s)
        return False

    async def _initialize(self) -> bool:
        """Run the init containers in order; False if one failed for good, or on stop."""
        for container in self._init:
            if self._stopping.is_set():
                return False
            if container in self._sidecars:
                self.spawn(container.run())
                await self._first_of(container.started, self._stopping)
            elif not await container.run():
                return False
        return not self._stopping.is_set()

    @staticmethod
    async def _first_of(*events: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in events]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _end_sidecars(self) -> None:
        """End the sidecars in reverse order, within the remaining grace period."""
        loop = asyncio.get_running_loop()
        for container in reversed(self._sidecars):
            grace_s = float(self.pod.spec.termination_grace_period_seconds)
            if self._stopping.is_set():
                grace_s = min(grace_s, self._deadline - loop.time())
            await container.stop(max(0.0, grace_s))

    def _out_of_time(self) -> None:
        message = "Pod was active on the node longer than the specified deadline"
        self._override = PhaseOverride("Failed", "DeadlineExceeded", message)
        self.spawn(self.stop(self.pod.spec.termination_grace_period_seconds))

    # -- status ----------------------------------------------------------------------------------

    def update(self, pod: Pod) -> None:
        """Take the API's newer version: labels, annotations, others' conditions."""
        self.pod = pod

    async def shut_down(self, grace_s: float) -> None:
        """End the processes but keep the pod for the next kubelet, because this one exits."""
        self._override = self._override or PhaseOverride(str(self.status()["phase"]))
        running = [c.record for c in (*self._init, *self._main) if c.process is not None]
        await self.stop(grace_s)
        await self.terminated.wait()
        for record in running:
            if isinstance(record.state, Terminated):  # by the kubelet, not by a failure
                record.last = msgspec.structs.replace(record.state, reason="KubeletStopped")
            record.state = Waiting("KubeletStopped", "will be restarted with the kubelet")
        self.changed()

    def container(self, name: str) -> ContainerRunner | None:
        """Return the container of that name."""
        every = (*self._init, *self._main)
        return next((c for c in every if c.spec.name == name), None)

    def status(self) -> Mapping[str, Any]:
        """The pod's current status for the API."""
        status = pod_status(
            self.pod,
            [c.record for c in self._init],
            [c.record for c in self._main],
            sidecars=frozenset(c.spec.name for c in self._sidecars),
            initialized=self._initialized,
            ip=self.ip,
            host_ip=self.host.ip,
            start_time=self._start_time,
            now=timestamp(time.time()),
            before=self._conditions,
            override=self._override,
        )
        for condition in status["conditions"]:
            since = condition.get("lastTransitionTime")
            self._conditions[condition["type"]] = Condition(
                condition["type"], condition["status"], last_transition_time=since
            )
        return status
