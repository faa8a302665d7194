"""Fixtures of the micro-benchmarks: rings of several sizes and 100,000 keys."""

import random
from collections.abc import Callable

import pytest

from kubeai._load import LoadTable
from kubeai._ring import Ring

WORKERS = 2
MODEL_ROW = 4095


@pytest.fixture
def table():
    table = LoadTable.create(rows=4096, workers=WORKERS)
    table.column = 0
    table.open_row(MODEL_ROW)
    for row in range(1000):
        table.open_row(row)
    yield table
    table.close()


@pytest.fixture
def make_ring(table) -> Callable[[int, int], Ring]:
    def make(endpoints: int, replication: int) -> Ring:
        ring = Ring(table, MODEL_ROW, 1, replication=replication)
        for row in range(endpoints):
            ring.set(f"model-a-7d9f-{row:05x}", row, 1)
        ring.lookup(0)
        return ring

    return make


@pytest.fixture(scope="session")
def keys() -> list[int]:
    source = random.Random(1)
    return [source.getrandbits(64) for _ in range(100_000)]
