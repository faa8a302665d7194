"""Binds pods without a Node to this one, in place of a scheduler.

A pod waits while the Node is cordoned (``spec.unschedulable``), unless it tolerates that, and while
the Node has too little left of what it requests (see `capacity`). As with kube-scheduler, it then
has the condition PodScheduled=False with the reason Unschedulable, and an Event FailedScheduling.
The Node is read before each binding, so a pod created after a cordon is never bound. Called by the
agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable, Container, Iterable
from typing import Any

from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import EVENTS, NODES, PODS, Resource
from kubeai.local.kubelet.capacity import Amounts, insufficient, requests_of, why_insufficient
from kubeai.local.kubelet.pods.pod import PodError, decode_pod
from kubeai.local.kubelet.pods.status import timestamp
from kubeai.logs import get_logger

log = get_logger(__name__)

Object = dict[str, Any]

TAINT = "node.kubernetes.io/unschedulable"  # the taint of a cordoned node, for tolerations
CORDONED = "0/1 nodes are available: 1 node(s) were unschedulable."


class Binder:
    """Runs one task per unbound pod. Run `run` concurrently."""

    def __init__(
        self,
        kube: Kube,
        node: str,
        capacity: Amounts,
        used: Callable[[], Iterable[Amounts]],
    ) -> None:
        """``capacity``: of the Node; ``used``: what each of its pods has of that now."""
        self._kube = kube
        self._node = node
        self._capacity = capacity
        self._used = used
        self._binding: dict[str, Amounts] = {}  # pods whose binding is not observed yet
        self._pods: dict[str, Object] = {}  # by uid, as last seen
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._waiting: set[str] = set()  # pods that wait for the Node to change
        self._node_changed = asyncio.Event()  # set and replaced on each change

    async def run(self) -> None:
        """Watch the Node until cancelled."""
        await self._kube.follow(
            NODES,
            fields=f"metadata.name={self._node}",
            replaced=lambda _: self._retry(),
            changed=lambda *_: self._retry(),
        )

    def room_changed(self) -> None:
        """A pod of the Node has ended: try the waiting ones again."""
        self._retry()

    def _retry(self) -> None:
        self._node_changed.set()
        self._node_changed = asyncio.Event()

    def offer(self, pod: Object) -> None:
        """Bind a new or changed pod without a Node."""
        uid = pod["metadata"]["uid"]
        self._pods[uid] = pod
        if uid not in self._tasks:
            task = self._tasks[uid] = asyncio.create_task(self._place(uid))
            task.add_done_callback(lambda _: self._forget(uid))

    def withdraw(self, uid: str) -> None:
        """Stop binding a pod that is deleted or being deleted."""
        self._binding.pop(uid, None)
        if uid in self._tasks:
            self._tasks[uid].cancel()

    def bound(self, uid: str) -> None:
        """The pod was bound, by this or another binder, and is counted as one of the Node's."""
        self._binding.pop(uid, None)
        if uid in self._waiting:  # a binding in flight ends by itself
            self.withdraw(uid)

    def keep_only(self, uids: Container[str]) -> None:
        """Withdraw all other pods."""
        for uid in {*self._tasks, *self._binding}:
            if uid not in uids:
                self.withdraw(uid)

    def stop(self) -> None:
        """Withdraw all pods."""
        self.keep_only(())

    def _forget(self, uid: str) -> None:
        del self._tasks[uid], self._pods[uid]
        self._waiting.discard(uid)

    async def _place(self, uid: str) -> None:
        backoff = Backoff()
        while True:
            changed, pod = self._node_changed, self._pods[uid]
            try:
                cordoned = await self._is_cordoned() and not tolerates_cordon(pod)
                # No await between this check and the entry in `_binding`: others check then too.
                wanted = _requests(pod)
                if why := CORDONED if cordoned else self._why_not(wanted):
                    await self._report(pod, why)
                    self._waiting.add(uid)
                    await changed.wait()
                    self._waiting.discard(uid)
                else:
                    await self._bind(pod["metadata"], wanted)
                    return
            except ApiError as error:
                if error.status == 404:
                    return  # the pod is gone
                if error.status != 409:  # 409: it was changed concurrently
                    name = pod["metadata"]["name"]
                    log.warning("failed to bind pod", pod=name, error=str(error))
                await asyncio.sleep(backoff.next_s())

    def _why_not(self, wanted: Amounts) -> str:
        """Why a pod with these requests cannot be bound; empty if it can."""
        used = [*self._used(), *self._binding.values()]
        if lacking := insufficient(wanted, used, self._capacity):
            return why_insufficient(lacking, wanted, self._capacity)
        return ""

    async def _is_cordoned(self) -> bool:
        try:
            node = await self._kube.get(NODES, self._node)
        except ApiError as error:
            if error.status == 404:  # deleted; the next heartbeat recreates it
                return False
            raise
        return bool(node.get("spec", {}).get("unschedulable"))

    async def _bind(self, meta: Object, wanted: Amounts) -> None:
        """Create a Binding; the watch then reports the pod with its Node."""
        name, namespace = meta["name"], meta["namespace"]
        collection = Resource("", "v1", f"pods/{name}/binding", "Binding")
        binding = {
            "metadata": {"name": name, "namespace": namespace, "uid": meta["uid"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": self._node},
        }
        self._binding[meta["uid"]] = wanted
        try:
            await self._kube.create(collection, binding, namespace)
        except ApiError as error:
            self._binding.pop(meta["uid"], None)
            if error.status != 409:  # already bound or being deleted: the watch reports which
                raise

    async def _report(self, pod: Object, message: str) -> None:
        meta = pod["metadata"]
        conditions = (pod.get("status") or {}).get("conditions") or []
        if any(is_unschedulable(one) and one.get("message") == message for one in conditions):
            return
        now = timestamp(time.time())
        condition = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": message,
            "lastTransitionTime": now,
        }
        others = [c for c in conditions if c["type"] != condition["type"]]
        patch = {
            "metadata": {"resourceVersion": meta["resourceVersion"]},
            "status": {"conditions": [*others, condition]},
        }
        namespace = meta["namespace"]
        await self._kube.patch(PODS, meta["name"], patch, namespace, subresource="status")
        with contextlib.suppress(ApiError):  # nothing depends on it
            await self._kube.create(EVENTS, _event(meta, message, now), namespace)


def is_unschedulable(condition: Object) -> bool:
    """Whether a pod's condition says that no node can run it."""
    found = condition.get("type"), condition.get("status"), condition.get("reason")
    return found == ("PodScheduled", "False", "Unschedulable")


def tolerates_cordon(pod: Object) -> bool:
    """Whether a toleration matches the taint that a cordoned node has."""
    return any(
        (toleration.get("key") or TAINT) == TAINT
        and toleration.get("effect") in (None, "", "NoSchedule")
        and (toleration.get("operator") == "Exists" or bool(toleration.get("key")))
        and not toleration.get("value")
        for toleration in pod["spec"].get("tolerations") or ()
    )


def _requests(pod: Object) -> Amounts:
    try:
        return requests_of(decode_pod(pod))
    except PodError:
        return {}  # the kubelet reports what is invalid


def _event(meta: Object, message: str, now: str) -> Object:
    return {
        "metadata": {"name": f"{meta['name']}.{secrets.token_hex(8)}"},
        "involvedObject": {
            "apiVersion": "v1", "kind": "Pod", "name": meta["name"],
            "namespace": meta["namespace"], "uid": meta["uid"],
        },
        "type": "Warning", "reason": "FailedScheduling", "message": message, "count": 1,
        "firstTimestamp": now, "lastTimestamp": now,
        "source": {"component": "kubeai-kubelet"},
    }  # fmt: skip
