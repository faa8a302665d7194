"""A load table, and one worker's side of it."""

import pytest
from fakes.load_table import WORKERS

from kubeai._load import LoadTable


@pytest.fixture
def table():
    table = LoadTable.create(rows=64, workers=WORKERS)
    yield table
    table.close()


@pytest.fixture
def worker(table):
    worker = LoadTable.attach(table.fd, 0)
    yield worker
    worker.close()
