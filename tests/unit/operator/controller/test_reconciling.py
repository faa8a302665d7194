"""Reconciliation to a Model's spec, whatever events are lost, late or older than our own writes."""

from __future__ import annotations

import asyncio
import copy
import random

import msgspec
import pytest
from fakes.kube import draining, now_s
from fakes.time import FAKE_TIME

from kubeai.api.model import Model
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS, MODELS, PODS
from kubeai.kube.workqueue import ERROR_BACKOFF_MAX_S
from kubeai.operator.pods import PodObject
from kubeai.operator.store import EXPECTATION_TIMEOUT_S

pytestmark = FAKE_TIME


async def test_a_model_is_reconciled_to_its_spec(world):
    world.start()
    world.apply(replicas=3)
    await world.settled(3, 3)
    assert world.kube.count("create", "pods") == 3
    world.apply(replicas=1)
    await world.settled(1, 1)
    assert world.kube.count("delete", "pods") == 2
    assert world.condition("Ready") == ("True", "AllReplicasReady")


async def test_unobserved_creates_are_not_repeated(world):
    world.auto_ready = False
    world.start()
    world.apply(replicas=3)
    world.kube.held_events = []
    for _ in range(20):
        world.controller.all_changed()
        await asyncio.sleep(0.5)
    assert world.kube.count("create", "pods") == 3
    # The events are lost for good. A second attempt finds the first one's pods and creates no more.
    await asyncio.sleep(2 * EXPECTATION_TIMEOUT_S)
    assert len(world.pods()) == world.kube.most_pods == 3
    world.kube.held_events = None
    world.relist()
    await world.settled(3, 0)


async def test_unobserved_deletes_are_not_repeated(world):
    world.start()
    world.apply(replicas=3)
    await world.settled(3, 3)
    world.kube.held_events = []
    world.apply(replicas=1)
    world.store.model_changed("MODIFIED", msgspec.convert(world.model(), Model))
    for _ in range(20):
        world.controller.all_changed()
        await asyncio.sleep(0.5)
    assert world.kube.count("delete", "pods") == 2
    world.kube.release_events()
    await world.settled(1, 1)


async def test_a_create_whose_response_was_lost_creates_one_pod(world):
    world.start()
    lost = []

    def lose(verb, plural, name):
        if (verb, plural) == ("create", "pods") and len(lost) < 3:
            lost.append(name)
            raise ApiError(0, "Timeout", "no answer")

    world.kube.after = lose
    world.kube.held_events = []
    world.apply(replicas=2)
    world.store.model_changed("ADDED", msgspec.convert(world.model(), Model))
    await world.until(lambda: len(world.pods()) == 2)
    await asyncio.sleep(5.0)
    world.kube.release_events()
    for name in world.pods():
        world.make_ready(name)
    await world.settled(2, 2)
    assert world.kube.most_pods == 2


async def test_a_pod_name_taken_by_another_owner_is_skipped(world):
    world.start()
    world.apply(replicas=1)
    await world.settled(1, 1)
    (name,) = world.pods()
    world.apply(replicas=0)
    await world.settled(0, 0)
    await world.kube.create(PODS, {"metadata": {"name": name}, "spec": {}})
    world.apply(replicas=1)
    await world.until(lambda: world.replicas() == {"all": 1, "ready": 1})
    assert len(world.pods()) == 2


async def test_an_event_older_than_our_own_write_is_ignored(world):
    world.start()
    world.apply(replicas=1)
    await world.settled(1, 1)
    (name,) = world.pods()
    before = msgspec.convert(world.kube.objects["pods", name], PodObject)
    world.loads.used.add(name)
    world.apply(replicas=0)
    await world.until(lambda: draining(world) == 1)
    world.store.pod_changed("MODIFIED", before)
    (pod,) = world.store.observed_pods("m")
    assert pod.draining_since_s


async def test_autoscaler_state_written_by_another_replica_is_read_before_it_is_overwritten(world):
    key = "configmaps", "kubeai-autoscaler-state"
    refused = []

    def meddle(verb, plural, name):
        """A write that a frozen former leader sent arrives just before ours."""
        if (verb, plural) == ("patch", "configmaps") and not refused:
            refused.append(verb)
            late = copy.deepcopy(world.kube.objects[key]) | {"data": {"models": "late"}}
            world.kube._keep(CONFIGMAPS, late, "MODIFIED")

    world.start()
    world.apply(replicas=0)
    scaling = asyncio.create_task(world.scaler().run())
    try:
        await world.until(lambda: key in world.kube.objects)
        world.kube.before = meddle
        world.apply("other", replicas=0)
        await world.until(lambda: refused)
        await asyncio.sleep(0.5)
        assert world.kube.objects[key]["data"]["models"] == "late"
        await world.until(lambda: '"other"' in world.kube.objects[key]["data"]["models"])
    finally:
        scaling.cancel()
        await asyncio.gather(scaling, return_exceptions=True)


async def test_pods_of_a_deleted_model_are_deleted(world):
    world.start()
    world.apply(replicas=2)
    await world.settled(2, 2)
    world.kube._keep(MODELS, world.model(), "DELETED")
    await world.until(lambda: not world.pods())


async def test_pods_of_a_model_not_yet_known_are_kept(world):
    world.start()
    world.apply(replicas=2)
    await world.settled(2, 2)
    world.store.model_changed("DELETED", msgspec.convert(world.model(), Model))
    await asyncio.sleep(2 * EXPECTATION_TIMEOUT_S)
    assert len(world.pods()) == 2


@pytest.mark.parametrize("seed", range(20))
async def test_it_converges_after_random_failures_and_edits(world, seed):
    rng = random.Random(seed)

    def maybe_fail(verb, plural, name):
        if now_s() < 60.0 and rng.random() < 0.25:
            raise ApiError(rng.choice([0, 409, 429, 500]), "Chance", "no luck")

    world.kube.before = world.kube.after = maybe_fail
    world.start()
    world.apply(replicas=2)
    most = 2
    while now_s() < 60.0:
        await asyncio.sleep(rng.random() * 4)
        match rng.randrange(6):
            case 0:
                replicas = rng.randrange(5)
                most = max(most, replicas)
                world.apply(replicas=replicas)
            case 1:
                world.apply(args=[f"--version={rng.randrange(3)}"])
            case 2 if world.pods():
                failed = {"phase": "Failed", "conditions": None}
                world.set_status(rng.choice(world.pods()), failed)
            case 3 if world.pods():
                gone = world.kube.objects["pods", rng.choice(world.pods())]
                world.kube._keep(PODS, copy.deepcopy(gone), "DELETED")
            case 4:
                await world.stop()
                world.start()
            case 5:
                world.relist()
        assert len(living(world)) <= most + 1
    replicas = rng.randrange(5)
    world.apply(replicas=replicas)
    # failed pods are replaced after a back-off that has grown
    await world.until(lambda: len(living(world)) == len(world.pods()) == replicas, limit_s=400.0)
    await asyncio.sleep(ERROR_BACKOFF_MAX_S)
    await world.settled(replicas, replicas)


def living(world):
    return [p for p in world.kube.alive() if p.get("status", {}).get("phase") != "Failed"]
