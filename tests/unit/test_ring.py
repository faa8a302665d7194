"""The ring: where keys are placed, which endpoint is picked under load, what a change moves."""

import os
import random
import subprocess
import sys
import time
from collections import Counter
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracles import REQUEST_TOKENS, OracleRing, OracleTable

import kubeai._ring
from examples import some
from kubeai._load import HALF_OPEN_PROBE_S, ITERATION_BUCKETS, LoadTable
from kubeai._prompt import Prompt
from kubeai._ring import LOAD_FLOOR, REPLICATION_MAX, Ring


@pytest.fixture
def table():
    table = LoadTable.create(rows=4096, workers=2)
    table.column = 0
    yield table
    table.close()


@pytest.fixture
def make_ring(table):
    def make(names, adapters=(), **options) -> Ring:
        model_row = 4095
        ring = Ring(table, model_row, table.open_row(model_row), **options)
        for row, name in enumerate(names):
            ring.set(name, row, table.open_row(row), adapters, target=f"to {name}")
        return ring

    return make


def pods(n: int) -> list[str]:
    return [f"model-a-{i:04x}" for i in range(n)]


def keys(n: int, seed: int = 1) -> list[int]:
    source = random.Random(seed)
    return [source.getrandbits(64) for _ in range(n)]


def homes(ring: Ring, some_keys) -> list[str | None]:
    return [ring.lookup(key) for key in some_keys]


# -- placement -----------------------------------------------------------------------------------


@given(st.permutations(pods(12)), st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_placement_does_not_depend_on_the_order_of_insertion(order, replication):
    table = LoadTable.create(16, 1)
    rings = []
    for names in (order, pods(12)):
        ring = Ring(table, 15, 1, replication=replication)
        for row, name in enumerate(names):
            ring.set(name, row, 1)
            if row % 3 == 0:
                ring.lookup(row)  # merges the endpoints added so far
        rings.append(ring)
    assert homes(rings[0], keys(200)) == homes(rings[1], keys(200))


def test_placement_is_the_same_in_every_process_and_release():
    script = (
        "from kubeai._load import LoadTable; from kubeai._ring import Ring\n"
        "ring = Ring(LoadTable.create(16, 1), 15, 1)\n"
        "[ring.set(f'pod-{i}', i, 1) for i in range(8)]\n"
        "print([int(ring.lookup(k)[4:]) for k in range(20)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    # Changing these values moves every user's conversations on upgrade.
    assert outputs == {"[2, 5, 3, 0, 7, 7, 7, 0, 7, 1, 2, 3, 7, 3, 5, 6, 7, 3, 2, 4]"}


def test_only_the_keys_of_a_removed_endpoint_move(make_ring):
    names = pods(100)
    ring = make_ring(names, replication=100)
    some_keys = keys(20_000)
    before = homes(ring, some_keys)
    ring.remove(names[17])
    after = homes(ring, some_keys)
    moved = {old for old, new in zip(before, after, strict=True) if old != new}
    assert moved == {names[17]}
    assert names[17] not in after
    ring.set(names[17], 17, 1)
    assert homes(ring, some_keys) == before


def test_a_new_endpoint_takes_about_its_share(make_ring):
    ring = make_ring(pods(50), replication=256)
    some_keys = keys(20_000)
    before = homes(ring, some_keys)
    ring.set("newcomer", 60, 1)
    after = homes(ring, some_keys)
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"newcomer"}
    assert 0.5 < len(moved) / (20_000 / 51) < 1.5


def test_names_that_are_prefixes_of_each_other_have_distinct_positions(make_ring):
    ring = make_ring(["pod-1", "pod-11", "pod-111"], replication=256)
    share = Counter(homes(ring, keys(9000)))
    assert min(share.values()) > 2000


def test_endpoints_with_colliding_hashes_are_ordered_by_name(make_ring, monkeypatch):
    monkeypatch.setattr(kubeai._ring, "hash64", lambda *_, **__: (7, 7))
    for order in (["c", "a", "b"], ["b", "c", "a"]):
        ring = make_ring(order, replication=50)
        assert set(homes(ring, keys(100))) == {"a"}
        assert {ring.pick_hashed(key, exclude=["a"]).name for key in keys(100)} == {"b"}
        ring.remove("a")
        assert set(homes(ring, keys(100))) == {"b"}


def test_sequential_keys_are_spread_like_random_ones(make_ring):
    ring = make_ring(pods(4), replication=256)
    share = Counter(homes(ring, range(8000)))
    assert min(share.values()) > 1500


def test_a_new_replication_moves_keys_as_a_new_ring_would(make_ring, table):
    names = pods(10)
    ring = make_ring(names, replication=20)
    homes(ring, keys(10))
    ring.remove(names[0])
    ring.configure(replication=64, mean_load_factor=125)
    assert homes(ring, keys(500)) == homes(make_ring(names[1:], replication=64), keys(500))


def test_replication_is_clamped_to_its_bounds(make_ring):
    names = pods(3)
    for asked, given_ in ((0, 1), (-5, 1), (10**12, REPLICATION_MAX)):
        ring = make_ring(names, replication=asked)
        assert homes(ring, keys(300)) == homes(make_ring(names, replication=given_), keys(300))


def test_a_load_factor_below_100_percent_is_rejected(make_ring):
    with pytest.raises(ValueError, match="at least 100"):
        make_ring([], mean_load_factor=99)
    with pytest.raises(ValueError, match="at least 100"):
        make_ring([]).configure(replication=20, mean_load_factor=0)


# -- picks under load ------------------------------------------------------------------------------


def test_a_pick_reports_its_endpoint_and_the_reason(make_ring, table):
    ring = make_ring(pods(4), replication=100)
    home = ring.lookup(42)
    held = [ring.pick_hashed(42) for _ in range(LOAD_FLOOR)]
    moved = ring.pick_hashed(42)
    assert [pick.name for pick in held] == [home] * LOAD_FLOOR
    assert [pick.first_load for pick in held] == [0, 1]
    assert moved.name != home
    assert (moved.first, moved.first_load, moved.bound) == (home, 2, 2)
    assert moved.target == f"to {moved.name}"
    assert moved.iterations == 2
    assert table.in_flight(4095) == 3


def test_a_second_simultaneous_request_stays_on_the_same_endpoint(make_ring):
    ring = make_ring(pods(50))
    for key in keys(50):
        one, two = ring.pick_hashed(key), ring.pick_hashed(key)
        assert one.name == two.name == ring.lookup(key)
        del one, two


def test_no_endpoint_exceeds_the_bound_when_every_pick_is_held(make_ring, table):
    ring = make_ring(pods(100), replication=256, mean_load_factor=125)
    held = [ring.pick_hashed(key) for key in keys(100_000)]
    loads = [table.in_flight(row) for row in range(100)]
    assert sum(loads) == 100_000 == table.in_flight(4095)
    assert max(loads) <= ceil(1.25 * 1000)
    assert sum(pick.name == pick.first for pick in held) > 90_000


def test_each_endpoint_is_considered_once(make_ring, table):
    """Regardless of how many virtual nodes of busy endpoints lie in between."""
    ring = make_ring(pods(8), replication=500, mean_load_factor=100)
    held = [ring.pick_hashed(7) for _ in range(8 * 20)]
    assert {table.in_flight(row) for row in range(8)} == {20}
    assert max(pick.iterations for pick in held) == 8


def test_the_first_endpoint_is_picked_beyond_the_bound_if_all_others_are_excluded(make_ring, table):
    names = pods(4)
    ring = make_ring(names)
    held = [ring.pick_hashed(9, exclude=names[1:]) for _ in range(20)]
    assert {pick.name for pick in held} == {names[0]}
    assert held[-1].first_load + 1 > held[-1].bound
    assert table.lookups(0)[1] == 20
    assert table.lookups(0)[2] == sum(pick.first_load + 1 > pick.bound for pick in held)
    assert ring.pick_hashed(9, exclude=names) is None
    assert ring.pick_least(exclude=names) is None


def test_excluded_names_are_not_picked_and_unknown_ones_are_ignored(make_ring):
    ring = make_ring(pods(4))
    home = ring.lookup(1)
    for exclude in ([home], {home}, (name for name in [home, home, "nobody"])):
        pick = ring.pick_hashed(1, exclude=exclude)
        assert home not in (pick.name, pick.first)
    assert ring.pick_hashed(1, None, ["nobody"]).name == home


def test_the_load_of_a_removed_endpoint_does_not_raise_the_bound(make_ring, table):
    names = pods(4)
    ring = make_ring(names)
    held = [ring.pick_hashed(3, exclude=names[1:]) for _ in range(40)]
    ring.remove(names[0])
    pick = ring.pick_hashed(3)
    assert pick.bound == LOAD_FLOOR
    assert table.in_flight(4095) == 41
    ring.set(names[0], 0, table.generation(0))
    assert ring.pick_hashed(3).bound == ceil(1.25 * 42 / 4)
    ring.set(names[0], 10, table.open_row(10))
    assert ring.pick_hashed(3).bound == LOAD_FLOOR, "its row belongs to another endpoint now"
    held.clear()
    assert table.in_flight(0) == 0


def test_only_endpoints_with_the_adapter_serve_it_and_count_for_its_bound(make_ring, table):
    names = pods(10)
    ring = make_ring(names)
    for row in (2, 5):
        ring.set(names[row], row, 1, ["sql", "law"])
    busy = [ring.pick_least(exclude=names[1:]) for _ in range(100)]
    held = [ring.pick_hashed(key, "sql") for key in keys(40)]
    assert Counter(pick.name for pick in held).keys() == {names[2], names[5]}
    assert held[-1].bound == ceil(1.25 * 40 / 2), (
        "the hundred on an endpoint without the adapter do not count"
    )
    assert {ring.lookup(key, "law") for key in keys(50)} == {names[2], names[5]}
    held.clear()
    assert {ring.pick_least("law").name for _ in range(4)} == {names[2], names[5]}
    assert ring.can_serve("law")
    ring.set(names[2], 2, 1, ["law"])
    ring.remove(names[5])
    assert not ring.can_serve("sql")
    assert ring.pick_hashed(1, "sql") is ring.pick_least("sql") is ring.lookup(1, "sql") is None
    assert ring.pick_hashed(1, "law").name == names[2]
    del busy


def test_ejected_endpoints_are_skipped_unless_no_other_is_left(make_ring, table):
    names = pods(3)
    ring = make_ring(names)
    home = ring.lookup(5)
    others = set(names) - {home}
    table.eject(names.index(home), 1, time.monotonic() + 100)
    pick = ring.pick_hashed(5)
    assert {pick.name, pick.first} <= others
    assert pick.iterations > 1
    del pick
    assert {ring.pick_least().name for _ in range(6)} == others
    assert ring.lookup(5) == home, "placement does not depend on health"
    assert ring.pick_hashed(5, exclude=others).name == home
    assert ring.pick_least(exclude=others).name == home
    for row in range(3):
        table.eject(row, 1, time.monotonic() + 100)
    assert ring.pick_hashed(5).name == home
    assert {ring.pick_least().name for _ in range(6)} == set(names)


def test_ejected_endpoints_do_not_count_in_the_mean(make_ring, table):
    names = pods(4)
    ring = make_ring(names)
    held = [ring.pick_least(exclude=names[1:]) for _ in range(100)]
    table.eject(0, 1, time.monotonic() + 100)
    assert ring.pick_hashed(1).bound == LOAD_FLOOR
    table.restore(0, 1)
    assert ring.pick_hashed(1).bound == ceil(1.25 * 101 / 4)
    del held


@pytest.mark.parametrize("pick", ["pick_hashed", "pick_least"])
def test_an_endpoint_whose_ejection_has_ended_gets_one_probe_request_at_a_time(
    make_ring, table, pick
):
    """Until the endpoint is restored; ejections by other workers count as well."""
    ring = make_ring(pods(3))
    home = ring.lookup(5)
    row = pods(3).index(home)
    other = LoadTable.attach(table.fd, 1)

    def picked(times):
        key = [5] if pick == "pick_hashed" else []
        picks = (getattr(ring, pick)(*key) for _ in range(times))
        return [p.is_probe for p in picks if p.name == home]

    assert ring.ejected_count() == 0
    for _ in range(2):
        other.eject(row, 1, time.monotonic() + 100)
        assert picked(9) == []
        other.eject(row, 1, time.monotonic())
        assert ring.ejected_count() == 1
        assert picked(9) == [True]
        assert 0 < table.ejected_until(row) - time.monotonic() <= HALF_OPEN_PROBE_S
        other.restore(row, 1)
        assert picked(3) == [False] * (3 if pick == "pick_hashed" else 1)
        assert ring.ejected_count() == 0


def test_a_pick_is_a_probe_if_all_endpoints_are_ejected(make_ring, table):
    ring = make_ring(pods(2))
    until_s = time.monotonic() + 100
    for row in range(2):
        table.eject(row, 1, until_s)
    assert ring.pick_least().is_probe
    assert ring.pick_hashed(1).is_probe
    assert [table.ejected_until(row) for row in range(2)] == [until_s] * 2


def test_a_pick_reports_a_failed_endpoint_until_it_has_recovered(make_ring, table):
    ring = make_ring(pods(2))
    assert not ring.pick_least().failing
    for row in range(2):
        table.note_failure(row, 1, time.monotonic(), False)
    assert ring.pick_least().failing
    assert not ring.pick_least().is_probe, "it has failed but is not ejected"
    for row in range(2):
        table.recover(row, 1)
    assert not ring.pick_least().failing


def test_ejections_end_by_the_rings_own_clock(table):
    now_s = 1000.0
    ring = Ring(table, 7, table.open_row(7), clock=lambda: now_s)
    for row, name in enumerate(pods(2)):
        ring.set(name, row, table.open_row(row))
    table.eject(0, table.generation(0), 1010.0)
    assert {ring.pick_least().name for _ in range(4)} == {pods(2)[1]}
    now_s = 1010.0
    assert any(ring.pick_least().is_probe for _ in range(4))


def test_an_endpoint_may_be_ejected_before_it_is_added(make_ring, table):
    ring = make_ring(pods(2))
    assert ring.pick_least()
    table.eject(2, table.open_row(2), time.monotonic() + 100)
    assert ring.pick_least()
    ring.set(pods(3)[2], 2, 1)
    assert {ring.pick_least().name for _ in range(9)} == set(pods(2))


def test_least_load_picks_the_least_loaded(make_ring, table):
    ring = make_ring(pods(5))
    held = [ring.pick_least() for _ in range(5 * 7)]
    assert {table.in_flight(row) for row in range(5)} == {7}
    quiet = held.pop(11)
    quiet.release()
    assert ring.pick_least().name == quiet.name


def test_least_load_ties_rotate(make_ring):
    ring = make_ring(pods(5))
    assert len({ring.pick_least().name for _ in range(5)}) == 5
    ring.remove(pods(5)[2])
    assert len({ring.pick_least().name for _ in range(4)}) == 4


def test_least_load_sees_the_picks_of_other_workers(make_ring, table):
    ring = make_ring(pods(2))
    other_table = LoadTable.attach(table.fd, 1)
    other = Ring(other_table, 4095, table.generation(4095))
    other.set(pods(2)[0], 0, 1)
    held = [other.pick_least() for _ in range(3)]
    assert {ring.pick_least().name for _ in range(5)} == {pods(2)[1]}
    assert table.in_flight(4095) == 3
    del held


def test_lookups_are_counted_as_initial_final_and_default(make_ring, table):
    names = pods(3)
    ring = make_ring(names)
    home = names.index(ring.lookup(1))
    held = [ring.pick_hashed(1) for _ in range(3)]
    assert table.lookups(home) == (3, 2, 0)
    assert sum(table.lookups(row)[1] for row in range(3)) == 3
    counts, total = table.iterations()
    assert (counts[:3], total) == ([2, 1, 0], 4)
    assert ring.pick_hashed(1, "nobody has this") is None
    assert table.lookups(home) == (4, 2, 0), "a walk that picks no endpoint still has a first one"
    ring.pick_least()
    ring.lookup(2)
    assert sum(table.lookups(row)[0] for row in range(3)) == 4
    del held


def test_a_reservation_keeps_the_target_it_was_made_with(make_ring, table):
    ring = make_ring(["a"])
    pick = ring.pick_least()
    ring.set("a", 0, 1, target="elsewhere")
    assert (pick.target, ring.pick_least().target) == ("to a", "elsewhere")
    ring.remove("a")
    assert (pick.name, table.in_flight(0)) == ("a", 1)
    pick.release()
    assert table.in_flight(0) == table.in_flight(4095) == 0


def test_an_empty_ring_picks_nothing(make_ring):
    ring = make_ring([])
    assert ring.pick_hashed(1) is ring.pick_least() is ring.lookup(1) is None
    assert not ring.can_serve()
    ring.set("a", 0, 1)
    assert ring.can_serve()
    assert (len(ring), "a" in ring, ring.names()) == (1, True, ["a"])
    ring.remove("a")
    ring.remove("a")
    assert ring.pick_hashed(1) is ring.pick_least() is ring.lookup(1) is None
    assert (len(ring), "a" in ring, ring.names()) == (0, False, [])


def test_an_invalid_key_or_column_is_rejected(make_ring, table):
    ring = make_ring(["a"])
    for key in (-1, 2**64, "a"):
        with pytest.raises((OverflowError, TypeError)):
            ring.pick_hashed(key)
    table.column = -1
    with pytest.raises(ValueError, match="no column"):
        ring.pick_hashed(1)
    table.column = 0
    table.close()
    for pick in (lambda: ring.pick_hashed(1), ring.pick_least):
        with pytest.raises(ValueError, match="closed"):
            pick()
    assert ring.lookup(1) == "a"


# -- compared with the oracle ----------------------------------------------------------------------

ROWS = 12
MODEL = 0
NAMES = st.sampled_from(pods(7))
ADAPTERS = st.frozensets(st.sampled_from(["sql", "law"]))
TOKENS = st.one_of(st.just(0), st.integers(0, 600), st.integers(0, 50_000))
KEYS = st.one_of(st.integers(0, 3), st.integers(0, 2**64 - 1))
ASKS = st.fixed_dictionaries(
    {"adapter": st.sampled_from([None, None, "sql", "law"]), "exclude": st.frozensets(NAMES)}
)


class Rings(RuleBasedStateMachine):
    """Two workers with a ring each over one table, given the same changes, beside the oracle."""

    @initialize(replication=st.integers(1, 40), factor=st.sampled_from([100, 125, 300]))
    def start(self, replication, factor):
        self.table = LoadTable.create(ROWS, 2)
        self.oracle_table = OracleTable(2)
        generation = self.open_row(MODEL)
        self.workers = [LoadTable.attach(self.table.fd, c) for c in range(2)]
        self.parameters = {"replication": replication, "mean_load_factor": factor}
        self.rings = [Ring(w, MODEL, generation, **self.parameters) for w in self.workers]
        self.oracle = OracleRing(self.oracle_table, **self.parameters)
        self.held = []
        self.iterations = [0] * (len(ITERATION_BUCKETS) + 1)

    def teardown(self):
        if hasattr(self, "held"):
            self.held.clear()

    def open_row(self, row):
        generation = self.oracle_table.open_row(row)
        assert self.table.open_row(row) == generation
        return generation

    def free_row(self):
        taken = {endpoint.row for endpoint in self.oracle.endpoints.values()} | {MODEL}
        return next(
            (row for row in range(ROWS) if row not in taken and self.table.row_is_zero(row)), None
        )

    @rule(name=NAMES, adapters=ADAPTERS, moved=st.booleans())
    def set(self, name, adapters, moved):
        known = self.oracle.endpoints.get(name)
        if known and not moved:
            row, generation = known.row, known.generation
        else:
            row = self.free_row()
            if row is None:
                return
            self.peers_tell(name, 0, 0)
            generation = self.open_row(row)
        rings: list[Any] = [*self.rings, self.oracle]
        for ring in rings:
            ring.set(name, row, generation, adapters)

    @rule(name=NAMES)
    def remove(self, name):
        self.peers_tell(name, 0, 0)
        rings: list[Any] = [*self.rings, self.oracle]
        for ring in rings:
            ring.remove(name)

    @rule(replication=st.integers(1, 40), factor=st.sampled_from([100, 125, 300]))
    def configure(self, replication, factor):
        self.parameters = {"replication": replication, "mean_load_factor": factor}
        for ring in self.rings:
            ring.configure(**self.parameters)
        self.oracle.replication = replication
        self.oracle.mean_load_factor = factor

    @rule(name=NAMES, for_s=st.sampled_from([1000, 0]), column=st.integers(0, 1))
    def eject(self, name, for_s, column):
        endpoint = self.oracle.endpoints.get(name)
        if endpoint:
            until_s = time.monotonic() + for_s
            self.workers[column].eject(endpoint.row, endpoint.generation, until_s)
            self.oracle_table.ejected[endpoint.row] = until_s

    @rule(name=NAMES, count=st.integers(0, 5), pending=TOKENS)
    def peers_tell(self, name, count, pending):
        """The model's row has the sum of what the peers tell about its endpoints."""
        table, endpoint = self.oracle_table, self.oracle.endpoints.get(name)
        if endpoint is None:
            return
        told = [(endpoint.row, endpoint.generation, count, pending)]
        for at in range(2):
            self.table.set_peers(*told[at])
            table.set_peers(*told[at])
            totals = [
                sum(n for (row, column), n in gauge.items() if column == 2 and row != MODEL)
                for gauge in (table.in_flight, table.pending)
            ]
            told.append((MODEL, 1, *totals))

    @rule(peers=st.integers(0, 3), steps=st.integers(1, 8))
    def settle(self, peers, steps):
        self.table.peers = self.oracle_table.peers = peers
        self.table.settle(steps)
        self.oracle_table.settle(steps)

    @rule(name=NAMES, column=st.integers(0, 1))
    def restore(self, name, column):
        endpoint = self.oracle.endpoints.get(name)
        if endpoint:
            self.workers[column].restore(endpoint.row, endpoint.generation)
            self.oracle_table.ejected.pop(endpoint.row, None)

    def tried(self, pick, began_s):
        """A pick of a half-open endpoint keeps others away from it for a while."""
        row = self.oracle.endpoints[pick.name].row
        until_s = self.oracle_table.ejected.get(row)
        assert pick.is_probe == (until_s is not None)
        if until_s is not None and until_s <= began_s:
            self.oracle_table.ejected[row] = self.table.ejected_until(row)
            assert began_s < self.table.ejected_until(row) <= time.monotonic() + HALF_OPEN_PROBE_S

    def hold(self, pick, column, tokens):
        endpoint = self.oracle.endpoints[pick.name]
        cells = [(endpoint.row, endpoint.generation), (MODEL, 1)]
        assert pick.pending == self.oracle_table.pick(cells, column, tokens) == tokens
        self.held.append([pick, cells, column, tokens])

    @rule(key=KEYS, ask=ASKS, column=st.integers(0, 1), times=st.integers(1, 4), tokens=TOKENS)
    def pick_hashed(self, key, ask, column, times, tokens):
        for _ in range(times):
            began_s = time.monotonic()
            wanted = self.oracle.pick_hashed(key, **ask, now_s=began_s, tokens=tokens)
            pick = self.rings[column].pick_hashed(key, **ask, prompt=Prompt(tokens))
            if wanted is None:
                assert pick is None
                if self.oracle.endpoints:
                    self.count(self.oracle.clockwise(key)[0], "initial")
                continue
            assert pick.name == wanted.name
            assert (pick.first, pick.first_load) == (wanted.first, wanted.first_load)
            assert (pick.bound, pick.own_load) == (wanted.bound, wanted.own_load)
            assert pick.iterations == wanted.iterations
            self.tried(pick, began_s)
            self.count(wanted.initial, "initial")
            self.count(wanted.name, "final")
            if wanted.defaulted:
                self.count(wanted.name, "default")
            self.iterations[sum(wanted.iterations > bucket for bucket in ITERATION_BUCKETS)] += 1
            self.hold(pick, column, tokens)

    def count(self, name, which):
        self.oracle_table.lookups[self.oracle.endpoints[name].row, which] += 1

    @rule(ask=ASKS, column=st.integers(0, 1), times=st.integers(1, 4), tokens=TOKENS)
    def pick_least(self, ask, column, times, tokens):
        for _ in range(times):
            began_s = time.monotonic()
            wanted = self.oracle.least(**ask, now_s=began_s)
            pick = self.rings[column].pick_least(**ask, tokens=tokens)
            if not wanted:
                assert pick is None
                continue
            assert pick.name in wanted
            assert pick.first == pick.name
            assert pick.first_load == self.oracle.expected(pick.name) / REQUEST_TOKENS
            self.tried(pick, began_s)
            self.hold(pick, column, tokens)

    @rule(which=st.integers(0, 99))
    def prefilled(self, which):
        if self.held:
            entry = self.held[which % len(self.held)]
            entry[0].prefilled(0.0)
            self.oracle_table.prefilled(*entry[1:])
            entry[-1] = 0

    @rule(which=st.integers(0, 99), drop=st.booleans(), times=st.integers(1, 5))
    def release(self, which, drop, times):
        for _ in range(min(times, len(self.held))):
            entry = self.held.pop(which % len(self.held))
            self.oracle_table.release(*entry[1:])
            if not drop:
                entry[0].release()
            entry.clear()

    @rule(column=st.integers(0, 1))
    def die(self, column):
        """A worker is killed; its successor learns the same endpoints in another order."""
        self.workers[column].close()
        self.held = [entry for entry in self.held if entry[2] != column]
        self.table.clear_column(column)
        self.oracle_table.clear_column(column)
        self.workers[column] = LoadTable.attach(self.table.fd, column)
        ring = self.rings[column] = Ring(self.workers[column], MODEL, 1, **self.parameters)
        left = set(self.rings[1 - column].names())
        for name in sorted(left):
            endpoint = self.oracle.endpoints[name]
            ring.set(name, endpoint.row, endpoint.generation, endpoint.adapters)
        # It cannot know about earlier departures, so nothing is left of them here.
        survivors = {e.row for e in self.oracle.endpoints.values()}
        for entry in [e for e in self.held if e[1][0][0] not in survivors]:
            self.held.remove(entry)
            self.oracle_table.release(*entry[1:])

    @rule(key=KEYS, adapter=st.sampled_from([None, "sql"]))
    def lookup(self, key, adapter):
        for ring in self.rings:
            assert ring.lookup(key, adapter) == self.oracle.lookup(key, adapter)
            assert ring.can_serve(adapter) == bool(self.oracle.able(adapter))

    @invariant()
    def agree(self):
        if not hasattr(self, "rings"):
            return
        for ring in self.rings:
            assert sorted(ring.names()) == sorted(self.oracle.endpoints)
        for row in range(ROWS):
            table = self.oracle_table
            assert self.table.in_flight(row) == table.row_sum(table.in_flight, row)
            assert self.table.pending(row) == table.row_sum(table.pending, row)
            assert self.table.lookups(row) == tuple(
                self.oracle_table.lookups[row, which] for which in ("initial", "final", "default")
            )
        assert self.table.iterations()[0] == self.iterations


TestRings = Rings.TestCase
TestRings.settings = settings(max_examples=some(60), stateful_step_count=50)
