"""Any order of changes and restarts: all workers converge on the supervisor's view."""

import functools
from typing import Any

from fakes.routing_tables import Worker, hashed, route
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from examples import some
from kubeai._load import LoadTable
from kubeai.errors import KubeAIError
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route

MODELS = st.sampled_from(["m", "n"])
endpoints = st.lists(
    st.builds(
        Endpoint,
        st.sampled_from("abc"),
        st.sampled_from(["1:1", "2:2"]),
        st.sampled_from([(), ("x",), ("x", "y")]),
    ),
    max_size=3,
    unique_by=lambda e: e.name,
)
routes = st.builds(
    functools.partial(Route, "?", "VLLM"),
    strategy=st.sampled_from(["LeastLoad", "PrefixHash"]),
    replication=st.sampled_from([1, 20]),
    mean_load_factor=st.sampled_from([100, 125]),
    endpoints=endpoints.map(tuple),
)
WORKERS = 2


class Hinge(RuleBasedStateMachine):
    """A Publisher, and workers that get its changes late and die now and then."""

    @initialize()
    def start(self):
        self.table = LoadTable.create(14, WORKERS)
        self.publisher = Publisher(self.table)
        self.workers: list[Any] = [None] * WORKERS
        self.queues = [[] for _ in range(WORKERS)]
        self.reservations = [[] for _ in range(WORKERS)]
        for column in range(WORKERS):
            self.spawn(column)

    def spawn(self, column):
        self.workers[column] = Worker(self.table, column)
        self.queues[column] = [self.publisher.snapshot()]

    @rule(model=MODELS, new=st.none() | routes)
    def change(self, model, new):
        before = self.publisher.snapshot()
        try:
            delta = self.publisher.update(model, None if new is None else replace(new, model=model))
        except KubeAIError:
            assert self.publisher.snapshot() == before
            return
        if delta is not None:
            for queue in self.queues:
                queue.append(delta)

    @rule(column=st.integers(0, WORKERS - 1), count=st.integers(1, 5))
    def hear(self, column, count):
        for _ in range(min(count, len(self.queues[column]))):
            self.workers[column].routing.apply(self.queues[column].pop(0))

    @rule(column=st.integers(0, WORKERS - 1))
    def hear_a_snapshot(self, column):
        self.queues[column].append(self.publisher.snapshot())

    @rule(column=st.integers(0, WORKERS - 1), model=MODELS, adapter=st.none() | st.just("x"))
    def pick(self, column, model, adapter):
        found = self.workers[column].routing.find(model)
        if found is not None and (picked := found.pick(hashed(7), adapter)) is not None:
            known = {e.name: e for e in found.route.endpoints}[picked.name]
            assert adapter is None or adapter in known.adapters
            assert picked.target.address == known.address
            assert not picked.target.closed
            self.reservations[column].append((picked, known.row, known.generation))

    @precondition(lambda self: any(self.reservations))
    @rule(data=st.data())
    def release(self, data):
        column = data.draw(st.sampled_from([c for c in range(WORKERS) if self.reservations[c]]))
        at = data.draw(st.integers(0, len(self.reservations[column]) - 1))
        self.reservations[column].pop(at)[0].release()

    @rule(column=st.integers(0, WORKERS - 1))
    def die(self, column):
        # A killed process releases nothing. Its objects are in this live process, so they must be
        # gone before the column is cleared.
        for picked, _, _ in self.reservations[column]:
            picked.release()
        self.reservations[column] = []
        self.table.clear_column(column)
        self.spawn(column)

    @rule()
    def reclaim(self):
        self.publisher.reclaim([self.table.acknowledged(c) for c in range(WORKERS)])

    @invariant()
    def no_row_has_two_owners(self):
        rows = []
        for published in self.publisher.snapshot().routes:
            rows.append(published.row)
            rows += [e.row for e in published.endpoints]
            lives: list[Any] = [published, *published.endpoints]
            assert all(self.table.generation(x.row) == x.generation for x in lives)
        assert len(rows) == len(set(rows))

    @invariant()
    def no_row_that_a_worker_knows_has_begun_another_life(self):
        for worker in self.workers:
            for known in worker.view().values():
                for owner in (known, *known.endpoints):
                    assert self.table.generation(owner.row) == owner.generation

    @invariant()
    def what_is_counted_is_what_is_reserved(self):
        counted = {}
        for column in range(WORKERS):
            for _, row, generation in self.reservations[column]:
                assert self.table.generation(row) == generation, "reused while it had counts"
                counted[row] = counted.get(row, 0) + 1
        for published in self.publisher.snapshot().routes:
            for e in published.endpoints:
                assert self.table.in_flight(e.row) == counted.get(e.row, 0)

    @invariant()
    def a_worker_that_has_heard_all_sees_what_is_published(self):
        for column in range(WORKERS):
            if not self.queues[column]:
                self.check_view(column)

    def check_view(self, column):
        worker = self.workers[column]
        snapshot = self.publisher.snapshot()
        assert worker.routing.version == snapshot.version
        assert worker.view() == {r.model: r for r in snapshot.routes}
        for model in worker.routing:
            assert sorted(model.ring.names()) == sorted(e.name for e in model.route.endpoints)
        assert worker.open_upstreams() == sorted(
            e.address for r in snapshot.routes for e in r.endpoints
        )

    def teardown(self):
        if not hasattr(self, "table"):
            return
        for column in range(WORKERS):
            self.hear(column, 10_000)
            for picked, _, _ in self.reservations[column]:
                picked.release()
        for column in range(WORKERS):
            self.check_view(column)
        for model in self.publisher.models():
            delta = self.publisher.update(model, None)
            for worker in self.workers:
                worker.routing.apply(delta)
        self.reclaim()
        # No row has leaked: every row of the table can be allocated again.
        full = [Endpoint(f"p{n}", "3:3") for n in range(self.table.rows - 1)]
        assert self.publisher.update("m", route(*full)) is not None
        self.table.close()


Hinge.TestCase.settings = settings(max_examples=some(50), stateful_step_count=40)


TestHinge = Hinge.TestCase
