"""The key table: windows, columns, generations; and what a Charge counts."""

import os
from math import floor

import pytest
from fakes.limited_keys import Clock
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from examples import some
from kubeai._key_readings import KeyReadings
from kubeai._key_table import KeyTable, Use
from kubeai._limits import TOKENS_MAX, charge
from kubeai._load import LoadTable

WORKERS = 2
INTERVAL_S = 10
MINUTE_S = 60


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def table(clock):
    table = KeyTable.create(rows=200, workers=WORKERS)
    table.clock = clock
    yield table
    table.close()


@pytest.fixture
def workers(table, clock):
    workers = [KeyTable.attach(table.fd, column) for column in range(WORKERS)]
    for worker in workers:
        worker.clock = clock
    yield workers
    for worker in workers:
        worker.close()


@pytest.fixture
def worker(workers):
    return workers[0]


# -- counting ----------------------------------------------------------------------------------


def test_a_new_row_is_unused(table):
    generation = table.open_row(3)
    assert generation == table.generation(3) == 1
    assert table.use(3) == Use(0, 0, 0)
    assert table.row_is_zero(3)
    assert (table.rows, table.columns, table.column) == (200, WORKERS + 1, -1)


def test_a_request_is_in_flight_until_it_ends_and_counts_for_a_minute(table, worker, clock):
    generation = table.open_row(0)
    one = charge(worker, 0, generation, requests=10, reserve=100)
    assert (one.excess, one.tokens) == (None, 100)
    assert table.use(0) == Use(1, 1, 100)
    assert not table.row_is_zero(0)
    one.end()
    one.end(7)
    assert table.use(0) == Use(0, 1, 100), "it has ended once"
    assert table.row_is_zero(0)
    clock.now_s += MINUTE_S
    assert table.use(0) == Use(0, 1, 100)
    clock.now_s += INTERVAL_S
    assert table.use(0) == Use(0, 0, 0)


def test_a_request_that_nobody_ends_is_ended_when_it_is_collected(table, worker):
    generation = table.open_row(0)
    charge(worker, 0, generation, reserve=5)
    assert table.use(0) == Use(0, 1, 5)


def test_the_interval_that_leaves_the_minute_counts_in_part(table, worker, clock):
    generation = table.open_row(0)
    for _ in range(10):
        charge(worker, 0, generation).end()
    clock.now_s += MINUTE_S
    used = []
    for _ in range(5):
        used.append(table.use(0).requests)
        clock.now_s += INTERVAL_S / 5
    assert used == [10, 8, 6, 4, 2]


def test_tokens_are_settled_in_the_interval_that_they_were_reserved_in(table, worker, clock):
    generation = table.open_row(0)
    one = charge(worker, 0, generation, reserve=1000)
    clock.now_s += 30
    one.end(200)
    assert table.use(0).tokens == 200
    clock.now_s += 40
    assert table.use(0).tokens == 0, "they are a minute old"


def test_tokens_beyond_the_estimate_count_when_they_are_known(table, worker, clock):
    generation = table.open_row(0)
    one = charge(worker, 0, generation, reserve=10)
    clock.now_s += 50
    one.end(110)
    assert table.use(0).tokens == 110
    clock.now_s += 20
    assert table.use(0).tokens == 100


def test_a_request_that_lasts_longer_than_a_minute_gives_nothing_back(table, worker, clock):
    generation = table.open_row(0)
    one = charge(worker, 0, generation, reserve=1000)
    clock.now_s += 70  # the slot of the reservation is in use again
    other = charge(worker, 0, generation, reserve=300)
    one.end(10)
    assert table.use(0).tokens == 300
    other.end(50)
    assert table.use(0).tokens == 50


@pytest.mark.parametrize("tokens", [TOKENS_MAX + 1, 1 << 62])
def test_absurd_numbers_of_tokens_are_bounded(table, worker, tokens):
    generation = table.open_row(0)
    one = charge(worker, 0, generation, reserve=tokens)
    assert one.tokens == TOKENS_MAX
    one.end(tokens)
    assert table.use(0).tokens == TOKENS_MAX


# -- limits ------------------------------------------------------------------------------------


def test_requests_beyond_the_limit_are_refused_until_one_has_left_the_minute(table, workers, clock):
    generation = table.open_row(0)
    left = []
    for count in range(6):
        one = charge(workers[count % WORKERS], 0, generation, requests=6)
        left.append(one.requests_left)
        one.end()
    assert left == [5, 4, 3, 2, 1, 0]
    refused = charge(workers[0], 0, generation, requests=6)
    assert (refused.excess, refused.requests_left) == ("requests", 0)
    assert table.use(0) == Use(0, 6, 0), "it is not counted"
    assert table.refused(0) == 1
    assert refused.retry_after_s == pytest.approx(MINUTE_S)
    clock.now_s += refused.retry_after_s - 0.01
    assert charge(workers[0], 0, generation, requests=6).excess == "requests"
    clock.now_s += 0.02
    assert charge(workers[0], 0, generation, requests=6).excess is None


def test_tokens_beyond_the_limit_are_refused_until_enough_have_left_the_minute(
    table, worker, clock
):
    generation = table.open_row(0)
    charge(worker, 0, generation, tokens=1000, reserve=400).end()
    clock.now_s += 25
    second = charge(worker, 0, generation, tokens=1000, reserve=400)
    assert second.tokens_left == 200
    second.end()
    refused = charge(worker, 0, generation, tokens=1000, reserve=300)
    assert (refused.excess, refused.tokens_left) == ("tokens", 200)
    # 99 of the first 400 have to leave, which they do from the 60th to the 70th second on.
    assert refused.retry_after_s == pytest.approx(MINUTE_S - 25 + 99 / 400 * INTERVAL_S)
    assert charge(worker, 0, generation, tokens=1000, reserve=200).excess is None


def test_a_request_larger_than_the_limit_is_refused_for_good(table, worker):
    generation = table.open_row(0)
    refused = charge(worker, 0, generation, requests=1, tokens=100, in_flight=1, reserve=101)
    assert (refused.excess, refused.retry_after_s) == ("too large", 0)


def test_a_request_without_an_estimate_needs_some_tokens_to_be_left(table, worker):
    generation = table.open_row(0)
    charge(worker, 0, generation, tokens=100).end(150)
    assert charge(worker, 0, generation, tokens=100).excess == "tokens"


def test_requests_in_flight_are_limited_at_all_workers_together(table, workers):
    generation = table.open_row(0)
    held = [charge(worker, 0, generation, in_flight=2) for worker in workers]
    refused = charge(workers[0], 0, generation, in_flight=2)
    assert (refused.excess, refused.retry_after_s) == ("in flight", 1)
    held.pop().end()
    assert charge(workers[0], 0, generation, in_flight=2).excess is None


def test_of_several_exceeded_limits_the_one_that_lasts_longest_is_named(table, worker, clock):
    generation = table.open_row(0)
    limits = {"requests": 1, "tokens": 100, "in_flight": 1, "reserve": 40}
    held = charge(worker, 0, generation, **limits)
    assert charge(worker, 0, generation, **limits).excess == "requests"
    held.end(100)
    clock.now_s += 61
    assert charge(worker, 0, generation, **limits).excess == "tokens"


def test_a_client_that_sends_evenly_can_use_all_of_its_limit(table, worker, clock):
    generation = table.open_row(0)
    for number in range(600):
        clock.now_s = 1000.0 + number * (MINUTE_S / 60 + 1e-6)
        one = charge(worker, 0, generation, requests=60)
        assert one.excess is None, number
        one.end()


@settings(max_examples=some(60))
@given(
    waits=st.lists(st.floats(0, 45), min_size=1, max_size=12),
    limit=st.integers(1, 40),
)
def test_neither_six_intervals_nor_any_50_s_have_more_than_the_limit(waits, limit):
    table = KeyTable.create(1, 1)
    worker = KeyTable.attach(table.fd, 0)
    worker.clock = clock = Clock()
    generation = table.open_row(0)
    taken = []
    for wait_s in waits:  # a client that takes all it can get
        clock.now_s += wait_s
        while charge(worker, 0, generation, requests=limit).excess is None:
            taken.append(clock.now_s)
    for begin_s in taken:
        aligned_s = begin_s // INTERVAL_S * INTERVAL_S
        for from_s, to_s in ((begin_s, begin_s + 50), (aligned_s, aligned_s + MINUTE_S)):
            assert sum(from_s <= at_s < to_s for at_s in taken) <= limit
    worker.close()
    table.close()


@settings(max_examples=some(60))
@given(
    steps=st.lists(
        st.tuples(st.floats(0, 30), st.integers(0, 500), st.integers(0, 3)), min_size=1, max_size=20
    ),
    reserve=st.integers(1, 500),
)
def test_a_request_that_waits_as_it_is_told_is_let_in_and_not_much_earlier(steps, reserve):
    table = KeyTable.create(1, 1)
    worker = KeyTable.attach(table.fd, 0)
    worker.clock = clock = Clock()
    generation = table.open_row(0)
    limits = {"requests": 20, "tokens": 500}
    for wait_s, tokens, count in steps:
        clock.now_s += wait_s
        for _ in range(count):
            charge(worker, 0, generation, **limits, reserve=tokens).end()
    refused = charge(worker, 0, generation, **limits, reserve=reserve)
    if refused.excess is not None:
        assert 0 < refused.retry_after_s <= MINUTE_S + INTERVAL_S
        before_s = clock.now_s
        clock.now_s = before_s + refused.retry_after_s - 0.01
        if clock.now_s > before_s:
            assert charge(worker, 0, generation, **limits, reserve=reserve).excess is not None
        clock.now_s = before_s + refused.retry_after_s + 0.01
        assert charge(worker, 0, generation, **limits, reserve=reserve).excess is None
    worker.close()
    table.close()


# -- rows, columns, processes --------------------------------------------------------------------


def test_a_charge_of_a_row_that_was_reused_has_no_effect(table, worker):
    old = table.open_row(0)
    held = charge(worker, 0, old, reserve=10)
    new = table.open_row(0)
    assert table.use(0) == Use(0, 0, 0)
    other = charge(worker, 0, new, reserve=5)
    held.end(1000)
    assert table.use(0) == Use(1, 1, 5)
    assert charge(worker, 0, old, reserve=5).excess is None
    assert table.use(0) == Use(1, 1, 5)
    other.end()


def test_a_killed_workers_requests_are_cleared_but_what_it_counted_stays(table, workers):
    generation = table.open_row(0)
    held = [charge(worker, 0, generation, reserve=10) for worker in workers]
    table.clear_column(0)
    assert table.use(0) == Use(1, 2, 20)
    held[0].end(0)
    assert table.use(0) == Use(1, 2, 10), "a late end does not count below 0"
    held[1].end()
    assert table.use(0).in_flight == 0


def test_other_replicas_count_for_limits_and_age_by_themselves(table, worker, clock):
    generation = table.open_row(0)
    assert table.moment() == (100, 0)
    table.set_peers(0, generation, 2, 100, (50,), (700,))
    assert table.use(0) == Use(2, 50, 700)
    assert table.use_here(0) == Use(0, 0, 0)
    assert table.window_here(0) == ((0,) * 7, (0,) * 7)
    assert table.row_is_zero(0), "the row's reuse depends on this replica alone"
    assert charge(worker, 0, generation, requests=50).excess == "requests"
    assert charge(worker, 0, generation, in_flight=2).excess == "in flight"
    table.set_peers(0, generation, 0, 100, (20, 0, 0, 0, 0, 0, 10), ())
    assert table.use(0) == Use(0, 30, 0), "a report replaces the one before"
    refused = charge(worker, 0, generation, requests=25)
    assert (refused.excess, refused.retry_after_s) == ("requests", pytest.approx(5, abs=0.01))
    clock.now_s += INTERVAL_S
    assert table.use(0) == Use(0, 20, 0)
    clock.now_s += MINUTE_S
    assert table.use(0) == Use(0, 0, 0)
    table.set_peers(0, generation + 1, 1, 107, (1,), (1,))
    assert table.use(0) == Use(0, 0, 0), "of another generation"
    with pytest.raises(ValueError, match="negative"):
        table.set_peers(0, generation, -1, 107, (), ())
    with pytest.raises(OverflowError, match="negative"):
        table.set_peers(0, generation, 0, 107, (-1,), ())
    with pytest.raises(ValueError, match="a minute has 7 intervals, not 8"):
        table.set_peers(0, generation, 0, 107, (), (0,) * 8)


def test_only_a_matching_table_can_be_attached(table):
    with pytest.raises(ValueError, match="column must be 0 to 2, not 3"):
        KeyTable.attach(table.fd, 3)
    loads = LoadTable.create(4, 1)
    with pytest.raises(ValueError, match="not a key table: wrong magic"):
        KeyTable.attach(loads.fd, 0)
    loads.close()
    fd = os.memfd_create("short")
    with pytest.raises(ValueError, match="too short"):
        KeyTable.attach(fd, 0)
    os.write(fd, os.pread(table.fd, 64, 0))
    with pytest.raises(ValueError, match="does not match its header"):
        KeyTable.attach(fd, 0)
    os.close(fd)
    with pytest.raises(ValueError, match="rows must be"):
        KeyTable.create(0, 1)
    with pytest.raises(ValueError, match="workers must be"):
        KeyTable.create(1, 64)


def test_rows_and_columns_are_checked(table, worker):
    with pytest.raises(IndexError, match="row must be 0 to 199, not 200"):
        table.use(200)
    with pytest.raises(IndexError, match="not -1"):
        charge(worker, -1, 1)
    with pytest.raises(IndexError, match="column must be"):
        table.clear_column(3)
    with pytest.raises(ValueError, match="no column"):
        charge(table, 0, 1)


def test_a_closed_table_counts_nothing():
    table = KeyTable.create(4, 1)
    worker = KeyTable.attach(table.fd, 0)
    held = charge(worker, 0, table.open_row(0), reserve=3)
    worker.close()
    held.end(1)
    with pytest.raises(ValueError, match="closed"):
        charge(worker, 0, 1)
    assert table.use(0).tokens == 3
    table.close()


# -- readings ------------------------------------------------------------------------------------


def test_readings_find_what_was_counted_and_what_has_aged(table, workers, clock):
    generations = {row: table.open_row(row) for row in (0, 70, 199)}
    readings = KeyReadings(table)
    assert readings.changed() == []
    held = charge(workers[1], 70, generations[70])
    charge(workers[0], 199, generations[199], reserve=5).end()
    assert readings.changed() == [70, 199]
    assert readings.changed() == []
    held.end()
    assert readings.changed() == [70]
    for _ in range(7):
        clock.now_s += INTERVAL_S
        assert readings.changed() == [70, 199]
    assert table.use(70) == table.use(199) == Use(0, 0, 0), "this was the last report"
    clock.now_s += INTERVAL_S
    assert readings.changed() == []
    table.set_peers(0, generations[0], 1, table.moment()[0], (1,), (1,))
    assert readings.changed() == [], "peers' uses are not ours to report"
    held = charge(workers[0], 0, generations[0])
    table.clear_column(0)
    assert 0 in readings.changed()


# -- a comparison with plain Python ----------------------------------------------------------------


class Oracle:
    """One key, as a list of what was counted when."""

    def __init__(self) -> None:
        self.in_flight = [0] * WORKERS
        self.requests: dict[int, int] = {}
        self.tokens: dict[int, int] = {}

    @staticmethod
    def used(counts: dict[int, int], now_s: float) -> float:
        interval, past_s = divmod(now_s, INTERVAL_S)
        whole = sum(counts.get(int(interval) - age, 0) for age in range(6))
        return whole + (1 - past_s / INTERVAL_S) * counts.get(int(interval) - 6, 0)


class Counting(RuleBasedStateMachine):
    """Charges of one key by two workers, compared with the oracle after each step."""

    @initialize(
        requests=st.sampled_from([0, 1, 5, 30]),
        tokens=st.sampled_from([0, 50, 1000]),
        in_flight=st.sampled_from([0, 1, 4]),
    )
    def begin(self, requests, tokens, in_flight):
        self.limits = {"requests": requests, "tokens": tokens, "in_flight": in_flight}
        self.table = KeyTable.create(1, WORKERS)
        self.clock = self.table.clock = Clock()
        self.workers = [KeyTable.attach(self.table.fd, column) for column in range(WORKERS)]
        for worker in self.workers:
            worker.clock = self.clock
        self.generation = self.table.open_row(0)
        self.oracle = Oracle()
        self.held = []

    @property
    def interval(self):
        return int(self.clock.now_s // INTERVAL_S)

    @rule(wait_s=st.one_of(st.floats(0, 5), st.floats(0, 90)))
    def wait(self, wait_s):
        self.clock.now_s += wait_s

    @rule(column=st.integers(0, WORKERS - 1), reserve=st.integers(0, 400))
    def take(self, column, reserve):
        now_s, oracle, limits = self.clock.now_s, self.oracle, self.limits
        one = charge(self.workers[column], 0, self.generation, **limits, reserve=reserve)
        used = oracle.used(oracle.requests, now_s), oracle.used(oracle.tokens, now_s)
        exceeded = set()
        if limits["in_flight"] and sum(oracle.in_flight) >= limits["in_flight"]:
            exceeded.add("in flight")
        if limits["requests"] and floor(used[0]) + 1 > limits["requests"]:
            exceeded.add("requests")
        if limits["tokens"] and floor(used[1]) + max(1, reserve) > limits["tokens"]:
            exceeded.add("tokens")
        if limits["tokens"] and reserve > limits["tokens"]:
            exceeded = {"too large"}
        assert (one.excess in exceeded) if exceeded else one.excess is None, (used, exceeded)
        if one.excess is not None:
            return
        self.held.append((one, column, self.interval))
        oracle.in_flight[column] += 1
        oracle.requests[self.interval] = oracle.requests.get(self.interval, 0) + 1
        oracle.tokens[self.interval] = oracle.tokens.get(self.interval, 0) + reserve

    @rule(which=st.integers(0, 50), tokens=st.integers(-1, 600))
    def end(self, which, tokens):
        if not self.held:
            return
        one, column, interval = self.held.pop(which % len(self.held))
        one.end(tokens)
        oracle = self.oracle
        oracle.in_flight[column] -= 1
        if tokens > one.tokens:
            more = tokens - one.tokens
            oracle.tokens[self.interval] = oracle.tokens.get(self.interval, 0) + more
        elif tokens >= 0:
            oracle.tokens[interval] -= one.tokens - tokens

    @invariant()
    def uses_agree(self):
        if not hasattr(self, "table"):
            return
        use, now_s = self.table.use(0), self.clock.now_s
        assert use.in_flight == sum(self.oracle.in_flight)
        for counted, counts in (
            (use.requests, self.oracle.requests),
            (use.tokens, self.oracle.tokens),
        ):
            expected = self.oracle.used(counts, now_s)
            assert expected - 1e-6 <= counted < expected + 1 + 1e-6

    def teardown(self):
        if hasattr(self, "table"):
            for one, *_ in self.held:
                one.end()
            for worker in self.workers:
                worker.close()
            self.table.close()


TestCounting = Counting.TestCase
TestCounting.settings = settings(max_examples=some(40), stateful_step_count=30, deadline=None)
