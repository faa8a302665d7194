"""Leader election on fake time and an API in memory: dead, frozen and restarted leaders."""

from __future__ import annotations

import asyncio

import pytest
from fakes.candidates import LEASE_S, RENEW_S, RETRY_S
from fakes.time import FAKE_TIME

from kubeai.kube.errors import ApiError
from kubeai.operator.leader import GO_CONTROLLER_LEASE_NAME, NotLeader

pytestmark = FAKE_TIME


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
