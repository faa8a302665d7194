"""The prefix index: what it finds, what it forgets, and what other writers can do to it."""

import os
import random
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai._prefix import BLOCKS_MAX, CACHE_UNITS, PrefixIndex

ROWS = 16


@pytest.fixture
def index():
    index = PrefixIndex.create(ROWS, 8192)
    yield index
    index.close()


def chain(*words: object) -> list[int]:
    """Hashes of the beginnings of a prompt."""
    return [random.Random(repr(words[: n + 1])).getrandbits(64) for n in range(len(words))]


# -- what is found ---------------------------------------------------------------------------------


def test_the_longest_common_beginning_is_found_for_each_endpoint(index):
    index.note(1, chain("system", "hello", "more"), 100)
    index.note(2, chain("system", "bye"), 100)
    assert index.find(chain("system", "hello", "more", "still")) == {1: 3, 2: 1}
    assert index.find(chain("system", "bye", "more")) == {2: 2, 1: 1}
    assert index.find(chain("other", "hello")) == {}
    assert index.find([]) == {}


def test_a_block_may_be_on_as_many_endpoints_as_a_bucket_has_entries(index):
    for row in range(10):
        index.note(row, chain("system"), 1)
    assert len(index.find(chain("system"))) == 8


def test_all_processes_see_the_same_entries(index):
    other = PrefixIndex.attach(index.fd)
    try:
        index.note(3, chain("a", "b"), 1)
        assert other.find(chain("a", "b")) == {3: 2}
        other.note(4, chain("a"), 1)
        assert index.find(chain("a", "b")) == {3: 2, 4: 1}
    finally:
        other.close()


# -- what is forgotten -----------------------------------------------------------------------------


def test_a_block_is_evicted_once_a_whole_cache_of_others_has_been_sent(index):
    index.set_cache(1, 10_000)
    index.note(1, chain("old"), 1_000)
    for n in range(8):
        index.note(1, chain("new", n), 1_000)
        assert index.find(chain("old")) == {1: 1}
    index.note(1, chain("new", 8), 2_000)
    assert index.find(chain("old")) == {}
    assert index.find(chain("new", 0)) == {1: 2}


def test_a_block_that_is_used_again_stays(index):
    index.set_cache(1, 10_000)
    for n in range(30):
        index.note(1, chain("system", n), 1_000)
        assert index.find(chain("system"))[1] == 1
    assert 1 not in index.find(chain("system", 0)[1:])


def test_what_other_endpoints_are_sent_evicts_nothing(index):
    index.set_cache(1, 1_000)
    index.set_cache(2, 1_000)
    index.note(1, chain("old"), 10)
    index.note(2, chain("new"), 100_000)
    assert index.find(chain("old")) == {1: 1}


def test_an_endpoint_that_restarts_is_forgotten_and_others_are_not(index):
    index.note(1, chain("a"), 1)
    index.note(2, chain("a"), 1)
    index.forget(1)
    assert index.find(chain("a")) == {2: 1}
    index.note(1, chain("a"), 1)
    assert index.find(chain("a")) == {1: 1, 2: 1}


def test_an_endpoint_whose_cache_has_another_size_is_forgotten(index):
    index.set_cache(1, 1_000)
    index.note(1, chain("a"), 10)
    index.set_cache(1, 1_000)
    assert index.find(chain("a")) == {1: 1}
    index.set_cache(1, 2_000)
    assert index.find(chain("a")) == {}


def test_the_stalest_entry_of_a_bucket_makes_room():
    index = PrefixIndex.create(ROWS, 8)  # one bucket
    index.set_cache(1, CACHE_UNITS)
    for n in range(8):
        index.note(1, chain(n), 1)
    index.note(1, chain(0), 1)  # used again
    index.note(1, chain("new"), 1)
    found = {n for n in range(8) if index.find(chain(n))}
    assert found == {0, 2, 3, 4, 5, 6, 7}
    index.close()


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.lists(st.integers(0, 2), min_size=1, max_size=4), st.booleans()
        ),
        max_size=40,
    )
)
def test_with_room_for_all_the_index_is_exact(events):
    index = PrefixIndex.create(4, 1 << 16)
    believed: set[tuple[int, int]] = set()
    try:
        for row, words, restarts in events:
            if restarts:
                index.forget(row)
                believed = {(r, block) for r, block in believed if r != row}
            blocks = chain(*words)
            expected = {}
            for r in range(4):
                depths = [n for n, block in enumerate(blocks, 1) if (r, block) in believed]
                if depths:
                    expected[r] = max(depths)
            assert index.find(blocks) == expected
            index.note(row, blocks, 10)
            believed |= {(row, block) for block in blocks}
    finally:
        index.close()


# -- limits ----------------------------------------------------------------------------------------


def test_its_memory_does_not_grow():
    index = PrefixIndex.create(ROWS, 1000)
    assert index.entries == 1024
    size = os.fstat(index.fd).st_size
    for n in range(5000):
        index.note(n % ROWS, chain(n), 1)
    assert os.fstat(index.fd).st_size == size <= 1024 * 8 + 512 * 576
    with pytest.raises(PermissionError):
        os.ftruncate(index.fd, size * 2)
    index.close()


@pytest.mark.parametrize(("rows", "entries"), [(0, 8), (1 << 21, 8), (1, 0), (1, 1 << 31)])
def test_a_size_out_of_bounds_is_rejected(rows, entries):
    with pytest.raises(ValueError, match="must be 1 to"):
        PrefixIndex.create(rows, entries)


def test_bad_rows_and_prompts_are_rejected(index):
    with pytest.raises(IndexError):
        index.note(ROWS, [1], 1)
    with pytest.raises(IndexError):
        index.forget(-1)
    with pytest.raises(ValueError, match="at most"):
        index.find([1] * (BLOCKS_MAX + 1))
    with pytest.raises(ValueError, match="at least one token"):
        index.set_cache(1, 0)


def test_a_closed_index_is_an_error():
    index = PrefixIndex.create(ROWS, 8)
    index.close()
    index.close()
    for use in (lambda: index.find([1]), lambda: index.note(0, [1], 1), lambda: index.forget(0)):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"kubeai" * 100])
def test_another_file_is_rejected(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("r+b") as file, pytest.raises(ValueError, match="not a prefix"):
        PrefixIndex.attach(file.fileno())


# -- several writers -------------------------------------------------------------------------------


def write(fd: int, seed: int) -> None:
    """What each of the processes does, until it is killed."""
    index = PrefixIndex.attach(fd)
    source = random.Random(seed)
    print("writing", flush=True)
    while True:
        row = source.randrange(ROWS)
        index.note(row, chain(source.randrange(500), source.randrange(3)), source.randrange(1000))
        if source.random() < 0.01:
            index.forget(row)


def test_writers_that_are_killed_leave_an_index_that_can_be_used():
    index = PrefixIndex.create(ROWS, 1024)
    writers = [
        subprocess.Popen(
            [sys.executable, __file__, str(index.fd), str(seed)],
            pass_fds=[index.fd],
            stdout=subprocess.PIPE,
        )
        for seed in range(3)
    ]
    try:
        for writer in writers:
            assert writer.stdout.readline()
        for n in range(20_000):
            for row, depth in index.find(chain(n % 500, n % 3)).items():
                assert 0 <= row < ROWS
                assert 1 <= depth <= 2
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    index.note(1, chain("after"), 1)
    assert index.find(chain("after")) == {1: 1}
    index.close()


if __name__ == "__main__":
    write(int(sys.argv[1]), int(sys.argv[2]))
