"""Send messages through a real broker to KubeAI while everything is killed, cut and stalled.

    BROKERS=$(tests/brokers/build.sh kafka) \\
        python tests/chaos/messages.py --broker kafka --messages 10000 --seed 1

Two `kubeai local`, whose messengers compete for the messages, reach the broker through a proxy; the
publisher and the reader of the responses reach it directly. Meanwhile one random fault after the
other: the broker is killed, its connections are cut or stall, a messenger is killed or suspended,
a worker or an engine is killed, or a whole KubeAI. The run passes if

- every message has a response, with the content that is right for it;
- all responses to one publication have the same ``request_message_id``;
- no HTTP request that was sent meanwhile failed, except while something that serves HTTP was
  killed.

``--seed`` repeats a run's faults and messages, but not its timing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from brokers.servers.proxy import Proxy
from chaos.load import PROBLEMS_MAX_SHOWN, Account, Publisher, read
from chaos.site import Site
from chaos.under_test import BROKERS, DURABLE, BrokerUnderTest, client_environment
from harness import until

from kubeai.brokers.urls import open_broker

SITES = 2
HANDLERS = 16  # per stream and site
FAULT_PAUSES_S = (0.5, 2.5)
# A suspended messenger's messages come back after the broker's deadline, which is 60 s at most.
NO_PROGRESS_MAX_S = 120.0
LATE_DUPLICATES_S = 3.0
SUBSCRIBE_TIMEOUT_S = 60.0
POLL_S = 0.2
Fault = Callable[[random.Random], Awaitable[None]]


class Options(NamedTuple):
    """``messages`` in all, at most ``per_s``."""

    broker: str
    messages: int = 10_000
    per_s: float = 80.0
    seed: int = 1


class Report(NamedTuple):
    """``faults``: what makes the run fail, for people."""

    rows: list[tuple[str, Any]]
    faults: list[str]

    def table(self) -> str:
        width = max(len(label) for label, _ in self.rows)
        lines = [f"{label:<{width}}  {value:>10,}" for label, value in self.rows]
        return "\n".join([*lines, *(f"! {fault}" for fault in self.faults)])


class Chaos:
    """A broker, a proxy to it, and the sites behind that."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self._folder = folder
        self._broker: BrokerUnderTest = BROKERS[options.broker](folder / "broker")
        self._proxy = Proxy(self._broker.proxied_port)
        self._sites: list[Site] = []
        self._random = random.Random(options.seed)
        self._account = Account()
        self._done: Counter[str] = Counter()  # faults
        self._locks: dict[str, asyncio.Lock] = {}
        self._ending = asyncio.Event()  # no more faults
        # The kernel ends a server with the thread that has started it.
        self._thread = ThreadPoolExecutor(1, "servers")

    async def run(self) -> Report:
        """Run it all; raises only if the run itself cannot be carried out."""
        await self._proxy.start()
        try:
            self._broker.advertise(self._proxy.port)
            await self._blocking(self._broker.server.start)
            await self._broker.create_topics()
            await self._start_sites()
            return await self._measure()
        finally:
            await asyncio.gather(*(site.stop() for site in self._sites), return_exceptions=True)
            await self._proxy.close()
            await self._blocking(self._broker.end)
            self._thread.shutdown()

    async def _blocking(self, call: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def _start_sites(self) -> None:
        stream = {
            "requestsURL": self._broker.requests,
            "responsesURL": self._broker.responses_topic,
            "maxHandlers": HANDLERS,
        }
        config = {"messaging": {"errorMaxBackoff": "2s", "streams": [stream]}}
        environment = self._broker.proxied_environment(self._proxy.port)
        self._sites = [
            Site(self._folder / f"site-{number}", config, environment) for number in range(SITES)
        ]
        await asyncio.gather(*(site.start() for site in self._sites))

    # -- the run -----------------------------------------------------------------------------------

    async def _measure(self) -> Report:
        under, environment = self._broker, client_environment(self._broker)
        publisher = Publisher(
            open_broker(under.requests_topic, "requests", environment), self._account
        )
        reader = open_broker(under.responses, "responses", environment)
        subscribed = asyncio.Event()
        reading = asyncio.create_task(read(reader, self._account, subscribed))
        await until("the reader is subscribed", subscribed.is_set, SUBSCRIBE_TIMEOUT_S)
        begin_s = time.monotonic()
        background = [
            reading,
            *(asyncio.create_task(site.send_http(at)) for at, site in enumerate(self._sites)),
        ]
        chaos = asyncio.create_task(self._break_things())
        publishing = asyncio.create_task(
            publisher.run(
                self.options.messages, self.options.per_s, random.Random(self.options.seed)
            )
        )
        try:
            await asyncio.wait(
                (publishing, chaos, *background), return_when=asyncio.FIRST_COMPLETED
            )
            _check([chaos, *background])
            publishing.result()
            published_s = time.monotonic() - begin_s
            await self._settle(chaos)
            await self._until_answered(background)
            answered_s = time.monotonic() - begin_s
            if self._account.missing:
                for site in self._sites:
                    print(await site.describe(), file=sys.stderr, flush=True)
            await asyncio.sleep(LATE_DUPLICATES_S)
        finally:
            for task in (chaos, publishing, *background):
                task.cancel()
            await asyncio.gather(chaos, publishing, *background, return_exceptions=True)
        return self._report(published_s, answered_s)

    async def _settle(self, chaos: asyncio.Task[None]) -> None:
        """End the faults, each after its repair."""
        self._ending.set()
        await chaos

    async def _until_answered(self, background: list[asyncio.Task[None]]) -> None:
        """Wait until every message has a response, or no more arrive."""
        progress_s, had = time.monotonic(), -1
        while self._account.missing:
            _check(background)
            if len(self._account.latencies_s) != had:
                progress_s, had = time.monotonic(), len(self._account.latencies_s)
            if time.monotonic() - progress_s > NO_PROGRESS_MAX_S:
                return
            await asyncio.sleep(POLL_S)

    def _report(self, published_s: float, answered_s: float) -> Report:
        account, sites = self._account, self._sites
        unexplained = [failure for site in sites for failure in site.unexplained()]
        rows: list[tuple[str, Any]] = [
            *account.rows(),
            ("messages per second", round(len(account.latencies_s) / answered_s, 1)),
            ("published within, s", round(published_s, 1)),
            ("answered within, s", round(answered_s, 1)),
            ("HTTP requests", sum(site.http_requests for site in sites)),
            ("HTTP requests that failed", sum(len(site.http_failures) for site in sites)),
            ("of these, without a reason", len(unexplained)),
            *((f"fault: {name}", count) for name, count in sorted(self._done.items())),
        ]
        faults = account.problems[:PROBLEMS_MAX_SHOWN]
        if missing := account.missing:
            faults.append(f"{len(missing)} messages without a response, such as {missing[:10]}")
        faults += [
            f"HTTP failed after {failure.end_s - failure.begin_s:.1f} s: {failure.why}"
            for failure in unexplained[:PROBLEMS_MAX_SHOWN]
        ]
        return Report(rows, faults)

    # -- faults ------------------------------------------------------------------------------------

    def _schedule(self) -> Iterator[tuple[str, str, Fault]]:
        """Random faults. The first ones are one of each name, so that short runs have them."""
        faults = list(self._faults())
        self._random.shuffle(faults)
        first = {name: (name, what, fault) for name, what, fault, _ in faults}
        yield from first.values()
        weights = [weight for *_, weight in faults]
        while True:
            ((name, what, fault, _),) = self._random.choices(faults, weights)
            yield name, what, fault

    def _faults(self) -> Iterator[tuple[str, str, Fault, int]]:
        """Each fault's name, what it breaks, how, and how often."""
        yield "broker down", "broker", self._kill_broker, 2
        yield "connections cut", "network", self._cut, 4
        yield "connections stalled", "network", self._stall, 3
        for at, site in enumerate(self._sites):
            where = f"site {at}"
            yield "messenger killed", where, site.kill_messenger, 3
            yield "messenger suspended", where, site.suspend_messenger, 1
            yield "worker killed", where, site.kill_worker, 1
            yield "engine killed", where, site.kill_engine, 1
            yield "KubeAI killed", where, site.restart_supervisor, 1

    async def _break_things(self) -> None:
        schedule = self._schedule()
        async with asyncio.TaskGroup() as group:
            while not self._ending.is_set():
                name, what, fault = next(schedule)
                seed = self._random.getrandbits(32)
                group.create_task(self._break(name, what, fault, random.Random(seed)))
                pause_s = self._random.uniform(*FAULT_PAUSES_S)
                try:
                    async with asyncio.timeout(pause_s):
                        await self._ending.wait()
                except TimeoutError:
                    continue

    async def _break(self, name: str, what: str, fault: Fault, source: random.Random) -> None:
        """One fault, unless what it breaks is already broken."""
        lock = self._locks.setdefault(what, asyncio.Lock())
        if lock.locked():
            return
        async with lock:
            print(f"{time.strftime('%X')} {name} ({what})", file=sys.stderr, flush=True)
            self._done[name] += 1
            await fault(source)

    async def _kill_broker(self, source: random.Random) -> None:
        await self._blocking(self._broker.go_down)
        await asyncio.sleep(source.uniform(0, 3))
        begin_s = time.monotonic()
        await self._blocking(self._broker.come_up)
        # Otherwise, a broker that starts slowly would be down most of the time.
        await asyncio.sleep(5 + time.monotonic() - begin_s)

    async def _cut(self, source: random.Random) -> None:
        self._proxy.cut()
        await asyncio.sleep(source.uniform(0, 4))
        self._proxy.heal()

    async def _stall(self, source: random.Random) -> None:
        self._proxy.stall()
        await asyncio.sleep(source.uniform(1, 8))
        self._proxy.heal()


def _check(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Raise if one has ended, for example because a fault could not be repaired."""
    for task in tasks:
        if task.done():
            if not task.cancelled():
                task.result()
            raise AssertionError(f"{task} has ended")


async def run(options: Options, folder: Path) -> Report:
    """Run the test in this folder."""
    return await Chaos(options, folder).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--broker", choices=DURABLE, required=True)
    parser.add_argument("--messages", type=int, default=Options._field_defaults["messages"])
    parser.add_argument("--rate", type=float, default=Options._field_defaults["per_s"])
    parser.add_argument("--seed", type=int, default=Options._field_defaults["seed"])
    given = parser.parse_args()
    options = Options(given.broker, given.messages, given.rate, given.seed)
    with tempfile.TemporaryDirectory(prefix="kubeai-chaos-") as folder:
        try:
            report = asyncio.run(run(options, Path(folder)))
        except pytest.skip.Exception as missing:
            parser.error(str(missing))
    print(f"{options.broker}, seed {options.seed}")
    print(report.table())
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
