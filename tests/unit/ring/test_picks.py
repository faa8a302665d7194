"""Which endpoint is picked: the bound on load, adapters, ejected endpoints, ties."""

import time
from collections import Counter
from math import ceil

import pytest
from fakes.ring_keys import keys, pods

from kubeai._load import HALF_OPEN_PROBE_S, LoadTable
from kubeai._ring import LOAD_FLOOR, Ring


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
