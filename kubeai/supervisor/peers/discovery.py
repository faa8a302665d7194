"""Finds the peers: pods with the same labels as its own pod.

It selects by the two labels that Helm charts set on the pods of a release. If they are missing, it
selects by all labels except those that controllers set per pod or per revision.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from kubeai.api.objects import ObjectMeta
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import PODS
from kubeai.logs import get_logger

log = get_logger(__name__)
RELEASE_LABELS = ("app.kubernetes.io/name", "app.kubernetes.io/instance")
_OF_ONE_POD = (
    "pod-template-hash",
    "controller-revision-hash",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
)


class _Status(msgspec.Struct, rename="camel"):
    phase: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")


class _Pod(msgspec.Struct, rename="camel"):
    metadata: ObjectMeta
    status: _Status = msgspec.field(default_factory=_Status)


def selector(labels: Mapping[str, str]) -> str:
    """The label selector for the peers of the pod with these labels; empty if it has none."""
    chosen: Iterable[str] = RELEASE_LABELS
    if not all(label in labels for label in RELEASE_LABELS):
        chosen = sorted(labels.keys() - set(_OF_ONE_POD))
    return ",".join(f"{label}={labels[label]}" for label in chosen)


class Discovery:
    """Watches the KubeAI replicas' pods. Calls ``changed`` with the peers' IPs on each change."""

    def __init__(
        self, kube: Kube, namespace: str, pod: str, changed: Callable[[set[str]], None]
    ) -> None:
        self.listed = not pod  # whether the peers are known
        self._kube = kube
        self._namespace = namespace
        self._pod = pod
        self._changed = changed
        self._ips: dict[str, str] = {}  # by pod name

    async def run(self) -> None:
        """Run forever, or return at once if our own pod does not exist (outside a cluster)."""
        if not self._pod:
            return
        labels = await self._labels()
        chosen = selector(labels) if labels is not None else ""
        if not chosen:
            log.info("peer discovery disabled", pod=self._pod, found=labels is not None)
            self.listed = True
            return
        await self._kube.follow(
            PODS,
            self._namespace,
            labels=chosen,
            type=_Pod,
            replaced=self._replaced,
            changed=self._put_and_tell,
        )

    async def _labels(self) -> dict[str, str] | None:
        """Our own pod's labels; None if there is no such pod."""
        backoff = Backoff()
        while True:
            try:
                found: Any = await self._kube.get(PODS, self._pod, self._namespace)
                return dict(found["metadata"].get("labels") or {})
            except ApiError as error:
                if error.status == 404:
                    return None
                log.info("cannot read own pod", pod=self._pod, error=str(error))
                await asyncio.sleep(max(backoff.next_s(), error.retry_after_s or 0.0))

    def _replaced(self, pods: list[_Pod]) -> None:
        self._ips.clear()
        for pod in pods:
            self._put("ADDED", pod)
        self.listed = True
        self._changed(set(self._ips.values()))

    def _put_and_tell(self, kind: str, pod: _Pod) -> None:
        self._put(kind, pod)
        self._changed(set(self._ips.values()))

    def _put(self, kind: str, pod: _Pod) -> None:
        """Record a pod. A terminating one still serves requests, so it counts until it is gone."""
        name, status = pod.metadata.name, pod.status
        self._ips.pop(name, None)
        alive = kind != "DELETED" and status.phase not in ("Succeeded", "Failed")
        if alive and status.pod_ip and name != self._pod:
            self._ips[name] = status.pod_ip
