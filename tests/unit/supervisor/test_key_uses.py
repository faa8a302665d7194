"""Limits of API keys at several replicas: what they report to each other, and what that bounds.

Each replica has two workers, which count in a key table of their own, and the real exchange of
loads with the other one, over HTTP.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace

import msgspec
import pytest
from aiohttp import web
from fakes.limited_keys import Clock, Rows
from harness import until

from kubeai._key_table import KeyTable, Use
from kubeai._limits import charge
from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai.routing.publisher import Publisher
from kubeai.supervisor.memory import KEY_ROWS
from kubeai.supervisor.peers import wire
from kubeai.supervisor.peers.key_uses import GONE_MAX_KEYS, KeyFeed, PeerUses
from kubeai.supervisor.peers.peers import LOADS_PATH, Peers
from kubeai.supervisor.peers.view import HOLD_S

WORKERS = 2


class Replica:
    """One replica's key table and workers, and its exchange with the replicas at ``addresses``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = Clock()  # of the peers; the tables follow the real one
        self.table = KeyTable.create(8, WORKERS)
        self.workers = [KeyTable.attach(self.table.fd, column) for column in range(WORKERS)]
        self.keys = Rows(self.table)
        self.loads = LoadTable.create(8, WORKERS)

    async def start(self, addresses: list[str]) -> None:
        index = PrefixIndex.create(8, 64)
        self.peers = Peers(
            SimpleNamespace(),
            "ns",
            self.name,
            self.loads,
            index,
            Publisher(self.loads, index),
            addresses=addresses,
            keys=(self.table, self.keys),
            clock=self.clock,
        )
        self._task = asyncio.create_task(self.peers.run(1))

    async def serve(self) -> str:
        """Serve the loads, of the Peers that are started later; returns the address."""
        app = web.Application()
        app.router.add_get(LOADS_PATH, self._serve)
        app.router.add_get("/metrics", announce)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"127.0.0.1:{self._runner.addresses[0][1]}"

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        return await self.peers.serve(request)

    async def restart(self) -> None:
        """Become another process at the same address, which has counted nothing."""
        await self._end()
        for name in list(self.keys.rows):
            self.keys.remove(name)
        await self.start([])

    async def vanish(self) -> None:
        """Stop to exchange anything."""
        await self._end()
        await self._runner.cleanup()

    async def _end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.peers.close()

    async def stop(self) -> None:
        await self.vanish()
        for worker in self.workers:
            worker.close()
        self.table.close()
        self.loads.close()

    def charge(self, name: str = "k", worker: int = 0, **limits: int):
        return charge(self.workers[worker], *self.keys.add(name), **limits)

    def use(self, name: str = "k") -> Use:
        return self.table.use(self.keys.add(name)[0])


async def announce(request: web.Request) -> web.Response:
    return web.Response(headers={wire.MARKER: wire.PATH})


@contextlib.asynccontextmanager
async def replicas() -> AsyncIterator[list[Replica]]:
    """Two replicas that listen to each other."""
    both = [Replica("one"), Replica("two")]
    addresses = [await replica.serve() for replica in both]
    for replica in both:
        await replica.start(addresses)
    try:
        yield both
    finally:
        for replica in both:
            await replica.stop()


async def test_a_limit_holds_for_all_workers_of_all_replicas():
    async with replicas() as (one, other):
        for replica in (one, other):
            replica.keys.add("k")
            replica.peers.key_changed("k")
        taken = 0
        for replica in (one, other):
            for worker in range(WORKERS):
                for _ in range(2):
                    held = replica.charge(worker=worker, requests=8, tokens=800, reserve=100)
                    assert held.excess is None
                    held.end()
                    taken += 1
            await until(
                "both replicas have counted it",
                lambda: {one.use(), other.use()} == {Use(0, taken, 100 * taken)},  # noqa: B023
            )
        for replica in (one, other):
            for worker in range(WORKERS):
                refused = replica.charge(worker=worker, requests=8)
                assert (refused.excess, refused.requests_left) == ("requests", 0)
                assert replica.charge(worker=worker, tokens=800).excess == "tokens"


async def test_requests_in_flight_at_another_replica_count_until_they_end():
    async with replicas() as (one, other):
        other.keys.add("k")
        held = one.charge(in_flight=2)
        await until("it is counted at the other", lambda: other.use().in_flight == 1)
        here = other.charge(in_flight=2)
        assert here.excess is None
        assert other.charge(in_flight=2).excess == "in flight"
        held.end()
        await until("it has ended", lambda: other.use().in_flight == 1)
        assert other.charge(in_flight=2).excess is None
        here.end()


async def test_replicas_that_have_not_heard_of_each_other_exceed_a_limit_by_what_each_takes():
    """The worst case: both take all of the limit within one interval of the reports."""
    async with replicas() as (one, other):
        for replica in (one, other):
            for _ in range(5):  # nothing is awaited, so nothing is reported meanwhile
                assert replica.charge(requests=5).excess is None
            assert replica.charge(requests=5).excess == "requests"
        for replica in (one, other):
            await until("both have counted all", lambda r=replica: r.use().requests == 10)
            assert replica.charge(requests=5).excess == "requests"
            refused = replica.charge(requests=9)
            assert refused.excess == "requests", "what was exceeded counts for the next minute"


async def test_what_a_replica_counted_before_it_became_silent_counts_until_it_is_a_minute_old():
    async with replicas() as (one, other):
        other.keys.add("k")
        held = one.charge(reserve=50)
        await until("it is counted at the other", lambda: other.use() == Use(1, 1, 50))
        await one.vanish()
        other.clock.now_s += HOLD_S + 1
        await until("it has nothing in flight any more", lambda: other.use() == Use(0, 1, 50))
        now_s = time.monotonic()
        other.table.clock = Clock(now_s + 40)
        assert other.use() == Use(0, 1, 50)
        other.table.clock = Clock(now_s + 80)
        assert other.use() == Use(0, 0, 0)
        held.end()


async def test_what_a_replica_counted_before_it_restarts_is_added_to_what_it_counts_later():
    async with replicas() as (one, other):
        other.keys.add("k")
        one.charge(reserve=50).end()
        await until("it is counted at the other", lambda: other.use() == Use(0, 1, 50))
        for requests in (2, 3):
            await one.restart()
            one.charge(reserve=50).end()
            await until(
                "both are counted",
                lambda: other.use() == Use(0, requests, 50 * requests),  # noqa: B023
            )


async def test_a_key_that_is_removed_is_no_longer_counted_at_the_other_replica():
    async with replicas() as (one, other):
        other.keys.add("k")
        held = one.charge()
        await until("it is counted at the other", lambda: other.use() == Use(1, 1, 0))
        one.keys.remove("k")
        one.peers.key_changed("k")
        await until("it is not counted any more", lambda: other.use() == Use(0, 0, 0))
        held.end()


# -- reports, without a connection -----------------------------------------------------------------


def summed(**uses: wire.KeyUse) -> wire.Loads:
    """What a replica of a version reports that does not say when it has counted something."""
    return wire.Loads(keys=uses)


@pytest.fixture
def table():
    table = KeyTable.create(8, 1)
    table.clock = Clock()
    yield table
    table.close()


@pytest.fixture
def worker(table):
    worker = KeyTable.attach(table.fd, 0)
    worker.clock = table.clock
    yield worker
    worker.close()


def test_only_changed_keys_are_reported_and_idle_ones_once_more(table, worker):
    keys = Rows(table)
    feed = KeyFeed(table, keys)
    keys.add("idle")
    charge(worker, *keys.add("a"), reserve=5).end()
    charge(worker, *keys.add("b")).end()
    assert feed.read(1)
    assert feed.since(0) == (
        {"b": (0, 1, 0), "a": (0, 1, 5)},
        wire.KeyWindows(0, [((1,), ()), ((1,), (5,))]),
    )
    assert not feed.read(2)
    assert feed.since(1) == ({}, None)
    held = charge(worker, *keys.add("b"))
    assert feed.read(2)
    assert feed.since(1) == ({"b": (1, 2, 0)}, wire.KeyWindows(0, [((2,), ())]))
    held.end()
    table.clock.now_s += 22.5
    assert feed.read(3)
    assert feed.since(2)[1] == wire.KeyWindows(2500, [((0, 0, 2), ()), ((0, 0, 1), (0, 0, 5))])
    table.clock.now_s += 47.5
    assert feed.read(4)
    assert feed.since(3)[0] == {"a": (0, 0, 0), "b": (0, 0, 0)}
    assert feed.since(0) == ({}, None)
    assert not feed.read(5)


def test_a_deleted_key_is_reported_as_unused(table, worker):
    keys = Rows(table)
    feed = KeyFeed(table, keys)
    held = charge(worker, *keys.add("a"))
    feed.read(1)
    keys.remove("a")
    held.end()
    feed.read(2)
    assert feed.since(1) == ({"a": (0, 0, 0)}, wire.KeyWindows(0, [((), ())]))


def test_the_memory_for_deleted_keys_is_bounded(table, worker):
    keys = Rows(table)
    feed = KeyFeed(table, keys)
    for number in range(GONE_MAX_KEYS + 10):
        keys.owners[0] = f"key-{number}"
        if number == 0:
            generation = table.open_row(0)
        charge(worker, 0, generation).end()
        feed.read(number + 1)
    assert len(feed.since(1)[0]) <= GONE_MAX_KEYS + 1


def test_the_uses_of_several_peers_are_added_up(table):
    keys = Rows(table)
    row, _ = keys.add("k")
    uses = PeerUses(table, keys)
    uses.take("a", summed(k=(1, 10, 100), unknown=(9, 9, 9)), whole=True)
    uses.take("b", summed(k=(2, 20, 200)), whole=True)
    assert table.use(row) == Use(3, 30, 300)
    uses.take("a", summed(k=(0, 11, 110)))
    assert table.use(row) == Use(2, 31, 310)
    later, _ = keys.add("unknown")
    assert table.use(later) == Use(0, 0, 0)
    uses.key_changed("unknown")
    assert table.use(later) == Use(9, 9, 9)
    uses.take("a", summed(k=(0, 0, 0)))
    assert table.use(row) == Use(2, 20, 200)


@pytest.mark.parametrize("process", ["", "p"], ids=["version without processes", "this version"])
def test_a_peer_that_comes_back_is_not_counted_twice(table, process):
    keys = Rows(table)
    row, _ = keys.add("k")
    uses = PeerUses(table, keys)
    uses.take("a", summed(k=(1, 10, 100)), whole=True, process=process)
    uses.leave("a")
    assert table.use(row) == Use(0, 10, 100)
    uses.take("a", summed(k=(1, 12, 120)), whole=True, process=process)
    assert table.use(row) == Use(1, 12, 120)
    uses.leave("a")
    table.clock.now_s += 59
    uses.age()
    assert table.use(row) == Use(0, 12, 120)
    table.clock.now_s += 11
    uses.age()
    assert table.use(row) == Use(0, 0, 0)
    uses.take("a", summed(), whole=True, process="later")
    assert table.use(row) == Use(0, 0, 0)


def test_a_peer_of_a_version_without_processes_keeps_the_larger_of_what_it_reports(table):
    keys = Rows(table)
    row, _ = keys.add("k")
    uses = PeerUses(table, keys)
    for requests, most in ((50, 50), (1, 50), (0, 50), (60, 60), (2, 60)):
        uses.take("a", summed(k=(0, requests, 0)), whole=True)
        assert table.use(row).requests == most
    uses.take("a", summed(k=(0, 5, 0)), whole=True, process="of this version")
    assert table.use(row).requests == 65


def test_a_peer_with_too_many_keys_is_refused(table):
    uses = PeerUses(table, Rows(table))
    names = {f"key-{number}": (1, 1, 1) for number in range(wire.KEYS_MAX + 1)}
    with pytest.raises(wire.BadFrame, match="more than 65536 keys"):
        uses.take("a", wire.Loads(keys=names), whole=True)


def test_a_report_with_other_keys_than_windows_is_refused(table):
    keys = Rows(table)
    row, _ = keys.add("k")
    uses = PeerUses(table, keys)
    uses.take("a", summed(k=(1, 2, 3)), whole=True)
    bad = wire.Loads(keys={"k": (0, 0, 0)}, key_windows=wire.KeyWindows(0, []))
    with pytest.raises(wire.BadFrame, match="1 keys, but 0 windows"):
        uses.take("a", bad, whole=True)
    assert table.use(row) == Use(1, 2, 3)


@pytest.mark.parametrize(
    "use", [(-1, 0, 0), (wire.COUNT_MAX + 1, 0, 0), (0, -1, 0), (0, 0, wire.USE_MAX + 1), (1, 1)]
)
def test_invalid_uses_make_a_frame_invalid(use):
    body = wire.encode(wire.Loads(keys={"k": use}))[4:]
    with pytest.raises(wire.BadFrame):
        wire.decode(body)


@pytest.mark.parametrize(
    "windows",
    [
        wire.KeyWindows(-1, []),
        wire.KeyWindows(10_001, []),
        wire.KeyWindows(0, [((-1,), ())]),
        wire.KeyWindows(0, [((), (wire.USE_MAX + 1,))]),
        wire.KeyWindows(0, [((0,) * 8, ())]),
    ],
)
def test_invalid_windows_make_a_frame_invalid(windows):
    body = wire.encode(wire.Loads(key_windows=windows))[4:]
    with pytest.raises(wire.BadFrame):
        wire.decode(body)


def test_the_largest_complete_report_fits_in_a_frame(table):
    use = (wire.COUNT_MAX, wire.USE_MAX, wire.USE_MAX)
    names = {f"{number:0253}": use for number in range(KEY_ROWS)}
    window = ((60,) * wire.INTERVALS_MAX, (1 << 32,) * wire.INTERVALS_MAX)
    windows = wire.KeyWindows(0, [window] * KEY_ROWS)
    frame = wire.encode(wire.Loads(keys=names, key_windows=windows))
    assert len(frame) < wire.FRAME_MAX_BYTES


def test_versions_without_keys_and_this_one_understand_each_other():
    class Loads(msgspec.Struct, frozen=True, tag="loads", array_like=True):
        """The frame before it had keys."""

        models: dict[str, tuple[int, int] | None] = {}
        endpoints: dict[str, int] = {}
        pending: dict[str, int] = {}
        prompts: list | None = None

    new = wire.encode(wire.Loads({"m": (1, 2)}, {"a": 3}, keys={"k": (1, 2, 3)}))[4:]
    old = msgspec.msgpack.decode(new, type=Loads)
    assert (old.models, old.endpoints) == ({"m": (1, 2)}, {"a": 3})
    assert wire.decode(msgspec.msgpack.encode(old)) == wire.Loads({"m": (1, 2)}, {"a": 3})


def test_versions_without_windows_and_this_one_understand_each_other():
    class Loads(msgspec.Struct, frozen=True, tag="loads", array_like=True):
        """The frame before it had windows."""

        models: dict[str, tuple[int, int] | None] = {}
        endpoints: dict[str, int] = {}
        pending: dict[str, int] = {}
        prompts: list | None = None
        keys: dict[str, tuple[int, int, int]] = {}
        queues: dict[str, tuple[int, int, int]] = {}

    class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
        """The frame before it had a process."""

        identity: str

    windows = wire.KeyWindows(0, [((2,), (3,))])
    new = wire.encode(wire.Loads(keys={"k": (1, 2, 3)}, key_windows=windows))[4:]
    old = msgspec.msgpack.decode(new, type=Loads)
    assert old.keys == {"k": (1, 2, 3)}
    assert wire.decode(msgspec.msgpack.encode(old)) == wire.Loads(keys={"k": (1, 2, 3)})
    hello = msgspec.msgpack.decode(wire.encode(wire.Hello("one", "p"))[4:], type=Hello)
    assert hello.identity == "one"
    assert wire.decode(msgspec.msgpack.encode(hello)) == wire.Hello("one")
