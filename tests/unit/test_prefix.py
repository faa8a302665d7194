"""The prefix index: what it finds, what it forgets, and what other writers can do to it."""

import os
import random
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai._load import LoadTable
from kubeai._prefix import CACHE_UNITS, PrefixIndex
from kubeai._prompt import BLOCKS_MAX, Prompt
from kubeai._ring import Ring

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


def test_a_cache_that_keeps_nothing_is_never_found(index):
    index.note(1, [7], 100)
    index.set_cache(1, 0)
    assert index.find([7]) == {}
    index.note(1, [7], 100)
    assert index.find([7]) == {}
    index.set_cache(1, 1_000)
    index.note(1, [7], 100)
    assert index.find([7]) == {1: 1}


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


# -- logs ------------------------------------------------------------------------------------------


class Worker:
    """Sends prompts to one endpoint, as a gateway's process does."""

    def __init__(self, index, column=0, row=1):
        self.index = PrefixIndex.attach(index.fd, column)
        self.table = LoadTable.create(ROWS, 1)
        self.table.column = 0
        self.ring = Ring(self.table, 0, self.table.open_row(0))
        self.ring.set("pod", row, self.table.open_row(row))

    def send(self, *words, tokens=100):
        blocks = chain(*words)
        depths = [tokens * n // len(blocks) for n in range(1, len(blocks) + 1)]
        self.ring.pick_hashed(1, prompt=Prompt(tokens, blocks, depths), index=self.index).release()

    def close(self):
        self.index.close()
        self.table.close()


@pytest.fixture
def start():
    started = []

    def new(*args, **options):
        started.append(Worker(*args, **options))
        return started[-1]

    yield new
    for worker in started:
        worker.close()


@pytest.fixture
def logged():
    index = PrefixIndex.create(ROWS, 8192, workers=3)
    yield index
    index.close()


def as_bytes(*words: object) -> bytes:
    return b"".join(block.to_bytes(8, sys.byteorder) for block in chain(*words))


def test_what_each_worker_sends_is_taken_once_in_order(logged, start):
    one, other = start(logged, 0, row=1), start(logged, 2, row=5)
    one.send("a", "b")
    other.send("a")
    one.send("a", "b", "c", "d", tokens=200)
    assert logged.take_log(100) == (
        [
            (1, 100, as_bytes("a", "b")),
            (1, 100, as_bytes("a", "b", "c", "d")),
            (5, 100, as_bytes("a")),
        ],
        0,
    )
    assert logged.take_log(100) == ([], 0)
    one.send("e")
    assert logged.take_log(100) == ([(1, 100, as_bytes("e"))], 0)


def test_each_reader_takes_all(logged, start):
    other = PrefixIndex.attach(logged.fd)
    start(logged).send("a")
    assert logged.take_log(9) == other.take_log(9) == ([(1, 100, as_bytes("a"))], 0)
    other.close()


def test_what_was_taken_makes_another_index_find_the_same(logged, start):
    worker = start(logged)
    worker.send("a", "b", "c")
    worker.send("a", "x")
    replica = PrefixIndex.create(ROWS, 8192)
    for row, new_tokens, blocks in logged.take_log(9)[0]:
        replica.note(row, blocks, new_tokens)
    for words in (("a", "b", "c", "d"), ("a", "x"), ("a",), ("y",)):
        assert replica.find(chain(*words)) == logged.find(chain(*words))
    replica.close()


@pytest.mark.parametrize("limit", [0, 1, 2, 7])
def test_of_each_worker_the_newest_are_taken_and_the_rest_is_counted(logged, start, limit):
    workers = [start(logged, column, row=column + 1) for column in range(3)]
    for n in range(5):
        for worker in workers[:2]:
            worker.send(n)
    workers[2].send("alone")
    entries, skipped = logged.take_log(limit)
    expected = [(row, 100, as_bytes(n)) for row in (1, 2) for n in range(5)[max(0, 5 - limit) :]]
    expected += [(3, 100, as_bytes("alone"))][:limit]
    assert (entries, skipped) == (expected, 11 - len(expected))
    assert logged.take_log(100) == ([], 0), "what is left out is not taken later"


@pytest.mark.parametrize("count", [510, 511, 512, 513, 1300])
def test_a_log_that_nobody_takes_has_the_newest_entries(logged, start, count):
    worker = start(logged)
    for n in range(count):
        worker.send(n, tokens=n)
    entries, skipped = logged.take_log(10_000)
    assert skipped == max(0, count - 511), "the place of the oldest may be in use for the next"
    assert [blocks for _, _, blocks in entries] == [as_bytes(n) for n in range(skipped, count)]
    worker.send("next")
    assert logged.take_log(10_000)[1] == 0


def test_a_workers_successor_continues_its_log(logged, start):
    first = start(logged, 1)
    first.send("a")
    first.send("b")
    assert len(logged.take_log(1)[0]) == 1
    first.send("c")
    first.close()
    start(logged, 1, row=2).send("d")
    assert logged.take_log(9) == ([(1, 100, as_bytes("c")), (2, 100, as_bytes("d"))], 0)


def test_a_process_without_a_column_or_a_prompt_without_blocks_writes_no_log(logged, start):
    start(logged, -1).send("a")
    start(logged, 0).send()
    logged.note(1, chain("b"), 100)
    assert logged.take_log(9) == ([], 0)
    assert logged.find(chain("a")) == logged.find(chain("b")) == {1: 1}


@pytest.mark.parametrize("field", [(0, ROWS), (0, -1), (0, -(2**31)), (8, BLOCKS_MAX + 1), (8, -1)])
def test_an_entry_that_cannot_be_right_is_left_out(logged, start, field):
    worker = start(logged)
    for word in "abc":
        worker.send(word)
    content = os.pread(logged.fd, os.fstat(logged.fd).st_size, 0)
    entry = content.index(as_bytes("b")) - 16  # row, new tokens, number of blocks, spare
    os.pwrite(logged.fd, field[1].to_bytes(4, sys.byteorder, signed=True), entry + field[0])
    assert [blocks for *_, blocks in logged.take_log(9)[0]] == [as_bytes("a"), as_bytes("c")]


def test_blocks_in_bytes_are_read_up_to_the_most_that_a_prompt_may_have(index):
    blocks = as_bytes(*range(BLOCKS_MAX + 5))
    index.note(1, blocks + b"odd", 1)
    assert index.find(chain(*range(BLOCKS_MAX))) == {1: BLOCKS_MAX}
    assert index.find(chain(*range(BLOCKS_MAX + 5))[BLOCKS_MAX:]) == {}
    index.note(2, b"", 1)
    index.note(2, b"1234567", 1)
    assert 2 not in index.find(chain(*range(BLOCKS_MAX)))


@pytest.mark.parametrize("column", [-2, 3, 64, 2**31 - 1])
def test_a_column_that_the_index_does_not_have_is_rejected(logged, column):
    with pytest.raises(ValueError, match="column must be -1 to 2"):
        PrefixIndex.attach(logged.fd, column)


@pytest.mark.parametrize("workers", [0, -1, 65])
def test_a_number_of_workers_out_of_bounds_is_rejected(workers):
    with pytest.raises(ValueError, match="workers must be 1 to 64"):
        PrefixIndex.create(ROWS, 8, workers)


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


def test_a_closed_index_is_an_error():
    index = PrefixIndex.create(ROWS, 8)
    index.close()
    index.close()
    for use in (
        lambda: index.find([1]),
        lambda: index.note(0, [1], 1),
        lambda: index.forget(0),
        lambda: index.take_log(1),
        lambda: index.silent,
    ):
        with pytest.raises(ValueError, match="closed"):
            use()


@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"kubeai" * 100])
def test_another_file_is_rejected(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("r+b") as file, pytest.raises(ValueError, match="not a prefix"):
        PrefixIndex.attach(file.fileno())


@pytest.mark.parametrize(
    ("word", "value", "match"),
    [
        (1, 1, "has layout 1"),
        (2, 0, "0 rows"),
        (2, 1 << 21, "rows"),
        (2, ROWS + 100, "does not match"),
        (3, 0, "0 buckets"),
        (3, 3, "3 buckets"),
        (3, 1 << 11, "does not match"),
        (3, 1 << 40, "buckets"),
        (4, 0, "0 columns"),
        (4, 2, "does not match"),
        (4, 65, "65 columns"),
        (4, 1 << 63, "columns"),
    ],
)
def test_an_index_with_another_header_is_rejected(index, tmp_path, word, value, match):
    content = bytearray(os.pread(index.fd, os.fstat(index.fd).st_size, 0))
    content[8 * word : 8 * word + 8] = value.to_bytes(8, sys.byteorder)
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("r+b") as file, pytest.raises(ValueError, match=match):
        PrefixIndex.attach(file.fileno())


def test_a_size_that_overflows_is_rejected(index, tmp_path):
    content = bytearray(os.pread(index.fd, os.fstat(index.fd).st_size - 8 * index.entries, 0))
    content[24:32] = (1 << 58).to_bytes(8, sys.byteorder)
    (tmp_path / "file").write_bytes(content)
    with (tmp_path / "file").open("r+b") as file, pytest.raises(ValueError, match="buckets"):
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


SENT = 20_000


def send(fd: int, column: int) -> None:
    """Send prompts whose blocks and tokens tell which one they are of."""
    index = PrefixIndex.attach(fd)
    worker = Worker(index, column, row=column)
    for n in range(SENT):
        blocks = [n << 8 | block for block in range(BLOCKS_MAX)]
        prompt = Prompt(n, blocks, [n] * BLOCKS_MAX)
        worker.ring.pick_hashed(1, prompt=prompt, index=worker.index).release()


def test_entries_that_are_overwritten_while_they_are_read_are_left_out():
    index = PrefixIndex.create(ROWS, 1024, workers=2)
    writers = [
        subprocess.Popen(
            [sys.executable, __file__, str(index.fd), str(column), "send"], pass_fds=[index.fd]
        )
        for column in range(2)
    ]
    total = 0
    last = [-1, -1]
    try:
        ended = False
        while not ended:
            ended = all(writer.poll() is not None for writer in writers)
            entries, skipped = index.take_log(10_000)
            total += len(entries) + skipped
            for row, new_tokens, blocks in entries:
                hashes = struct.unpack(f"{BLOCKS_MAX}Q", blocks)
                n = hashes[0] >> 8
                assert last[row] < n < SENT
                last[row] = n
                assert list(hashes) == [n << 8 | block for block in range(BLOCKS_MAX)]
                assert new_tokens <= n
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert [writer.returncode for writer in writers] == [0, 0]
    assert total == 2 * SENT
    index.close()


if __name__ == "__main__":
    if sys.argv[3:] == ["send"]:
        send(int(sys.argv[1]), int(sys.argv[2]))
    else:
        write(int(sys.argv[1]), int(sys.argv[2]))
