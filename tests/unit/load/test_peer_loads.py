"""Loads of other replicas in the load table, and what the supervisor reads of it."""

import pytest
from fakes.load_table import reserve

from kubeai._counts import admit
from kubeai._readings import Readings
from kubeai._ring import Ring


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
