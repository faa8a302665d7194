"""Background work after writes: garbage collection, namespace and CRD deletion, old Events.

Level-based: a write enqueues the objects that it may affect; processing one looks at the current
state and takes the next step. On start all candidates are enqueued, so no work is lost if the
process is killed between two steps.
"""

from __future__ import annotations

import asyncio
import itertools
from datetime import UTC, datetime, timedelta
from typing import Any

from kubeai.local.apiserver.errors import StatusError
from kubeai.local.apiserver.kinds.definitions import CLEANUP
from kubeai.local.apiserver.kinds.metadata import parse_time
from kubeai.local.apiserver.kinds.resources import CRDS, EVENTS, NAMESPACES, Resource
from kubeai.local.apiserver.storage.deletion import FOREGROUND, ORPHAN
from kubeai.local.apiserver.storage.options import DeleteOptions
from kubeai.local.apiserver.storage.registry import Registry
from kubeai.local.apiserver.storage.store import Event, Key, Stored
from kubeai.logs import get_logger

log = get_logger(__name__)
Object = dict[str, Any]
ObjectKey = tuple[str, Key]

EVENT_AGE_MAX_S = 3600.0
EVENT_SWEEP_S = 60.0
DELETIONS_AT_ONCE = 50
STEPS_AT_ONCE = 20  # then yield to requests


class Collector:
    """Collects garbage. `run` must run as a task while the registry is in use."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._store = registry.store
        self._queue: dict[ObjectKey, None] = {}  # an ordered set
        self._work = asyncio.Event()
        self._store.listeners.append(self._follow)
        for resource, key, stored in self._store.all():
            metadata = stored.metadata
            if metadata.get("deletionTimestamp") or metadata.get("ownerReferences"):
                self._add((resource, key))

    def _add(self, object_key: ObjectKey) -> None:
        self._queue[object_key] = None
        self._work.set()

    def _follow(self, event: Event) -> None:
        metadata = event.last.metadata
        if event.new is None:
            for object_key in self._store.dependents(event.last.uid):
                self._add(object_key)
            for owner in metadata.get("ownerReferences", ()):
                self._add_owner(owner["uid"])
            self._add_containers(event)
        elif metadata.get("deletionTimestamp") or metadata.get("ownerReferences"):
            self._add((event.resource, event.key))
            if metadata.get("deletionTimestamp"):
                for owner in metadata.get("ownerReferences", ()):
                    self._add_owner(owner["uid"])
                self._add_containers(event)

    def _add_owner(self, uid: str) -> None:
        object_key = self._store.by_uid(uid)
        if object_key is not None:
            self._add(object_key)

    def _add_containers(self, event: Event) -> None:
        """Enqueue a namespace or CRD that may be waiting for this object's deletion."""
        for object_key in (
            (NAMESPACES.key, ("", event.key[0])),
            (CRDS.key, ("", event.resource)),
        ):
            holder = self._store.get(*object_key)
            if holder is not None and holder.metadata.get("deletionTimestamp"):
                self._add(object_key)

    async def run(self) -> None:
        """Process the queue until cancelled, and delete old Events."""
        sweeper = asyncio.create_task(self._sweep_events())
        try:
            while True:
                await self._work.wait()
                self._work.clear()
                while self._queue:
                    for _ in range(min(STEPS_AT_ONCE, len(self._queue))):
                        self._step(next(iter(self._queue)))
                    await asyncio.sleep(0)
        finally:
            sweeper.cancel()

    def _step(self, object_key: ObjectKey) -> None:
        del self._queue[object_key]
        stored = self._store.get(*object_key)
        resource = self._registry.catalog.by_key(object_key[0])
        if stored is None or resource is None:
            return
        try:
            if stored.metadata.get("deletionTimestamp"):
                self._continue_deletion(resource, object_key[1], stored)
            elif stored.metadata.get("ownerReferences"):
                self._check_owners(resource, object_key[1], stored)
        except StatusError as error:
            log.warning("failed to collect object", object=object_key, error=error.message)

    # Objects that are being deleted.

    def _continue_deletion(self, resource: Resource, key: Key, stored: Stored) -> None:
        finalizers = stored.metadata.get("finalizers", ())
        if resource is NAMESPACES:
            self._empty_namespace(key, stored)
        elif resource is CRDS and CLEANUP in finalizers:
            self._empty_definition(key, stored)
        elif ORPHAN in finalizers:
            for object_key in self._store.dependents(stored.uid):
                self._drop_owners(object_key, {stored.uid})
            self._registry.change(resource, key, lambda obj: _unfinalize(obj, ORPHAN))
        elif FOREGROUND in finalizers:
            self._delete_dependents_first(resource, key, stored)

    def _delete_dependents_first(self, resource: Resource, key: Key, stored: Stored) -> None:
        for object_key in self._store.dependents(stored.uid):
            dependent = self._store.get(*object_key)
            kind = self._registry.catalog.by_key(object_key[0])
            if dependent is None or kind is None:
                continue
            if not dependent.metadata.get("deletionTimestamp"):
                self._check_owners(kind, object_key[1], dependent)
        if not any(
            _blocks(left, stored.uid)
            for object_key in self._store.dependents(stored.uid)
            if (left := self._store.get(*object_key)) is not None
        ):
            self._registry.change(resource, key, lambda obj: _unfinalize(obj, FOREGROUND))

    def _empty_namespace(self, key: Key, stored: Stored) -> None:
        name, left = key[1], False
        for resource in self._registry.catalog.all():
            if resource.namespaced:
                left = self._delete_all(resource, name) or left
        if not left and not stored.metadata.get("finalizers"):
            self._store.remove(NAMESPACES.key, key)

    def _empty_definition(self, key: Key, stored: Stored) -> None:
        spec = stored.object["spec"]
        resource = self._registry.catalog.by_key(f"{spec['names']['plural']}.{spec['group']}")
        if resource is None or not self._delete_all(resource, ""):
            self._registry.change(CRDS, key, lambda obj: _unfinalize(obj, CLEANUP))

    def _delete_all(self, resource: Resource, namespace: str) -> bool:
        """Delete a batch; return whether any are left. Each deletion re-enqueues the container."""
        whole = (
            stored.metadata
            for stored in self._store.items(resource.key, namespace)
            if not stored.metadata.get("deletionTimestamp")
        )
        for metadata in itertools.islice(whole, DELETIONS_AT_ONCE):
            where = metadata.get("namespace", "")
            self._registry.delete(resource, where, metadata["name"], DeleteOptions())
        return bool(self._store.items(resource.key, namespace))

    # Objects with owners.

    def _check_owners(self, resource: Resource, key: Key, stored: Stored) -> None:
        """Delete the object if it has no owner left, like Kubernetes' garbage collector."""
        living, waiting, gone = set(), set(), set()
        for reference in stored.metadata["ownerReferences"]:
            owner = self._owner(key[0], reference)
            if owner is None:
                gone.add(reference["uid"])
            elif _waits_for_dependents(owner):
                waiting.add(reference["uid"])
            else:
                living.add(reference["uid"])
        if living:
            if gone or waiting:
                self._drop_owners((resource.key, key), gone | waiting)
            return
        policy = None
        if waiting and self._store.dependents(stored.uid):
            policy = "Foreground"
        elif not set(stored.metadata.get("finalizers", ())) & {ORPHAN, FOREGROUND}:
            policy = "Background"
        options = DeleteOptions(uid=stored.uid, propagation=policy)
        self._registry.delete(resource, *key, options)

    def _owner(self, namespace: str, reference: Object) -> Stored | None:
        """Return the owner, if it exists. It is in the same namespace or cluster-scoped."""
        object_key = self._store.by_uid(reference["uid"])
        if object_key is None or object_key[1][0] not in ("", namespace):
            return None
        owner = self._store.get(*object_key)
        if owner is None or owner.metadata["name"] != reference["name"]:
            return None
        return owner if owner.object["kind"] == reference["kind"] else None

    def _drop_owners(self, object_key: ObjectKey, uids: set[str]) -> None:
        resource = self._registry.catalog.by_key(object_key[0])
        if resource is not None:
            self._registry.change(resource, object_key[1], lambda obj: _disown(obj, uids))

    # Events.

    async def _sweep_events(self) -> None:
        while True:
            oldest = datetime.now(UTC) - timedelta(seconds=EVENT_AGE_MAX_S)
            for stored in self._store.items(EVENTS.key):
                metadata = stored.metadata
                seen = stored.object.get("lastTimestamp") or metadata["creationTimestamp"]
                if parse_time(seen) < oldest:
                    self._store.remove(EVENTS.key, (metadata["namespace"], metadata["name"]))
            await asyncio.sleep(EVENT_SWEEP_S)


def _blocks(dependent: Stored, uid: str) -> bool:
    return any(
        reference["uid"] == uid and reference.get("blockOwnerDeletion")
        for reference in dependent.metadata.get("ownerReferences", ())
    )


def _waits_for_dependents(owner: Stored) -> bool:
    metadata = owner.metadata
    return bool(metadata.get("deletionTimestamp")) and FOREGROUND in metadata.get("finalizers", ())


def _unfinalize(obj: Object, finalizer: str) -> None:
    left = [name for name in obj["metadata"].get("finalizers", ()) if name != finalizer]
    obj["metadata"]["finalizers"] = left
    if not left:
        del obj["metadata"]["finalizers"]


def _disown(obj: Object, uids: set[str]) -> None:
    left = [r for r in obj["metadata"].get("ownerReferences", ()) if r["uid"] not in uids]
    obj["metadata"]["ownerReferences"] = left
    if not left:
        del obj["metadata"]["ownerReferences"]
