"""Queues of several workers and replicas: those that hang, die or come first."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fakes.queues import Site, served
from fakes.time import FAKE_TIME

pytestmark = FAKE_TIME


async def test_a_worker_that_hangs_is_passed(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    hangs, task = site.workers[0].ask(priority=1), site.workers[1].ask()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.release()
    other = site.workers[1].routing
    other.dispatch(is_tick=True)
    await asyncio.sleep(0)
    assert not task.done()  # the other worker gets until the next tick
    other.dispatch(is_tick=True)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert task.done()
    task.result().release()
    assert await served(site, [hangs]) == [hangs]
    hangs.result().release()


async def turns() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


async def without_ticks(worker, tasks) -> list[asyncio.Task[Any]]:
    """Serve tasks one after the other, only with the wake-ups of free places. Returns the order."""
    order = []
    while len(order) < len(tasks):
        (now,) = [task for task in tasks if task.done() and task not in order]
        order.append(now)
        now.result().release()
        if worker.queues.take_wakes():
            worker.routing.dispatch()
        await turns()
    return order


async def test_a_worker_that_hangs_is_passed_at_once_until_it_goes_on(site):
    site.route(["a"])
    first = site.workers[1].pick_new()
    hangs = [site.workers[0].ask(priority=1) for _ in range(2)]
    tasks = [site.workers[1].ask() for _ in range(4)]
    await turns()
    first.release()
    other = site.workers[1]
    for _ in range(2):
        other.routing.dispatch(is_tick=True)
    await turns()
    assert await without_ticks(other, tasks) == tasks
    new = other.pick_new()
    assert new.name == "a"  # it does not wait behind the worker that hangs
    last = other.ask()
    await turns()
    site.workers[0].routing.dispatch()  # it goes on, before a slot is free
    new.release()
    assert await served(site, [*hangs, last]) == hangs[:1]
    hangs[0].result().release()
    assert await served(site, [hangs[1], last]) == hangs[1:]
    hangs[1].result().release()
    assert await served(site, [last]) == [last]
    last.result().release()


async def test_the_request_of_a_dead_replica_is_passed_at_once_until_another_comes_first(site):
    site.route(["a"])
    row, worker = site.publisher.row("m"), site.workers[0]
    first = worker.pick_new()
    site.queues.set_peers(row, 5, 0)
    tasks = [worker.ask() for _ in range(4)]
    await site.settle()
    first.release()
    site.tick()
    site.tick()
    await turns()
    site.queues.set_peers(row, 5, 0)  # a report that says the same
    assert await without_ticks(worker, tasks) == tasks
    last = worker.pick_new() or await worker.ask()
    task = worker.ask()
    site.queues.set_peers(row, 5, 100)
    await site.settle()
    last.release()
    assert await served(site, [task]) == []  # a slot is left for it
    site.queues.clear_peers(row)
    site.queues.notify(row)
    assert await served(site, [task]) == [task]
    task.result().release()


@pytest.mark.parametrize("peer", [False, True])
async def test_several_workers_that_hang_are_passed(peer):
    site = Site(workers=4)
    site.route(["a"], capacity=3)
    picks = [site.workers[0].pick_new() for _ in range(3)]
    hung = [site.workers[column].ask(priority=3 - column) for column in range(3)]
    if peer:  # a request of another replica comes first, too
        site.queues.set_peers(site.publisher.row("m"), 5, 0)
    tasks = [site.workers[3].ask() for _ in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for pick in picks:
        pick.release()
    for _ in range(6):
        site.workers[3].routing.dispatch(is_tick=True)
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [task.done() for task in tasks] == [True] * 3
    site.queues.clear_peers(site.publisher.row("m"))
    for task in (*tasks, *await served(site, hung)):
        task.result().release()
    await site.settle()
    site.close()


async def test_a_worker_is_not_passed_because_its_model_is_full_for_long(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    waits, task = site.workers[0].ask(priority=1), site.workers[1].ask()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    other = site.workers[1].routing
    for _ in range(5):
        other.dispatch(is_tick=True)
    first.release()
    other.dispatch(is_tick=True)  # before the worker that is woken
    assert await served(site, [waits, task]) == [waits]
    waits.result().release()
    assert await served(site, [task]) == [task]
    task.result().release()


async def test_one_place_is_left_for_a_request_of_another_replica_that_comes_first(site):
    site.route(["a"], capacity=2)
    row = site.publisher.row("m")
    picks = [site.workers[0].pick_new(), site.workers[0].pick_new()]
    site.queues.set_peers(row, 5, 0)
    tasks = [site.workers[0].ask(), site.workers[1].ask(timeout_s=60.0)]
    await site.settle()
    picks[0].release()
    assert await served(site, tasks) == []
    picks[1].release()
    assert await served(site, tasks) == [tasks[0]]
    site.queues.clear_peers(row)
    site.queues.notify(row)
    assert await served(site, tasks) == tasks
    for task in tasks:
        task.result().release()


async def test_a_place_is_not_left_for_longer_than_two_ticks(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    site.queues.set_peers(site.publisher.row("m"), 5, 0)
    task = site.workers[0].ask()
    await site.settle()
    first.release()
    site.tick()
    assert await served(site, [task]) == []
    site.tick()
    assert await served(site, [task]) == [task]
    task.result().release()


async def test_a_request_of_another_replica_that_comes_later_is_left_nothing(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    task = site.workers[0].ask(priority=1)
    site.queues.set_peers(site.publisher.row("m"), 0, 0)
    await site.settle()
    first.release()
    assert await served(site, [task]) == [task]
    task.result().release()


async def test_a_killed_workers_queue_holds_up_nobody(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    dies, task = site.workers[0].ask(priority=9), site.workers[1].ask()
    await site.settle()
    first.release()
    site.queues.clear_column(0)
    site.workers[1].routing.dispatch()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert task.done()
    task.result().release()
    dies.cancel()
    await asyncio.gather(dies, return_exceptions=True)


async def test_a_lost_wake_up_costs_one_tick(site):
    site.route(["a"])
    first = site.workers[0].pick_new()
    task = site.workers[1].ask()
    await site.settle()
    first.release()
    site.workers[1].queues.take_wakes()  # lost
    assert await served(site, [task]) == []
    site.tick()
    assert await served(site, [task]) == [task]
    task.result().release()
