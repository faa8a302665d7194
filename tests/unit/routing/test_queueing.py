"""Requests that wait for a saturated or cold model, in the queues of several workers."""

from __future__ import annotations

import asyncio
import math
from typing import Any, cast

import pytest
from fakes.time import FAKE_TIME

from kubeai._load import LoadTable
from kubeai._prompt import Prompt
from kubeai._queue_table import QueueTable
from kubeai.routing.publisher import Publisher
from kubeai.routing.queueing import Displaced, ModelGone, NoEndpoint, Waiting
from kubeai.routing.routes import Endpoint, Route
from kubeai.routing.table import RoutingTable

pytestmark = FAKE_TIME


class Upstream:
    is_waited_on = False

    def close(self):
        pass

    def move_waiting(self, sent_before_s=math.inf):
        pass


class Worker:
    """A worker's routing table; wake-ups are taken when a test asks for it, as by the loop."""

    def __init__(self, site, column):
        self.loads = LoadTable.attach(site.loads.fd, column)
        self.queues = QueueTable.attach(site.queues.fd, column, site.queues.wake_fds)
        self.routing = RoutingTable(
            self.loads, lambda routed, endpoint: cast(Any, Upstream()), queues=self.queues
        )

    @property
    def model(self):
        return self.routing.find("m")

    def pick_new(self, tenant="", adapter=None):
        return self.model.pick_new(Prompt(), adapter, tenant)

    def ask(self, tenant="", priority=0, *, adapter=None, tokens=0, timeout_s=600.0):
        """A task that waits for a Reservation."""
        waiting = Waiting(Prompt(tokens), adapter, tenant, priority)
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        task = asyncio.create_task(self.model.queue.wait(waiting, deadline_s))
        task.waiting = waiting  # type: ignore[attr-defined]
        return task


class Site:
    def __init__(self, workers=2):
        self.loads = LoadTable.create(16, workers)
        self.queues = QueueTable.create(16, workers)
        self.publisher = Publisher(self.loads, queues=self.queues)
        self.workers = [Worker(self, column) for column in range(workers)]

    def route(self, *endpoints, capacity=1, model="m", **values):
        made = tuple(
            Endpoint(name, "127.0.0.1:1", tuple(adapters)) for name, *adapters in endpoints
        )
        route = Route(model, "VLLM", endpoints=made, capacity=capacity, **values)
        delta = self.publisher.update(model, route)
        for worker in self.workers:
            worker.routing.apply(delta)

    def unroute(self):
        delta = self.publisher.update("m", None)
        for worker in self.workers:
            worker.routing.apply(delta)

    async def settle(self):
        """Let tasks run and woken workers dispatch until nothing happens."""
        for _ in range(20):
            for _ in range(4):
                await asyncio.sleep(0)
            woken = [each for each in self.workers if each.queues.take_wakes()]
            if not woken:
                return
            for each in woken:
                each.routing.dispatch()
        pytest.fail("the workers keep waking each other")

    def tick(self):
        for worker in self.workers:
            worker.routing.dispatch(is_tick=True)

    def close(self):
        for worker in self.workers:
            worker.routing.close()
            worker.loads.close()
            worker.queues.close()
        self.loads.close()
        self.queues.close()


@pytest.fixture
async def site():
    site = Site()
    yield site
    site.close()


async def served(site, tasks):
    """Of the tasks, those that have their turn now."""
    await site.settle()
    return [task for task in tasks if task.done()]


async def serve_all(site, tasks):
    """Release each served request in turn. Returns the tasks in the order of their turns."""
    order = []
    left = list(tasks)
    while left:
        now = await served(site, left)
        assert now, "somebody has a turn"
        order += now
        left = [task for task in left if task not in now]
        for task in now:
            task.result().release()
    await site.settle()
    return order


def tenants(order):
    return "".join(task.waiting.tenant for task in order)


async def test_without_a_capacity_endpoints_are_never_full(site):
    site.route(["a"], capacity=0)
    picks = [site.workers[0].pick_new() for _ in range(50)]
    assert all(picks)
    assert not site.workers[0].model.is_saturated()
    for pick in picks:
        pick.release()


@pytest.mark.parametrize("strategy", ["LeastLoad", "PrefixHash", "PrefixCache"])
async def test_no_pick_exceeds_the_capacity_of_an_endpoint(site, strategy):
    site.route(["a"], ["b"], ["c"], capacity=2, strategy=strategy)
    prompts = [Prompt(100, key=7, streams=True) for _ in range(7)]
    picks = [site.workers[n % 2].model.pick_new(prompt) for n, prompt in enumerate(prompts)]
    assert sorted(pick.name for pick in picks[:6]) == ["a", "a", "b", "b", "c", "c"]
    assert picks[6] is None
    assert site.workers[0].model.is_saturated()
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
    assert worker.model.is_saturated("x")
    other = site.workers[1].pick_new()
    assert other.name == "b"
    base.release()
    assert await served(site, [waits]) == [waits]
    assert waits.result().name == "a"
    waits.result().release()
    other.release()


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
