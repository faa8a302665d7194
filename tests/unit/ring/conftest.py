"""A load table, and rings over it."""

import pytest

from kubeai._load import LoadTable
from kubeai._ring import Ring


@pytest.fixture
def table():
    table = LoadTable.create(rows=4096, workers=2)
    table.column = 0
    yield table
    table.close()


@pytest.fixture
def make_ring(table):
    def make(names, adapters=(), **options) -> Ring:
        model_row = 4095
        ring = Ring(table, model_row, table.open_row(model_row), **options)
        for row, name in enumerate(names):
            ring.set(name, row, table.open_row(row), adapters, target=f"to {name}")
        return ring

    return make
