"""Events of Models, on fake time and an API in memory: deduplicated, counted and rate-limited."""

from __future__ import annotations

import asyncio

import pytest
from fakes.kube import FakeKube, now_s
from fakes.time import FAKE_TIME

from kubeai.api.model import decode_model
from kubeai.kube.errors import ApiError
from kubeai.operator.events import BURST_MAX_EVENTS, DELAY_S, FORGET_S, REFILL_S, Events

pytestmark = FAKE_TIME


def model(name="m", uid="u"):
    spec = {"url": "hf://o/n", "engine": "VLLM", "features": []}
    meta = {"name": name, "namespace": "ns", "uid": uid, "resourceVersion": "7"}
    return decode_model({"metadata": meta, "spec": spec})


@pytest.fixture
async def kube():
    return FakeKube()


@pytest.fixture
async def events(kube):
    events = Events(kube, "default", now_s)
    task = asyncio.create_task(events.run())
    yield events
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def written(kube):
    return [obj for (plural, _), obj in kube.objects.items() if plural == "events"]


async def test_an_event_refers_to_its_model(kube, events):
    events.emit(model(), "LoadFailed", "no such repository", warning=True)
    await asyncio.sleep(DELAY_S + 1.0)
    (event,) = written(kube)
    assert event["involvedObject"] == {
        "apiVersion": "kubeai.org/v1",
        "kind": "Model",
        "namespace": "ns",
        "name": "m",
        "uid": "u",
        "resourceVersion": "7",
    }
    assert (event["type"], event["reason"]) == ("Warning", "LoadFailed")
    assert event["message"] == "no such repository"
    assert event["metadata"]["namespace"] == "ns"


async def test_a_repeated_event_increments_the_count(kube, events):
    for _ in range(300):
        events.emit(model(), "ScaledUp", "from 1 to 2 replicas")
        await asyncio.sleep(1.0)
    await asyncio.sleep(DELAY_S)
    (event,) = written(kube)
    assert 200 <= event["count"] <= 300
    assert len(kube.writes) <= 6  # one per minute
    await asyncio.sleep(FORGET_S)
    events.emit(model(), "ScaledUp", "from 1 to 2 replicas")
    await asyncio.sleep(DELAY_S + 1.0)
    assert len(written(kube)) == 2


async def test_events_are_rate_limited_per_model(kube, events):
    for n in range(1000):
        events.emit(model(), "PodsCreated", f"created pod {n}")
    events.emit(model("other", "v"), "PodsCreated", "created pod a")
    await asyncio.sleep(60.0)
    names = [event["involvedObject"]["name"] for event in written(kube)]
    assert names.count("m") == BURST_MAX_EVENTS
    assert names.count("other") == 1
    await asyncio.sleep(3 * REFILL_S)
    for n in range(1000):
        events.emit(model(), "PodsCreated", f"created pod {n + 1000}")
    await asyncio.sleep(60.0)
    assert BURST_MAX_EVENTS < len(written(kube)) <= BURST_MAX_EVENTS + 1 + 5


async def test_a_rejected_event_is_not_retried(kube, events):
    def refuse(verb, plural, name):
        raise ApiError(403, "Forbidden", "no rights")

    kube.before = refuse
    events.emit(model(), "PodsCreated", "created pod a")
    await asyncio.sleep(60.0)
    assert len(kube.writes) == 1
    kube.before = lambda *_: None
    events.emit(model(), "PodsDeleted", "deleted pod a")
    await asyncio.sleep(60.0)
    assert [event["reason"] for event in written(kube)] == ["PodsDeleted"]
