"""The kubelet's interface to the API: which pods to run, and their status.

Owns the watch on the Node's pods, one :class:`_PodSync` per pod, and all writes. Without a
scheduler, pods that have no node go to the :class:`~.binder.Binder`. Each :class:`_PodSync` starts
its pod's runner, patches ``status`` when it differs from the last one written, and deletes the
object when the processes of a deleted pod have exited. Without changes nothing is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from kubeai.errors import KubeAIError
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS, PODS, PVCS, SECRETS, Resource
from kubeai.local.kubelet.binder import Binder
from kubeai.local.kubelet.capacity import Amounts, allocatable, requests_of
from kubeai.local.kubelet.pods.addresses import PodAddress
from kubeai.local.kubelet.pods.container import ContainerRunner
from kubeai.local.kubelet.pods.environment import Data
from kubeai.local.kubelet.pods.host import Host
from kubeai.local.kubelet.pods.pod import (
    ObjectMeta,
    Pod,
    PodError,
    Waiting,
    decode_pod,
)
from kubeai.local.kubelet.pods.runner import PodRunner
from kubeai.local.kubelet.pods.volumes import config_map_data, secret_data
from kubeai.local.kubelet.server.execs import Refusal
from kubeai.logs import get_logger

log = get_logger(__name__)

FIRST_STATUS_TIMEOUT_S = 10.0
FLUSH_TIMEOUT_S = 3.0
ADDRESS_RETRY_MAX_S = 10.0
TERMINAL = ("Succeeded", "Failed")
Object = dict[str, Any]


class KubeObjects:
    """The objects that pods refer to, read from the API on demand."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube

    async def config_map(self, namespace: str, name: str) -> Data | None:
        """Return the ConfigMap's data."""
        obj = await self._get(CONFIGMAPS, namespace, name)
        return None if obj is None else config_map_data(obj)

    async def secret(self, namespace: str, name: str) -> Data | None:
        """Return the Secret's data."""
        obj = await self._get(SECRETS, namespace, name)
        return None if obj is None else secret_data(obj)

    async def open_claim(self, namespace: str, name: str) -> bool:
        """Whether the claim exists. A pending claim becomes Bound."""
        claim = await self._get(PVCS, namespace, name)
        if claim is None:
            return False
        if claim.get("status", {}).get("phase") == "Pending":
            bound = {"metadata": {"uid": claim["metadata"]["uid"]}, "status": {"phase": "Bound"}}
            await self._kube.patch(PVCS, name, bound, namespace, subresource="status")
        return True

    async def _get(self, resource: Resource, namespace: str, name: str) -> Object | None:
        if not name:
            return None
        try:
            return await self._kube.get(resource, name, namespace)
        except ApiError as error:
            if error.status == 404:
                return None
            raise


class Agent:
    """All pods of one Node. ``synced`` is set once all pods found at the start have a status."""

    def __init__(
        self, kube: Kube, host: Host, node: str, capacity: Mapping[str, str], *, bind: bool
    ) -> None:
        """``capacity``: of the Node, for binding pods to it."""
        self.kube = kube
        self.host = host
        self.synced = asyncio.Event()
        self._node = node
        self._binder = Binder(kube, node, allocatable(capacity), self._used) if bind else None
        self._pods: dict[str, _PodSync] = {}
        self._sync: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Watch the pods until cancelled."""
        fields = "" if self._binder else f"spec.nodeName={self._node}"
        pods = self.kube.follow(PODS, fields=fields, replaced=self._replaced, changed=self._changed)
        await (asyncio.gather(pods, self._binder.run()) if self._binder else pods)

    async def stop(self, grace_s: float) -> None:
        """End all processes but keep the Pods for the next kubelet. Call after run."""
        if self._binder:
            self._binder.stop()
        await asyncio.gather(*(pod_sync.shut_down(grace_s) for pod_sync in self._pods.values()))

    def find_log(
        self, namespace: str, pod: str, container: str, previous: bool
    ) -> tuple[Path, Callable[[], bool]]:
        """See server.Pods."""
        return self._find_pod(namespace, pod).find_log(container, previous)

    def find_container(self, namespace: str, pod: str, container: str) -> ContainerRunner:
        """See execs.Containers."""
        return self._find_pod(namespace, pod).find_container(container)

    def _find_pod(self, namespace: str, pod: str) -> _PodSync:
        found = [pod_sync for pod_sync in self._pods.values() if pod_sync.is_named(namespace, pod)]
        if not found:
            raise Refusal(404, f'pod "{pod}" is not on this node')
        return found[-1]

    def _used(self) -> list[Amounts]:
        return [pod_sync.requests for pod_sync in self._pods.values()]

    def pod_ended(self, uid: str) -> None:
        """No process of the pod is left: others may have its resources."""
        self.host.devices.release(uid)
        if self._binder:
            self._binder.room_changed()

    # -- watch events ----------------------------------------------------------------------------

    def _replaced(self, pods: list[Object]) -> None:
        uids = {pod["metadata"]["uid"] for pod in pods}
        for uid, pod_sync in self._pods.items():
            if uid not in uids:
                pod_sync.object_deleted()
        if self._binder:
            self._binder.keep_only(uids)
        if self._sync is None:
            self._remove_old_directories(uids)
            self._restore_devices(pods)
        for pod in pods:
            self._changed("ADDED", pod)
        if self._sync is None:
            self._sync = asyncio.create_task(self._wait_for_statuses())

    def _changed(self, kind: str, obj: Object) -> None:
        meta, spec = obj["metadata"], obj.get("spec") or {}
        uid, node = meta["uid"], spec.get("nodeName") or ""
        pod_sync = self._pods.get(uid)
        if self._binder:
            if kind == "DELETED" or meta.get("deletionTimestamp"):
                self._binder.withdraw(uid)
            elif node:
                self._binder.bound(uid)
            elif pod_sync is None:
                self._binder.offer(obj)
        if kind == "DELETED":
            if pod_sync is not None:
                pod_sync.object_deleted()
        elif node == self._node:
            if pod_sync is None:
                self._pods[uid] = _PodSync(self, obj, lambda: self._forget(uid))
            else:
                pod_sync.observe(obj)

    def _forget(self, uid: str) -> None:
        self._pods.pop(uid, None)
        self.pod_ended(uid)

    def _restore_devices(self, pods: list[Object]) -> None:
        """Let the pods that an earlier kubelet ran keep their devices, before any gets others."""
        for pod in pods:
            phase = (pod.get("status") or {}).get("phase")
            if (pod.get("spec") or {}).get("nodeName") == self._node and phase not in TERMINAL:
                meta = msgspec.convert(_metadata(pod), ObjectMeta)
                if meta.deletion_timestamp is None:
                    self.host.devices.restore(meta.uid, self.host.pod_directory(meta))

    async def _wait_for_statuses(self) -> None:
        written = [asyncio.create_task(p.written.wait()) for p in self._pods.values()]
        if written:
            _, late = await asyncio.wait(written, timeout=FIRST_STATUS_TIMEOUT_S)
            for task in late:
                task.cancel()
        self.synced.set()

    def _remove_old_directories(self, uids: set[str]) -> None:
        for directory in (self.host.data_dir / "pods").glob("*_*_*"):
            if directory.name.rsplit("_", 1)[-1] not in uids:
                shutil.rmtree(directory, ignore_errors=True)


class _PodSync:
    """One pod of this Node, from its first event until its object is deleted."""

    def __init__(self, agent: Agent, obj: Object, done: Callable[[], object]) -> None:
        self.written = asyncio.Event()  # the status was written, or none is needed
        self._agent = agent
        self._meta = msgspec.convert(_metadata(obj), ObjectMeta)
        self._phase = (obj.get("status") or {}).get("phase") or ""
        self._directory = agent.host.pod_directory(self._meta)
        self._pod: Pod | None = None
        self._runner: PodRunner | None = None
        self._override: Object | None = None  # the status of a pod without a runner
        self._last: Mapping[str, Any] | None = None
        self._dirty = asyncio.Event()
        self._object_deleted = asyncio.Event()
        self._deleting = False
        self._shutting_down = False
        self._grace_s = float("inf")  # the shortest requested
        try:
            self._pod = decode_pod(obj)
        except PodError as error:
            self._override = {"phase": "Failed", "reason": error.reason, "message": str(error)}
        # What it has of the Node's resources: until its processes are gone.
        runs = self._pod is not None and self._phase not in TERMINAL
        self.requests: Amounts = requests_of(self._pod) if runs and self._pod else {}
        self._task = asyncio.create_task(self._sync(), name=f"pod {self._meta.name}")
        self._task.add_done_callback(lambda task: self._finished(task, done))

    def is_named(self, namespace: str, name: str) -> bool:
        return (self._meta.namespace, self._meta.name) == (namespace, name)

    def observe(self, obj: Object) -> None:
        """A newer version of the object."""
        self._meta = msgspec.convert(_metadata(obj), ObjectMeta)
        try:
            self._pod = decode_pod(obj)
        except PodError as error:
            log.warning("ignoring invalid pod update", pod=self._meta.name, error=str(error))
        if self._runner is not None and self._pod is not None:
            self._runner.update(self._pod)
        self._handle_deletion()
        self._dirty.set()

    def object_deleted(self) -> None:
        """The object was deleted from the API: kill its processes."""
        self._object_deleted.set()
        self.written.set()
        self._stop(0)
        self._dirty.set()

    async def shut_down(self, grace_s: float) -> None:
        """The kubelet shuts down: end the processes, write the status, keep the object and logs."""
        self._shutting_down = True
        if self._runner is None or self._deleting:
            self._task.cancel()
            return
        if not self._runner.terminated.is_set():
            await self._runner.shut_down(grace_s)
        self._dirty.set()
        with contextlib.suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(FLUSH_TIMEOUT_S):
                await asyncio.shield(self._task)
        self._task.cancel()

    def find_log(self, container: str, previous: bool) -> tuple[Path, Callable[[], bool]]:
        runner = self._runner
        if runner is None:
            return self._find_old_log(container, previous)
        one = self._container(runner, container)
        run = one.record.restarts
        path = self._directory / container / f"{run - previous}.log"
        if not path.exists():
            state, name = one.record.state, self._meta.name
            if previous:
                what = f'previous terminated container "{container}" in pod "{name}" not found'
            elif isinstance(state, Waiting):
                why = ": ".join(filter(None, (state.reason, state.message)))
                what = f'container "{container}" in pod "{name}" is waiting to start: {why}'
            else:
                what = f'container "{container}" in pod "{name}" has no log'
            raise Refusal(400, what)
        process = one.process
        return path, lambda: not previous and process is not None and not process.exited.done()

    def find_container(self, name: str) -> ContainerRunner:
        one = None if self._runner is None else self._container(self._runner, name)
        if one is None or one.process is None:
            raise Refusal(400, f'container "{name}" in pod "{self._meta.name}" is not running')
        return one

    def _container(self, runner: PodRunner, name: str) -> ContainerRunner:
        one = runner.container(name)
        if one is None:
            raise Refusal(400, f"container {name} is not valid for pod {self._meta.name}")
        return one

    def _find_old_log(self, container: str, previous: bool) -> tuple[Path, Callable[[], bool]]:
        """The log of a pod that ended under an earlier kubelet."""
        runs = sorted(
            (path for path in (self._directory / container).glob("*.log")),
            key=lambda path: int(path.stem),
        )
        if len(runs) <= previous:
            raise Refusal(400, f'container "{container}" in pod "{self._meta.name}" has no log')
        return runs[-1 - previous], lambda: False

    # -- lifecycle -------------------------------------------------------------------------------

    async def _sync(self) -> None:
        if self._pod is None or self._phase in TERMINAL or self._meta.deletion_timestamp:
            # It has no processes: those of an earlier kubelet ended with it.
            if self._phase in TERMINAL or self._meta.deletion_timestamp:
                self.written.set()
            await self._write_until(lambda: False)
        else:
            await self._run(self._pod)
        if self._shutting_down:
            return
        self._deleting = True
        if not self._is_deleted:
            await self._delete()
        await asyncio.to_thread(shutil.rmtree, self._directory, ignore_errors=True)
        log.info("pod ended", pod=f"{self._meta.namespace}/{self._meta.name}")
        await self._object_deleted.wait()  # so that a late event is not taken for a new pod

    @property
    def _is_deleted(self) -> bool:
        return self._object_deleted.is_set()

    async def _run(self, pod: Pod) -> None:
        try:
            devices = self._agent.host.devices.assign(pod, self._directory)
        except PodError as error:
            self._ended()
            self._override = {"phase": "Failed", "reason": error.reason, "message": str(error)}
            await self._write_until(lambda: False)
            return
        address = await self._claim_address(pod)
        if address is None:
            return
        running = None
        try:
            runner = PodRunner(pod, address.ip, self._agent.host, self._dirty.set, devices)
            running = asyncio.create_task(runner.run(), name=f"runner {pod.key}")
            running.add_done_callback(lambda _: address.release())
            running.add_done_callback(lambda _: self._ended())
            self._runner = runner
            log.info("pod started", pod=pod.key, ip=address.ip)
            self._handle_deletion()
            self._dirty.set()
            await self._write_until(lambda: not runner.terminated.is_set())
        finally:
            if running is not None:
                await asyncio.wait({running})

    def _ended(self) -> None:
        self.requests = {}
        self._agent.pod_ended(self._meta.uid)

    async def _write_until(self, is_running: Callable[[], bool]) -> None:
        """Write changes until the object can be deleted (or is gone) and no process is left."""
        self._dirty.set()
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            if not self._is_deleted:
                await self._write_status()
            over = not is_running()
            done = self._shutting_down and over and not self._dirty.is_set()
            if done or (over and (self._is_deleted or self._meta.deletion_timestamp is not None)):
                return

    async def _claim_address(self, pod: Pod) -> PodAddress | None:
        backoff = Backoff(max_s=ADDRESS_RETRY_MAX_S)
        ports = [p.container_port for c in pod.spec.containers for p in c.ports]
        while not (self._is_deleted or self._meta.deletion_timestamp or self._shutting_down):
            try:
                return PodAddress.claim(pod.status.pod_ip, ports)
            except KubeAIError as error:
                self._override = {
                    "phase": "Pending",
                    "reason": "NoAddress",
                    "message": str(error),
                }
            await self._write_status()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff.next_s()):
                    await self._dirty.wait()
        return None

    def _handle_deletion(self) -> None:
        meta = self._meta
        if meta.deletion_timestamp is None:
            return
        grace_s = meta.deletion_grace_period_seconds
        if grace_s is None and self._pod is not None:
            grace_s = self._pod.spec.termination_grace_period_seconds
        self._stop(grace_s or 0)

    def _stop(self, grace_s: float) -> None:
        """End the processes; repeated only with a shorter grace period."""
        runner = self._runner
        if runner is not None and not runner.terminated.is_set() and grace_s < self._grace_s:
            self._grace_s = grace_s
            runner.spawn(runner.stop(grace_s))

    # -- writes ----------------------------------------------------------------------------------

    async def _write_status(self) -> None:
        """Patch the status if it differs from the last one written; retries until it succeeds."""
        backoff = Backoff()
        meta = self._meta
        while not self._is_deleted:
            status = self._runner.status() if self._runner is not None else self._override
            if status is None or status == self._last:
                return
            patch = {"metadata": {"uid": meta.uid}, "status": status}
            try:
                await self._agent.kube.patch(
                    PODS, meta.name, patch, meta.namespace, subresource="status"
                )
            except ApiError as error:
                if error.status == 404:
                    self.object_deleted()
                    return
                log.warning("failed to write pod status", pod=meta.name, error=str(error))
                await asyncio.sleep(max(backoff.next_s(), error.retry_after_s or 0.0))
            else:
                self._last = status
                self.written.set()
                return

    async def _delete(self) -> None:
        backoff = Backoff()
        meta = self._meta
        while not self._is_deleted:
            try:
                await self._agent.kube.delete(
                    PODS, meta.name, meta.namespace, uid=meta.uid, grace_s=0
                )
            except ApiError as error:
                if error.status in (404, 409):
                    self._object_deleted.set()
                    break
                log.warning("failed to delete pod", pod=meta.name, error=str(error))
                await asyncio.sleep(backoff.next_s())
            else:
                break

    def _finished(self, task: asyncio.Task[None], done: Callable[[], object]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("pod sync failed", pod=self._meta.name, exc_info=error)
        done()


def _metadata(obj: Object) -> Object:
    return {key: value for key, value in obj["metadata"].items() if value is not None}
