"""The ring: picks, lookups, and the cost of a change.

Each round of a pick benchmark is 1,000 picks: the reported time divided by 1,000 is one pick with
its release and the loop overhead (about 10 ns). The limits, at 1,000 endpoints × 256 virtual
nodes: pick and release ≤ 300 ns from Python and ≤ 150 ns from compiled code, LeastLoad ≤ 1 µs,
build ≤ 60 ms, add or remove one ≤ 1 ms.
"""

import importlib.util
import itertools
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PICKS = 1000
SIZES = [(10, 20), (10, 256), (100, 256), (1000, 20), (1000, 256)]


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def ring(request, make_ring):
    return make_ring(*request.param)


@pytest.fixture(params=["idle", "loaded"])
def held(request, ring, keys):
    """Start with twenty requests per endpoint in flight, or with none."""
    times = 20 * len(ring) if request.param == "loaded" else 0
    return [ring.pick_hashed(key) for key in itertools.islice(itertools.cycle(keys), times)]


@pytest.fixture(scope="module")
def picks(tmp_path_factory):
    """The module ``picks.pyx``, compiled."""
    code = tmp_path_factory.mktemp("picks") / "picks.c"
    cython = [sys.executable, "-m", "cython", "-3", "-I", ROOT, "-o", code]
    subprocess.run([*cython, Path(__file__).with_name("picks.pyx")], check=True)
    include, library = sysconfig.get_path("include"), code.with_suffix(".so")
    compiler = ["cc", "-O2", "-fPIC", "-shared", f"-I{include}", "-o", library]
    subprocess.run([*compiler, code], check=True)
    spec = importlib.util.spec_from_file_location("picks", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def each_of(keys):
    """Use 1,000 new keys in each round, so that no round benefits from the CPU cache."""
    starts = itertools.cycle(range(0, len(keys), PICKS))

    def setup():
        start = next(starts)
        return (keys[start : start + PICKS],), {}

    return setup


def test_pick_hashed_and_release(benchmark, ring, held, keys):
    def thousand(some_keys):
        pick = ring.pick_hashed
        for key in some_keys:
            pick(key).release()

    benchmark.pedantic(thousand, setup=each_of(keys), rounds=500, warmup_rounds=100)


def test_pick_hashed_and_release_from_compiled_code(benchmark, picks, ring, held, keys):
    def thousand(some_keys):
        picks.pick_and_release(ring, some_keys)

    benchmark.pedantic(thousand, setup=each_of(keys), rounds=500, warmup_rounds=100)


def test_pick_least_and_release(benchmark, ring, held):
    def thousand():
        pick = ring.pick_least
        for _ in range(PICKS):
            pick().release()

    benchmark.pedantic(thousand, rounds=200, warmup_rounds=5)


def test_pick_hashed_with_an_adapter_that_half_have(benchmark, make_ring, keys):
    ring = make_ring(1000, 256)
    for row, name in enumerate(ring.names()):
        ring.set(name, row, 1, ["sql"] if row % 2 else [])

    def thousand(some_keys):
        for key in some_keys:
            ring.pick_hashed(key, "sql").release()

    benchmark.pedantic(thousand, setup=each_of(keys), rounds=200, warmup_rounds=20)


def test_lookup(benchmark, ring, keys):
    def thousand(some_keys):
        lookup = ring.lookup
        for key in some_keys:
            lookup(key)

    benchmark.pedantic(thousand, setup=each_of(keys), rounds=500, warmup_rounds=100)


def test_build(benchmark, make_ring):
    benchmark.pedantic(make_ring, args=(1000, 256), rounds=20, warmup_rounds=1)


def test_add_and_remove_one(benchmark, make_ring):
    """An add and a remove, each with the merge in the next lookup: one is half of this."""
    ring = make_ring(1000, 256)
    name = ring.names()[500]

    def both():
        ring.remove(name)
        ring.lookup(1)
        ring.set(name, 500, 1)
        ring.lookup(1)

    benchmark.pedantic(both, rounds=100, warmup_rounds=5)


def test_hold_one_pick_of_each_of_100_000_keys(benchmark, make_ring, table, keys):
    def all_held():
        return [ring.pick_hashed(key) for key in keys]

    ring = make_ring(100, 256)
    held = benchmark.pedantic(all_held, rounds=1)
    loads = [table.in_flight(row) for row in range(100)]
    benchmark.extra_info["mean, highest"] = sum(loads) / 100, max(loads)
    benchmark.extra_info["stayed at home"] = sum(pick.name == pick.first for pick in held)
    assert max(loads) <= 1250
