"""Report Models in namespaces that `kubeai local` does not serve, in their status and in the log.

The operator serves one namespace, because requests are routed by the Model's name. This module is
the only writer of Models in other namespaces, so the two never write the same object; the lock on
the data directory ensures there is only one. If an earlier start served a Model with another
``--namespace``, its replicas are deleted, because no request could reach them.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from kubeai.api.model import POD_MODEL_LABEL
from kubeai.kube.backoff import Backoff
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import MODELS, PODS
from kubeai.logs import get_logger
from kubeai.operator.conditions import OURS

log = get_logger(__name__)

Object = dict[str, Any]
Key = tuple[str, str]  # namespace and name

REASON = "NamespaceNotServed"


class Unserved:
    """Watches the Models of all namespaces. `run` runs until it is cancelled."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._seen: set[str] = set()  # uids of Models whose replicas are gone
        self._pending: dict[Key, Object] = {}  # as last seen
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Watch all Models until cancelled."""
        follow = self._kube.follow(MODELS, replaced=self._replaced, changed=self._changed)
        await asyncio.gather(follow, self._work())

    def _replaced(self, models: list[Object]) -> None:
        self._pending.clear()
        for model in models:
            self._changed("ADDED", model)

    def _changed(self, kind: str, model: Object) -> None:
        meta = model["metadata"]
        key = meta["namespace"], meta["name"]
        if kind == "DELETED":
            self._pending.pop(key, None)
            self._seen.discard(meta["uid"])
        elif meta["namespace"] != self._kube.namespace:
            self._pending[key] = model
            self._wake.set()

    async def _work(self) -> None:
        backoff = Backoff()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                key, model = next(iter(self._pending.items()))
                try:
                    await self._write(model)
                    backoff.reset()
                except ApiError as error:
                    if error.status not in (404, 409):  # deleted, or changed and queued again
                        log.warning("failed to write Model status", model=key, error=str(error))
                        await asyncio.sleep(backoff.next_s())
                        continue
                if self._pending.get(key) is model:
                    del self._pending[key]

    async def _write(self, model: Object) -> None:
        meta = model["metadata"]
        served = self._kube.namespace
        if meta["uid"] not in self._seen:
            await self._delete_replicas(meta)
            self._seen.add(meta["uid"])
            name = f"{meta['namespace']}/{meta['name']}"
            log.warning("model not served", model=name, reason=REASON, message=message(served))
        patch = status_patch(model, served, datetime.now(UTC))
        if patch is not None:
            namespace = meta["namespace"]
            await self._kube.patch(MODELS, meta["name"], patch, namespace, subresource="status")

    async def _delete_replicas(self, meta: Object) -> None:
        labels = f"app=model,{POD_MODEL_LABEL}={meta['name']}"
        pods, _ = await self._kube.list(PODS, meta["namespace"], labels=labels)
        for pod in pods:
            owners = pod["metadata"].get("ownerReferences") or ()
            if any(owner["uid"] == meta["uid"] for owner in owners):
                try:
                    await self._kube.delete(PODS, pod["metadata"]["name"], meta["namespace"])
                except ApiError as error:
                    if error.status != 404:
                        raise


def message(served: str) -> str:
    """Tell the user why a Model in another namespace is not served."""
    return (
        f"kubeai local serves Models in the namespace {served} only. Create it there, or start "
        f"kubeai local with another --namespace"
    )


def status_patch(model: Object, served: str, now: datetime) -> Object | None:
    """Return the merge patch that updates the status; None if it is already up to date."""
    meta, status = model["metadata"], model.get("status") or {}
    before = status.get("conditions") or []
    ready = {
        "type": "Ready",
        "status": "False",
        "reason": REASON,
        "message": message(served),
        "observedGeneration": meta["generation"],
    }
    false = (c for c in before if c["type"] == "Ready" and c["status"] == "False")
    old: Object = next(false, {})
    ready["lastTransitionTime"] = old.get("lastTransitionTime") or f"{now:%Y-%m-%dT%H:%M:%SZ}"
    wanted = {
        "conditions": [ready, *(c for c in before if c["type"] not in OURS)],
        "replicas": {"all": 0, "ready": 0},
    }
    if all(status.get(name) == value for name, value in wanted.items()):
        return None
    return {"metadata": {"resourceVersion": meta["resourceVersion"]}, "status": wanted}
