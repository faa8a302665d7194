"""Routes are published as snapshots and deltas, and every worker's table follows them."""

import contextlib

import pytest
from fakes.routing_tables import Worker, endpoint, hashed, route

from kubeai._load import LoadTable
from kubeai._prompt import Prompt
from kubeai.errors import KubeAIError
from kubeai.openai.request import prompt_of, read
from kubeai.openai.routes import Kind
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Delta, Snapshot


@pytest.fixture
def table():
    table = LoadTable.create(64, 2)
    yield table
    table.close()


@pytest.fixture
def publisher(table):
    return Publisher(table)


@pytest.fixture
def worker(table):
    return Worker(table)


def publish(publisher, worker, model, new):
    delta = publisher.update(model, new)
    worker.routing.apply(delta)
    return worker.routing.find(model)


def test_only_changes_increment_the_version(publisher):
    first = publisher.update("m", route(endpoint("a"), endpoint("b")))
    assert (first.version, publisher.version) == (1, 1)
    assert publisher.update("m", route(endpoint("b"), endpoint("a"))) is None
    assert publisher.update("gone", None) is None
    assert publisher.version == 1
    assert publisher.update("m", None) == Delta(2, "m", None)
    assert publisher.snapshot() == Snapshot(2, ())


def test_endpoints_keep_their_rows(publisher):
    publisher.update("m", route(endpoint("a")))
    rows = publisher.endpoint_rows("m")
    publisher.update("m", route(endpoint("b"), endpoint("a", "x", address="elsewhere:1")))
    assert publisher.endpoint_rows("m")["a"] == rows["a"]
    assert len({publisher.row("m"), *publisher.endpoint_rows("m").values()}) == 3
    assert publisher.models() == ["m"]
    assert publisher.row("none") is None
    assert publisher.endpoint_rows("none") == {}


def test_a_full_table_is_an_error_with_its_size_and_changes_nothing():
    table = LoadTable.create(3, 1)
    publisher = Publisher(table)
    before = publisher.update("m", route(endpoint("a"), endpoint("b")))
    with pytest.raises(KubeAIError, match="3 rows"):
        publisher.update("n", route(model="n"))
    with pytest.raises(KubeAIError, match="full"):
        publisher.update("m", route(endpoint("c"), endpoint("a")))
    assert publisher.snapshot() == Snapshot(1, (before.route,))
    publisher.update("m", None)
    publisher.reclaim([2])
    assert publisher.update("n", route(endpoint("c"), endpoint("d"), model="n")) is not None


def row_of_a_newcomer(publisher, table, name):
    publisher.reclaim(table.acknowledged(column) for column in (0, 1))
    publisher.update("m", route(endpoint(name)))
    return publisher.endpoint_rows("m")[name]


def test_a_row_is_reused_only_after_every_worker_has_acknowledged(publisher, table):
    workers = [Worker(table, 0), Worker(table, 1)]
    publisher.update("m", route(endpoint("a")))
    dropped = publisher.endpoint_rows("m")["a"]
    publisher.update("m", route())
    assert row_of_a_newcomer(publisher, table, "b") != dropped
    workers[0].routing.apply(publisher.snapshot())
    assert row_of_a_newcomer(publisher, table, "c") != dropped
    workers[1].routing.apply(publisher.snapshot())
    assert row_of_a_newcomer(publisher, table, "d") == dropped


def test_a_row_is_reused_only_when_it_has_no_counts(publisher, table, worker):
    model = publish(publisher, worker, "m", route(endpoint("a")))
    dropped = publisher.endpoint_rows("m")["a"]
    other = Worker(table, 1).routing
    reservation = model.pick(hashed(1))
    for routing in (worker.routing, other):
        publisher.update("m", route())
        routing.apply(publisher.snapshot())
    assert row_of_a_newcomer(publisher, table, "b") != dropped
    reservation.release()
    assert row_of_a_newcomer(publisher, table, "c") == dropped


def test_a_request_of_an_old_generation_does_not_count_in_a_reused_row(publisher, table, worker):
    model = publish(publisher, worker, "m", route(endpoint("a")))
    row = publisher.endpoint_rows("m")["a"]
    late = model.pick(hashed(1))
    table.clear_column(0)  # as if the worker were dead; it is only slow
    publish(publisher, worker, "m", route())
    publisher.reclaim([publisher.version])
    model = publish(publisher, worker, "m", route(endpoint("b")))
    assert publisher.endpoint_rows("m")["b"] == row
    held = model.pick(hashed(1))
    late.release()
    assert table.in_flight(row) == 1
    held.release()
    assert table.in_flight(row) == 0


def test_a_change_is_acknowledged_once_applied(publisher, table, worker):
    publish(publisher, worker, "m", route())
    assert table.acknowledged(0) == 1
    worker.routing.apply(Delta(1, "m", None))  # an old delta
    assert worker.routing.find("m") is not None
    assert len(worker.routing) == 1


def test_a_lost_delta_is_noticed(publisher, worker):
    publisher.update("m", route())
    with pytest.raises(RuntimeError, match="lost"):
        worker.routing.apply(publisher.update("n", route(model="n")))


def test_connections_are_kept_while_the_address_is_unchanged(publisher, worker):
    publish(publisher, worker, "m", route(endpoint("a"), endpoint("b")))
    first = list(worker.upstreams)
    model = publish(publisher, worker, "m", route(endpoint("a", "x"), endpoint("b")))
    assert worker.upstreams == first
    model = publish(publisher, worker, "m", route(endpoint("a", address="new:1"), endpoint("b")))
    assert worker.open_upstreams() == ["b:8000", "new:1"]
    picks = [model.pick(hashed(0)) for _ in range(2)]
    assert {p.name: p.target.address for p in picks} == {"a": "new:1", "b": "b:8000"}
    for pick in picks:
        pick.release()
    publish(publisher, worker, "m", route(endpoint("b")))
    assert worker.open_upstreams() == ["b:8000"]
    publish(publisher, worker, "m", None)
    assert worker.open_upstreams() == []
    assert worker.routing.find("m") is None


def test_closing_the_table_closes_every_connection(publisher, worker):
    publish(publisher, worker, "m", route(endpoint("a")))
    worker.routing.close()
    assert (worker.open_upstreams(), len(worker.routing)) == ([], 0)


def test_a_recreated_model_is_a_different_model(publisher, worker):
    old = publish(publisher, worker, "m", route(endpoint("a")))
    publisher.update("m", None)
    publisher.update("m", route(endpoint("a")))
    worker.routing.apply(publisher.snapshot())
    new = worker.routing.find("m")
    assert new is not old
    assert worker.open_upstreams() == ["a:8000"]
    new.pick(hashed(0)).release()


def test_the_strategy_may_change_at_runtime(publisher, worker):
    pods = [endpoint(name) for name in "abcd"]
    model = publish(publisher, worker, "m", route(*pods))
    ask = read(Kind.COMPLETIONS, b'{"model":"m","prompt":"hello"}')
    picks = [model.pick(prompt_of(model.picker, ask)) for _ in range(4)]
    assert {p.name for p in picks} == set("abcd")
    for pick in picks:
        pick.release()
    again = publish(publisher, worker, "m", route(*pods, strategy="PrefixHash"))
    assert again is model
    prompt = prompt_of(model.picker, ask)
    picks = [model.pick(prompt) for _ in range(2)]
    assert {p.name for p in picks} == {model.ring.lookup(prompt.key)}
    for pick in picks:
        pick.release()


def test_audio_requests_have_no_prefix_and_use_least_load(publisher, worker):
    pods = [endpoint(name) for name in "abcd"]
    model = publish(publisher, worker, "m", route(*pods, strategy="PrefixHash"))
    picks = [model.pick(Prompt()) for _ in range(4)]
    assert {p.name for p in picks} == set("abcd")
    for pick in picks:
        pick.release()


def test_a_new_load_factor_applies_to_the_next_pick(publisher, worker):
    pods = [endpoint(name) for name in "abcd"]

    def spread(factor):
        model = publish(
            publisher, worker, "m", route(*pods, strategy="PrefixHash", mean_load_factor=factor)
        )
        picks = [model.pick(hashed(42)) for _ in range(20)]
        loads = {}
        for pick in picks:
            loads[pick.name] = loads.get(pick.name, 0) + 1
            pick.release()
        return max(loads.values())

    assert spread(10_000) == 20
    assert spread(100) <= 6


def test_replication_may_change_at_runtime(publisher, worker):
    pods = [endpoint(f"p{n}") for n in range(8)]
    model = publish(publisher, worker, "m", route(*pods, strategy="PrefixHash"))
    model = publish(publisher, worker, "m", route(*pods, strategy="PrefixHash", replication=256))
    other = Worker(worker.table, 1)
    other.routing.apply(publisher.snapshot())
    fresh = other.routing.find("m")
    keys = [n * 2**57 + n for n in range(128)]
    assert [model.ring.lookup(k) for k in keys] == [fresh.ring.lookup(k) for k in keys]


def test_only_an_endpoint_with_the_adapter_serves_it(publisher, worker):
    model = publish(publisher, worker, "m", route(endpoint("a"), endpoint("b", "x")))
    assert model.can_serve("x")
    assert not model.can_serve("x", {"b"})
    assert not model.can_serve("y")
    with model_pick(model, "x") as pick:
        assert pick.name == "b"
    assert model.pick(hashed(0), "x", ("b",)) is None
    publish(publisher, worker, "m", route(endpoint("a", "x"), endpoint("b")))
    with model_pick(model, "x") as pick:
        assert pick.name == "a"


@contextlib.contextmanager
def model_pick(model, adapter):
    pick = model.pick(hashed(0), adapter)
    yield pick
    pick.release()


def test_an_admitted_request_counts_for_its_model(publisher, table, worker):
    model = publish(publisher, worker, "m", route())
    admission = model.admit("message")
    assert table.active(publisher.row("m"), "message") == 1
    admission.close()
    assert table.active(publisher.row("m")) == 0


def test_aliases_and_canaries_follow_the_routes_in_the_same_objects(publisher, worker):
    aliases, canaried = worker.routing.aliases, worker.routing.canaried
    publish(publisher, worker, "m", route(aliases=("x", "y"), canary="n"))
    assert (aliases, canaried) == ({"x": "m", "y": "m"}, {"m"})
    publish(publisher, worker, "m", route(aliases=("y", "z")))
    assert (aliases, canaried) == ({"y": "m", "z": "m"}, set())
    publish(publisher, worker, "m", None)
    assert aliases == {}


def test_an_alias_that_moves_belongs_to_a_model_at_each_step(publisher, worker):
    publish(publisher, worker, "a", route(model="a", aliases=("x",)))
    publish(publisher, worker, "b", route(model="b", aliases=("x",)))
    assert worker.routing.aliases == {"x": "b"}
    publish(publisher, worker, "a", route(model="a", owner="changed", aliases=("x",)))
    assert worker.routing.aliases == {"x": "b"}, "the later one has it"
    publish(publisher, worker, "a", route(model="a"))
    assert worker.routing.aliases == {"x": "b"}
    worker.routing.apply(publisher.snapshot())
    assert worker.routing.aliases == {"x": "b"}
