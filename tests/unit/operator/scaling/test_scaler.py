"""The autoscaler's inputs and writes, against an API in memory, on fake time."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from fakes.kube import CONFIG, World, now_s
from fakes.time import FAKE_TIME

INTERVAL_S = CONFIG.model_autoscaling.interval_s
STATE = "configmaps", "kubeai-autoscaler-state"


@pytest.fixture
async def world():
    world = World()
    yield world
    world.scaling.cancel()
    await asyncio.gather(world.scaling, return_exceptions=True)
    await world.stop()


async def start(world, replicas, active):
    """A Model with ready replicas, and a scaler. Called within the test, on its clock."""
    world.loads.counts["m"] = active
    world.start()
    world.apply(replicas=replicas, targetRequests=10)
    world.scaling = asyncio.create_task(world.scaler().run())
    await world.settled(replicas, replicas)


def wanted(world):
    return world.model()["spec"]["replicas"]


@FAKE_TIME
async def test_a_step_to_eight_times_the_target_is_followed_within_three_intervals(world):
    await start(world, 1, active=5)
    await asyncio.sleep(600)
    assert wanted(world) == 1
    world.loads.counts["m"] = 80
    began_s = now_s()
    await world.until(lambda: wanted(world) >= 8)
    assert now_s() - began_s <= 3 * INTERVAL_S
    await asyncio.sleep(600)
    assert wanted(world) == 8
    assert world.events.reasons().count("ScaledUp") <= 2


@FAKE_TIME
async def test_the_load_is_sampled_several_times_per_interval(world):
    await start(world, 1, active=5)
    world.loads.asked = 0
    await asyncio.sleep(10 * INTERVAL_S)
    assert 90 <= world.loads.asked <= 110


@FAKE_TIME
async def test_a_follower_writes_nothing_and_acts_on_its_own_samples_once_it_leads(world):
    await start(world, 4, active=35)
    await world.until(lambda: STATE in world.kube.objects)
    world.leader.leads = False
    # its own samples take precedence over the former leader's saved state
    text = '{"models":{"m":{"averageActiveRequests":2}},"lastCalculationTime":null}'
    world.kube.objects[STATE]["data"]["models"] = text
    await asyncio.sleep(600)
    writes = len(world.kube.writes)
    world.leader.leads = True
    await asyncio.sleep(2.0)
    state = msgspec.json.decode(world.kube.objects[STATE]["data"]["models"])
    assert state["models"]["m"]["averageActiveRequests"] == 35.0
    assert len(world.kube.writes) == writes + 1, "the state, and nothing else"
    await asyncio.sleep(300)
    assert wanted(world) == 4


@FAKE_TIME
async def test_no_replica_is_removed_while_a_peer_does_not_report(world):
    await start(world, 3, active=25)
    world.loads.counts["m"], world.loads.whole = 0, False
    await asyncio.sleep(1000)
    assert wanted(world) == 3
    world.loads.counts["m"] = 95
    await asyncio.sleep(3 * INTERVAL_S)
    assert wanted(world) == 10
    world.loads.counts["m"] = 0
    world.loads.whole = True
    await asyncio.sleep(1000)
    assert wanted(world) == 0
