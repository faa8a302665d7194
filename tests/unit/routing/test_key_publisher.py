"""Rows and versions of API keys, against a model of what workers have acknowledged."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kubeai._load import LoadTable
from kubeai.api.api_key import ApiKey
from kubeai.errors import KubeAIError
from kubeai.routing.channel import Down
from kubeai.routing.key_publisher import KeyPublisher
from kubeai.routing.keys import KeyDelta, KeyRecord
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Route
from kubeai.routing.table import RoutingTable


class Rows:
    """A key table: the generation of each row, and the requests in flight in it."""

    def __init__(self, rows=4):
        self.rows = rows
        self.generations = [0] * rows
        self.in_flight = [0] * rows

    def open_row(self, row):
        assert not self.in_flight[row], "the row is still in use"
        self.generations[row] += 1
        return self.generations[row]

    def row_is_zero(self, row):
        return self.in_flight[row] == 0


class Versions:
    def __init__(self):
        self.last = 0

    def advance(self):
        self.last += 1
        return self.last


@pytest.fixture
def rows():
    return Rows()


@pytest.fixture
def versions():
    return Versions()


@pytest.fixture
def publisher(rows, versions):
    return KeyPublisher(rows, versions.advance)


def key(name="a", digest=b"d" * 32, **fields):
    return ApiKey(name=name, digest=digest, tenant=name, **fields)


def test_a_key_gets_a_row_and_keeps_it_when_it_changes(publisher):
    added = publisher.update("a", key(requests_per_minute=5, is_admin=True))
    assert added == KeyDelta(
        1,
        "a",
        KeyRecord("a", b"d" * 32, "a", requests_per_minute=5, is_admin=True, row=0, generation=1),
    )
    changed = publisher.update("a", key(digest=b"e" * 32, tokens_per_minute=7))
    assert (changed.version, changed.key.row, changed.key.generation) == (2, 0, 1)
    assert changed.key.digest == b"e" * 32
    assert publisher.rows == {"a": (0, 1)}
    assert publisher.owners == {0: "a"}


def test_what_has_not_changed_has_no_version(publisher, versions):
    publisher.update("a", key())
    assert publisher.update("a", key()) is None
    assert publisher.update("unknown", None) is None
    assert versions.last == 1


def test_a_removed_key_keeps_its_row_until_workers_know_and_its_requests_have_ended(
    publisher, rows, versions
):
    publisher.update("a", key())
    rows.in_flight[0] = 1
    assert publisher.update("a", None) == KeyDelta(2, "a", None)
    assert list(publisher.names()) == []
    publisher.reclaim([1, 2], versions.last)
    assert publisher.owners == {0: "a"}
    publisher.reclaim([2, 2], versions.last)
    assert publisher.owners == {0: "a"}, "a request is in flight"
    rows.in_flight[0] = 0
    publisher.reclaim([2, 2], versions.last)
    assert publisher.owners == {}
    assert publisher.update("b", key("b")).key.row == 0
    assert rows.generations[0] == 2


def test_a_key_that_comes_back_at_once_has_another_row(publisher):
    publisher.update("a", key())
    publisher.update("a", None)
    again = publisher.update("a", key())
    assert again.key.row == 1
    assert publisher.owners == {0: "a", 1: "a"}
    assert publisher.rows == {"a": (1, 1)}


def test_keys_beyond_the_rows_wait_for_one_in_their_order(publisher, versions):
    for name in "abcd":
        publisher.update(name, key(name))
    for name in "ef":
        with pytest.raises(KubeAIError, match="key table is full: of 4 rows, 0 belong"):
            publisher.update(name, key(name))
    assert len(publisher) == 4
    publisher.update("a", None)
    (delta,) = publisher.reclaim([versions.last], versions.last)
    assert (delta.name, delta.key.row, delta.version) == ("e", 0, 6)
    publisher.update("f", None)  # no longer waits
    publisher.update("b", None)
    assert publisher.reclaim([versions.last], versions.last) == []
    assert set(publisher.names()) == {"c", "d", "e"}


def test_a_waiting_key_is_published_as_it_was_last(publisher, versions):
    for name in "abcd":
        publisher.update(name, key(name))
    for limit in (1, 2):
        with pytest.raises(KubeAIError):
            publisher.update("e", key("e", requests_per_minute=limit))
    publisher.update("a", None)
    (delta,) = publisher.reclaim([versions.last], versions.last)
    assert delta.key.requests_per_minute == 2


def test_a_snapshot_has_all_keys_and_the_last_version(publisher, versions):
    publisher.update("a", key())
    publisher.update("b", key("b"))
    publisher.update("a", None)
    snapshot = publisher.snapshot(versions.last)
    assert (snapshot.version, [each.name for each in snapshot.keys]) == (3, ["b"])


def test_messages_are_the_same_at_the_other_end_of_the_channel(publisher, versions):
    sent = publisher.update("a", key(models="a=b", expires_s=1.5, priority=-3))
    for message in (sent, publisher.snapshot(versions.last), KeyDelta(2, "a", None)):
        encoded = msgspec.msgpack.encode(message)
        assert msgspec.msgpack.decode(encoded, type=Down) == message


def test_a_worker_acknowledges_routes_and_keys_in_one_sequence():
    table = LoadTable.create(8, 2)
    worker = LoadTable.attach(table.fd, 0)
    publisher = Publisher(table)
    keys = KeyPublisher(Rows(), publisher.advance)
    routes = RoutingTable(worker, lambda model, endpoint: None)
    routes.apply(publisher.snapshot())
    routes.apply(publisher.update("m", Route("m", "VLLM")))
    routes.advance(keys.update("a", key()).version)
    assert table.acknowledged(0) == 2
    routes.apply(publisher.update("m", None))
    assert table.acknowledged(0) == 3
    routes.advance(2)  # outdated
    assert table.acknowledged(0) == 3
    with pytest.raises(RuntimeError, match="a delta was lost"):
        routes.advance(5)


class Life(RuleBasedStateMachine):
    """Two workers that apply what is sent at different times, and requests that end late."""

    names = st.sampled_from("abcdef")

    def __init__(self):
        super().__init__()
        self.table = Rows(4)
        self.versions = Versions()
        self.publisher = KeyPublisher(self.table, self.versions.advance)
        self.sent = []  # in order
        self.applied = [0, 0]  # by worker: how many of them
        self.keys = [{}, {}]  # by worker: name → record
        self.running = []  # (row, generation) of requests
        self.wanted = {}

    @rule(name=names, limit=st.integers(0, 2))
    def put(self, name, limit):
        self.wanted[name] = key(name, requests_per_minute=limit)
        with contextlib.suppress(KubeAIError):
            self.send(self.publisher.update(name, self.wanted[name]))

    @rule(name=names)
    def remove(self, name):
        self.wanted.pop(name, None)
        self.send(self.publisher.update(name, None))

    def send(self, delta):
        if delta is not None:
            self.sent.append(delta)

    @rule(worker=st.sampled_from([0, 1]))
    def apply(self, worker):
        if self.applied[worker] < len(self.sent):
            delta = self.sent[self.applied[worker]]
            self.applied[worker] += 1
            assert delta.version == self.applied[worker]
            if delta.key is None:
                self.keys[worker].pop(delta.name, None)
            else:
                self.keys[worker][delta.name] = delta.key

    @rule(worker=st.sampled_from([0, 1]), name=names)
    def request(self, worker, name):
        record = self.keys[worker].get(name)
        if record is not None:
            assert self.table.generations[record.row] == record.generation, "the row was reused"
            self.table.in_flight[record.row] += 1
            self.running.append(record.row)

    @rule()
    def end(self):
        if self.running:
            self.table.in_flight[self.running.pop()] -= 1

    @rule()
    def sweep(self):
        for delta in self.publisher.reclaim(self.applied, self.versions.last):
            self.send(delta)

    @invariant()
    def published_keys_are_those_that_are_wanted_and_have_distinct_rows(self):
        records = self.publisher.snapshot(self.versions.last).keys
        assert len({record.row for record in records}) == len(records)
        for record in records:
            assert record.requests_per_minute == self.wanted[record.name].requests_per_minute
        assert len(records) <= len(self.wanted)

    def teardown(self):
        for worker in (0, 1):
            while self.applied[worker] < len(self.sent):
                self.apply(worker)
        while self.running:
            self.end()
        for _ in range(3):
            self.sweep()
            for worker in (0, 1):
                while self.applied[worker] < len(self.sent):
                    self.apply(worker)
        assert len(self.publisher) == min(4, len(self.wanted))


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip
