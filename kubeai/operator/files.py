"""The ConfigMaps that hold Models' files, maintained by the leader.

A Model's files are written before a pod that mounts them is created. The ConfigMap is deleted once
the Model has no files and no pod mounts it. The existing ConfigMaps are listed once per leadership,
metadata only. Used by the controller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec

from kubeai.api.model import Model
from kubeai.api.objects import ObjectMeta
from kubeai.errors import ModelError
from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS
from kubeai.logs import get_logger
from kubeai.operator.leader import Writes
from kubeai.operator.leftovers import delete_unchanged, list_permitted
from kubeai.operator.pods import Pod
from kubeai.podspec import config_map_name, files_config_map

log = get_logger(__name__)


class _ConfigMap(msgspec.Struct):
    metadata: ObjectMeta


class Files:
    """The ConfigMaps of a namespace's Models."""

    def __init__(self, kube: Kube, namespace: str, writes: Writes) -> None:
        self._kube = kube
        self._namespace = namespace
        self._writes = writes
        self._written: dict[str, dict[str, str]] = {}  # Model uid → its ConfigMap's data
        self._uids: dict[str, str] = {}  # Model uid → its ConfigMap's uid
        self._listing = asyncio.Lock()
        self._listed = False

    def stopped_leading(self) -> None:
        """This KubeAI replica is no longer the leader: another may write from now on."""
        self._written.clear()
        self._uids.clear()
        self._listed = False

    def forget(self, uid: str) -> None:
        """The Model is gone. Kubernetes deletes its ConfigMap with it."""
        self._written.pop(uid, None)
        self._uids.pop(uid, None)

    async def ensure(self, model: Model) -> None:
        """Write the Model's files, unless they are known to be up to date."""
        try:
            wanted = files_config_map(model)
        except ModelError:
            return  # the plan reports it
        uid = model.metadata.uid
        if wanted is None or self._written.get(uid) == wanted["data"]:
            return
        found = await self._find(wanted["metadata"]["name"])
        kept = await self._write(wanted, found, uid)
        self._uids[uid] = kept["metadata"]["uid"]
        self._written[uid] = wanted["data"]

    async def remove(self, model: Model, pods: Iterable[Pod]) -> None:
        """Delete the ConfigMap of a Model without files, unless one of the pods mounts it."""
        if any(pod.mounts_files for pod in pods):
            return
        await self._list()
        uid = model.metadata.uid
        if uid not in self._uids:
            return
        name = config_map_name(model.metadata.name)
        async with self._writes:
            if await delete_unchanged(
                self._kube, CONFIGMAPS, name, self._namespace, uid=self._uids[uid]
            ):
                log.info("ConfigMap deleted", config_map=name)
        self.forget(uid)

    async def _find(self, name: str) -> dict[str, Any]:
        """The ConfigMap of that name; an empty dict if there is none."""
        try:
            return await self._kube.get(CONFIGMAPS, name, self._namespace)
        except ApiError as error:
            if error.status != 404:
                raise
            return {}

    async def _write(
        self, wanted: dict[str, Any], found: dict[str, Any], model_uid: str
    ) -> dict[str, Any]:
        """Bring ``found`` in line with ``wanted``. Returns the resulting ConfigMap."""
        name, meta = wanted["metadata"]["name"], found.get("metadata", {})
        owners = [owner["uid"] for owner in meta.get("ownerReferences", ())]
        async with self._writes:
            if found and owners != [model_uid]:  # it belongs to a former Model of the same name
                await self._kube.delete(CONFIGMAPS, name, self._namespace, uid=meta["uid"])
                found = {}
            if not found:
                return await self._kube.create(CONFIGMAPS, wanted, self._namespace)
            if found.get("data") == wanted["data"]:
                return found
            gone = dict.fromkeys(found.get("data") or {})
            known = {key: meta[key] for key in ("uid", "resourceVersion")}
            patch = {"metadata": known, "data": gone | wanted["data"]}
            return await self._kube.patch(CONFIGMAPS, name, patch, self._namespace)

    async def _list(self) -> None:
        """List the Models' ConfigMaps, to find those from before this leadership."""
        async with self._listing:
            if self._listed:
                return
            found = await list_permitted(
                self._kube, CONFIGMAPS, self._namespace, metadata_only=True, type=_ConfigMap
            )
            self._listed = True
            for one in found:
                self._note(one.metadata)

    def _note(self, meta: ObjectMeta) -> None:
        for owner in meta.owner_references:
            ours = owner.kind == "Model" and owner.controller
            if ours and meta.name == config_map_name(owner.name):
                self._uids[owner.uid] = meta.uid
