"""Which requests succeed, and at what cost, while endpoints fail and recover.

The policy under test runs in a simulated cluster (fakes/partial_failure.py). Two bounds hold for
every subset of endpoints that fails, in each way, at each load, and in each order of recovery:
while some endpoint can respond, requests succeed; while none can, few attempts are made.
"""

import asyncio
import itertools

import pytest
from fakes.partial_failure import FAIL_S, SLOW_S, Cluster, Report
from fakes.time import FAKE_TIME

pytestmark = FAKE_TIME

LOADS = {
    "20 one by one": lambda cluster: cluster.one_by_one(20),
    "20 at once": lambda cluster: cluster.at_once(20),
    "100 at once": lambda cluster: cluster.at_once(100),
    "100 per second": lambda cluster: cluster.steadily(100, 1),
}
BUDGET_MIN, BUDGET_SHARE = 10, 0.2  # the defaults of the config
PROBES_MAX = 4  # per endpoint, beyond the budget


def subsets(names: list[str]) -> list[tuple[str, ...]]:
    return [
        failing
        for size in range(1, len(names) + 1)
        for failing in itertools.combinations(names, size)
    ]


def assert_bounds(report: Report, failing: int, endpoints: int, answered_before: int, mode: str):
    requests = report.answered + report.failed
    attempts = report.attempts.total()
    if failing == endpoints:
        budget = BUDGET_MIN + BUDGET_SHARE * answered_before + PROBES_MAX * endpoints
        assert attempts <= requests + budget, report
        return
    assert report.most_attempts <= 4, report
    if mode == "500":  # retried only once
        assert report.failed <= max(0.25 * requests, BUDGET_MIN), report
    elif requests == 20:
        assert report.failed <= 2, report
    else:
        assert report.failed == 0, report


@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("mode", ["reset", "503", "500"])
@pytest.mark.parametrize("endpoints", [2, 3, pytest.param("all 3", marks=pytest.mark.slow)])
async def test_the_bounds_hold_for_every_failing_subset_and_recovery_order(endpoints, mode, load):
    """Endpoints are interchangeable, so the first to fail are e0 and the next; "all 3" repeats it
    for the other names.
    """
    every_name = endpoints == "all 3"
    endpoints = 3 if every_name else endpoints
    names = [f"e{number}" for number in range(endpoints)]
    firsts = subsets(names) if every_name else [tuple(names[:n]) for n in range(1, endpoints + 1)]
    for seed, (first, second) in enumerate(itertools.product(firsts, subsets(names))):
        cluster = Cluster(endpoints, seed=seed)
        cluster.behave(dict.fromkeys(first, mode))
        before = await LOADS[load](cluster)
        assert_bounds(before, len(first), endpoints, 0, mode)
        await asyncio.sleep(0.5)
        cluster.behave(dict.fromkeys(second, mode))
        after = await LOADS[load](cluster)
        assert_bounds(after, len(second), endpoints, before.answered, mode)
        await cluster.close()


@pytest.mark.parametrize("failing", [("e0",), ("e1", "e3"), ("e0", "e1", "e2")])
@pytest.mark.parametrize("mode", ["reset", "503"])
async def test_the_healthy_ones_of_four_endpoints_serve_every_request(mode, failing):
    cluster = Cluster(4)
    cluster.behave(dict.fromkeys(failing, mode))
    burst = await cluster.at_once(400)
    assert (burst.answered, burst.failed) == (400, 0)
    steady = await cluster.steadily(100, 5)
    assert steady.failed == 0
    assert sum(steady.attempts[name] for name in failing) <= 2 * len(failing), "they are ejected"
    await cluster.close()


async def test_one_healthy_endpoint_is_found_among_different_failures():
    cluster = Cluster(4)
    cluster.behave({"e0": "reset", "e1": "503", "e2": "slow"})
    report = await cluster.at_once(100)
    assert report.failed == 0
    assert report.attempts["e2"] <= 50, (
        "a slow endpoint has not failed, but retries prefer a responsive one"
    )
    await cluster.close()


async def test_of_two_ejected_endpoints_the_one_that_recovers_takes_over():
    """The last endpoint that served now fails fast, and must not attract all requests for that."""
    cluster = Cluster(3)
    cluster.behave({"e0": "503", "e1": "503"})
    assert (await cluster.at_once(100)).failed == 0
    cluster.behave({"e2": "reset"})
    report = await cluster.one_by_one(50)
    assert report.failed == 0
    assert report.attempts["e2"] <= 5
    await asyncio.sleep(5)
    assert (await cluster.one_by_one(50)).failed == 0
    await cluster.close()


async def test_when_all_endpoints_recover_at_once_all_serve_again_within_seconds():
    """Not only the first one to respond, with the others waiting for their ejections to end."""
    cluster = Cluster(3, eject_time_s=600.0, eject_max_time_s=600.0)
    cluster.behave(dict.fromkeys(cluster.names, "reset"))
    await cluster.at_once(100)
    cluster.behave({})
    await cluster.steadily(50, 3)
    report = await cluster.steadily(50, 2)
    assert report.failed == 0
    assert min(report.attempts[name] for name in cluster.names) >= 20, report
    await cluster.close()


async def test_attempts_are_bounded_for_slow_failures_of_all_endpoints(monkeypatch):
    """Each attempt takes longer than a request waits for proof of recovery."""
    monkeypatch.setattr("fakes.partial_failure.FAIL_S", SLOW_S)
    cluster = Cluster(3)
    cluster.behave(dict.fromkeys(cluster.names, "503"))
    report = await cluster.steadily(50, 20)
    requests = report.answered + report.failed
    assert report.attempts.total() <= 1.3 * requests
    await cluster.close()


async def test_requests_waiting_on_a_hung_endpoint_move_when_it_leaves_the_routes():
    cluster = Cluster(3)
    cluster.behave({"e1": "hang"})
    burst = asyncio.create_task(cluster.at_once(30))
    await asyncio.sleep(10)
    assert not burst.done()
    cluster.route(["e0", "e2"])  # its readiness probe has failed
    left_s = cluster.clock()
    report = await burst
    assert (report.answered, report.failed) == (30, 0)
    assert cluster.clock() - left_s < 1.0
    assert report.most_attempts == 2
    await cluster.close()


async def test_requests_waiting_on_a_hung_endpoint_stay_if_no_other_can_serve():
    cluster = Cluster(2)
    cluster.behave({"e0": "hang", "e1": "hang"})
    burst = asyncio.create_task(cluster.at_once(10))
    await asyncio.sleep(1)
    cluster.route([])
    await asyncio.sleep(1)
    assert not burst.done()
    cluster.behave({"e0": "hang"})
    cluster.route(["e1"])
    assert (await burst).failed == 0
    await cluster.close()


async def test_requests_waiting_on_an_endpoint_ejected_for_resets_move():
    cluster = Cluster(2)
    cluster.behave({"e1": "hang"})
    waiting = asyncio.create_task(cluster.at_once(10))
    await asyncio.sleep(1)
    cluster.behaviours["e1"] = "reset"  # affects new requests only; waiting ones get no response
    ejecting = await cluster.at_once(30)
    assert ejecting.failed == 0
    assert ejecting.attempts["e1"] >= 5
    report = await waiting
    assert (report.answered, report.failed) == (10, 0)
    await cluster.close()


async def test_requests_waiting_on_an_endpoint_ejected_for_503_stay():
    """It sheds load, but works on accepted requests: that work must not be done twice."""
    cluster = Cluster(2)
    cluster.behave({"e1": "hang"})
    waiting = asyncio.create_task(cluster.at_once(10))
    await asyncio.sleep(1)
    cluster.behaviours["e1"] = "503"
    ejecting = await cluster.at_once(30)
    assert ejecting.failed == 0
    assert ejecting.attempts["e1"] >= 5
    await asyncio.sleep(5)
    assert not waiting.done()
    cluster.behave({})
    report = await waiting
    assert (report.answered, report.most_attempts) == (10, 1)
    await cluster.close()


def test_the_simulated_failures_are_faster_than_a_request_waits_for_proof():
    assert FAIL_S * 10 < SLOW_S
