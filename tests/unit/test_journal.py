"""The journal keeps the last requests of each worker, whole, whatever happens to its writer.

This file is also the program of the processes that write in it.
"""

import itertools
import os
import signal
import struct
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai._journal import ENDS, ID_BYTES, PICKS, Entry, Journal

ENTRIES = 8
WORKERS = 3
WAIT_S = 30.0


def entry(number=1, **fields):
    return Entry(
        **{
            "began_s": float(number),
            "waited_s": 0.0,
            "first_s": 0.5,
            "duration_s": 1.0,
            "model_row": number,
            "model_generation": number,
            "row": number,
            "generation": number,
            "status": 200,
            "end": "whole",
            "pick": "cached",
            "retries": 0,
            "streamed": True,
            "estimated_tokens": number,
            "expected_tokens": number,
            "prompt_tokens": number,
            "cached_tokens": number,
            "output_tokens": number,
            "id": f"id-{number}",
            **fields,
        }
    )


def write_forever(fd, column):
    """Write entries whose fields all say the same number, until killed."""
    journal = Journal.attach(fd, column)
    _, written, _ = journal.read(column)
    for number in itertools.count(written + 1):
        journal.write(entry(number))
        if number == written + 1:
            print("writing", flush=True)


@pytest.fixture
def journal():
    journal = Journal.create(WORKERS, ENTRIES)
    yield journal
    journal.close()


def writer(journal, column):
    return Journal.attach(journal.fd, column)


def test_what_is_written_is_read(journal):
    first = entry(1, id="a")
    second = entry(
        2,
        first_s=None,
        row=-1,
        status=0,
        end="left",
        pick=None,
        streamed=False,
        prompt_tokens=None,
        cached_tokens=None,
        output_tokens=None,
        id="",
    )
    one = writer(journal, 1)
    one.write(first)
    one.write(second)
    assert journal.read(1) == ([first, second], 2, 0)
    assert journal.read(1, 1) == ([second], 2, 0)
    assert journal.read(1, 2) == ([], 2, 0)
    assert journal.read(0) == ([], 0, 0)


def test_a_long_id_is_cut_off(journal):
    writer(journal, 0).write(entry(id="x" * 100))
    assert journal.read(0)[0][0].id == "x" * ID_BYTES


def test_the_successor_of_a_worker_continues_its_column(journal):
    writer(journal, 0).write(entry(1))
    writer(journal, 0).write(entry(2))
    assert [e.model_row for e in journal.read(0)[0]] == [1, 2]


tokens = st.none() | st.integers(0, 2**32 - 2)
entries = st.builds(
    entry,
    status=st.integers(0, 599),
    end=st.sampled_from(ENDS),
    pick=st.sampled_from(PICKS),
    retries=st.integers(0, 255),
    streamed=st.booleans(),
    row=st.integers(-1, 2**31 - 1),
    generation=st.integers(0, 2**32 - 1),
    prompt_tokens=tokens,
    cached_tokens=tokens,
    output_tokens=tokens,
    first_s=st.none() | st.sampled_from((0.0, 0.25, 64.0)),
    id=st.text("abc-0", max_size=ID_BYTES),
)


@given(st.lists(st.tuples(st.integers(0, WORKERS - 1), entries) | st.integers(0, WORKERS - 1)))
def test_it_is_like_a_bounded_list_per_worker(steps):
    """The oracle is a list. A number is a read of that column from where the last one ended."""
    journal = Journal.create(WORKERS, ENTRIES)
    columns = [writer(journal, column) for column in range(WORKERS)]
    written = [[] for _ in range(WORKERS)]
    read = [0] * WORKERS
    for step in [*steps, *range(WORKERS)]:
        if isinstance(step, tuple):
            column, value = step
            columns[column].write(value)
            written[column].append(value)
            continue
        missed = max(0, len(written[step]) - read[step] - ENTRIES)
        expected = written[step][read[step] + missed :], len(written[step]), missed
        assert journal.read(step, read[step]) == expected
        read[step] = len(written[step])
    for each in (*columns, journal):
        each.close()


def test_entries_are_whole_while_writers_write_and_are_killed():
    journal = Journal.create(WORKERS, 64)
    read, seen = [0] * WORKERS, 0
    for killed in range(1, 5):
        writers = [
            subprocess.Popen(
                [sys.executable, __file__, str(journal.fd), str(column)],
                pass_fds=[journal.fd],
                stdout=subprocess.PIPE,
            )
            for column in range(WORKERS)
        ]
        try:
            for process in writers:
                assert process.stdout.readline() == b"writing\n"
            deadline_s = time.monotonic() + WAIT_S
            while seen < 300 * killed:
                assert time.monotonic() < deadline_s, f"only {seen} entries were read"
                for column in range(WORKERS):
                    found, read[column], missed = journal.read(column, read[column])
                    seen += len(found)
                    assert len(found) <= journal.entries
                    assert missed >= 0
                    for one in found:
                        assert one == entry(one.model_row), "torn"
                    rows = [one.model_row for one in found]
                    assert rows == sorted(set(rows)), "in order, each once"
        finally:
            for process in writers:
                process.send_signal(signal.SIGKILL)
                process.wait()
                process.stdout.close()
    journal.close()


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 1, "wrong magic"),
        (8, 99, "layout 99"),
        (16, 0, "0 columns"),
        (24, 0, "0 entries"),
        (24, ENTRIES + 1, "does not match its header"),
    ],
)
def test_another_file_is_refused(journal, at, value, message):
    os.pwrite(journal.fd, struct.pack("<Q", value), at)
    with pytest.raises(ValueError, match=message):
        Journal.attach(journal.fd, 0)


def test_arguments_are_checked(journal):
    with pytest.raises(ValueError, match="workers must be 1 to 64"):
        Journal.create(0)
    with pytest.raises(ValueError, match="entries must be 1"):
        Journal.create(1, 0)
    with pytest.raises(ValueError, match="column must be 0 to 2"):
        Journal.attach(journal.fd, WORKERS)
    with pytest.raises(IndexError, match="column must be 0 to 2"):
        journal.read(WORKERS)
    with pytest.raises(ValueError, match="no column"):
        journal.write(entry())
    with pytest.raises(TypeError, match=r"Journal\.create"):
        Journal()
    closed = writer(journal, 0)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        closed.write(entry())
    with pytest.raises(ValueError, match="closed"):
        closed.read(0)


if __name__ == "__main__":
    write_forever(*map(int, sys.argv[1:]))
