"""Pods drain before they are deleted, and a new leader continues the drains."""

from __future__ import annotations

import asyncio

from fakes.kube import draining
from fakes.time import FAKE_TIME

pytestmark = FAKE_TIME


async def test_a_drained_pod_is_deleted_once_it_receives_no_more_requests(world):
    world.start()
    world.apply(replicas=3)
    await world.settled(3, 3)
    _, *busy = world.pods()
    world.loads.used |= set(busy)
    world.loads.served |= dict.fromkeys(busy, 4)
    world.apply(replicas=1)
    await world.until(lambda: draining(world) == 1)
    await world.until(lambda: world.replicas() == {"all": 1, "ready": 1})
    await asyncio.sleep(60.0)
    assert sorted(world.pods()) == sorted(busy), "the idle pod was deleted, no busy one was"
    writes = len(world.kube.writes)
    await asyncio.sleep(60.0)
    assert len(world.kube.writes) == writes, "waiting writes nothing"
    world.loads.used.clear()
    await world.settled(1, 1)
    assert world.kube.count("delete", "pods") == 2


async def test_a_draining_pod_returns_to_service_when_it_is_needed_again(world):
    world.start()
    world.apply(replicas=2)
    await world.settled(2, 2)
    pods = world.pods()
    world.loads.used |= set(pods)
    world.apply(replicas=0)
    await world.until(lambda: draining(world) == 2)
    world.apply(replicas=2)
    await world.settled(2, 2)
    assert (draining(world), world.pods()) == (0, pods)
    assert world.kube.count("create", "pods") == 2


async def test_a_rollout_drains_each_old_pod_before_deleting_it(world):
    world.start()
    world.apply(replicas=2)
    await world.settled(2, 2)
    old = world.pods()
    world.loads.used |= set(old)
    world.apply(args=["--new"])
    await world.until(lambda: draining(world) == 1)
    await asyncio.sleep(60.0)
    assert set(old) < set(world.pods())
    assert world.kube.most_pods == 3, "a draining pod still occupies its node"
    world.loads.used.clear()
    await world.settled(2, 2)
    assert not set(old) & set(world.pods())


async def test_a_new_leader_continues_the_drains_of_its_predecessor(world):
    world.start()
    world.apply(replicas=1)
    await world.settled(1, 1)
    used = set(world.pods())
    world.loads.used |= used
    world.apply(replicas=0)
    await world.until(lambda: draining(world) == 1)
    await world.stop()
    world.start()
    world.loads.used |= used
    await asyncio.sleep(30.0)
    assert len(world.pods()) == 1
    world.loads.used.clear()
    await world.settled(0, 0)
