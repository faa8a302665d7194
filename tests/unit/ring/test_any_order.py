"""Any order of changes and picks, compared with an oracle of the ring."""

import time
from typing import Any

from fakes.ring_keys import pods
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracles import REQUEST_TOKENS, OracleRing, OracleTable

from examples import some
from kubeai._load import HALF_OPEN_PROBE_S, ITERATION_BUCKETS, LoadTable
from kubeai._prompt import Prompt
from kubeai._ring import Ring

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
