"""Watches against a scripted server: events, failures, back-off, and new lists."""

from __future__ import annotations

import asyncio
import time

import msgspec
from fakes.scripted_api import event, gone, kubeconfig, thing

from kubeai.kube.client import Kube
from kubeai.kube.resources import CONFIGMAPS

DEADLINE_S = 10.0


class View:
    """The state of a follower."""

    def __init__(self):
        self.objects = {}
        self.lists = 0
        self.events = []

    def replaced(self, items):
        self.lists += 1
        self.objects = {item["metadata"]["name"]: item for item in items}

    def changed(self, kind, item):
        name = item["metadata"]["name"]
        self.events.append((kind, name))
        if kind == "DELETED":
            self.objects.pop(name, None)
        else:
            self.objects[name] = item


async def following(kube, server, **options):
    """Follow until the server's script has ended; return the resulting view."""
    view = View()
    follow = kube.follow(CONFIGMAPS, "ns", replaced=view.replaced, changed=view.changed, **options)
    task = asyncio.create_task(follow)
    end = asyncio.create_task(server.again.wait())
    try:
        done, _ = await asyncio.wait(
            {task, end}, timeout=DEADLINE_S, return_when=asyncio.FIRST_COMPLETED
        )
        assert done, "the script did not reach its end"
        if task in done:
            task.result()
    finally:
        task.cancel()
        end.cancel()
        await asyncio.gather(task, end, return_exceptions=True)
    return view


async def test_a_follower_applies_events(kube, server):
    server.lists = [([thing("a", 1), thing("b", 2)], "5")]
    server.watches = [
        [
            event("ADDED", thing("c", 6)),
            event("MODIFIED", thing("a", 7, new="1")),
            event("DELETED", thing("b", 8)),
            event("BOOKMARK", {"metadata": {"resourceVersion": "20"}}),
        ]
    ]
    view = await following(kube, server)
    assert view.objects.keys() == {"a", "c"}
    assert view.objects["a"]["data"] == {"new": "1"}
    assert view.events == [("ADDED", "c"), ("MODIFIED", "a"), ("DELETED", "b")]
    assert server.watched_from() == ["5", "20"]  # after the watch ended: from the bookmark
    assert view.lists == 1


async def test_an_expired_resource_version_causes_a_relist(kube, server):
    server.lists = [([thing("a", 1)], "5"), ([thing("b", 30)], "30"), ([thing("c", 40)], "40")]
    server.watches = [[event("ADDED", thing("x", 6)), gone()], 410]
    view = await following(kube, server)
    assert view.lists == 3
    assert view.objects.keys() == {"c"}
    assert server.watched_from() == ["5", "30", "40"]


async def test_an_expired_watch_after_an_outage_relists_without_back_off(kube, server):
    """The back-off was for the outage; if the new list expires as well, it backs off again."""
    server.lists = [([], "5"), ([], "30"), ([], "40")]
    server.watches = [500] * 4 + [410] * 2
    view = await following(kube, server)
    assert view.lists == 3
    expired, again = 5, 7  # a list, four watches, this one, a list, and this one
    assert server.times_s[expired + 1] - server.times_s[expired] < 0.5
    assert server.times_s[again + 1] - server.times_s[again] > 0.5


async def test_a_broken_watch_resumes_where_it_stopped(kube, server):
    half = event("ADDED", thing("b", 7))
    server.watches = [[event("ADDED", thing("a", 6)), half[:20]], 500, [half]]
    view = await following(kube, server)
    assert view.objects.keys() == {"a", "b"}
    assert view.lists == 1
    assert server.watched_from() == ["1", "6", "6", "7"]


async def test_a_watch_without_a_response_is_retried(kube, server, monkeypatch):
    monkeypatch.setattr("kubeai.kube.watch.RESPONSE_TIMEOUT_S", 0.2)
    server.watches = [None, [event("ADDED", thing("a", 6))]]
    view = await following(kube, server)
    assert view.objects.keys() == {"a"}


async def test_events_may_arrive_in_pieces_of_any_size(kube, server):
    long = event("ADDED", thing("long", 8, text="x" * 3_000_000))
    stream = event("ADDED", thing("a", 6)) + b"\n" + event("ADDED", thing("b", 7)) + long
    pieces = [stream[i : i + 70_001] for i in range(0, len(stream), 70_001)]
    server.watches = [[stream[:5], stream[5:8], *[]], pieces]
    view = await following(kube, server)
    assert view.objects.keys() == {"a", "b", "long"}
    assert len(view.objects["long"]["data"]["text"]) == 3_000_000


class Typed(msgspec.Struct):
    metadata: dict[str, str]
    data: dict[str, str]

    def __getitem__(self, key):
        return getattr(self, key)


async def test_an_object_that_does_not_decode_is_skipped(kube, server):
    odd = {"metadata": {"name": "odd", "resourceVersion": "3"}, "data": 7}
    server.lists = [([thing("a", 1), odd], "5"), ([], "9")]
    server.watches = [
        [
            event("MODIFIED", odd | {"metadata": {"name": "a", "resourceVersion": "6"}}),
            event("ADDED", thing("b", 7)),
        ]
    ]
    view = await following(kube, server, type=Typed)
    assert view.objects.keys() == {"a", "b"}
    assert view.events == [("ADDED", "b")]


async def test_an_undecodable_delete_event_causes_a_relist(kube, server):
    odd = {"metadata": {"name": "a", "resourceVersion": "6"}, "data": 7}
    server.lists = [([thing("a", 1)], "5"), ([], "9")]
    server.watches = [[event("DELETED", odd)]]
    view = await following(kube, server, type=Typed)
    assert view.objects == {}
    assert view.lists == 2


async def test_failures_are_retried_with_back_off(kube, server):
    server.watches = [500] * 4
    began = time.monotonic()
    await following(kube, server)
    # at least 0.05 + 0.1 + 0.2 + 0.4 s of back-off
    assert 0.75 <= time.monotonic() - began < DEADLINE_S


async def test_a_rejected_watch_resumes_with_the_rotated_token(server, tmp_path):
    token = tmp_path / "token"
    token.write_text("first")
    path = kubeconfig(tmp_path / "kubeconfig", server.url, {"tokenFile": str(token)})
    kube = await Kube.connect(path)
    token.write_text("second")
    server.watches = [401]
    view = await following(kube, server)
    used = [h["Authorization"] for _, _, h, _ in server.requests]
    assert used == ["Bearer first", "Bearer first", "Bearer second"]
    assert view.lists == 1
    await kube.close()
