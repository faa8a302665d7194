"""Uses of keys that replicas report to each other: age, names used again, restarts.

Each replica has a key table and a clock of its own, and publishes its keys itself.
"""

import contextlib

import pytest
from fakes.limited_keys import Clock
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import some
from kubeai._key_table import KeyTable, Use
from kubeai._limits import charge
from kubeai.api.api_key import ApiKey
from kubeai.routing.key_publisher import KeyPublisher
from kubeai.supervisor.peers import wire
from kubeai.supervisor.peers.key_uses import KeyFeed, PeerUses

INTERVAL_S = 10
MINUTE_S = 60


class Replica:
    """One replica, and its latest report to the other one."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.table = KeyTable.create(8, 1)
        self.worker = KeyTable.attach(self.table.fd, 0)
        self.table.clock = self.worker.clock = clock
        self.version = 0
        self.keys = KeyPublisher(self.table, self._next)
        self.uses = PeerUses(self.table, self.keys)
        self.restart()

    def restart(self) -> None:
        """Report from the beginning, as a process that has counted nothing yet."""
        for name in self.keys.rows:
            self.table.open_row(self.keys.rows[name][0])
        self.feed = KeyFeed(self.table, self.keys)
        self.frame = self.sent = 0

    def close(self) -> None:
        self.worker.close()
        self.table.close()

    def _next(self) -> int:
        self.version += 1
        return self.version

    def create(self, name: str) -> None:
        self.keys.update(name, ApiKey(name=name, digest=name.encode(), tenant=name))
        self._changed(name)

    def revoke(self, name: str) -> None:
        self.keys.update(name, None)
        self._changed(name)

    def _changed(self, name: str) -> None:
        self.uses.key_changed(name)
        self.frame += self.feed.key_changed(name, self.frame + 1)

    def sweep(self) -> None:
        self.keys.reclaim([self.version], self.version)

    def news(self) -> wire.Loads:
        """Read what was counted here. Returns what has changed."""
        self.frame += self.feed.read(self.frame + 1)
        uses, windows = self.feed.since(self.sent)
        self.sent = self.frame
        return wire.Loads(keys=uses, key_windows=windows)

    def report(self, other: "Replica", *, process: str = "p", whole: bool = False) -> None:
        """Report what has changed to the other replica."""
        loads = wire.decode(wire.encode(self.news())[4:])
        other.uses.take("one:8080", loads, whole=whole, process=process)

    def use(self, name: str = "k") -> Use:
        return self.table.use(self.keys.rows[name][0])

    def charge(self, name: str = "k", **limits: int):
        row, _ = self.keys.rows[name]
        return charge(self.worker, row, self.table.generation(row), **limits)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def both(clock):
    both = [Replica(clock), Replica(clock)]
    for replica in both:
        replica.create("k")
    both[0].report(both[1], whole=True)
    yield both
    for replica in both:
        replica.close()


# -- age -------------------------------------------------------------------------------------------


def test_another_replica_says_when_to_retry_as_the_one_that_has_served_the_requests(both, clock):
    one, other = both
    for _ in range(60):
        one.charge(requests=60).end()
    for _ in range(56):
        one.report(other)
        clock.now_s += 1
    one.report(other)
    here, there = one.charge(requests=60), other.charge(requests=60)
    assert here.retry_after_s == pytest.approx(there.retry_after_s) == pytest.approx(4, abs=0.2)
    clock.now_s += there.retry_after_s + 0.01
    one.report(other)
    assert other.charge(requests=60).excess is None


@settings(max_examples=some(60))
@given(
    offset_s=st.floats(0, 50),
    steps=st.lists(st.tuples(st.floats(0, 12), st.integers(0, 3)), min_size=1, max_size=15),
    latency_s=st.floats(0, 0.2),
)
def test_what_was_counted_elsewhere_counts_as_long_as_there_and_at_most_10_s_longer(
    offset_s, steps, latency_s
):
    """The clocks of the two replicas differ, and so do the beginnings of their intervals."""
    one, other = Replica(Clock(1000.0)), Replica(Clock(5000.0 + offset_s))
    for replica in (one, other):
        replica.create("k")
    counted_at_s = []

    def most(now_s: float) -> float:
        """What was counted in the minute, if all of it is 10 s younger than it is."""
        ages_s = [
            now_s - INTERVAL_S - latency_s - at_s // INTERVAL_S * INTERVAL_S
            for at_s in counted_at_s
        ]
        left = [(MINUTE_S + INTERVAL_S - age_s) / INTERVAL_S for age_s in ages_s]
        return sum(max(0.0, min(1.0, share)) for share in left)

    def wait(seconds: float) -> None:
        for replica in (one, other):
            replica.clock.now_s += seconds

    for wait_s, count in [*steps, *((3.0, 0) for _ in range(30))]:
        for _ in range(count):
            one.charge(reserve=100).end()
            counted_at_s.append(one.clock.now_s)
        for _ in range(int(wait_s / 0.5)):  # reports come more often, but most without changes
            loads = one.news()
            wait(latency_s)
            other.uses.take("one:8080", loads, process="p")
            # Intervals are compared in milliseconds, and uses are rounded up.
            assert other.use().requests >= one.use().requests - 1
            assert other.use().tokens >= one.use().tokens - 1
            assert other.use().requests <= most(one.clock.now_s) + 1
            wait(0.5)
    assert one.use() == other.use() == Use(0, 0, 0)
    for replica in (one, other):
        replica.close()


# -- names that are used again ---------------------------------------------------------------------


@pytest.mark.parametrize("reports_between", [False, True])
@pytest.mark.parametrize("is_swept", [False, True])
def test_a_new_key_inherits_nothing_from_one_of_the_same_name(
    both, clock, reports_between, is_swept
):
    one, other = both
    held = [one.charge(in_flight=5, requests=60) for _ in range(5)]
    one.report(other)
    assert other.use() == Use(5, 5, 0)
    for replica in both:
        replica.revoke("k")
    for each in held:
        each.end()
    if is_swept:
        one.sweep(), other.sweep()
    if reports_between:
        one.report(other)
    for replica in both:
        replica.create("k")
    assert other.use() == Use(0, 0, 0)
    one.report(other)
    assert one.use() == other.use() == Use(0, 0, 0)
    one.charge().end()
    one.report(other)
    assert other.use() == Use(0, 1, 0)


def test_a_replica_that_learns_of_a_new_key_first_forgets_the_old_one_when_the_other_does(both):
    one, other = both
    held = one.charge()
    one.report(other)
    other.revoke("k"), other.create("k")
    one.charge().end()
    one.report(other)
    assert other.use() == Use(1, 2, 0), "the old key still counts there"
    one.revoke("k"), one.create("k")
    one.report(other)
    assert other.use() == Use(0, 0, 0)
    held.end()


def test_a_new_key_inherits_nothing_from_processes_that_are_over(both):
    one, other = both
    one.charge().end()
    one.report(other)
    one.restart()
    one.report(other, process="later", whole=True)
    assert other.use() == Use(0, 1, 0)
    other.revoke("k"), other.create("k")
    assert other.use() == Use(0, 0, 0)


def test_removed_keys_are_not_kept(both, monkeypatch):
    monkeypatch.setattr(wire, "KEYS_MAX", 3)
    one, other = both
    other.revoke("k")
    for number in range(20):
        name = f"key-{number}"
        one.create(name)
        one.charge(name).end()
        one.report(other)
        one.revoke(name)
        one.sweep()
        one.report(other)
    other.create("key-3")
    assert other.use("key-3") == Use(0, 0, 0)
    assert one.feed.since(0) == ({}, None)


# -- restarts --------------------------------------------------------------------------------------


def test_what_every_process_at_an_address_has_counted_is_added_up(both, clock):
    one, other = both
    for process, count in (("p", 50), ("q", 1), ("r", 7)):
        if process != "p":
            one.restart()
            one.report(other, process=process, whole=True)
        for _ in range(count):
            one.charge(reserve=10).end()
        one.report(other, process=process)
        clock.now_s += 5
    assert other.use() == Use(0, 58, 580)
    clock.now_s = 1060.0
    assert other.use() == Use(0, 58, 580)
    clock.now_s = 1070.0
    one.report(other, process="r")
    assert other.use() == Use(0, 7, 70), "each count keeps its age"
    other.uses.leave("one:8080")
    clock.now_s = 1090.0
    other.uses.age()
    assert other.use() == Use(0, 0, 0)


def test_what_was_in_flight_at_a_process_that_is_over_is_not(both):
    one, other = both
    held = one.charge()
    one.report(other)
    assert other.use() == Use(1, 1, 0)
    one.restart()
    one.report(other, process="later", whole=True)
    assert other.use() == Use(0, 1, 0)
    held.end()


@pytest.mark.parametrize("up_s", [0.0, 5.0, 25.0, 55.0])
def test_what_peers_report_counts_just_after_the_machine_has_started(up_s):
    with contextlib.closing(KeyTable.create(8, 1)) as table:
        table.clock = Clock(up_s)
        generation = table.open_row(0)
        interval, _ = table.moment()
        table.set_peers(0, generation, 0, interval, (7, 1), (100,))
        assert table.use(0) == Use(0, 8, 100)
