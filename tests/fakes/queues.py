"""Workers that queue the requests of one site, without a network."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from fakes.routing_tables import Upstream
from kubeai._load import LoadTable
from kubeai._prompt import Prompt
from kubeai._queue_table import QueueTable
from kubeai.routing.publisher import Publisher
from kubeai.routing.queueing import Waiting
from kubeai.routing.routes import Endpoint, Route
from kubeai.routing.table import RoutingTable


class Worker:
    """A worker's routing table; wake-ups are taken when a test asks for it, as by the loop."""

    def __init__(self, site, column):
        self.loads = LoadTable.attach(site.loads.fd, column)
        self.queues = QueueTable.attach(site.queues.fd, column, site.queues.wake_fds)
        self.routing = RoutingTable(
            self.loads, lambda routed, endpoint: cast(Any, Upstream(endpoint)), queues=self.queues
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
