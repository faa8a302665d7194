"""What the load table counts: Admissions, Reservations, pending tokens and outcomes."""

import pytest
from fakes.load_table import WORKERS, reserve
from oracles import IN_FLIGHT_MAX, PENDING_MAX

from kubeai._counts import admit
from kubeai._load import ITERATION_BUCKETS, OUTCOME_NAMES, LoadTable
from kubeai._ring import Ring


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
