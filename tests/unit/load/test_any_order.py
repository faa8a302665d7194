"""Any order of picks, releases and cleared columns, compared with a model of the load table."""

from fakes.load_table import WORKERS
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracles import PENDING_MAX, OracleTable

from examples import some
from kubeai._counts import admit, live
from kubeai._load import LoadTable
from kubeai._ring import Ring

ROWS = 6
TOKENS = st.one_of(st.integers(0, 3000), st.integers(PENDING_MAX - 9, PENDING_MAX + 9))


class Tables(RuleBasedStateMachine):
    """The table, seen from two workers and their supervisor, compared with its oracle."""

    @initialize()
    def start(self):
        self.table = LoadTable.create(ROWS, WORKERS)
        self.oracle = OracleTable(WORKERS)
        self.workers = [LoadTable.attach(self.table.fd, c) for c in range(WORKERS)]
        self.admissions = []
        self.reservations = []
        for row in range(3):
            self.open_row(row)

    def teardown(self):
        if hasattr(self, "table"):
            self.admissions.clear()
            self.reservations.clear()
            for row in range(ROWS):
                assert self.table.in_flight_here(row) == self.table.pending_here(row) == 0
            self.table.close()
            assert live() == (0, 0)

    @rule(row=st.integers(0, ROWS - 1))
    def open_row(self, row):
        assert self.table.open_row(row) == self.oracle.open_row(row)

    @rule(
        row=st.integers(0, ROWS - 1),
        column=st.integers(0, WORKERS - 1),
        stale=st.booleans(),
        kind=st.sampled_from(["http", "message"]),
    )
    def admit(self, row, column, stale, kind):
        generation = max(0, self.oracle.generations[row] - stale)
        self.admissions.append(
            [admit(self.workers[column], row, generation, kind), column, row, generation, kind, 0]
        )
        self.oracle.up(self.oracle.active, (row, column, kind), generation)
        self.oracle.column_active[column] += 1

    @rule(which=st.integers(0, 99), again=st.booleans())
    def hold(self, which, again):
        if self.admissions:
            entry = self.admissions[which % len(self.admissions)]
            admission, column, row, generation, _, held = entry
            for _ in range(1 + again):
                admission.hold()
            if not held:
                self.oracle.up(self.oracle.held, (row, column), generation)
            entry[-1] = 1

    def unheld(self, entry):
        _, column, row, generation, _, held = entry
        if held:
            self.oracle.down(self.oracle.held, (row, column), generation)
        entry[-1] = 0

    @rule(which=st.integers(0, 99))
    def unhold(self, which):
        if self.admissions:
            entry = self.admissions[which % len(self.admissions)]
            entry[0].unhold()
            self.unheld(entry)

    @rule(which=st.integers(0, 99), drop=st.booleans())
    def close(self, which, drop):
        if self.admissions:
            entry = self.admissions.pop(which % len(self.admissions))
            self.unheld(entry)
            _, column, row, generation, kind, _ = entry
            self.oracle.down(self.oracle.active, (row, column, kind), generation)
            self.oracle.column_active[column] = max(0, self.oracle.column_active[column] - 1)
            if not drop:
                entry[0].close()
                entry[0].close()
            entry.clear()

    @rule(
        row=st.integers(0, ROWS - 1),
        model=st.integers(0, ROWS - 1),
        column=st.integers(0, WORKERS - 1),
        stale=st.booleans(),
        tokens=TOKENS,
    )
    def reserve(self, row, model, column, stale, tokens):
        generations = self.oracle.generations
        cells = [(row, max(0, generations[row] - stale)), (model, generations[model])]
        ring = Ring(self.workers[column], model, cells[1][1])
        ring.set("pod", *cells[0])
        reservation = ring.pick_least(tokens=tokens)
        counted = self.oracle.pick(cells, column, tokens)
        assert reservation.pending == counted
        self.reservations.append([reservation, cells, column, counted])

    @rule(which=st.integers(0, 99), again=st.booleans())
    def prefilled(self, which, again):
        if self.reservations:
            entry = self.reservations[which % len(self.reservations)]
            for _ in range(1 + again):
                entry[0].prefilled(0.0)
            assert entry[0].pending == 0
            self.oracle.prefilled(*entry[1:])
            entry[-1] = 0

    @rule(which=st.integers(0, 99), drop=st.booleans())
    def release(self, which, drop):
        if self.reservations:
            entry = self.reservations.pop(which % len(self.reservations))
            self.oracle.release(*entry[1:])
            if not drop:
                entry[0].release()
                assert entry[0].released
                entry[0].prefilled(0.0)
                entry[0].release()
            entry.clear()

    @rule(
        row=st.integers(0, ROWS - 1),
        count=st.integers(0, 9),
        pending=TOKENS,
        peers=st.integers(0, 8),
        stale=st.booleans(),
    )
    def peers_tell(self, row, count, pending, peers, stale):
        generation = max(0, self.oracle.generations[row] - stale)
        self.table.peers = self.oracle.peers = peers
        self.table.set_peers(row, generation, count, pending)
        self.oracle.set_peers(row, generation, count, pending)

    @rule(steps=st.integers(1, 8))
    def settle(self, steps):
        self.table.settle(steps)
        self.oracle.settle(steps)

    @rule(column=st.integers(0, WORKERS - 1))
    def clear_column(self, column):
        self.table.clear_column(column)
        self.oracle.clear_column(column)

    @rule(column=st.integers(0, WORKERS - 1))
    def die(self, column):
        """A worker dies with its counts; a successor takes its column."""
        self.workers[column].close()
        self.admissions = [entry for entry in self.admissions if entry[1] != column]
        self.reservations = [entry for entry in self.reservations if entry[2] != column]
        self.clear_column(column)
        self.workers[column] = LoadTable.attach(self.table.fd, column)

    @invariant()
    def agree(self):
        if not hasattr(self, "table"):
            return
        oracle = self.oracle
        for row in range(ROWS):
            assert self.table.generation(row) == oracle.generations[row]
            assert self.table.in_flight(row) == oracle.row_sum(oracle.in_flight, row)
            assert self.table.in_flight_here(row) == oracle.here(oracle.in_flight, row)
            assert self.table.pending(row) == oracle.row_sum(oracle.pending, row)
            assert self.table.pending_here(row) == oracle.here(oracle.pending, row)
            for per_request in (1, 256):
                assert self.table.expected(row, per_request) == oracle.expected(row, per_request)
            assert self.table.held(row) == oracle.row_sum(oracle.held, row)
            assert self.table.active(row) == oracle.row_sum(oracle.active, row)
            for kind in ("http", "message"):
                assert self.table.active(row, kind) == sum(
                    oracle.active[row, column, kind] for column in range(WORKERS)
                )
            assert self.table.row_is_zero(row) == (
                not any(
                    oracle.row_sum(gauge, row)
                    for gauge in (oracle.in_flight, oracle.active, oracle.held)
                )
            )
        assert self.table.active_total() == sum(oracle.column_active.values())
        assert live() == (len(self.admissions), len(self.reservations))


TestTables = Tables.TestCase
TestTables.settings = settings(max_examples=some(60), stateful_step_count=50)
