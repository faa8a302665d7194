"""Lists, watches and tables on both APIs."""

from __future__ import annotations

import threading
import time

import pytest
from widgets import TABLE, TIMEOUT_S, Collection, pod, widget

PARTIAL = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io"


# Lists.


def test_paginated_lists_show_one_snapshot(widgets: Collection):
    for index in range(5):
        widgets.make(widget(f"w{index}"))
    code, first = widgets("GET", "?limit=2")
    assert [item["metadata"]["name"] for item in first["items"]] == ["w0", "w1"]
    assert first["metadata"]["remainingItemCount"] == 3
    widgets("DELETE", "w2")
    widgets.make(widget("w22"))
    token = first["metadata"]["continue"]
    code, second = widgets("GET", f"?limit=10&continue={token}")
    assert code == 200
    assert [item["metadata"]["name"] for item in second["items"]] == ["w2", "w3", "w4"]
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert not second["metadata"].get("continue")
    widgets.refused(400, "GET", "?continue=nonsense")


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ("a=1", ["w1"]),
        ("a==1,b", ["w1"]),
        ("a!=1", ["w2", "w3"]),
        ("a+in+(1,2)", ["w1", "w2"]),
        ("a+notin+(1)", ["w2", "w3"]),
        ("!a", ["w3"]),
        ("b", ["w1", "w3"]),
        ("a,b=x", ["w1"]),
        ("", ["w1", "w2", "w3"]),
    ],
)
def test_list_returns_the_objects_that_match_a_label_selector(
    widgets: Collection, selector: str, expected: list[str]
):
    for name, labels in (("w1", {"a": "1", "b": "x"}), ("w2", {"a": "2"}), ("w3", {"b": "y"})):
        widgets.make(widget(name, {"labels": labels}))
    assert widgets.names(f"?labelSelector={selector}") == expected


def test_list_returns_the_objects_that_match_a_field_selector(
    widgets: Collection, pods: Collection, namespace: str
):
    widgets.make(widget("w1"))
    widgets.make(widget("w2", color="blue"))
    assert widgets.names("?fieldSelector=metadata.name=w2") == ["w2"]
    assert widgets.names("?fieldSelector=metadata.name!=w2") == ["w1"]
    assert widgets.names("?fieldSelector=spec.color=blue,metadata.name=w2") == ["w2"]
    assert widgets.names(f"?fieldSelector=metadata.namespace={namespace}") == ["w1", "w2"]
    pods.make(pod("p1", nodeName="n1"))
    pods.make(pod("p2"))
    assert pods.names("?fieldSelector=spec.nodeName=n1") == ["p1"]
    assert pods.names("?fieldSelector=spec.nodeName=") == ["p2"]
    assert pods.names("?fieldSelector=status.phase!=Pending") == []
    for collection, bad in ((widgets, "spec.size=1"), (pods, "spec.bad=1"), (pods, "x")):
        collection.refused(400, "GET", f"?fieldSelector={bad}")
    widgets.refused(400, "GET", "?labelSelector=a+in+b")


def test_list_at_a_future_resource_version_is_rejected(widgets: Collection):
    answer = widgets.refused(504, "GET", "?resourceVersion=99999999&resourceVersionMatch=Exact")
    assert answer["details"]["causes"][0]["reason"] == "ResourceVersionTooLarge"


# Watches.


def _types(events, count: int) -> list[tuple[str, str]]:
    found = []
    for event in events:
        found.append((event["type"], event["object"]["metadata"]["name"]))
        if len(found) == count:
            break
    return found


def test_watch_returns_events_since_a_resource_version(widgets: Collection):
    start = widgets("GET")[1]["metadata"]["resourceVersion"]
    widgets.make(widget())
    with widgets.server.watch(f"{widgets.path}?watch=1&resourceVersion={start}") as events:
        assert next(events)["type"] == "ADDED"
        widgets.patch("w", {"spec": {"size": 4}})
        event = next(events)
        assert (event["type"], event["object"]["spec"]["size"]) == ("MODIFIED", 4)
        widgets("DELETE", "w")
        last = next(events)
        assert last["type"] == "DELETED"
    versions = [int(e["object"]["metadata"]["resourceVersion"]) for e in (event, last)]
    assert versions == sorted(set(versions))


def test_watch_without_resource_version_starts_with_existing_objects(widgets: Collection):
    widgets.make(widget())
    for query in ("?watch=1", "?watch=1&resourceVersion=0"):
        with widgets.server.watch(widgets.path + query) as events:
            assert _types(events, 1) == [("ADDED", "w")]


def test_a_watch_may_ask_for_the_initial_events(widgets: Collection):
    widgets.make(widget())
    query = (
        "?watch=1&sendInitialEvents=true&allowWatchBookmarks=true&resourceVersionMatch=NotOlderThan"
    )
    with widgets.server.watch(widgets.path + query) as events:
        assert next(events)["type"] == "ADDED"
        bookmark = next(events)
    assert bookmark["type"] == "BOOKMARK"
    assert bookmark["object"]["metadata"]["annotations"] == {"k8s.io/initial-events-end": "true"}


def test_watch_with_selector_reports_objects_entering_and_leaving(widgets: Collection):
    start = widgets("GET")[1]["metadata"]["resourceVersion"]
    query = f"?watch=1&resourceVersion={start}&labelSelector=in=1"
    with widgets.server.watch(widgets.path + query) as events:
        widgets.make(widget("other"))
        widgets.make(widget("w"))
        widgets.patch("w", {"metadata": {"labels": {"in": "1"}}})
        widgets.patch("w", {"spec": {"size": 4}})
        widgets.patch("w", {"metadata": {"labels": {"in": "2"}}})
        widgets.make(widget("end", {"labels": {"in": "1"}}))
        assert _types(events, 4) == [
            ("ADDED", "w"), ("MODIFIED", "w"), ("DELETED", "w"), ("ADDED", "end"),
        ]  # fmt: skip


def test_watch_ends_after_its_timeout(widgets: Collection):
    started = time.monotonic()
    with widgets.server.watch(f"{widgets.path}?watch=1&timeoutSeconds=1") as events:
        assert list(events) == []
    assert 0.9 < time.monotonic() - started < TIMEOUT_S


def test_many_watches_see_the_same_order(widgets: Collection):
    start = widgets("GET")[1]["metadata"]["resourceVersion"]
    seen: list[list[str]] = []

    def look() -> None:
        with widgets.server.watch(f"{widgets.path}?watch=1&resourceVersion={start}") as events:
            seen.append([name for _, name in _types(events, 10)])

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for index in range(10):
        widgets.make(widget(f"w{index}"))
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert seen == [[f"w{index}" for index in range(10)]] * 4


# Forms.


def test_lists_and_objects_as_tables(widgets: Collection):
    widgets.make(widget(size=7))
    widgets.patch("w/status", {"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    for path in (widgets.path, f"{widgets.path}/w"):
        code, table = widgets.server.request("GET", path, accept=TABLE)
        assert (code, table["kind"]) == (200, "Table")
        columns = [(c["name"], c["type"], c["priority"]) for c in table["columnDefinitions"]]
        assert columns == [
            ("Name", "string", 0), ("Size", "integer", 0), ("Ready", "string", 0),
            ("Color", "string", 1), ("Age", "date", 0),
        ]  # fmt: skip
        (row,) = table["rows"]
        assert row["cells"][:4] == ["w", 7, "True", "red"]
        assert row["object"]["kind"] == "PartialObjectMetadata"
        assert row["object"]["metadata"]["name"] == "w"
    code, table = widgets.server.request(
        "GET", f"{widgets.path}?includeObject=Object", accept=TABLE
    )
    assert table["rows"][0]["object"]["spec"]["size"] == 7


def test_a_watch_as_tables_has_columns_once(widgets: Collection):
    widgets.make(widget("a"))
    with widgets.server.watch(f"{widgets.path}?watch=1", TABLE) as events:
        first = next(events)["object"]
        widgets.make(widget("b"))
        second = next(events)["object"]
    assert (first["kind"], second["kind"]) == ("Table", "Table")
    assert first["columnDefinitions"]
    assert not second["columnDefinitions"]
    assert second["rows"][0]["cells"][0] == "b"


def test_partial_object_metadata(widgets: Collection):
    widgets.make(widget())
    code, answer = widgets.server.request("GET", f"{widgets.path}/w", accept=PARTIAL)
    assert (code, answer["kind"]) == (200, "PartialObjectMetadata")
    assert "spec" not in answer


def test_the_columns_of_pods(pods: Collection):
    pods.make(pod())
    _, table = pods.server.request("GET", pods.path, accept=TABLE)
    names = [column["name"] for column in table["columnDefinitions"]]
    assert names == [
        "Name", "Ready", "Status", "Restarts", "Age", "IP", "Node", "Nominated Node",
        "Readiness Gates",
    ]  # fmt: skip
    cells = table["rows"][0]["cells"]
    assert cells[:3] == ["p", "0/1", "Pending"]
    assert str(cells[3]) == "0"
    assert cells[5:] == ["<none>", "<none>", "<none>", "<none>"]
