"""How a wait ends: clients that give up, deadlines, lower priorities, changed routes."""

from __future__ import annotations

import asyncio

import pytest
from fakes.queues import serve_all, served
from fakes.time import FAKE_TIME

from kubeai._prompt import Prompt
from kubeai.routing.queueing import Displaced, ModelGone, NoEndpoint, Waiting

pytestmark = FAKE_TIME


async def test_a_request_that_gives_up_lets_the_next_one_come(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    gives_up, next_one = site.workers[0].ask(), site.workers[0].ask()
    await site.settle()
    gives_up.cancel()
    await site.settle()
    first.release()
    assert await served(site, [next_one]) == [next_one]
    next_one.result().release()


async def test_a_request_that_gives_up_at_its_turn_frees_the_place(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    task, next_one = site.workers[0].ask(), site.workers[1].ask()
    await site.settle()
    first.release()
    site.workers[0].routing.dispatch()  # it is its turn, but its task has not run yet
    task.cancel()
    assert await served(site, [next_one]) == [next_one]
    next_one.result().release()


async def test_an_endpoint_that_goes_before_the_request_is_sent_serves_none(site):
    site.route()
    task = site.workers[0].ask()
    await site.settle()
    site.route(["a"])
    site.route()
    assert await served(site, [task]) == []
    site.route(["b"])
    assert await served(site, [task]) == [task]
    assert task.result().name == "b"
    task.result().release()


async def test_a_request_that_can_be_served_does_not_wait(site):
    site.route(["a"])
    reservation = await site.workers[0].ask(timeout_s=0.0)
    reservation.release()


async def test_a_wait_for_an_adapter_ends_when_an_endpoint_has_it(site):
    site.route(capacity=0, adapters=("x",))
    plain, adapter = site.workers[0].ask(), site.workers[0].ask(adapter="x")
    await site.settle()
    site.route(["a"], capacity=0, adapters=("x",))
    assert await served(site, [plain, adapter]) == [plain]
    site.route(["a", "x"], capacity=0, adapters=("x",))
    assert await served(site, [adapter]) == [adapter]
    for task in (plain, adapter):
        task.result().release()


async def test_a_deadline_ends_the_wait(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    with pytest.raises(NoEndpoint):
        await site.workers[0].ask(timeout_s=30.0)
    assert loop.time() - began_s == pytest.approx(30.0)
    assert not site.queues.is_waiting(site.publisher.row("m"))
    first.release()


async def test_a_deleted_model_ends_the_wait(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    task = site.workers[0].ask()
    row, model = site.publisher.row("m"), site.workers[0].model
    await site.settle()
    site.unroute()
    with pytest.raises(ModelGone):
        await task
    assert not site.queues.is_waiting(row)
    assert sum(site.queues.waiting(row)) == 0
    with pytest.raises(ModelGone):
        await model.queue.wait(Waiting(Prompt()), asyncio.get_running_loop().time() + 30)
    first.release()


async def test_only_a_lower_priority_makes_room(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    worker = site.workers[0]
    old, new, high = worker.ask(priority=-1), worker.ask(priority=-1), worker.ask(priority=4)
    await site.settle()
    queue = worker.model.queue
    assert not queue.displace(Waiting(Prompt(), priority=-1))
    assert queue.displace(Waiting(Prompt(), priority=0))
    with pytest.raises(Displaced):
        await new
    assert queue.displace(Waiting(Prompt(), priority=5))
    with pytest.raises(Displaced):
        await old
    first.release()
    assert await served(site, [high]) == [high]
    high.result().release()


async def test_a_place_in_the_queue_counts_the_other_workers(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    tasks = [site.workers[n % 2].ask() for n in range(8)]
    await site.settle()
    queue = site.workers[0].model.queue
    places = [queue.place(task.waiting) for task in tasks[::2]]
    assert places == [(2, 8), (4, 8), (6, 8), (8, 8)]
    first.release()
    await serve_all(site, tasks)


async def test_a_capacity_may_change_at_runtime(site):
    site.route(["a"], capacity=1)
    first = site.workers[0].pick_new()
    tasks = [site.workers[n % 2].ask() for n in range(4)]
    assert await served(site, tasks) == []
    site.route(["a"], capacity=3)
    assert len(await served(site, tasks)) == 2
    site.route(["a"], capacity=0)
    assert len(await served(site, tasks)) == 4
    assert not site.queues.is_waiting(site.publisher.row("m"))
    for task in tasks:
        task.result().release()
    first.release()


async def test_waits_are_counted_by_priority(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    tasks = [site.workers[0].ask(), site.workers[1].ask(priority=3)]
    await site.settle()
    row = site.publisher.row("m")
    assert site.queues.waiting(row) == (0, 1, 1)
    await asyncio.sleep(5)
    first.release()
    await serve_all(site, tasks)
    assert site.queues.waiting(row) == (0, 0, 0)
    _, normal, high = site.queues.waited(row)
    assert normal == ([0, 0, 1, 0, 0], pytest.approx(5.0))
    assert high == ([0, 0, 1, 0, 0], pytest.approx(5.0))
