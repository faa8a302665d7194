"""Tenants that share a saturated Model: on real workers and real connections.

``HAMMER_WAITING=10000`` has that many requests wait.
"""

import asyncio
import os

import uvloop
from fakes.fleet import Fleet
from fakes.wire import Broken, Engine, Message, Wire, answer, connect, post, until

from kubeai.routing.routes import Endpoint, Route

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}
WORKERS = 2
CAPACITY = 2
MANY = int(os.environ.get("HAMMER_WAITING", "150"))
DEADLINE_S = 30.0 + MANY / 100
TENANT = "X-Gateway-Inference-Fairness-ID"


class Busy:
    """An engine that answers one request at a time, when the test says so."""

    def __init__(self) -> None:
        self.came: list[str] = []  # tenants, in the order in which their requests came
        self._left: list[asyncio.Event] = []
        self._is_calm = False

    async def __call__(self, wire: Wire, request: Message) -> None:
        done = asyncio.Event()
        self.came.append(request.one(TENANT) or "")
        self._left.append(done)
        if not self._is_calm:
            await done.wait()
        await wire.send(answer(200, b"ok"))

    async def next(self) -> str:
        """Answer the oldest request. Returns the tenant whose request comes next."""
        came = len(self.came)
        self._left.pop(0).set()
        await until(lambda: len(self.came) > came, "the next request has come", DEADLINE_S)
        return self.came[came]

    def finish(self) -> None:
        """Answer all requests, those that are still to come too."""
        self._is_calm = True
        for done in self._left:
            done.set()


async def ask(fleet: Fleet, tenant: str) -> Wire:
    wire = await connect(fleet.port)
    await wire.send(post("/openai/v1/chat/completions", b'{"model":"m"}', f"{TENANT}: {tenant}"))
    return wire


async def test_a_replica_with_all_places_leaves_one_for_another_replicas_request(monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "error")
    busy = Busy()
    engine = await Engine(busy).start()
    route = Route("m", "VLLM", endpoints=(Endpoint("a", engine.address),), capacity=CAPACITY)
    one, other = [
        await Fleet.start([route], workers=1, identity=name, drain_accept_s=0.0)
        for name in ("one", "other")
    ]
    for fleet, peer in ((one, other), (other, one)):
        fleet.supervisor.peers._join(peer.supervisor.metrics_address)
    wires = []
    try:
        wires += [await ask(one, "many") for _ in range(20)]
        await until(lambda: held(one) == 18, "the others wait", DEADLINE_S)
        row = other.supervisor.publisher.row("m")
        seen = other.supervisor.table
        await until(lambda: seen.in_flight(row) == CAPACITY, "the other replica knows", DEADLINE_S)
        wires.append(await ask(other, "one"))
        queues, row = one.supervisor.queues, one.supervisor.publisher.row("m")
        await until(lambda: queues.best(row) == 1, "its request is known", DEADLINE_S)
        # The next place; or a later one if this machine takes longer than the place is left free.
        assert "one" in [await busy.next() for _ in range(3)]
    finally:
        busy.finish()
        for wire in wires:
            wire.close()
        await one.close()
        await other.close()
        await engine.stop()


async def status(wire: Wire) -> int:
    """Of the answer; 0: the connection broke."""
    try:
        return (await wire.answer()).status
    except Broken:
        return 0


def held(fleet: Fleet) -> int:
    return fleet.counts().get("held m", 0)


async def test_waiting_requests_delay_another_tenants_by_one_service(monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "error")
    busy = Busy()
    engine = await Engine(busy).start()
    route = Route("m", "VLLM", endpoints=(Endpoint("a", engine.address),), capacity=CAPACITY)
    fleet = await Fleet.start([route], workers=WORKERS, hold_max_requests=MANY, drain_accept_s=0.0)
    wires = []
    try:
        wires += [await ask(fleet, "many") for _ in range(MANY)]
        await until(lambda: held(fleet) == MANY - CAPACITY, "the others wait", DEADLINE_S)
        assert fleet.counts()["in flight m"] == CAPACITY
        for number in range(6):
            waiting = held(fleet)
            wires.append(await ask(fleet, f"one-{number}"))
            await until(lambda w=waiting: held(fleet) == w + 1, "it waits too", DEADLINE_S)
            # First come, first served, hundreds would come before it.
            assert await busy.next() == f"one-{number}"
            assert fleet.counts()["in flight m"] == CAPACITY
            await busy.next()
        # A killed worker's places are free again, and its queue holds up nobody.
        assert fleet.kill(0)
        busy.finish()
        answers = await asyncio.gather(*map(status, wires))
        assert set(answers) == {200, 0}
        assert answers.count(200) > MANY / WORKERS
        await until(lambda: not fleet.counts(), "nothing is left", DEADLINE_S)
    finally:
        for wire in wires:
            wire.close()
        await fleet.close()
        await engine.stop()
