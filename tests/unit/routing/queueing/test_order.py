"""Requests that wait for a saturated or cold model: when one waits, and whose turn it is."""

from __future__ import annotations

import asyncio
import math

import pytest
from fakes.queues import serve_all, served
from fakes.time import FAKE_TIME

from kubeai._prompt import Prompt

pytestmark = FAKE_TIME


def tenants(order):
    return "".join(task.waiting.tenant for task in order)


async def test_without_a_capacity_endpoints_are_never_full(site):
    site.route(["a"], capacity=0)
    picks = [site.workers[0].pick_new() for _ in range(50)]
    assert all(picks)
    assert not site.workers[0].model.is_full()
    for pick in picks:
        pick.release()


@pytest.mark.parametrize("strategy", ["LeastLoad", "PrefixHash", "PrefixCache"])
async def test_no_pick_exceeds_the_capacity_of_an_endpoint(site, strategy):
    site.route(["a"], ["b"], ["c"], capacity=2, strategy=strategy)
    prompts = [Prompt(100, key=7, streams=True) for _ in range(7)]
    picks = [site.workers[n % 2].model.pick_new(prompt) for n, prompt in enumerate(prompts)]
    assert sorted(pick.name for pick in picks[:6]) == ["a", "a", "b", "b", "c", "c"]
    assert picks[6] is None
    assert site.workers[0].model.is_full()
    picks[0].release()
    again = site.workers[1].model.pick_new(prompts[6])
    assert again.name == picks[0].name
    for pick in (*picks[1:6], again):
        pick.release()


async def test_a_request_that_only_one_endpoint_can_serve_may_exceed_its_capacity(site):
    """A stored response is nowhere else, and its engine may be full for minutes."""
    site.route(["a"], ["b"])
    model = site.workers[0].model
    picks = [site.workers[0].pick_new(), site.workers[0].pick_new()]
    picks.append(model.pick_only("a", Prompt()))
    assert picks[2].name == "a"
    assert model.pick_only("gone", Prompt()) is None
    assert site.workers[0].pick_new() is None
    for pick in picks:
        pick.release()


async def test_ejected_endpoints_get_no_requests_because_the_others_are_full(site):
    site.route(["a"], ["b"])
    model = site.workers[0].model
    model.note_failure("b", 0.0, True)
    model.eject("b", math.inf)
    first = site.workers[0].pick_new()
    assert first.name == "a"
    assert site.workers[0].pick_new() is None
    assert site.workers[1].pick_new() is None
    first.release()


async def test_a_request_waits_until_a_place_is_free(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    task = site.workers[0].ask()
    assert await served(site, [task]) == []
    first.release()
    assert await served(site, [task]) == [task]
    task.result().release()


async def test_a_place_that_one_worker_frees_serves_a_request_of_another(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    task = site.workers[1].ask()
    await site.settle()
    first.release()
    assert await served(site, [task]) == [task]
    task.result().release()


async def test_new_requests_do_not_pass_waiting_ones_of_any_worker(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    task = site.workers[1].ask()
    await site.settle()
    first.release()  # the other worker has not been woken yet
    assert site.workers[0].pick_new() is None
    assert await served(site, [task]) == [task]
    task.result().release()


async def test_one_request_waits_for_at_most_one_service_whatever_others_have_waiting(site):
    site.route(["a"])
    first = site.workers[0].pick_new("many")
    many = [site.workers[n % 2].ask("many") for n in range(200)]
    await site.settle()
    one = site.workers[1].ask("one")
    await site.settle()
    first.release()
    assert await served(site, [*many, one]) == [one]
    one.result().release()
    for task in await served(site, many):
        task.result().release()
    for task in many:
        task.cancel()
    await asyncio.gather(*many, return_exceptions=True)
    await site.settle()


async def test_tenants_get_equal_shares_however_many_workers_they_use(site):
    """One that opens connections to all workers gets no more."""
    site.route(["a"])
    first = site.workers[0].pick_new("x")
    wide = [site.workers[n % 2].ask("w") for n in range(40)]
    narrow = [site.workers[1].ask("n") for _ in range(20)]
    await site.settle()
    first.release()
    order = tenants(await serve_all(site, [*wide, *narrow]))
    for length in range(4, 40, 2):
        assert abs(order[:length].count("w") - order[:length].count("n")) <= 2


async def test_long_outputs_are_charged_when_they_are_known(site):
    site.route(["a"])
    worker = site.workers[0]
    first = worker.pick_new("talks")
    tasks = [worker.ask(name) for name in ("talks", "brief", "brief", "brief", "brief")]
    await site.settle()
    worker.model.picker.settle("talks", 256 * 3)  # twice what a request counts as, more
    first.release()
    order = tenants(await serve_all(site, tasks))
    assert order == "brief" * 3 + "talks" + "brief"


async def test_a_higher_priority_in_any_worker_is_served_first(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    tasks = [
        site.workers[n % 2].ask(str(priority), priority)
        for n, priority in enumerate((0, 2, -1, 5, 1))
    ]
    await site.settle()
    first.release()
    assert tenants(await serve_all(site, tasks)) == "5210-1"


async def test_a_cold_model_drains_in_the_fair_order(site):
    site.route(capacity=1)
    many = [site.workers[0].ask("m") for _ in range(6)]
    one = [site.workers[1].ask("o"), site.workers[1].ask("p", 1)]
    await site.settle()
    site.route(["a"])
    order = tenants(await serve_all(site, [*many, *one]))
    assert order[0] == "p"
    assert order.index("o") <= 2


async def test_without_a_capacity_a_cold_model_serves_all_at_once_in_the_fair_order(site):
    site.route(capacity=0)
    worker = site.workers[0]
    tasks = [*[worker.ask("m") for _ in range(5)], worker.ask("o"), worker.ask("p", 3)]
    await site.settle()
    turns = []
    for task in tasks:
        task.add_done_callback(lambda task: turns.append(task.waiting.tenant))
    site.route(["a"], capacity=0)
    assert len(await served(site, tasks)) == 7
    for task in tasks:
        task.result().release()
    assert turns[0] == "p"
    assert turns.index("o") <= 2


async def test_requests_for_an_adapter_that_is_full_hold_up_no_others(site):
    site.route(["a", "x"], ["b"], adapters=("x",))
    worker = site.workers[0]
    base = worker.model.pick_only("a", Prompt())
    waits = worker.ask(adapter="x")
    await site.settle()
    assert worker.model.is_full("x")
    other = site.workers[1].pick_new()
    assert other.name == "b"
    base.release()
    assert await served(site, [waits]) == [waits]
    assert waits.result().name == "a"
    waits.result().release()
    other.release()
