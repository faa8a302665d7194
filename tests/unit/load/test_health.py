"""Failures and ejections in the load table, which all workers share."""

import time

import pytest

from kubeai._load import LoadTable


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


def test_a_closed_table_counts_no_more_health_events():
    table = LoadTable.create(8, 1)
    table.close()
    with pytest.raises(ValueError, match="closed"):
        table.health_events()
