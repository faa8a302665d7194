"""Where keys are placed on the ring, and which of them a change moves."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from fakes.ring_keys import keys, pods
from hypothesis import given, settings
from hypothesis import strategies as st

import kubeai._ring
from kubeai._load import LoadTable
from kubeai._ring import REPLICATION_MAX, Ring


def homes(ring: Ring, some_keys) -> list[str | None]:
    return [ring.lookup(key) for key in some_keys]


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
