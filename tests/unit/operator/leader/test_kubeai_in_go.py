"""Leader election beside KubeAI in Go, whose two leases have one leader each."""

from __future__ import annotations

import asyncio
import itertools
import random

import pytest
from fakes.candidates import LEASE_S, RENEW_S, RETRY_S, Candidate, Leases, World
from fakes.time import FAKE_TIME

from kubeai.operator.leader import GO_CONTROLLER_LEASE_NAME, LEASE_NAME, Leader, NotLeader

pytestmark = FAKE_TIME


class GoCandidate(Candidate):
    """A replica of KubeAI in Go competes for each lease by itself."""

    def __init__(self, leases, identity, name):
        self.identity = identity
        self.elected = Leader(
            *(leases, "default", identity),
            lease_duration_s=LEASE_S,
            renew_deadline_s=RENEW_S,
            retry_period_s=RETRY_S,
            name=name,
            clock=asyncio.get_running_loop().time,
        )

    @property
    def leads(self):
        return self.elected.leads

    async def release(self):
        await self.elected.release()

    def thaw(self):
        self.task = asyncio.create_task(self._run())

    async def _run(self):
        while True:
            await self.elected.step()
            await asyncio.sleep(self.elected.wait_s())


async def test_a_lease_of_kubeai_in_go_is_respected(world):
    world.leases._keep(
        {
            "metadata": {"name": "kubeai.org"},
            "spec": {
                "holderIdentity": "kubeai-in-go",
                "leaseDurationSeconds": 40,
                "renewTime": "2001-01-01T00:00:00.000000Z",  # clocks are not compared
                "leaseTransitions": 7,
            },
        }
    )
    one = world.join("one")
    await asyncio.sleep(39)
    assert not one.leads
    await world.until(lambda: one.leads, 2 * RETRY_S)
    assert world.leases.lease["spec"]["leaseTransitions"] == 8


async def test_a_replica_does_not_lead_while_the_controller_of_kubeai_in_go_does(world):
    """Its autoscaler's lease is free: with two replicas, each may hold one of the leases."""
    world.leases.held_by_go(GO_CONTROLLER_LEASE_NAME)
    one = world.join("one")
    for _ in range(5):
        await asyncio.sleep(LEASE_S / 2)
        assert not one.leads
        with pytest.raises(NotLeader):
            one.leader.check()
        world.leases.held_by_go(GO_CONTROLLER_LEASE_NAME)
    await world.until(lambda: one.leads, LEASE_S + RETRY_S)


async def test_the_controller_of_kubeai_in_go_cannot_lead_beside_a_leader(world):
    one, two = world.join("one"), world.join("two")
    await world.until(lambda: one.leads or two.leads, RETRY_S)
    leader, other = (one, two) if one.leads else (two, one)
    for _ in range(4):
        await asyncio.sleep(LEASE_S)
        spec = world.leases.kept[GO_CONTROLLER_LEASE_NAME]["spec"]
        assert spec["holderIdentity"] == leader.identity
    await leader.freeze()
    await leader.leader.release()
    spec = world.leases.kept[GO_CONTROLLER_LEASE_NAME]["spec"]
    assert spec["holderIdentity"] == ""
    await world.until(lambda: other.leads, RETRY_S)
    spec = world.leases.kept[GO_CONTROLLER_LEASE_NAME]["spec"]
    assert spec["holderIdentity"] == other.identity


async def test_a_leader_stops_if_it_loses_only_the_lease_of_go_s_controller(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    world.leases.held_by_go(GO_CONTROLLER_LEASE_NAME)
    await world.until(lambda: not one.leads, 2 * RETRY_S)
    assert world.turns == [("one", True), ("one", False)]
    assert world.leases.holder == "one", "the others need not compete for it"
    await world.until(lambda: one.leads, LEASE_S + 2 * RETRY_S)


async def test_both_leases_of_a_dead_leader_expire_together(world):
    world.leases.held_by_go(LEASE_NAME, GO_CONTROLLER_LEASE_NAME)
    one = world.join("one")
    assert await world.until(lambda: one.leads, LEASE_S + RETRY_S) >= LEASE_S - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
async def test_there_is_one_leader_and_none_beside_kubeai_in_go_whatever_fails(seed):
    dice, leases, turns = random.Random(seed), Leases(), []
    here = [Candidate(leases, f"here-{number}", turns) for number in range(3)]
    names = itertools.product(range(2), (LEASE_NAME, GO_CONTROLLER_LEASE_NAME))
    go = [GoCandidate(leases, f"go-{number}", name) for number, name in names]
    alive = set()
    for _ in range(150):
        one = dice.choice(here + go)
        if one in alive:
            alive.remove(one)
            await one.freeze()
            if dice.random() < 0.5:
                await one.release()
        elif dice.random() < 0.5:
            alive.add(one)
            one.thaw()
        leases.away, leases.lose_answers = dice.random() < 0.1, dice.random() < 0.1
        leases.answer_s = dice.choice((0, 0, 0, 1, 6))
        for _ in range(dice.randint(1, 100)):
            await asyncio.sleep(0.1)
            leaders = [each for each in here if each.leads]
            assert len(leaders) <= 1
            assert not leaders or not any(each.leads for each in go)
    for each in alive:
        await each.freeze()
    leases.away, leases.lose_answers, leases.answer_s = False, False, 0
    world = World()
    world.leases = leases
    last = world.join("last")
    await world.until(lambda: last.leads, LEASE_S + 2 * RETRY_S)
    await last.freeze()
    for each in here:
        mine = [leads for identity, leads in turns if identity == each.identity]
        assert all(before != after for before, after in itertools.pairwise(mine))
