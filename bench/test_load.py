"""The load table, from Python: counting a request, reading a row, clearing a dead worker's column.

Each round is 1,000 operations: divide the reported time by 1,000.
"""

import pytest

from kubeai._counts import admit
from kubeai._load import LoadTable
from kubeai._readings import Readings

TIMES = range(1000)


def test_admit_hold_and_close(benchmark, table):
    def thousand():
        for _ in TIMES:
            admission = admit(table, 0, 1)
            admission.hold()
            admission.close()

    benchmark.pedantic(thousand, rounds=200, warmup_rounds=5)


@pytest.mark.parametrize("read", ["in_flight", "active", "held", "lookups"])
def test_read_a_row(benchmark, table, read):
    def thousand():
        get = getattr(table, read)
        for row in TIMES:
            get(row)

    benchmark.pedantic(thousand, rounds=200, warmup_rounds=5)


def test_clear_a_column_of_16_384_rows(benchmark):
    table = LoadTable.create(16_384, 8)
    for row in range(16_384):
        table.open_row(row)
    benchmark.pedantic(table.clear_column, args=(3,), rounds=100, warmup_rounds=1)


def test_open_a_row(benchmark, table):
    benchmark(table.open_row, 7)


def test_attach(benchmark, table):
    benchmark(lambda: LoadTable.attach(table.fd, 1).close())


def test_look_at_16_384_rows_for_changes(benchmark):
    """A supervisor does this 20 times per second for its peers; 2 workers, 10 changed rows."""
    table, worker = _large()
    readings = Readings(table)
    readings.changed()
    generation = table.generation(0)
    admissions = []

    def look():
        admissions.append([admit(worker, row, generation) for row in range(10)])
        assert len(readings.changed()) == 10

    benchmark.pedantic(look, rounds=100, warmup_rounds=1)


def test_settle_16_384_rows(benchmark):
    """A supervisor does this 80 times per second while it has peers."""
    table, _ = _large()
    benchmark.pedantic(table.settle, rounds=100, warmup_rounds=1)


def _large():
    table = LoadTable.create(16_384, 2)
    for row in range(16_384):
        table.open_row(row)
    return table, LoadTable.attach(table.fd, 0)
