"""The embedded API's store: revisions, the event window, durability."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.local.apiserver.kinds.resources import PODS
from kubeai.local.apiserver.storage import store as store_module
from kubeai.local.apiserver.storage import watching
from kubeai.local.apiserver.storage.store import Expired, Store
from kubeai.local.apiserver.storage.watching import ListOptions


def obj(name: str, owners: tuple[str, ...] = (), **fields: Any) -> dict:
    references = [{"uid": uid, "name": uid, "kind": "X", "apiVersion": "v1"} for uid in owners]
    metadata = {"name": name, "namespace": "n", "uid": f"uid-{name}"}
    if references:
        metadata["ownerReferences"] = references
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, **fields}


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store(":memory:")
    yield store
    store.close()


def put(store: Store, name: str, **fields: Any) -> int:
    return store.put("pods", ("n", name), obj(name, **fields)).revision


def test_writes_survive_a_restart(tmp_path: Path):
    first = Store(tmp_path / "db")
    put(first, "a", spec={"x": 1})
    put(first, "b")
    first.remove("pods", ("n", "b"))
    revision = first.revision
    first.close()
    second = Store(tmp_path / "db")
    assert [stored.metadata["name"] for stored in second.items("pods")] == ["a"]
    assert second.get("pods", ("n", "a")).object["spec"] == {"x": 1}
    assert second.revision == revision
    assert put(second, "c") == revision + 1
    with pytest.raises(Expired):
        second.since("pods", revision - 1)
    assert [event.type for event in second.since("pods", revision)] == ["ADDED"]
    second.close()


def test_a_failed_write_leaves_no_trace(store: Store):
    before = store.revision
    with pytest.raises(TypeError):
        store.put("pods", ("n", "a"), obj("a", spec={"x": object()}))
    assert store.get("pods", ("n", "a")) is None
    assert store.revision == before
    assert put(store, "a") == before + 1


def test_a_full_disk_fails_writes_and_loses_nothing(tmp_path: Path):
    store = Store(tmp_path / "db")
    put(store, "a", spec={"x": 1})
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    revision = store.revision
    with pytest.raises(sqlite3.OperationalError, match="full"):
        put(store, "a", spec={"x": "y" * 100_000})
    assert store.get("pods", ("n", "a")).object["spec"] == {"x": 1}
    assert store.revision == revision
    assert put(store, "b") == revision + 1
    store.close()
    again = Store(tmp_path / "db")
    assert [stored.metadata["name"] for stored in again.items("pods")] == ["a", "b"]
    again.close()


def test_the_event_window_is_limited_by_count(store: Store, monkeypatch):
    monkeypatch.setattr(store_module, "WINDOW_MAX_EVENTS", 10)
    start = store.revision
    for index in range(25):
        put(store, f"p{index}")
    with pytest.raises(Expired):
        store.since("pods", start)
    recent = store.since("pods", store.revision - 5)
    assert [event.key[1] for event in recent] == [f"p{index}" for index in range(20, 25)]


def test_the_event_window_is_limited_by_size(store: Store, monkeypatch):
    monkeypatch.setattr(store_module, "WINDOW_MAX_BYTES", 10_000)
    start = store.revision
    for _ in range(8):
        put(store, "big", data="x" * 3000)
    with pytest.raises(Expired):
        store.since("pods", start)
    kept = store.since("pods", store.revision - 2)
    assert len(kept) == 2


def test_each_resource_has_its_own_event_window(store: Store, monkeypatch):
    monkeypatch.setattr(store_module, "WINDOW_MAX_EVENTS", 5)
    start = put(store, "quiet")
    for index in range(20):
        store.put("events", ("n", f"e{index}"), obj(f"e{index}"))
    assert store.since("pods", start) == []


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=30), st.data())
def test_past_revisions_can_be_listed(writes: list[tuple[str, bool]], data: st.DataObject):
    store = Store(":memory:")
    past = {store.revision: {}}
    for name, keep in writes:
        if keep:
            put(store, name, spec=len(past))
        elif store.get("pods", ("n", name)) is not None:
            store.remove("pods", ("n", name))
        past[store.revision] = {s.metadata["name"]: s.raw for s in store.items("pods")}
    revision = data.draw(st.sampled_from(sorted(past)))
    then = {s.metadata["name"]: s.raw for s in store.items_at("pods", revision)}
    assert then == past[revision]
    store.close()


def test_dependents_are_found_by_their_owner(store: Store):
    store.put("pods", ("n", "a"), obj("a", owners=("one", "two")))
    store.put("pods", ("n", "b"), obj("b", owners=("one",)))
    assert store.dependents("one") == [("pods", ("n", "a")), ("pods", ("n", "b"))]
    store.put("pods", ("n", "a"), obj("a", owners=("two",)))
    store.remove("pods", ("n", "b"))
    assert store.dependents("one") == []
    assert store.dependents("two") == [("pods", ("n", "a"))]


# Watches on the store.


async def collect(store: Store, options: ListOptions) -> list[tuple[str, str]]:
    return [
        (seen.type, seen.object.get("metadata", {}).get("name", ""))
        async for seen in watching.watch(store, PODS, options, asyncio.Event())
    ]


async def test_a_watch_from_before_the_window_is_expired(store: Store, monkeypatch):
    monkeypatch.setattr(store_module, "WINDOW_MAX_EVENTS", 5)
    start = put(store, "a")
    for _ in range(10):
        put(store, "a")
    options = ListOptions(resource_version=str(start), timeout_s=5.0)
    (seen,) = [seen async for seen in watching.watch(store, PODS, options, asyncio.Event())]
    assert (seen.type, seen.object["code"], seen.object["reason"]) == ("ERROR", 410, "Expired")


async def test_a_slow_watch_is_expired(store: Store, monkeypatch):
    monkeypatch.setattr(store_module, "WINDOW_MAX_EVENTS", 5)
    options = ListOptions(resource_version=str(put(store, "a")), timeout_s=5.0)
    events = watching.watch(store, PODS, options, asyncio.Event())
    put(store, "b")
    assert (await anext(events)).type == "ADDED"
    for _ in range(20):
        put(store, "b")
    assert [seen.type async for seen in events] == ["ERROR"]


async def test_bookmarks_advance_a_quiet_watch(store: Store, monkeypatch):
    monkeypatch.setattr(watching, "BOOKMARK_S", 0.01)
    start = put(store, "a")
    for index in range(3):
        store.put("events", ("n", f"e{index}"), obj(f"e{index}"))
    options = ListOptions(resource_version=str(start), timeout_s=5.0, bookmarks=True)
    events = watching.watch(store, PODS, options, asyncio.Event())
    seen = await anext(events)
    assert (seen.type, seen.object["metadata"]["resourceVersion"]) == ("BOOKMARK", str(start + 3))
    await events.aclose()


async def test_a_watch_is_notified_of_a_write(store: Store):
    options = ListOptions(resource_version=str(put(store, "a")), timeout_s=5.0)
    events = watching.watch(store, PODS, options, asyncio.Event())
    waiting = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    assert not waiting.done()
    put(store, "b")
    assert (await waiting).object["metadata"]["name"] == "b"
    await events.aclose()


async def test_a_watch_of_one_namespace_sees_no_other_namespace(store: Store):
    start = put(store, "a")
    other = obj("b")
    other["metadata"]["namespace"] = "m"
    store.put("pods", ("m", "b"), other)
    put(store, "c")
    options = ListOptions(namespace="n", resource_version=str(start), timeout_s=0.01)
    assert await collect(store, options) == [("ADDED", "c")]


async def test_a_stopped_watch_ends(store: Store):
    stop = asyncio.Event()
    options = ListOptions(resource_version=str(put(store, "a")), timeout_s=5.0)
    events = watching.watch(store, PODS, options, stop)
    waiting = asyncio.ensure_future(anext(events, None))
    await asyncio.sleep(0)
    stop.set()
    store.notify_all()
    assert await waiting is None
