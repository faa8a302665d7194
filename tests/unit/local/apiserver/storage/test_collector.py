"""Garbage collection in the embedded API: owners, namespaces, definitions, old Events."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta

import pytest
import pytest_asyncio

from kubeai.local.apiserver.errors import StatusError
from kubeai.local.apiserver.kinds.resources import BUILT_IN, CRDS, EVENTS, NAMESPACES, PODS, Catalog
from kubeai.local.apiserver.storage import collector as collector_module
from kubeai.local.apiserver.storage.collector import Collector
from kubeai.local.apiserver.storage.options import DeleteOptions, WriteOptions
from kubeai.local.apiserver.storage.registry import Registry
from kubeai.local.apiserver.storage.store import Store

CONFIGS = next(resource for resource in BUILT_IN if resource.plural == "configmaps")
JOBS = next(resource for resource in BUILT_IN if resource.plural == "jobs")
TIMEOUT_S = 5.0


class Api:
    """A registry in memory; the collector runs only inside `settled`."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.registry = Registry(store, Catalog())
        self.collector = Collector(self.registry)

    def make(self, name: str, owners: tuple = (), resource=CONFIGS, namespace="default", **fields):
        metadata = {"name": name, **fields.pop("metadata", {})}
        if owners:
            metadata["ownerReferences"] = [
                {
                    "apiVersion": owner.object["apiVersion"],
                    "kind": owner.object["kind"],
                    "name": owner.metadata["name"],
                    "uid": owner.uid,
                    "blockOwnerDeletion": True,
                }
                for owner in owners
            ]
        obj = {"metadata": metadata, **fields}
        return self.registry.create(resource, namespace, obj, WriteOptions())

    def delete(self, name: str, propagation: str | None = None, resource=CONFIGS) -> None:
        options = DeleteOptions(propagation=propagation)
        self.registry.delete(resource, "default", name, options)

    def names(self, resource=CONFIGS, namespace: str = "default") -> list[str]:
        return [s.metadata["name"] for s in self.store.items(resource.key, namespace)]

    async def settled(self) -> None:
        """Run the collector until its queue is empty."""
        task = asyncio.create_task(self.collector.run())
        async with asyncio.timeout(TIMEOUT_S):
            await asyncio.sleep(0)
            while self.collector._queue:  # noqa: ASYNC110 - it works through it turn by turn
                await asyncio.sleep(0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest_asyncio.fixture
async def api():
    store = Store(":memory:")
    yield Api(store)
    store.close()


async def test_dependents_are_deleted_after_their_owner(api: Api):
    owner = api.make("owner")
    child = api.make("child", (owner,))
    api.make("grandchild", (child,))
    api.make("other")
    api.delete("owner")
    await api.settled()
    assert api.names() == ["other"]


async def test_an_object_stays_while_one_owner_exists(api: Api):
    first, second = api.make("first"), api.make("second")
    api.make("child", (first, second))
    api.delete("first")
    await api.settled()
    assert api.names() == ["child", "second"]
    child = api.store.get(CONFIGS.key, ("default", "child"))
    assert [reference["name"] for reference in child.metadata["ownerReferences"]] == ["second"]


async def test_an_object_whose_owner_never_existed_is_collected(api: Api):
    owner = api.make("owner")
    api.delete("owner")
    api.make("child", (owner,))
    await api.settled()
    assert api.names() == []


async def test_an_object_with_the_owners_name_but_another_uid_is_not_the_owner(api: Api):
    owner = api.make("owner")
    api.make("child", (owner,))
    api.delete("owner")
    api.make("owner")
    await api.settled()
    assert api.names() == ["owner"]


async def test_an_owner_in_another_namespace_does_not_count(api: Api):
    owner = api.make("owner", namespace="kube-system")
    api.make("child", (owner,))
    await api.settled()
    assert api.names() == []


async def test_foreground_deletion_waits_for_the_dependents(api: Api):
    owner = api.make("owner")
    api.make("child", (owner,), metadata={"finalizers": ["x.org/hold"]})
    api.delete("owner", "Foreground")
    await api.settled()
    assert api.names() == ["child", "owner"]
    held = api.store.get(CONFIGS.key, ("default", "child"))
    assert held.metadata["deletionTimestamp"]
    api.registry.change(CONFIGS, ("default", "child"), lambda o: o["metadata"].pop("finalizers"))
    await api.settled()
    assert api.names() == []


async def test_orphaned_dependents_stay_without_their_owner(api: Api):
    owner = api.make("owner")
    api.make("child", (owner,))
    api.delete("owner", "Orphan")
    await api.settled()
    assert api.names() == ["child"]
    child = api.store.get(CONFIGS.key, ("default", "child"))
    assert "ownerReferences" not in child.metadata


async def test_deleting_a_job_orphans_its_pods_by_default(api: Api):
    containers = {"containers": [{"name": "c", "image": "i"}], "restartPolicy": "Never"}
    for name in ("a", "b"):
        job = api.make(name, resource=JOBS, spec={"template": {"spec": containers}})
        api.make(f"pod-{name}", (job,), resource=PODS, spec=containers)
    api.delete("a", resource=JOBS)
    api.delete("b", "Background", resource=JOBS)
    await api.settled()
    assert api.names(PODS) == ["pod-a"]


async def test_collected_pods_are_removed_by_their_kubelet(api: Api):
    owner = api.make("owner")
    spec = {"containers": [{"name": "c", "image": "i"}], "nodeName": "local"}
    api.make("pod", (owner,), resource=PODS, spec=spec)
    api.delete("owner")
    await api.settled()
    pod = api.store.get(PODS.key, ("default", "pod"))
    assert pod.metadata["deletionGracePeriodSeconds"] == 30


async def test_a_namespace_is_removed_once_it_is_empty(api: Api):
    api.registry.create(NAMESPACES, "", {"metadata": {"name": "team"}}, WriteOptions())
    api.make("plain", namespace="team")
    api.make("held", namespace="team", metadata={"finalizers": ["x.org/hold"]})
    api.registry.delete(NAMESPACES, "", "team", DeleteOptions())
    await api.settled()
    assert api.names(namespace="team") == ["held"]
    team = api.store.get(NAMESPACES.key, ("", "team"))
    assert team.object["status"]["phase"] == "Terminating"
    with pytest.raises(StatusError, match="because it is being terminated") as refused:
        api.make("late", namespace="team")
    assert refused.value.code == 403
    api.registry.change(CONFIGS, ("team", "held"), lambda o: o["metadata"].pop("finalizers"))
    await api.settled()
    assert api.store.get(NAMESPACES.key, ("", "team")) is None


async def test_a_large_namespace_is_emptied_in_batches(api: Api, monkeypatch):
    monkeypatch.setattr(collector_module, "DELETIONS_AT_ONCE", 3)
    api.registry.create(NAMESPACES, "", {"metadata": {"name": "team"}}, WriteOptions())
    for index in range(10):
        held = {"finalizers": ["x.org/hold"]} if index % 2 else {}
        api.make(f"c{index}", namespace="team", metadata=held)
    api.registry.delete(NAMESPACES, "", "team", DeleteOptions())
    await api.settled()
    left = api.store.items(CONFIGS.key, "team")
    assert [stored.metadata["name"] for stored in left] == ["c1", "c3", "c5", "c7", "c9"]
    assert all(stored.metadata["deletionTimestamp"] for stored in left)


async def test_custom_objects_are_deleted_with_their_definition(api: Api):
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1", "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}
    names = {"plural": "things", "kind": "Thing"}
    spec = {"group": "x.org", "names": names, "scope": "Namespaced", "versions": [version]}
    definition = {"metadata": {"name": "things.x.org"}, "spec": spec}
    api.registry.create(CRDS, "", definition, WriteOptions())
    things = api.registry.catalog.find("x.org", "v1", "things")
    api.registry.create(
        things, "default", {"kind": "Thing", "metadata": {"name": "t"}}, WriteOptions()
    )
    api.registry.delete(CRDS, "", "things.x.org", DeleteOptions())
    await api.settled()
    assert api.store.items("things.x.org") == []
    assert api.store.items(CRDS.key) == []
    assert api.registry.catalog.find("x.org", "v1", "things") is None


async def test_a_restart_between_two_steps_loses_nothing(api: Api):
    owner = api.make("owner")
    api.make("child", (owner,))
    foreground = api.make("foreground")
    api.make("inner", (foreground,))
    api.delete("owner")
    api.delete("foreground", "Foreground")
    again = Api(api.store)  # the first collector never ran
    await again.settled()
    assert again.names() == []


async def test_old_events_are_deleted(api: Api, monkeypatch):
    monkeypatch.setattr(collector_module, "EVENT_SWEEP_S", 3600.0)
    about = {"involvedObject": {"kind": "Model", "name": "m", "namespace": "default"}}
    old = (datetime.now(UTC) - timedelta(hours=2)).strftime("%Y-%m-%dT%H:%M:%SZ")
    api.make("old", resource=EVENTS, lastTimestamp=old, **about)
    api.make("new", resource=EVENTS, **about)
    await api.settled()
    assert api.names(EVENTS) == ["new"]
