"""Demand for a Model without replicas: one write, and a pod at once."""

from __future__ import annotations

import asyncio

import pytest
from fakes.kube import now_s, rates
from fakes.time import FAKE_TIME

from kubeai.kube.errors import ApiError
from kubeai.operator.scaling.scaler import Activator
from kubeai.operator.scaling.timeline import Timeline

pytestmark = FAKE_TIME


class Held(dict):
    """Loads: the number of held requests per model."""

    def held(self, model):
        return self.get(model, 0)

    active = held

    def in_flight(self, model, endpoint):
        return 0

    def in_use(self, model, endpoint):
        return False

    def ended(self, model):
        return 0

    def complete(self):
        return True


@pytest.fixture
async def activator(world):
    world.start()
    world.held = Held()
    activator = Activator(world.kube, "default", world.store, world.held, world.events, Timeline())
    yield activator
    await activator.stop()


async def test_demand_causes_one_write_and_a_pod_at_once(world, activator):
    world.apply(replicas=0)
    await world.settled(0, 0)
    began = now_s()
    for _ in range(100):
        activator.demand("m")
    await world.until(world.pods)
    assert now_s() - began < 0.05
    assert world.kube.count("patch", "models") == 1
    await world.settled(1, 1)


async def test_demand_scales_to_the_models_min_replicas(world, activator):
    world.leader.leads = False
    world.apply(minReplicas=3)
    activator.demand("m")
    await world.until(lambda: world.model()["spec"].get("replicas") == 3)


async def test_demand_for_an_unknown_or_active_or_manual_model_writes_nothing(world, activator):
    world.apply("awake", replicas=2)
    world.apply("theirs", replicas=0, autoscalingDisabled=True)
    await world.until(lambda: len(world.pods()) == 2)
    for name in ("awake", "theirs", "unknown"):
        activator.demand(name)
    await asyncio.sleep(10.0)
    assert world.kube.count("patch", "models") == 0


async def test_demand_backs_off_during_an_error_storm(world, activator):
    def refuse(verb, plural, name):
        if now_s() < until_s:
            raise ApiError(503, "Storm", "no")

    world.apply(replicas=0)
    await world.settled(0, 0)
    world.kube.writes.clear()
    until_s = now_s() + 60.0
    world.kube.before = refuse
    world.held["m"] = 7
    for _ in range(500):
        activator.demand("m")
        await asyncio.sleep(0.1)
    assert rates(world.kube.writes) <= 2
    looking = asyncio.create_task(activator.run())  # no more messages, but the request is held
    await world.until(lambda: world.model()["spec"]["replicas"] == 1, limit_s=60.0)
    looking.cancel()
    await asyncio.gather(looking, return_exceptions=True)


async def test_demand_with_a_stale_view_reads_the_model_again(world, activator):
    world.apply(replicas=0, maxReplicas=5)
    await world.settled(0, 0)
    world.kube.held_events = []
    world.apply(replicas=5)
    activator.demand("m")  # the store still says 0
    await world.until(lambda: len(world.pods()) == 5)
    assert world.model()["spec"]["replicas"] == 5
