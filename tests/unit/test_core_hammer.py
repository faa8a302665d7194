"""Several processes pick and release on one table at once; some are killed midway.

This file is also the program that those processes run.
"""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from math import ceil

import pytest

from kubeai._counts import admit, live
from kubeai._load import LoadTable
from kubeai._pick import Picker
from kubeai._prefix import PrefixIndex
from kubeai._prompt import Prompt
from kubeai._ring import Ring

ENDPOINTS = 8
MODEL = 0
ROWS = ENDPOINTS + 1
CONVERSATIONS = 40
TURNS = 8
TURN_TOKENS = 500


def attach(fd: int, column: int, factor: int) -> tuple[LoadTable, Ring]:
    table = LoadTable.attach(fd, column)
    ring = Ring(table, MODEL, table.generation(MODEL), mean_load_factor=factor)
    for row in range(1, ROWS):
        ring.set(f"pod-{row}", row, table.generation(row), ["even"] if row % 2 == 0 else [])
    return table, ring


def churn(table: LoadTable, ring: Ring, seed: int) -> dict[str, int]:
    """Random picks, admissions, releases and ejections until standard input ends."""
    source = random.Random(seed)
    stop = os.open("/dev/stdin", os.O_RDONLY | os.O_NONBLOCK)
    hashed = 0
    held, admissions = [], []
    while True:
        for _ in range(200):
            kind = source.randrange(8)
            if kind < 3:
                adapter = source.choice([None, "even"])
                held.append(ring.pick_hashed(source.getrandbits(3), adapter))
                hashed += 1
            elif kind == 3:
                held.append(ring.pick_least())
            elif kind == 4:
                admissions.append(admit(table, MODEL, 1, source.choice(["http", "message"])))
                if source.random() < 0.5:
                    admissions[-1].hold()
            elif kind == 5 and source.random() < 0.01:
                table.eject(source.randrange(1, ROWS), 1, time.monotonic() + 0.001)
            else:
                for things in (held, admissions):
                    if len(things) > source.randrange(30):
                        things.pop(source.randrange(len(things)))
        try:
            if not os.read(stop, 1):
                break
        except BlockingIOError:
            pass
    held.clear()
    admissions.clear()
    return {"hashed": hashed, "live": sum(live())}


def hold(table: LoadTable, ring: Ring, seed: int) -> dict[str, int]:
    """Hold all picks; report and release them when standard input ends."""
    source = random.Random(seed)
    sys.stdin.read(1)
    held = [ring.pick_hashed(source.getrandbits(1)) for _ in range(3000)]
    print(json.dumps({"held": len(held)}), flush=True)
    sys.stdin.read()
    return {"held": len(held)}


def blocks_of(conversation: int, turns: int) -> list[int]:
    """Hashes from which the conversation and the place of each block can be told."""
    source = random.Random(conversation)
    return [source.getrandbits(40) << 24 | conversation << 8 | turn for turn in range(turns)]


def converse(table: LoadTable, ring: Ring, seed: int, index_fd: int) -> dict[str, int]:
    """Pick with PrefixCache, answer and release until standard input ends."""
    index = PrefixIndex.attach(index_fd, table.column)
    picker = Picker(ring, index)
    picker.configure("PrefixCache", load_factor=seed % 2 * 125)
    source = random.Random(seed)
    stop = os.open("/dev/stdin", os.O_RDONLY | os.O_NONBLOCK)
    conversations = [blocks_of(n, TURNS) for n in range(CONVERSATIONS)]
    held = []
    picks = 0
    while True:
        for _ in range(100):
            blocks = source.choice(conversations)[: source.randrange(1, TURNS + 1)]
            depths = [TURN_TOKENS * n for n in range(1, len(blocks) + 1)]
            streams = source.random() < 0.7
            adapter = source.choice([None, None, "even"])
            prompt = Prompt(depths[-1] + source.randrange(99), blocks, depths, streams=streams)
            held.append(picker.pick(prompt, adapter))
            picks += 1
            if source.random() < 0.5:
                source.choice(held).prefilled(time.monotonic())
            while len(held) > source.randrange(30):
                held.pop(source.randrange(len(held))).release()
            if source.random() < 0.002:
                index.forget(source.randrange(1, ROWS))
        try:
            if not os.read(stop, 1):
                break
        except BlockingIOError:
            pass
    for pick in held:
        pick.release()
    return {"picks": picks, "live": sum(live())}


def main() -> None:
    how, fd, column, factor, seed, *index_fd = sys.argv[1], *map(int, sys.argv[2:])
    table, ring = attach(fd, column, factor)
    table.acknowledge(os.getpid())
    run = {"churn": churn, "hold": hold, "converse": converse}[how]
    print(json.dumps(run(table, ring, seed, *index_fd)), flush=True)


# -- what pytest runs ------------------------------------------------------------------------------


@pytest.fixture
def table():
    table = LoadTable.create(ROWS, workers=4)
    for row in range(ROWS):
        assert table.open_row(row) == 1
    yield table
    table.close()


@pytest.fixture
def index():
    index = PrefixIndex.create(ROWS, 1 << 12, workers=4)
    for row in range(1, ROWS):
        index.set_cache(row, 20_000)
    yield index
    index.close()


@pytest.fixture
def start(table, index):
    processes = []

    def start(how: str, column: int, seed: int, factor: int = 125) -> subprocess.Popen:
        numbers = [table.fd, column, factor, seed]
        numbers += [index.fd] if how == "converse" else []
        process = subprocess.Popen(
            [sys.executable, __file__, how, *map(str, numbers)],
            pass_fds=[table.fd, index.fd],
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


def wait_until(condition, deadline_s: float = 20) -> None:
    end_s = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end_s, "timed out"
        time.sleep(0.002)


def finish(process: subprocess.Popen) -> dict[str, int]:
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    return json.loads(out.splitlines()[-1])


def hashed_picks(table: LoadTable) -> int:
    return sum(table.lookups(row)[1] for row in range(1, ROWS))


def gauges(table: LoadTable) -> list[int]:
    rows = range(ROWS)
    return [
        *(table.in_flight(row) for row in rows),
        *(table.pending(row) for row in rows),
        *(table.active(row) for row in rows),
        *(table.held(row) for row in rows),
        table.active_total(),
    ]


def test_no_count_is_lost_between_workers(table, start):
    workers = [start("churn", column, seed=column) for column in range(4)]
    wait_until(lambda: hashed_picks(table) > 40_000 and all(map(table.acknowledged, range(4))))
    assert min(gauges(table)) >= 0
    told = [finish(worker) for worker in workers]
    assert not any(gauges(table))
    assert hashed_picks(table) == sum(worker["hashed"] for worker in told)
    assert sum(table.iterations()[0]) == hashed_picks(table)
    assert sum(table.lookups(row)[0] for row in range(1, ROWS)) == hashed_picks(table)
    assert {worker["live"] for worker in told} == {0}


def test_clearing_a_killed_workers_column_removes_what_it_held(table, start):
    source = random.Random(0)
    workers = [start("churn", column, seed=column) for column in range(3)]
    wait_until(lambda: all(map(table.acknowledged, range(3))))
    for death in range(6):
        column = source.randrange(1, 3)
        before = hashed_picks(table)
        wait_until(lambda before=before: hashed_picks(table) > before + 2000)
        workers[column].kill()
        assert workers[column].wait(timeout=20) == -signal.SIGKILL
        table.clear_column(column)
        workers[column] = start("churn", column, seed=100 + death)
        wait_until(lambda c=column, w=workers[column]: table.acknowledged(c) == w.pid)
        assert min(gauges(table)) >= 0
    told = [finish(worker) for worker in workers]
    assert not any(gauges(table))
    assert {worker["live"] for worker in told} == {0}


def test_a_killed_workers_load_stays_until_its_column_is_cleared(table, start):
    dead, alive = start("hold", 0, seed=1), start("hold", 1, seed=2)
    for worker in (dead, alive):
        worker.stdin.write("x")
        worker.stdin.flush()
        assert json.loads(worker.stdout.readline()) == {"held": 3000}
    dead.kill()
    dead.wait(timeout=20)
    assert table.in_flight(MODEL) == 6000
    table.clear_column(0)
    assert table.in_flight(MODEL) == sum(table.in_flight(row) for row in range(1, ROWS)) == 3000
    finish(alive)
    assert not any(gauges(table))


@pytest.mark.parametrize("factor", [100, 125])
def test_workers_overshoot_a_bound_by_at_most_their_number_less_one(table, start, factor):
    workers = [start("hold", column, seed=column, factor=factor) for column in range(4)]
    wait_until(lambda: all(map(table.acknowledged, range(4))))
    for worker in workers:
        worker.stdin.write("x")
        worker.stdin.flush()
    for worker in workers:
        assert json.loads(worker.stdout.readline()) == {"held": 3000}
    loads = [table.in_flight(row) for row in range(1, ROWS)]
    assert sum(loads) == table.in_flight(MODEL) == 12_000
    bound = ceil(factor * 12_000 / 100 / ENDPOINTS)
    # Two keys, so that the bound spreads them: some endpoint is at its bound.
    assert max(loads) >= bound - 1
    assert max(loads) <= bound + len(workers) - 1
    for worker in workers:
        finish(worker)
    assert not any(gauges(table))


# -- picks with the prefix index -------------------------------------------------------------------


def take_well_formed(index: PrefixIndex, limit: int = 10_000) -> int:
    """Take the log; returns how many prompts were sent since the last time."""
    entries, skipped = index.take_log(limit)
    for row, new_tokens, content in entries:
        blocks = list(struct.unpack(f"{len(content) // 8}Q", content))
        assert 1 <= row < ROWS
        assert blocks == blocks_of(blocks[0] >> 8 & 0xFFFF, len(blocks))
        assert 0 <= new_tokens < TURN_TOKENS * len(blocks) + 99
    return len(entries) + skipped


def check_finds(index: PrefixIndex) -> int:
    """Look all conversations up; returns how many endpoints are found."""
    found = [index.find(blocks_of(n, TURNS)) for n in range(CONVERSATIONS)]
    for rows in found:
        assert all(1 <= row < ROWS for row in rows)
        assert all(1 <= depth <= TURNS for depth in rows.values())
    return sum(map(len, found))


def test_every_pick_with_the_index_is_counted_down_and_logged_once(table, index, start):
    workers = [start("converse", column, seed=column) for column in range(4)]
    sent = 0
    while sent < 20_000:
        sent += take_well_formed(index)
        assert min(gauges(table)) >= 0
    told = [finish(worker) for worker in workers]
    sent += take_well_formed(index)
    assert sent == sum(worker["picks"] for worker in told)
    assert {worker["live"] for worker in told} == {0}
    assert not any(gauges(table))
    assert check_finds(index)


def test_killed_workers_that_pick_with_the_index_leave_nothing_pending(table, index, start):
    workers = {column: start("converse", column, seed=column) for column in range(4)}
    for death in range(12):
        column = death % 4
        sent = 0
        wait_until(lambda c=column: table.acknowledged(c) == workers[c].pid)
        while sent < 2000:
            sent += take_well_formed(index, limit=100)
            check_finds(index)
        workers[column].kill()
        assert workers[column].wait(timeout=20) == -signal.SIGKILL
        table.clear_column(column)
        assert min(gauges(table)) >= 0
        workers[column] = start("converse", column, seed=100 + death)
    for worker in workers.values():
        worker.kill()
        assert worker.wait(timeout=20) == -signal.SIGKILL
    for column in workers:
        table.clear_column(column)
    assert not any(gauges(table))
    take_well_formed(index)
    assert check_finds(index)
    assert take_well_formed(index) == 0


if __name__ == "__main__":
    main()
