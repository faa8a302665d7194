"""Leader election, on fake time and an API in memory."""

from __future__ import annotations

import asyncio
import copy
import itertools
import random

import pytest
from fakes.time import FAKE_TIME

from kubeai.api.config.system import LeaderElection
from kubeai.kube.errors import ApiError
from kubeai.operator.leader import (
    GO_CONTROLLER_LEASE_NAME,
    LEASE_NAME,
    Leader,
    Leadership,
    NotLeader,
)

LEASE_S, RENEW_S, RETRY_S = 15.0, 10.0, 2.0
pytestmark = FAKE_TIME


class Leases:
    """Leases with optimistic concurrency; can be unavailable."""

    def __init__(self):
        self.kept = {}
        self.version = 0
        self.writes = []
        self.away = False
        self.lose_answers = False
        self.answer_s = 0.0  # how long a response is delayed after the write

    async def _answer(self):
        await asyncio.sleep(0.005)
        if self.away:
            raise ApiError(0, "Unreachable", "away")

    async def get(self, r, name, namespace=""):
        await self._answer()
        if name not in self.kept:
            raise ApiError(404, "NotFound", name)
        return copy.deepcopy(self.kept[name])

    async def create(self, r, obj, namespace=""):
        await self._answer()
        if obj["metadata"]["name"] in self.kept:
            raise ApiError(409, "AlreadyExists", "taken")
        return self._keep(obj)

    async def update(self, r, obj, namespace=""):
        await self._answer()
        kept = self.kept.get(obj["metadata"]["name"])
        if kept is None:
            raise ApiError(404, "NotFound", "gone")
        if obj["metadata"]["resourceVersion"] != kept["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", "changed")
        kept = self._keep(obj)
        await asyncio.sleep(self.answer_s)
        return kept

    def _keep(self, obj):
        self.version += 1
        kept = copy.deepcopy(obj)
        kept["metadata"]["resourceVersion"] = str(self.version)
        name = obj["metadata"]["name"]
        self.kept[name] = kept
        if name == LEASE_NAME:
            self.writes.append(self.holder)
        if self.lose_answers:
            raise ApiError(0, "Unreachable", "the answer is lost")
        return copy.deepcopy(kept)

    @property
    def lease(self):
        return self.kept.get(LEASE_NAME)

    @lease.setter
    def lease(self, lease):
        if lease is None:
            del self.kept[LEASE_NAME]
        else:
            self.kept[LEASE_NAME] = lease

    @property
    def holder(self):
        return self.lease["spec"]["holderIdentity"]

    def held_by_go(self, *names):
        """What a leader of KubeAI in Go has left, as of now."""
        for name in names:
            self.version += 1
            spec = {"holderIdentity": "kubeai-in-go", "leaseDurationSeconds": LEASE_S}
            meta = {"name": name, "resourceVersion": str(self.version)}
            self.kept[name] = {"metadata": meta, "spec": spec}


class Candidate:
    """A Leader with its task, and its callbacks' history."""

    def __init__(self, leases, identity, turns):
        self.identity = identity
        self.turns = turns
        config = LeaderElection(
            lease_duration_s=LEASE_S, renew_deadline_s=RENEW_S, retry_period_s=RETRY_S
        )
        self.leader = Leadership(
            *(leases, "default", identity, config),
            changed=lambda leads: turns.append((identity, leads)),
            clock=asyncio.get_running_loop().time,
        )
        self.task = None

    @property
    def leads(self):
        return self.leader.leads

    async def release(self):
        await self.leader.release()

    def thaw(self):
        self.task = asyncio.create_task(self.leader.run())

    async def freeze(self):
        """Stop in the middle of whatever it does, without a word."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


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


class World:
    def __init__(self):
        self.leases = Leases()
        self.turns = []
        self.candidates = []

    def join(self, identity):
        candidate = Candidate(self.leases, identity, self.turns)
        self.candidates.append(candidate)
        candidate.thaw()
        return candidate

    async def until(self, true, limit_s):
        """Wait until ``true`` returns true; returns the seconds that it took."""
        clock = asyncio.get_running_loop().time
        began = clock()
        while not true():
            assert clock() - began <= limit_s, "too late"
            await asyncio.sleep(0.01)
        return clock() - began


@pytest.fixture
async def world():
    world = World()
    yield world
    for candidate in world.candidates:
        await candidate.freeze()


async def test_one_of_many_candidates_leads_and_keeps_leading(world):
    candidates = [world.join(name) for name in "abcde"]
    await world.until(lambda: any(c.leads for c in candidates), RETRY_S)
    (leader,) = [c for c in candidates if c.leads]
    for _ in range(40):
        await asyncio.sleep(RETRY_S / 2)
        assert [c for c in candidates if c.leads] == [leader]
    assert world.turns == [(leader.identity, True)]
    assert world.leases.lease["spec"]["leaseTransitions"] == 0


async def test_a_dead_leader_is_replaced_when_its_lease_expires(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    two = world.join("two")
    await asyncio.sleep(5 * RETRY_S)
    await one.freeze()
    took_s = await world.until(lambda: two.leads, LEASE_S + 2 * RETRY_S)
    assert took_s >= LEASE_S - RETRY_S  # not while the other may believe that it leads
    assert not one.leads
    assert world.leases.lease["spec"]["leaseTransitions"] == 1


async def test_a_released_lease_is_acquired_at_the_next_retry(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    two = world.join("two")
    await asyncio.sleep(RETRY_S)
    await one.freeze()
    await one.leader.release()
    assert not one.leads
    assert world.leases.holder == ""
    await world.until(lambda: two.leads, RETRY_S + 0.1)


async def test_a_lease_is_released_even_if_its_renewal_was_interrupted(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    world.leases.answer_s = 1.0
    await asyncio.sleep(RETRY_S + 0.1)
    assert len(world.leases.writes) == 2, "it is renewed, but the response has not arrived"
    await one.freeze()
    world.leases.answer_s = 0.0
    await one.leader.release()
    assert world.leases.holder == ""


async def test_a_lease_acquired_by_another_holder_is_not_released(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    await one.freeze()
    world.join("two")
    await world.until(lambda: world.leases.holder == "two", LEASE_S + RETRY_S)
    await one.leader.release()
    assert world.leases.holder == "two"


async def test_a_frozen_leader_may_not_write_when_it_resumes(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    await one.freeze()
    one.leader.check()
    await asyncio.sleep(RENEW_S)  # nobody acquired the lease, but it has expired
    with pytest.raises(NotLeader):
        one.leader.check()


async def test_a_leases_age_counts_from_the_sending_of_its_renewal(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    world.leases.answer_s = 6.0
    await asyncio.sleep(RETRY_S + 6.5)
    assert len(world.leases.writes) == 2
    await one.freeze()
    one.leader.check()
    await asyncio.sleep(RENEW_S - 6.0)
    assert not one.leads


async def test_a_leader_that_renewed_late_reconciles_everything_again(world):
    """Events that arrived while it could not write were not acted on."""
    one = world.join("one")
    await world.until(lambda: one.leads, 1.0)
    await one.freeze()
    await asyncio.sleep(RENEW_S + 1.0)
    assert not one.leads
    one.thaw()
    await world.until(lambda: one.leads, 1.0)
    assert world.turns == [("one", True), ("one", False), ("one", True)]


async def test_a_frozen_leader_sees_its_successor_when_it_resumes(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    two = world.join("two")
    await asyncio.sleep(RETRY_S)
    await one.freeze()
    await world.until(lambda: two.leads, LEASE_S + 2 * RETRY_S)
    one.thaw()
    await asyncio.sleep(5 * RETRY_S)
    assert (one.leads, two.leads) == (False, True)
    assert world.turns == [("one", True), ("two", True), ("one", False)]
    assert world.leases.writes.count("one") == world.leases.writes.index("two")


async def test_a_leader_stops_leading_if_the_api_is_unavailable_for_the_renew_deadline(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    world.leases.away = True
    lost_s = await world.until(lambda: not one.leads, RENEW_S)
    assert lost_s > RENEW_S - 2 * RETRY_S
    await asyncio.sleep(RETRY_S * 1.5)
    assert world.turns[-1] == ("one", False)
    world.leases.away = False
    await world.until(lambda: one.leads, LEASE_S + 2 * RETRY_S)


async def test_a_short_outage_of_the_api_changes_nothing(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    world.leases.away = True
    await asyncio.sleep(RENEW_S - 2 * RETRY_S)
    world.leases.away = False
    await asyncio.sleep(3 * RETRY_S)
    assert one.leads
    assert world.turns == [("one", True)]


async def test_a_renewal_whose_response_was_lost_keeps_the_leader(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    world.leases.lose_answers = True
    await asyncio.sleep(RETRY_S * 1.5)
    world.leases.lose_answers = False
    for _ in range(20):
        await asyncio.sleep(RETRY_S)
        assert one.leads


async def test_a_deleted_lease_is_recreated(world):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    world.leases.lease = None
    await asyncio.sleep(3 * RETRY_S)
    assert one.leads
    assert world.leases.holder == "one"


async def test_a_deleted_lease_is_not_taken_over_while_its_holder_may_still_lead(
    world,
):
    one = world.join("one")
    await world.until(lambda: one.leads, RETRY_S)
    two = world.join("two")
    for _ in range(20):
        await asyncio.sleep(0.3 * RETRY_S)
        world.leases.lease = None
        for _ in range(30):
            await asyncio.sleep(RETRY_S / 10)
            assert not two.leads
    await one.freeze()
    await asyncio.sleep(2 * RETRY_S)
    world.leases.lease = None
    await world.until(lambda: two.leads, LEASE_S)
    assert not one.leads


async def test_a_restarted_leader_with_the_same_identity_does_not_wait(world):
    one = world.join("pod-0")
    await world.until(lambda: one.leads, RETRY_S)
    await one.freeze()
    again = world.join("pod-0")
    await world.until(lambda: again.leads, 0.1)


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


@pytest.mark.parametrize("year", [1971, 2999])
async def test_another_holders_clock_does_not_matter(world, year):
    """It is not replaced while it renews, nor waited for when it does not."""
    lease = {
        "metadata": {"name": "kubeai.org"},
        "spec": {"holderIdentity": "other", "leaseDurationSeconds": 15, "leaseTransitions": 0},
    }
    one = world.join("one")
    for second in range(60):
        lease["spec"]["renewTime"] = f"{year}-01-01T00:00:{second:02}.000000Z"
        world.leases._keep(lease)
        await asyncio.sleep(RETRY_S)
        assert not one.leads
    await world.until(lambda: one.leads, LEASE_S + RETRY_S)


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


async def test_a_replica_without_permission_for_one_lease_does_not_lead(world, monkeypatch):
    create = world.leases.create

    async def refuse(r, obj, namespace=""):
        if obj["metadata"]["name"] == GO_CONTROLLER_LEASE_NAME:
            raise ApiError(403, "Forbidden", "leases is forbidden")
        return await create(r, obj, namespace)

    monkeypatch.setattr(world.leases, "create", refuse)
    one, two = world.join("one"), world.join("two")
    for _ in range(10):
        await asyncio.sleep(LEASE_S / 2)
        assert not one.leads
        assert not two.leads
    monkeypatch.setattr(world.leases, "create", create)
    await world.until(lambda: one.leads or two.leads, 2 * RETRY_S)
