"""The load table as mapped memory: its bounds, its file, its lifetime, and no leaks."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.load_table import WORKERS, reserve

from kubeai._counts import admit, live
from kubeai._load import LoadTable
from kubeai._ring import Ring


def test_a_reservation_outlives_its_table(table, worker):
    table.open_row(0), table.open_row(1)
    reservation, admission = reserve(worker, 1), admit(worker, 0, 1)
    worker.close()
    reservation.release()
    admission.close()
    with pytest.raises(ValueError, match="closed"):
        worker.in_flight(1)
    assert table.in_flight(1) == table.active(0) == 1


def test_a_process_without_a_column_counts_nothing(table):
    table.open_row(0), table.open_row(1)
    for call in (
        lambda: admit(table, 0, 1),
        lambda: table.acknowledge(1),
        lambda: table.eject(1, 1, 1.0),
        lambda: table.restore(1, 1),
        lambda: reserve(table, 1),
    ):
        with pytest.raises(ValueError, match="no column"):
            call()
    table.column = WORKERS
    admission = admit(table, 0, 1)
    assert table.active(0) == 1
    assert table.active_total() == 0, "the supervisor's column is not a worker's"
    admission.close()
    with pytest.raises(ValueError, match="column must be"):
        table.column = WORKERS + 1


@pytest.mark.parametrize("row", [-1, 64, 2**40])
def test_rows_outside_the_table_are_rejected(table, worker, row):
    for call in (
        table.open_row,
        table.generation,
        table.row_is_zero,
        table.active,
        table.held,
        table.in_flight,
        table.lookups,
        table.ejected_until,
        table.ejection_count,
        lambda row: admit(worker, row, 1),
        lambda row: worker.eject(row, 1, 1.0),
        lambda row: worker.restore(row, 1),
        lambda row: worker.recover(row, 1),
        worker.outcomes,
        lambda row: Ring(worker, 0, 1).set("pod", row, 1),
    ):
        with pytest.raises(IndexError, match="row must be"):
            call(row)
    for call in (table.clear_column, table.acknowledged):
        with pytest.raises(IndexError, match="column must be"):
            call(WORKERS + 1)


def test_an_unknown_kind_is_rejected(table, worker):
    with pytest.raises(ValueError, match="'smoke'"):
        admit(worker, 0, 0, "smoke")
    with pytest.raises(ValueError, match="'smoke'"):
        table.active(0, "smoke")


@pytest.mark.parametrize(("rows", "workers"), [(0, 1), (2**20 + 1, 1), (1, 0), (1, 64)])
def test_a_size_out_of_bounds_is_rejected(rows, workers):
    with pytest.raises(ValueError, match="must be"):
        LoadTable.create(rows, workers)


def test_the_largest_table_works_and_is_sparse():
    table = LoadTable.create(2**20, 63)
    table.column = 62
    generation = table.open_row(2**20 - 1)
    admission = admit(table, 2**20 - 1, generation)
    assert table.active(2**20 - 1) == 1
    assert os.fstat(table.fd).st_blocks * 512 < 4 << 20
    admission.close()
    table.close()


def test_a_file_that_is_not_a_load_table_is_rejected(table, tmp_path: Path):
    good = os.pread(table.fd, 1 << 20, 0)
    bad = {
        "too short": good[:8],
        "magic": b"x" + good[1:],
        "layout": good[:8] + b"\x09" + good[9:],
        "rows": good[:16] + b"\x00" + good[17:],
        "size": good[:-1],
        "column": good,
    }
    for what, content in bad.items():
        file = tmp_path / what
        file.write_bytes(content)
        with file.open("r+b") as f, pytest.raises(ValueError, match=what):
            LoadTable.attach(f.fileno(), 99)


@pytest.mark.parametrize("module", ["__main__", "kubeai", "os", "sys"])
def test_a_table_that_a_module_holds_until_the_exit_is_closed_silently(module):
    code = f"""
import os, sys, kubeai, __main__
from kubeai._load import LoadTable
{module}.table = LoadTable.create(1, 1)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_a_mapped_table_cannot_be_truncated(table):
    with pytest.raises(PermissionError):
        os.ftruncate(table.fd, 0)


def test_admissions_and_reservations_cannot_be_constructed_directly():
    from kubeai._counts import Admission, Reservation

    for cls in (LoadTable, Admission, Reservation):
        with pytest.raises(TypeError):
            cls()


def test_a_reservation_in_a_garbage_cycle_is_released(table, worker):
    table.open_row(0), table.open_row(1)
    # The garbage collector clears objects in the order in which it began to track them. It tracks
    # this dictionary only once it has an item, so it clears the Reservation first.
    knot = {}
    ring = Ring(worker, 0, 1)
    ring.set("pod", 1, 1, target=knot)
    knot["reservation"] = ring.pick_least()
    knot["admission"] = admit(worker, 0, 1)
    del knot, ring
    assert live() == (1, 1)
    gc.collect()
    assert live() == (0, 0)
    assert table.row_is_zero(0)
    assert table.row_is_zero(1)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif("KUBEAI_ASAN" in os.environ, reason="the sanitizer keeps freed memory")
def test_neither_counting_nor_mapping_leaks():
    def churn(times: int) -> None:
        for i in range(times):
            table = LoadTable.create(256, 1)
            table.column = 0
            ring = Ring(table, 0, table.open_row(0), replication=32)
            for row in range(1, 20):
                ring.set(f"pod-{row}", row, table.open_row(row), {"a", f"b{row % 3}"})
            for key in range(50):
                picked = ring.pick_hashed(key, "a", ["pod-1", "pod-2"])
                admission = admit(table, 0, 1)
                admission.hold()
                del admission
                if i % 2:
                    picked.release()
            ring.remove("pod-3")
            ring.configure(replication=7 + i % 5, mean_load_factor=125)
            ring.lookup(1)
            if i % 3:
                table.close()

    churn(200)
    gc.collect()
    before = resident_bytes(), len(os.listdir("/proc/self/fd"))
    churn(1000)
    gc.collect()
    assert resident_bytes() - before[0] < 2 << 20
    assert len(os.listdir("/proc/self/fd")) == before[1]
    assert live() == (0, 0)
