"""The headless Services of Models, for external gateways; maintained by the leader.

With `proxy.mode: external`, each Model has one. They are watched, so that one that is deleted or
edited is restored. With ``internal`` there are none: those that an earlier configuration left are
listed once per leadership and deleted. Used by the controller.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from kubeai.api.model import KIND, Model
from kubeai.api.objects import ObjectMeta
from kubeai.kube.client import Kube
from kubeai.kube.resources import SERVICES
from kubeai.logs import get_logger
from kubeai.operator.leader import Writes
from kubeai.operator.leftovers import delete_unchanged, list_permitted
from kubeai.podspec.service import SELECTOR, headless_service

log = get_logger(__name__)


class _Port(msgspec.Struct, rename="camel"):
    name: str = ""
    port: int = 0
    target_port: int | str = 0
    protocol: str = "TCP"


class _Spec(msgspec.Struct, rename="camel"):
    selector: dict[str, str] = {}
    ports: list[_Port] = []


class ServiceObject(msgspec.Struct):
    """The part of a Service that is decoded."""

    metadata: ObjectMeta
    spec: _Spec = msgspec.field(default_factory=_Spec)

    @property
    def model_uid(self) -> str:
        """The uid of the Model that owns it; empty if it is not ours."""
        owners = self.metadata.owner_references
        return next((one.uid for one in owners if one.kind == KIND and one.controller), "")


class Services:
    """``changed(model)`` is called when a Service of the named Model has changed.

    ``all_changed`` is called once they are listed.
    """

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        writes: Writes,
        *,
        external: bool,
        changed: Callable[[str], None],
        all_changed: Callable[[], None],
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._writes = writes
        self._external = external
        self._changed = changed
        self._all_changed = all_changed
        self._found: dict[str, ServiceObject] = {}  # by the Model's uid
        self._listed = False
        self._listing = asyncio.Lock()

    async def run(self) -> None:
        """Watch the Services forever, if Models have any."""
        if not self._external:
            await asyncio.Event().wait()
        await self._kube.follow(
            SERVICES,
            self._namespace,
            labels=SELECTOR,
            type=ServiceObject,
            replaced=self._replace,
            changed=self._event,
        )

    def stopped_leading(self) -> None:
        """This KubeAI replica is no longer the leader: another may write from now on."""
        if not self._external:
            self._found.clear()
            self._listed = False

    async def ensure(self, model: Model) -> None:
        """Bring the Model's Service in line with the configuration."""
        if self._external:
            if self._listed:
                await self._write(model)
            return
        await self._list()
        found = self._found.get(model.metadata.uid)
        if found is not None:
            await self._delete(found)
            self._found.pop(model.metadata.uid, None)

    async def _write(self, model: Model) -> None:
        wanted = headless_service(model)
        name, uid = wanted["metadata"]["name"], model.metadata.uid
        found = self._found.get(uid)
        if found is not None and found.spec == msgspec.convert(wanted["spec"], _Spec):
            return
        async with self._writes:
            if found is None:
                found = await self._kube.create(
                    SERVICES, wanted, self._namespace, type=ServiceObject
                )
                log.info("service created", model=model.metadata.name, service=name)
            else:
                spec = {key: wanted["spec"][key] for key in ("selector", "ports")}
                spec["selector"] = dict.fromkeys(found.spec.selector) | spec["selector"]
                patch = {"metadata": {"uid": found.metadata.uid}, "spec": spec}
                found = await self._kube.patch(
                    SERVICES, found.metadata.name, patch, self._namespace, type=ServiceObject
                )
        self._found[uid] = found

    async def _delete(self, found: ServiceObject) -> None:
        meta = found.metadata
        async with self._writes:
            await delete_unchanged(self._kube, SERVICES, meta.name, self._namespace, uid=meta.uid)
        log.info("service deleted", service=meta.name)

    async def _list(self) -> None:
        async with self._listing:
            if self._listed:
                return
            found = await list_permitted(
                self._kube, SERVICES, self._namespace, labels=SELECTOR, type=ServiceObject
            )
            self._replace(found)

    def _replace(self, found: list[ServiceObject]) -> None:
        self._found = {one.model_uid: one for one in found if one.model_uid}
        self._listed = True
        if self._external:
            self._all_changed()

    def _event(self, kind: str, one: ServiceObject) -> None:
        uid = one.model_uid
        known = self._found.get(uid)
        if not uid or (known is not None and one.metadata.version < known.metadata.version):
            return  # not ours, or older than the response to our own write
        if kind != "DELETED":
            self._found[uid] = one
        elif known is not None and known.metadata.uid == one.metadata.uid:
            del self._found[uid]
        owners = one.metadata.owner_references
        for name in (owner.name for owner in owners if owner.uid == uid):
            self._changed(name)
