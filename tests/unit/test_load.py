"""The load table: cells, columns, row generations, and what a Reservation returns."""

import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracles import IN_FLIGHT_MAX, PENDING_MAX, OracleTable

from examples import some
from kubeai._counts import admit, live
from kubeai._load import ITERATION_BUCKETS, OUTCOME_NAMES, LoadTable
from kubeai._readings import Readings
from kubeai._ring import Ring

ROWS = 6
WORKERS = 2


@pytest.fixture
def table():
    table = LoadTable.create(rows=64, workers=WORKERS)
    yield table
    table.close()
    gc.collect()
    assert live() == (0, 0)


@pytest.fixture
def worker(table):
    worker = LoadTable.attach(table.fd, 0)
    yield worker
    worker.close()


def reserve(table: LoadTable, row: int, model_row: int = 0, tokens: int = 0):
    """A pick of the endpoint in ``row``, counted on the model in ``model_row`` too."""
    ring = Ring(table, model_row, table.generation(model_row))
    ring.set("pod", row, table.generation(row))
    return ring.pick_least(tokens=tokens)


def test_a_new_table_is_all_zero(table):
    assert (table.rows, table.columns, table.column) == (64, WORKERS + 1, -1)
    assert all(table.row_is_zero(row) for row in range(64))
    assert table.active_total() == 0
    assert table.iterations() == ([0] * (len(ITERATION_BUCKETS) + 1), 0)


def test_an_admission_is_counted_once_even_if_closed_repeatedly(table, worker):
    generation = table.open_row(3)
    admission = admit(worker, 3, generation)
    other = admit(worker, 3, generation, "message")
    assert (table.active(3), table.active(3, "http"), table.active(3, "message")) == (2, 1, 1)
    assert table.active_total() == 2
    admission.close()
    admission.close()
    assert (table.active(3), table.active(3, "http")) == (1, 0)
    del other
    assert table.active(3) == 0
    assert table.active_total() == 0


def test_a_held_request_is_counted_as_held_until_it_is_not(table, worker):
    admission = admit(worker, 3, table.open_row(3))
    admission.hold()
    admission.hold()
    assert (table.held(3), table.active(3)) == (1, 1)
    admission.unhold()
    admission.unhold()
    assert table.held(3) == 0
    admission.hold()
    admission.close()
    assert table.held(3) == 0
    admission.hold()
    assert table.held(3) == 0


def test_a_load_is_summed_over_the_columns(table):
    table.open_row(0), table.open_row(1)
    columns = [LoadTable.attach(table.fd, column) for column in range(WORKERS + 1)]
    held = [reserve(column, 1) for column in columns for _ in range(2)]
    assert [t.in_flight(1) for t in (table, *columns)] == [6] * (WORKERS + 2)
    assert table.in_flight(0) == 6
    held[0].release()
    held[0].release()
    assert held[0].released
    assert not held[1].released
    assert table.in_flight(1) == table.in_flight(0) == 5
    del held
    assert table.in_flight(1) == table.in_flight(0) == 0


def test_releasing_a_reservation_of_an_old_generation_changes_nothing(table, worker):
    table.open_row(0), table.open_row(1)
    stale = reserve(worker, 1)
    stale_admission = admit(worker, 0, table.generation(0))
    table.open_row(0), table.open_row(1)
    fresh = reserve(worker, 1)
    stale.release()
    stale_admission.close()
    assert table.in_flight(1) == table.in_flight(0) == 1
    fresh.release()
    assert table.row_is_zero(1)
    assert table.active_total() == 0


def test_picks_and_admissions_of_an_old_generation_count_nothing(table, worker):
    old = table.open_row(1)
    table.open_row(0)
    ring = Ring(worker, 0, table.generation(0))
    ring.set("pod", 1, old)
    table.open_row(1)
    with_old = ring.pick_least()
    admission = admit(worker, 1, old)
    admission.hold()
    assert table.row_is_zero(1)
    with_old.release()
    admission.close()
    assert table.row_is_zero(1)


def test_clearing_a_column_resets_its_gauges_and_no_others(table):
    generation = table.open_row(0)
    table.open_row(1)
    dead, alive = (LoadTable.attach(table.fd, column) for column in range(2))
    kept = [reserve(alive, 1), admit(alive, 0, generation)]
    lost = [reserve(dead, 1), admit(dead, 0, generation), admit(dead, 0, generation, "message")]
    lost[1].hold()
    table.clear_column(0)
    assert (table.in_flight(0), table.in_flight(1)) == (1, 1)
    assert (table.active(0), table.held(0), table.active_total()) == (1, 0, 1)
    # Nothing falls below 0 when the cleared ones are released after all.
    del lost
    assert (table.in_flight(0), table.in_flight(1), table.active(0)) == (1, 1, 1)
    del kept
    assert table.row_is_zero(0)


def test_counters_survive_a_cleared_column_and_are_reset_with_the_row(table, worker):
    table.open_row(0), table.open_row(1)
    ring = Ring(worker, 0, table.generation(0))
    ring.set("pod", 1, table.generation(1))
    for key in range(5):
        ring.pick_hashed(key).release()
    table.clear_column(0)
    assert table.lookups(1) == (5, 5, 0)
    assert table.iterations() == ([5] + [0] * len(ITERATION_BUCKETS), 5)
    table.open_row(1)
    assert table.lookups(1) == (0, 0, 0)


def test_pending_tokens_end_with_the_first_byte_or_the_request(table, worker):
    table.open_row(0), table.open_row(1)
    first, second = (reserve(worker, 1, tokens=tokens) for tokens in (1000, 300))
    assert (table.pending(0), table.pending(1), first.pending) == (1300, 1300, 1000)
    first.prefilled(1.0)
    first.prefilled(2.0)
    assert (table.pending(0), table.pending(1), table.in_flight(1)) == (300, 300, 2)
    second.release()
    second.prefilled(3.0)
    assert (table.pending(0), table.pending(1), table.in_flight(1)) == (0, 0, 1)
    first.release()


def test_pending_tokens_go_with_their_column_and_their_row(table, worker):
    other = LoadTable.attach(table.fd, 1)
    table.open_row(0), table.open_row(1)
    lost, kept = reserve(worker, 1, tokens=1000), reserve(other, 1, tokens=300)
    table.clear_column(0)
    assert table.pending(0) == table.pending(1) == 300
    lost.prefilled(1.0)
    lost.release()
    assert table.pending(0) == table.pending(1) == 300
    table.open_row(1)
    assert (table.pending(0), table.pending(1)) == (300, 0)
    again = reserve(other, 1, tokens=50)
    kept.prefilled(1.0)
    assert (table.pending(0), table.pending(1)) == (50, 50)
    kept.release()
    again.release()
    assert table.pending(0) == table.pending(1) == 0
    other.close()


def test_pending_tokens_never_spill_into_another_count(table, worker):
    table.open_row(0), table.open_row(1)
    held = [reserve(worker, 1, tokens=tokens) for tokens in (PENDING_MAX - 1, 2**32 - 1, 5)]
    assert [each.pending for each in held] == [PENDING_MAX - 1, 1, 0]
    assert (table.pending(1), table.in_flight(1)) == (PENDING_MAX, 3)
    table.set_peers(1, table.generation(1), 2**31 - 1, 2**60)
    assert (table.pending(1), table.in_flight(1)) == (2 * PENDING_MAX, IN_FLIGHT_MAX + 3)
    for each in held:
        each.release()
    assert (table.pending_here(1), table.in_flight_here(1)) == (0, 0)


def test_a_row_has_a_generation(table):
    assert table.generation(7) == 0
    assert [table.open_row(7) for _ in range(3)] == [1, 2, 3]
    assert table.generation(7) == 3


def test_failures_are_counted_over_all_workers_until_a_complete_response(table, worker):
    other = LoadTable.attach(table.fd, 1)
    generation = table.open_row(7)
    events = table.health_events()
    assert worker.note_failure(7, generation, 1.0, True) == 1
    assert other.note_failure(7, generation, 2.0, False) == 2
    assert (table.failures(7), table.failed_at(7), table.unreachable(7)) == (2, 2.0, False)
    assert table.health_events() == events + 2
    assert worker.note_failure(7, generation + 1, 3.0, True) == 0, "an old generation of the row"
    worker.recover(7, generation)
    assert (other.failures(7), other.failed_at(7)) == (0, 2.0)
    other.close()


def test_an_ejection_can_be_shortened_but_not_extended(table, worker):
    generation = table.open_row(7)
    worker.eject(7, generation, 5.0)
    worker.half_open(7, generation, 8.0)
    assert table.ejected_until(7) == 5.0
    worker.half_open(7, generation, 3.0)
    assert table.ejected_until(7) == 3.0
    worker.restore(7, generation)
    worker.half_open(7, generation, 1.0)
    assert table.ejected_until(7) == 0


def test_an_ejection_is_shared_by_all_workers_and_ends_with_the_rows_generation(table, worker):
    generation = table.open_row(7)
    until_s = time.monotonic() + 100
    worker.eject(7, generation + 1, until_s)
    assert table.ejected_until(7) == 0
    worker.eject(7, generation, until_s)
    assert (table.ejected_until(7), table.ejection_count(7)) == (until_s, 1)
    table.open_row(7)
    assert (table.ejected_until(7), table.ejection_count(7)) == (0, 0)


def test_an_endpoint_is_restored_only_in_its_own_generation(table, worker):
    generation = table.open_row(7)
    worker.eject(7, generation, 5.0)
    worker.restore(7, generation + 1)
    assert table.ejected_until(7) == 5.0
    worker.restore(7, generation)
    assert table.ejected_until(7) == 0


def test_the_ejection_count_is_shared_by_all_workers(table, worker):
    generation = table.open_row(7)
    other = LoadTable.attach(table.fd, 1)
    worker.eject(7, generation, 5.0)
    other.eject(7, generation, 6.0)
    other.eject(7, generation + 1, 7.0)
    assert worker.ejection_count(7) == 2
    worker.recover(7, generation + 1)
    worker.restore(7, generation)
    assert (other.ejected_until(7), other.ejection_count(7)) == (0, 2)
    other.eject(7, generation, 8.0)
    worker.recover(7, generation)
    assert (other.ejected_until(7), other.ejection_count(7)) == (0, 0)
    other.close()


def test_outcomes_are_counted_by_model_and_column(table, worker):
    generation = table.open_row(7)
    other = LoadTable.attach(table.fd, 1)
    for by, outcomes in ((worker, ["2xx", "2xx", "left"]), (other, ["2xx", "retried", "broken"])):
        for outcome in outcomes:
            admission = admit(by, 7, generation)
            admission.count(outcome)
            admission.close()
    assert {k: v for k, v in table.outcomes(7).items() if v} == {
        "2xx": 3, "left": 1, "broken": 1, "retried": 1,
    }  # fmt: skip
    assert table.outcomes(7, 0)["2xx"] == 2
    assert tuple(table.outcomes(7)) == OUTCOME_NAMES
    table.clear_column(0)
    assert table.outcomes(7)["2xx"] == 3, "counters outlive a worker"
    late = admit(worker, 7, generation)
    table.open_row(7)
    late.count("2xx")
    assert not any(table.outcomes(7).values()), "a new generation of the row"
    late.close()
    with pytest.raises(ValueError, match="not in"):
        late.count("odd")


def test_each_worker_acknowledges_for_itself(table, worker):
    worker.acknowledge(2**40)
    assert [table.acknowledged(column) for column in range(WORKERS)] == [2**40, 0]


def test_a_reservation_outlives_its_table(table, worker):
    table.open_row(0), table.open_row(1)
    reservation, admission = reserve(worker, 1), admit(worker, 0, 1)
    worker.close()
    reservation.release()
    admission.close()
    with pytest.raises(ValueError, match="closed"):
        worker.in_flight(1)
    assert table.in_flight(1) == table.active(0) == 1


def test_a_process_without_a_column_counts_nothing(table):
    table.open_row(0), table.open_row(1)
    for call in (
        lambda: admit(table, 0, 1),
        lambda: table.acknowledge(1),
        lambda: table.eject(1, 1, 1.0),
        lambda: table.restore(1, 1),
        lambda: reserve(table, 1),
    ):
        with pytest.raises(ValueError, match="no column"):
            call()
    table.column = WORKERS
    admission = admit(table, 0, 1)
    assert table.active(0) == 1
    assert table.active_total() == 0, "the supervisor's column is not a worker's"
    admission.close()
    with pytest.raises(ValueError, match="column must be"):
        table.column = WORKERS + 1


@pytest.mark.parametrize("row", [-1, 64, 2**40])
def test_rows_outside_the_table_are_rejected(table, worker, row):
    for call in (
        table.open_row,
        table.generation,
        table.row_is_zero,
        table.active,
        table.held,
        table.in_flight,
        table.lookups,
        table.ejected_until,
        table.ejection_count,
        lambda row: admit(worker, row, 1),
        lambda row: worker.eject(row, 1, 1.0),
        lambda row: worker.restore(row, 1),
        lambda row: worker.recover(row, 1),
        worker.outcomes,
        lambda row: Ring(worker, 0, 1).set("pod", row, 1),
    ):
        with pytest.raises(IndexError, match="row must be"):
            call(row)
    for call in (table.clear_column, table.acknowledged):
        with pytest.raises(IndexError, match="column must be"):
            call(WORKERS + 1)


def test_an_unknown_kind_is_rejected(table, worker):
    with pytest.raises(ValueError, match="'smoke'"):
        admit(worker, 0, 0, "smoke")
    with pytest.raises(ValueError, match="'smoke'"):
        table.active(0, "smoke")


@pytest.mark.parametrize(("rows", "workers"), [(0, 1), (2**20 + 1, 1), (1, 0), (1, 64)])
def test_a_size_out_of_bounds_is_rejected(rows, workers):
    with pytest.raises(ValueError, match="must be"):
        LoadTable.create(rows, workers)


def test_the_largest_table_works_and_is_sparse():
    table = LoadTable.create(2**20, 63)
    table.column = 62
    generation = table.open_row(2**20 - 1)
    admission = admit(table, 2**20 - 1, generation)
    assert table.active(2**20 - 1) == 1
    assert os.fstat(table.fd).st_blocks * 512 < 4 << 20
    admission.close()
    table.close()


def test_a_file_that_is_not_a_load_table_is_rejected(table, tmp_path: Path):
    good = os.pread(table.fd, 1 << 20, 0)
    bad = {
        "too short": good[:8],
        "magic": b"x" + good[1:],
        "layout": good[:8] + b"\x09" + good[9:],
        "rows": good[:16] + b"\x00" + good[17:],
        "size": good[:-1],
        "column": good,
    }
    for what, content in bad.items():
        file = tmp_path / what
        file.write_bytes(content)
        with file.open("r+b") as f, pytest.raises(ValueError, match=what):
            LoadTable.attach(f.fileno(), 99)


@pytest.mark.parametrize("module", ["__main__", "kubeai", "os", "sys"])
def test_a_table_that_a_module_holds_until_the_exit_is_closed_silently(module):
    code = f"""
import os, sys, kubeai, __main__
from kubeai._load import LoadTable
{module}.table = LoadTable.create(1, 1)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_mapped_table_cannot_be_truncated(table):
    with pytest.raises(PermissionError):
        os.ftruncate(table.fd, 0)


def test_admissions_and_reservations_cannot_be_constructed_directly():
    from kubeai._counts import Admission, Reservation

    for cls in (LoadTable, Admission, Reservation):
        with pytest.raises(TypeError):
            cls()


def test_a_reservation_in_a_garbage_cycle_is_released(table, worker):
    table.open_row(0), table.open_row(1)
    # The garbage collector clears objects in the order in which it began to track them. It tracks
    # this dictionary only once it has an item, so it clears the Reservation first.
    knot = {}
    ring = Ring(worker, 0, 1)
    ring.set("pod", 1, 1, target=knot)
    knot["reservation"] = ring.pick_least()
    knot["admission"] = admit(worker, 0, 1)
    del knot, ring
    assert live() == (1, 1)
    gc.collect()
    assert live() == (0, 0)
    assert table.row_is_zero(0)
    assert table.row_is_zero(1)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif("KUBEAI_ASAN" in os.environ, reason="the sanitizer keeps freed memory")
def test_neither_counting_nor_mapping_leaks():
    def churn(times: int) -> None:
        for i in range(times):
            table = LoadTable.create(256, 1)
            table.column = 0
            ring = Ring(table, 0, table.open_row(0), replication=32)
            for row in range(1, 20):
                ring.set(f"pod-{row}", row, table.open_row(row), {"a", f"b{row % 3}"})
            for key in range(50):
                picked = ring.pick_hashed(key, "a", ["pod-1", "pod-2"])
                admission = admit(table, 0, 1)
                admission.hold()
                del admission
                if i % 2:
                    picked.release()
            ring.remove("pod-3")
            ring.configure(replication=7 + i % 5, mean_load_factor=125)
            ring.lookup(1)
            if i % 3:
                table.close()

    churn(200)
    gc.collect()
    before = resident_bytes(), len(os.listdir("/proc/self/fd"))
    churn(1000)
    gc.collect()
    assert resident_bytes() - before[0] < 2 << 20
    assert len(os.listdir("/proc/self/fd")) == before[1]
    assert live() == (0, 0)


# -- other replicas of KubeAI ----------------------------------------------------------------------


def test_the_load_of_peers_counts_for_picks_but_not_as_our_own(table, worker):
    model, pod = table.open_row(0), table.open_row(1)
    mine = reserve(worker, 1)
    table.set_peers(1, pod, 4, 900)
    table.set_peers(0, model, 4, 900)
    table.set_peers(1, pod - 1, 9)  # an old generation
    assert (table.in_flight(1), table.in_flight_here(1)) == (5, 1)
    assert (table.pending(1), table.pending_here(1)) == (900, 0)
    assert worker.in_flight(0) == 5
    for load in ((-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="negative"):
            table.set_peers(1, pod, *load)
    mine.release()
    assert (table.in_flight(1), table.in_flight_here(1)) == (4, 0)


def test_unreported_peer_load_is_extrapolated_from_our_own(table, worker):
    table.open_row(0), table.open_row(1)
    table.peers = 3
    picks = [reserve(worker, 1) for _ in range(2)]
    assert worker.expected(1) == 2 + 3 * 2
    table.settle(2)
    assert worker.expected(1) == 2 + 3 * 1
    table.settle(1)
    assert worker.expected(1) == 2
    picks.pop().release()
    assert worker.expected(1) == 1 - 3, "they are assumed to have completed requests too"
    table.peers = 0
    assert worker.expected(1) == 1
    del picks


def test_repeated_settling_converges_to_the_load(table, worker):
    table.open_row(0), table.open_row(1)
    table.peers = 1
    pick = reserve(worker, 1)
    for _ in range(100):
        table.settle()
    assert worker.expected(1) == 1
    pick.release()


def test_replicas_break_ties_differently(table, worker):
    table.open_row(0)
    firsts = []
    for phase in range(3):
        table.phase = phase
        ring = Ring(worker, 0, table.generation(0))
        for row in range(1, 4):
            ring.set(f"pod-{row}", row, table.open_row(row))
        firsts.append(ring.pick_least().name)
    assert firsts == ["pod-1", "pod-2", "pod-3"]


def test_readings_report_each_changed_row_once(table, worker):
    readings = Readings(table)
    assert readings.changed() == []
    table.open_row(0), table.open_row(1)
    assert readings.changed() == [(0, 0, 0, 0), (1, 0, 0, 0)]
    admission = admit(worker, 0, table.generation(0))
    pick = reserve(worker, 1)
    table.set_peers(1, table.generation(1), 7)
    assert readings.changed() == [(0, 1, 1, 0), (1, 1, 0, 0)]
    assert readings.changed() == []
    admission.count("2xx")
    admission.count("retried")
    admission.close()
    pick.release()
    assert readings.changed() == [(0, 0, 0, 1), (1, 0, 0, 0)]
    table.open_row(1)
    assert readings.changed() == [(1, 0, 0, 0)], "the row has a new generation"


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


def test_a_closed_table_counts_no_more_health_events():
    table = LoadTable.create(8, 1)
    table.close()
    with pytest.raises(ValueError, match="closed"):
        table.health_events()
