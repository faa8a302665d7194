"""What is reported and how often it is retried when pods fail or the API rejects or fails."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime

import pytest
from fakes.kube import now_s, rates
from fakes.time import FAKE_TIME

from kubeai.kube.errors import ApiError
from kubeai.operator.apply import CREATES_AT_FIRST_MAX

pytestmark = FAKE_TIME


@pytest.mark.parametrize("status", [409, 429, 500, 503, 0])
async def test_it_backs_off_during_an_error_storm_and_recovers(world, status):
    def refuse(verb, plural, name):
        if now_s() < until_s:
            raise ApiError(status, "Storm", "no")

    until_s = now_s() + 120.0
    world.kube.before = refuse
    world.start()
    world.apply(minReplicas=3)
    await asyncio.sleep(60.0)
    for _ in range(300):  # events arrive all the time, but change nothing
        world.controller.all_changed()
        await asyncio.sleep(0.2)
    assert rates(world.kube.writes) <= 2
    assert len(world.kube.writes) < 60
    await world.settled(3, 3, limit_s=60.0)
    assert world.kube.most_pods == 3


async def test_the_final_status_is_written_without_delay(world):
    world.auto_ready = False
    world.start()
    world.apply(minReplicas=30)
    await world.until(lambda: len(world.pods()) == 30)
    for name in world.pods():
        world.make_ready(name)
        await asyncio.sleep(0.09)  # shorter than the time for which a status is debounced
    began_s = now_s()
    await world.until(lambda: world.replicas() == {"all": 30, "ready": 30})
    assert now_s() - began_s < 0.15
    assert world.kube.count("patch status") >= 2, "intermediate statuses were written too"
    assert rates(world.kube.writes) <= 2


async def test_replicas_that_become_ready_together_cause_one_status_write(world):
    world.auto_ready = False
    world.start()
    world.apply(minReplicas=5)
    await world.until(lambda: len(world.pods()) == 5)
    await asyncio.sleep(5)
    written = world.kube.count("patch status")
    for name in world.pods():
        world.make_ready(name)
        await asyncio.sleep(0.08)
    await world.until(lambda: world.replicas() == {"all": 5, "ready": 5})
    assert world.kube.count("patch status") == written + 1


async def test_a_rejected_pod_is_reported_in_the_status_and_retried(world):
    def quota(verb, plural, name):
        if (verb, plural) == ("create", "pods") and full:
            raise ApiError(403, "Forbidden", "exceeded quota: gpus")

    full = True
    world.kube.before = quota
    world.start()
    world.apply(replicas=4)
    await world.until(lambda: world.condition("Ready") == ("False", "PodRefused"))
    conditions = world.model()["status"]["conditions"]
    assert [c["message"] for c in conditions] == ["exceeded quota: gpus"] * 3
    assert "PodRefused" in world.events.reasons()
    await asyncio.sleep(300.0)
    assert world.kube.count("create", "pods") < 25  # one pod at a time, with growing back-off
    assert world.kube.count("patch status") == 1
    full = False
    await world.settled(4, 4)
    assert world.condition("Progressing") == ("False", "UpToDate")


async def test_a_rejection_is_cleared_once_no_pod_is_wanted(world):
    def quota(verb, plural, name):
        if (verb, plural) == ("create", "pods"):
            raise ApiError(403, "Forbidden", "exceeded quota: gpus")

    world.kube.before = quota
    world.start()
    world.apply(replicas=1)
    await world.until(lambda: world.condition("Ready") == ("False", "PodRefused"))
    world.apply(replicas=0)
    await world.until(lambda: world.condition("Ready") == ("True", "ScaledToZero"))


async def test_pods_that_keep_failing_are_replaced_with_back_off(world):
    world.auto_ready = False
    world.start()

    def evict(plural, kind, obj):
        if (plural, kind) == ("pods", "ADDED"):
            failed = {"phase": "Failed", "reason": "Evicted"}
            asyncio.get_running_loop().call_later(
                0.1, world.set_status, obj["metadata"]["name"], failed
            )

    world.kube.listeners.append(evict)
    world.apply(replicas=1)
    await asyncio.sleep(600.0)
    made = world.kube.count("create", "pods")
    assert 5 < made < 15
    assert world.condition("Ready") == ("False", "Evicted")
    world.kube.listeners.remove(evict)
    world.auto_ready = True
    await world.settled(1, 1, limit_s=400.0)


async def test_status_writes_stop_if_the_crd_prunes_conditions(world):
    def prune(obj):
        obj.get("status", {}).pop("conditions", None)
        return obj

    world.kube.admit = prune
    world.start()
    world.apply(replicas=1)
    await world.settled(1, 1)


async def test_label_writes_stay_rate_limited_if_something_removes_the_labels(world):
    def strip(obj):
        obj["metadata"].pop("labels", None)
        return obj

    world.start()
    world.kube.admit = strip
    world.apply(replicas=0, meta={"labels": {}})
    await asyncio.sleep(60.0)
    assert rates(world.kube.writes) <= 2


async def test_nothing_is_written_after_leadership_is_lost(world):
    world.start()

    def lose(verb, plural, name):
        if (verb, plural) == ("create", "pods"):
            world.leader.leads = False

    world.kube.before = lose
    world.apply(replicas=50)
    await asyncio.sleep(60.0)
    assert 1 <= world.kube.count("create", "pods") <= CREATES_AT_FIRST_MAX  # sent together
    assert world.kube.count("patch status") == 0


async def test_the_autoscalers_state_is_saved_with_back_off_and_only_when_it_changes(world):
    def refuse(verb, plural, name):
        if plural == "configmaps" and now_s() < until_s:
            raise ApiError(500, "Storm", "no")

    key = "configmaps", "kubeai-autoscaler-state"
    until_s = now_s() + 10.0
    world.kube.before = refuse
    world.start()
    world.apply(replicas=0)
    scaling = asyncio.create_task(world.scaler().run())
    try:
        await world.until(lambda: key in world.kube.objects)
        assert '"m"' in world.kube.objects[key]["data"]["models"]
        await asyncio.sleep(5.0)
        assert world.kube.count("patch", "configmaps") == 0, (
            "it is created with its complete content"
        )
        assert rates(world.kube.writes) <= 2
        writes = len(world.kube.writes)
        await asyncio.sleep(60.0)
        assert len(world.kube.writes) == writes
        del world.kube.objects[key]
        world.apply("other", replicas=0)
        await world.until(lambda: '"other"' in str(world.kube.objects.get(key)))
    finally:
        scaling.cancel()
        await asyncio.gather(scaling, return_exceptions=True)


async def test_degraded_clears_without_an_event_after_a_long_enough_run(world, monkeypatch):
    start_s = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    monkeypatch.setattr(time, "time", lambda: start_s + now_s())
    world.auto_ready = False
    world.start()
    world.apply(replicas=1)
    await world.until(world.pods)
    times = {"startedAt": "2026-01-01T00:00:00Z", "finishedAt": "2026-01-01T00:01:00Z"}
    server = {
        "name": "server",
        "restartCount": 2,
        "state": {"running": {"startedAt": "2026-01-01T00:02:00Z"}},
        "lastState": {"terminated": {"exitCode": 1, "message": "no GPU", **times}},
    }
    world.set_status(world.pods()[0], {"phase": "Running", "containerStatuses": [server]})
    await world.until(lambda: world.condition("Degraded") == ("True", "CrashLoopBackOff"))
    await asyncio.sleep(600.0)
    assert world.condition("Degraded") == ("True", "CrashLoopBackOff")
    await world.until(lambda: world.condition("Degraded") == ("False", "AsExpected"), 300.0)
    assert now_s() >= 120 + 600 + 60
