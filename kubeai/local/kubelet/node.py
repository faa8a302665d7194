"""The Node object of this machine, and its heartbeat.

Owns the reported capacity (CPUs, memory, NVIDIA GPUs, and overrides) and the kubelet's port in the
API. In `kubeai local` the heartbeat is a status patch every five minutes; in a cluster, whose
controllers mark silent nodes as not ready, it is a Lease renewed every ten seconds, as in other
kubelets.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from datetime import UTC, datetime
from typing import Any

import kubeai
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import LEASES, NODES
from kubeai.local.kubelet.pods.pod import GPU
from kubeai.local.kubelet.pods.status import timestamp
from kubeai.logs import get_logger

log = get_logger(__name__)

HEARTBEAT_INTERVAL_S = 300.0
LEASE_INTERVAL_S, LEASE_DURATION_S = 10.0, 40
LEASE_NAMESPACE = "kube-node-lease"
PODS_MAX = 1000
# With this feature, API servers from 1.36 on pass kubectl's WebSockets through. Otherwise they
# translate them to SPDY, which this kubelet does not support.
DECLARED_FEATURES = ["ExtendWebSocketsToKubelet"]
_CONDITIONS = (
    ("MemoryPressure", "False", "KubeletHasSufficientMemory"),
    ("DiskPressure", "False", "KubeletHasNoDiskPressure"),
    ("PIDPressure", "False", "KubeletHasSufficientPID"),
    ("Ready", "True", "KubeletReady"),
)


class Node:
    """This machine's Node object."""

    def __init__(
        self,
        kube: Kube,
        name: str,
        host_ip: str,
        *,
        lease: bool,
        labels: dict[str, str],
        capacity: dict[str, str],
        gpus: int = 0,
    ) -> None:
        """``labels`` and ``capacity`` extend or override the detected ones."""
        self._kube = kube
        self._name = name
        self._ip = host_ip
        self._lease = lease
        self._labels = labels
        self.capacity = {
            "cpu": str(os.cpu_count() or 1),
            "memory": f"{_memory_kib()}Ki",
            "pods": str(PODS_MAX),
            **({GPU: str(gpus)} if gpus else {}),
            **capacity,
        }
        self._since = timestamp(time.time())
        self._port = 0

    async def register(self, port: int) -> None:
        """Create or adopt the Node; ``port`` serves logs and exec."""
        self._port = port
        labels = {
            "kubernetes.io/hostname": self._name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": _architecture(),
            "kubeai.org/process-kubelet": "true",
        } | self._labels
        try:
            await self._kube.create(NODES, {"metadata": {"name": self._name, "labels": labels}})
        except ApiError as error:
            if error.status != 409:
                raise
            await self._kube.patch(NODES, self._name, {"metadata": {"labels": labels}})
        await self._write_status()

    async def run(self) -> None:
        """Send heartbeats until cancelled; recreates the Node if it was deleted."""
        backoff = Backoff()
        while True:
            await asyncio.sleep(LEASE_INTERVAL_S if self._lease else HEARTBEAT_INTERVAL_S)
            try:
                await (self._renew() if self._lease else self._write_status())
                backoff.reset()
            except ApiError as error:
                log.warning("heartbeat failed", node=self._name, error=str(error))
                await asyncio.sleep(backoff.next_s())
                if error.status == 404:
                    await self._try_to_register()

    async def _try_to_register(self) -> None:
        try:
            await self.register(self._port)
        except ApiError as error:
            log.warning("failed to register the node", node=self._name, error=str(error))

    async def _write_status(self) -> None:
        await self._kube.patch(NODES, self._name, {"status": self._status()}, subresource="status")

    def _status(self) -> dict[str, Any]:
        now = timestamp(time.time())
        return {
            # No Hostname: API servers would prefer it, and it does not resolve to loopback.
            "addresses": [{"type": "InternalIP", "address": self._ip}],
            "capacity": self.capacity,
            "allocatable": self.capacity,
            "declaredFeatures": DECLARED_FEATURES,
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._port}},
            "conditions": [
                {
                    "type": kind,
                    "status": status,
                    "reason": reason,
                    "message": reason,
                    "lastHeartbeatTime": now,
                    "lastTransitionTime": self._since,
                }
                for kind, status, reason in _CONDITIONS
            ],
            "nodeInfo": {
                "architecture": _architecture(),
                "operatingSystem": "linux",
                "kernelVersion": platform.release(),
                "osImage": _os_name(),
                "kubeletVersion": f"kubeai-{kubeai.__version__}",
                "kubeProxyVersion": "",
                "containerRuntimeVersion": f"process://{kubeai.__version__}",
                "machineID": "",
                "systemUUID": "",
                "bootID": "",
            },
        }

    async def _renew(self) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {
            "holderIdentity": self._name,
            "leaseDurationSeconds": LEASE_DURATION_S,
            "renewTime": now,
        }
        try:
            await self._kube.patch(LEASES, self._name, {"spec": spec}, LEASE_NAMESPACE)
        except ApiError as error:
            if error.status != 404:
                raise
            lease = {"metadata": {"name": self._name}, "spec": spec}
            await self._kube.create(LEASES, lease, LEASE_NAMESPACE)


def _memory_kib() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 10


def _architecture() -> str:
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")
    except OSError:
        return "Linux"
