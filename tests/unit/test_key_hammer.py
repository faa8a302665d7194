"""Several processes count requests of one key at once; some are killed midway.

This file is also the program that those processes run.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from kubeai._key_table import KeyTable
from kubeai._limits import charge, live

WORKERS = 3
ROWS = 4
LIMIT = 20_000


def churn(table: KeyTable, seed: int) -> dict[str, int]:
    """Charge and end at random until standard input ends."""
    source = random.Random(seed)
    stop = os.open("/dev/stdin", os.O_RDONLY | os.O_NONBLOCK)
    held = []
    counted = 0
    while True:
        for _ in range(200):
            row = source.randrange(ROWS)
            held.append(charge(table, row, table.generation(row), reserve=source.randrange(100)))
            counted += 1
            while len(held) > source.randrange(20):
                held.pop(source.randrange(len(held))).end(source.randrange(-1, 200))
        try:
            if not os.read(stop, 1):
                break
        except BlockingIOError:
            pass
    held.clear()
    return {"counted": counted, "live": live()}


def rush(table: KeyTable, _: int) -> dict[str, int]:
    """Take all that the limit allows, as fast as possible, once standard input says so."""
    generation = table.generation(0)
    print("ready", flush=True)
    sys.stdin.read(1)
    taken = refused = 0
    while refused < 100:
        one = charge(table, 0, generation, requests=LIMIT)
        if one.excess is None:
            taken += 1
        else:
            refused += 1
        one.end()
    return {"taken": taken}


def stand_still() -> float:
    """The time for all processes: on a busy machine, a test may take longer than a minute."""
    return 1000.0


def main() -> None:
    how, *numbers = sys.argv[1:]
    fd, column, seed = map(int, numbers)
    table = KeyTable.attach(fd, column)
    table.clock = stand_still
    print(json.dumps({"churn": churn, "rush": rush}[how](table, seed)), flush=True)


# -- what pytest runs ------------------------------------------------------------------------------


@pytest.fixture
def table():
    table = KeyTable.create(ROWS, WORKERS)
    table.clock = stand_still
    for row in range(ROWS):
        table.open_row(row)
    yield table
    table.close()


@pytest.fixture
def start(table):
    processes = []

    def start(how: str, column: int, seed: int = 0) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, __file__, how, str(table.fd), str(column), str(seed)],
            pass_fds=[table.fd],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen) -> dict[str, int]:
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def counted(table: KeyTable) -> int:
    return sum(table.use(row).requests for row in range(ROWS))


def wait_until(condition, deadline_s: float = 30) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "timed out"
        time.sleep(0.002)


def test_a_killed_workers_requests_in_flight_are_cleared_and_its_counts_are_kept(table, start):
    workers = [start("churn", column, seed=column) for column in range(WORKERS)]
    wait_until(lambda: counted(table) > 5_000)
    for death in range(3):
        workers[0].kill()
        assert workers[0].wait(timeout=20) == -signal.SIGKILL
        before = counted(table)
        table.clear_column(0)
        assert counted(table) >= before
        assert all(table.use(row).in_flight >= 0 for row in range(ROWS))
        workers[0] = start("churn", 0, seed=10 + death)
        wait_until(lambda before=before: counted(table) > before + 2_000)
    told = [finish(worker) for worker in workers]
    assert all(table.row_is_zero(row) for row in range(ROWS))
    assert {worker["live"] for worker in told} == {0}
    assert counted(table) >= sum(worker["counted"] for worker in told)


def test_workers_exceed_a_limit_by_at_most_their_number_less_one(table, start):
    workers = [start("rush", column) for column in range(WORKERS)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("x")
        worker.stdin.flush()
    taken = sum(finish(worker)["taken"] for worker in workers)
    assert LIMIT <= taken <= LIMIT + WORKERS - 1


if __name__ == "__main__":
    main()
