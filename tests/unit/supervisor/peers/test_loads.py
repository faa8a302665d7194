"""Load shared between replicas: what each reports, by Model and by endpoint, and the sums."""

from collections import Counter

from fakes.peers import two
from harness import until
from hypothesis import given
from hypothesis import strategies as st

from kubeai._counts import admit
from kubeai.supervisor.loads import AllLoads
from kubeai.supervisor.metrics import Metrics
from kubeai.supervisor.peers import wire
from kubeai.supervisor.peers.view import STALE_S, View


async def test_active_and_completed_requests_are_reported_per_model():
    async with two() as (one, other):
        route = one.route("a")
        early = admit(one.worker, route.row, route.generation)
        early.count("2xx")
        early.close()
        admissions = [admit(one.worker, route.row, route.generation) for _ in range(4)]
        await until("the requests are seen", lambda: other.peers.active("m") == 4)
        assert other.peers.ended("m") == 0, "completions from before the connection do not count"
        for admission in admissions[:3]:
            admission.count("5xx")
            admission.close()
        await until("completions are seen", lambda: other.peers.ended("m") == 3)
        assert other.peers.active("m") == 1
        admissions[3].close()


async def test_the_operator_sees_the_loads_of_all_replicas():
    async with two() as (one, other):
        loads = AllLoads(other.table, other.publisher, other.peers)
        for replica in (one, other):
            route = replica.route("a")
            replica.held.append(admit(replica.worker, route.row, route.generation))
            replica.serve("a")
        await until("both are counted", lambda: loads.active("m") == 2)
        assert loads.held("m") == 0
        await until("both have begun", lambda: loads.in_flight("m", "a") == 2)
        assert loads.complete()
        for outcomes in (["2xx"], ["retried", "retried", "5xx"], ["left"]):
            for replica in (one, other):
                route = replica.publisher.route("m")
                admission = admit(replica.worker, route.row, route.generation)
                for outcome in outcomes:
                    admission.count(outcome)
                admission.close()
        await until("completions are counted once each", lambda: loads.ended("m") == 6)
        other.held.clear()
        other.route()
        other.reclaim()
        assert loads.in_use("m", "a"), "the other replica routes to it"
        one.held.clear()
        one.route()
        one.reclaim()
        await until("no replica uses it", lambda: not loads.in_use("m", "a"))
        other.clock.now_s += STALE_S + 0.1
        assert loads.in_use("m", "a"), "unknown, so it counts as in use"


async def test_metrics_separate_this_replicas_load_from_that_of_its_peers():
    async with two() as (one, other):
        one.route("a"), other.route("a")
        one.serve("a", 2)
        await until("the peer's load is seen", lambda: other.in_flight("a") == 2)
        metrics = Metrics(other.table, other.publisher, other.peers.silences_s)
        text = metrics.render("")[0].decode()
        series = '{endpoint="a",request_model="m"}'
        assert f"kubeai_endpoint_requests_in_flight{series} 0.0" in text
        assert f"kubeai_endpoint_peers_requests_in_flight{series} 2.0" in text
        assert f'kubeai_peer_silence_seconds{{peer="{one.address}"}} 0.0' in text


async def test_an_endpoint_is_in_use_until_no_worker_can_send_it_anything():
    async with two() as (one, other):
        one.route("a", "b")
        await until("both have a route", lambda: other.peers.routes("a"))
        one.serve("a")
        one.route("b")
        one.reclaim()
        await until("its load is reported", lambda: other.peers.in_flight("a") == 1)
        assert other.peers.routes("a"), "a request is still in flight there"
        one.held.clear()
        one.reclaim()
        await until("it is not in use", lambda: not other.peers.routes("a"))
        assert other.peers.routes("b")


async def test_an_endpoint_that_was_removed_and_added_again_counts_with_both_its_rows():
    async with two() as (one, other):
        one.route("a")
        one.serve("a", 2)
        one.route()
        one.route("a")
        one.serve("a", 1)
        await until("all three are reported", lambda: other.peers.in_flight("a") == 3)
        del one.held[:2]
        one.reclaim()
        await until("the first two have ended", lambda: other.peers.in_flight("a") == 1)
        assert other.peers.routes("a")


async def test_a_reused_row_has_no_peer_load_of_its_former_endpoint():
    async with two() as (one, other):
        one.route("a"), other.route("a")
        one.serve("a", 5)
        await until("the peer's load is seen", lambda: other.in_flight("a") == 5)
        row = other.publisher.endpoint_rows("m")["a"]
        other.route()
        assert other.table.in_flight(row) == 0
        assert other.table.in_flight(other.publisher.row("m")) == 0
        other.reclaim()
        other.route("b")
        assert other.publisher.endpoint_rows("m") == {"b": row}
        one.serve("a")
        await until("the new load is reported", lambda: other.peers.in_flight("a") == 6)
        assert other.in_flight("b") == 0


async def test_an_endpoint_added_later_has_its_peer_load_at_once():
    async with two() as (one, other):
        one.route("a")
        one.serve("a", 5)
        await until("the load is reported", lambda: other.peers.in_flight("a") == 5)
        other.route("a")
        assert other.in_flight("a") == 5


async def test_an_endpoint_shared_by_two_models_has_its_load_for_both():
    async with two() as (one, other):
        one.route("a")
        one.serve("a", 5)
        other.route("a", model="first")
        other.route("a", model="m")
        await until("the load is reported to one", lambda: other.in_flight("a", "m") == 5)
        assert other.in_flight("a", "first") == 5
        other.route(model="m")
        one.serve("a")
        await until("the new load is reported", lambda: other.in_flight("a", "first") == 6)
        other.route(model="first")


async def test_the_load_of_a_deleted_model_is_dropped():
    async with two() as (one, other):
        one.route("a", model="gone")
        await until("the model is known", lambda: other.peers.routes("a"))
        one.publisher.update("gone", None)
        one.peers.rerouted("gone")
        one.worker.acknowledge(one.publisher.version)
        one.reclaim()
        await until("the model is dropped", lambda: not other.peers.routes("a"))
        (peer,) = other.peers._view.peers.values()
        await until("nothing is left", lambda: not peer.models)


NAMES = st.sampled_from("abcd")
LOADS = st.builds(
    wire.Loads,
    st.dictionaries(NAMES, st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9))),
    st.dictionaries(NAMES, st.integers(-1, 9)),
)
STEPS = st.lists(
    st.tuples(st.sampled_from("123"), LOADS, st.booleans())
    | st.sampled_from("123").map(lambda address: (address, None, False)),
    max_size=30,
)


@given(STEPS)
def test_the_sums_equal_those_of_each_peers_last_report(steps):
    touched = set()
    view = View(touched.update)
    expected: dict[str, tuple[dict, dict]] = {}
    for address, loads, whole in steps:
        before = Counter({name: view.in_flight(name) for name in "abcd"})
        touched.clear()
        if loads is None:
            view.leave(address)
            expected.pop(address, None)
        else:
            peer = view.peers.get(address) or view.join(address, 0.0)
            view.take(peer, loads, 0.0, whole)
            models, endpoints = ({}, {}) if whole else expected.get(address, ({}, {}))
            models, endpoints = models | loads.models, endpoints | loads.endpoints
            expected[address] = (
                {name: counts for name, counts in models.items() if counts is not None},
                {name: count for name, count in endpoints.items() if count != wire.GONE},
            )
        for name in "abcd":
            sums = [endpoints.get(name, 0) for _, endpoints in expected.values()]
            assert view.in_flight(name) == sum(sums)
            assert (name in touched) == (view.in_flight(name) != before[name])
            assert view.routes(name) == any(name in e for _, e in expected.values())
            assert view.active(name) == sum(m.get(name, (0, 0))[0] for m, _ in expected.values())


def test_a_report_of_the_peer_with_the_first_request_says_that_it_serves():
    """Its next request may have the same start as the one before."""
    changes: list[tuple[str, bool]] = []
    view = View(lambda names: None, lambda model, is_live: changes.append((model, is_live)))
    first, other = (view.join(address, 0.0) for address in "12")

    def report(peer, ended: int, head: wire.Head | None) -> list[tuple[str, bool]]:
        changes.clear()
        queues = {} if head is None else {"m": head}
        view.take(peer, wire.Loads({"m": (1, ended)}, {}, queues=queues), 0.0)
        return changes

    assert report(first, 0, (5, 10, 0)) == [("m", True)]
    assert report(other, 0, (5, 20, 0)) == [("m", False)]
    assert report(other, 1, (5, 20, 0)) == []
    assert report(first, 1, (5, 10, 0)) == [("m", True)]
    assert report(first, 2, None) == [("m", False)]
    assert report(other, 2, (5, 20, 0)) == [("m", True)]
