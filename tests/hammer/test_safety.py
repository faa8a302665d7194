"""The supervisor's and workers' guarantees under failure, on real processes."""

import asyncio
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop
from fakes.fleet import Fleet
from fakes.wire import (
    CHUNKED,
    WAIT_S,
    Broken,
    Engine,
    Message,
    Wire,
    answer,
    chunk,
    connect,
    post,
    says,
    until,
)

from kubeai.routing.routes import Endpoint, Route

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}
STREAM = b'{"model":"m","stream":true}'


class Streams:
    """An engine that begins each stream, and ends it when told to."""

    async def start(self) -> Engine:
        self.go_on = asyncio.Event()
        self.engine = await Engine(self._script).start()
        return self.engine

    async def _script(self, wire: Wire, request: Message) -> None:
        if request.body != STREAM:
            await wire.send(answer(200, b"here"))
            return
        await wire.send(CHUNKED + chunk(b"1"))
        await self.go_on.wait()
        await wire.send(chunk(b"2") + b"0\r\n\r\n")


@pytest.fixture
async def streams():
    streams = Streams()
    engine = await streams.start()
    yield streams
    await engine.stop()


@pytest.fixture
async def start(streams, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "error")
    fleets = []

    async def start(workers: int, **gateway: Any) -> Fleet:
        route = Route("m", "VLLM", endpoints=(Endpoint("pod-0", streams.engine.address),))
        fleets.append(await Fleet.start([route], workers=workers, **gateway))
        return fleets[-1]

    yield start
    for fleet in fleets:
        await fleet.close()


async def open_streams(port: int, count: int) -> list[tuple[Wire, Message]]:
    opened = []
    for _ in range(count):
        wire = await connect(port)
        await wire.send(post(body=STREAM))
        opened.append((wire, await wire.head()))
    return opened


async def get(address: str, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{address}{path}") as got:
        return got.status, await got.text()


async def test_drain_completes_every_stream_and_serves_late_requests(start, streams):
    fleet = await start(2, drain_accept_s=3.0, drain_timeout_s=20.0)
    opened = await open_streams(fleet.port, 50)
    assert fleet.counts()["active m"] == 50
    health = fleet.supervisor.health_address
    assert (await get(health, "/readyz"))[0] == 200

    fleet.supervisor.stop()  # what SIGTERM does
    began_s = time.monotonic()
    while (await get(health, "/readyz"))[0] == 200:
        assert time.monotonic() < began_s + WAIT_S
    late = 0
    while not late or time.monotonic() < began_s + 0.6:
        try:
            wire = await connect(fleet.port)  # fresh: those that are open may be closed
            await wire.send(post())
            answered = await wire.answer()
        except (Broken, ConnectionError):
            assert time.monotonic() > began_s + 3.0, "it does not accept any more, and too early"
            break
        assert (answered.status, answered.body) == (200, b"here")
        late += answered.one("connection") == "close"
        wire.close()
    assert late > 0

    async def refused() -> bool:
        try:
            (await connect(fleet.port)).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # it closed just then
            return False
        return False

    while not await refused():
        assert time.monotonic() < began_s + WAIT_S
    streams.go_on.set()
    for wire, head in opened:
        assert (await wire.body(head)).body == b"12"
        wire.close()


async def test_a_killed_worker_takes_only_its_own_requests_with_it(start, streams):
    fleet = await start(2, drain_accept_s=0.0, drain_timeout_s=2.0)
    opened = await open_streams(fleet.port, 40)
    pids = fleet.pids
    assert fleet.kill(0)
    await until(lambda: fleet.counts().get("active m", 0) < 40, "its column is cleared")
    left = fleet.counts()["active m"]
    assert 0 < left < 40
    # New connections may wait in the dead worker's queue; its successor answers them.
    wires = [await connect(fleet.port) for _ in range(20)]
    for wire in wires:
        await wire.send(post())
    assert {(await wire.answer()).body for wire in wires} == {b"here"}
    await until(lambda: fleet.ready and fleet.pids != pids, "it is replaced")
    streams.go_on.set()
    whole = 0
    for wire, head in opened:
        with contextlib.suppress(Broken):
            whole += (await wire.body(head)).body == b"12"
        wire.close()
    assert whole == left
    for wire in wires:
        wire.close()
    await until(lambda: not fleet.counts(), "0")


async def test_an_endpoint_ejected_by_one_worker_is_ejected_for_all_and_their_successors(start):
    """A worker that has seen no failure itself learns of it from the load table."""

    async def fail(wire: Wire, request: Message) -> None:
        await wire.send(answer(503))

    engines = [await Engine(fail).start(), await Engine(says(b"good")).start()]
    bad, good = engines
    fleet = await start(2, eject_after_failures=2, eject_time_s=600.0, retries=1)
    endpoints = (Endpoint("bad", bad.address), Endpoint("good", good.address))
    fleet.route("n", Route("n", "VLLM", endpoints=endpoints))

    async def ask(wire: Wire) -> bytes:
        await wire.send(post(body=b'{"model":"n"}'))
        return (await wire.answer()).body

    one = await connect(fleet.port)  # always the same worker
    while await ask(one) != b"good":
        pass  # the route has to reach it first
    for _ in range(6):
        assert await ask(one) == b"good"
    assert len(bad.requests) == 2

    async def ask_all() -> set[bytes]:
        """Over connections enough that each of two workers has some, but for one time in 2^23."""
        wires = [await connect(fleet.port) for _ in range(24)]
        found = {await ask(wire) for wire in wires}
        for wire in wires:
            wire.close()
        return found

    assert await ask_all() == {b"good"}
    one.close()
    for column in range(2):
        pids = fleet.pids
        assert fleet.kill(column)
        await until(lambda: fleet.ready and fleet.pids != pids, "it is replaced")  # noqa: B023
    assert await ask_all() == {b"good"}
    assert len(bad.requests) == 2
    for engine in engines:
        await engine.stop()


async def test_unknown_model_names_leave_no_memory_or_series(start):
    fleet = await start(1, drain_accept_s=0.0)
    (pid,) = fleet.pids
    wire = await connect(fleet.port)

    async def ask(first: int, count: int) -> None:
        for number in range(first, first + count):
            await wire.send(post(body=json.dumps({"model": f"none-{number}" + "x" * 900}).encode()))
            assert (await wire.answer()).status == 404

    def memory_bytes() -> int:
        statm = Path(f"/proc/{pid}/statm").read_text()
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    async def series() -> set[str]:
        _, text = await get(fleet.supervisor.metrics_address, "/metrics")
        return {line.rpartition(" ")[0] for line in text.splitlines() if line.startswith("kubeai")}

    await ask(0, 1000)
    series_before, memory_before = await series(), memory_bytes()
    await ask(1000, 4000)  # 4 MB of names
    assert await series() == series_before
    assert memory_bytes() < memory_before + (1 << 20)
    wire.close()
