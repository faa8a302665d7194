"""Tenants that share a saturated Model, and its fallback: on real workers and real connections.

``HAMMER_WAITING=10000`` has that many requests wait.
"""

import asyncio
import hashlib
import os

import uvloop
from fakes.fleet import Fleet
from fakes.wire import Broken, Engine, Message, Wire, answer, connect, post, until

from kubeai.api.api_key import ApiKey
from kubeai.routing.routes import Endpoint, Route

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}
WORKERS = 2
CAPACITY = 2
MANY = int(os.environ.get("HAMMER_WAITING", "150"))
DEADLINE_S = 30.0 + MANY / 100
TENANT = "X-Gateway-Inference-Fairness-ID"
MARK = "X-Mark"  # says which key a request had, because engines do not see keys


class Busy:
    """An engine that answers one request at a time, when the test says so."""

    def __init__(self) -> None:
        self.came: list[str] = []  # tenants, in the order in which their requests came
        self._left: list[asyncio.Event] = []
        self._is_calm = False

    async def __call__(self, wire: Wire, request: Message) -> None:
        done = asyncio.Event()
        self.came.append(request.one(MARK) or request.one(TENANT) or "")
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
        assert answers.count(200) > MANY / WORKERS / 2  # connections are not spread evenly
        await until(lambda: not fleet.counts(), "nothing is left", DEADLINE_S)
    finally:
        for wire in wires:
            wire.close()
        await fleet.close()
        await engine.stop()


def key(name: str, tenant: str, **fields: int) -> ApiKey:
    return ApiKey(name, hashlib.sha256(f"sk-{name}".encode()).digest(), tenant, **fields)


async def ask_as(fleet: Fleet, name: str) -> Wire:
    """Send a request with a key, which the client says belongs to another tenant."""
    lines = f"{MARK}: {name}", f"Authorization: Bearer sk-{name}", f"{TENANT}: urgent"
    wire = await connect(fleet.port)
    await wire.send(post("/openai/v1/chat/completions", b'{"model":"m"}', *lines))
    return wire


async def test_keys_have_their_tenant_and_priority_in_the_queue_of_all_workers(monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "error")
    busy = Busy()
    engine = await Engine(busy).start()
    keys = [
        key("many-1", "many"),
        key("many-2", "many"),
        key("one", "one"),
        key("urgent", "urgent", priority=10),
        key("batch", "batch", priority=-10),
    ]
    route = Route("m", "VLLM", endpoints=(Endpoint("a", engine.address),), capacity=1)
    fleet = await Fleet.start([route], workers=WORKERS, keys=keys)
    wires = []
    try:
        order = ["many-1", "batch", *["many-1", "many-2"] * 4, "one", "one", "urgent", "urgent"]
        for waiting, name in enumerate(order):
            wires.append(await ask_as(fleet, name))
            if waiting:
                await until(lambda n=waiting: held(fleet) == n, "it waits", DEADLINE_S)
            else:
                await until(lambda: busy.came, "it is served", DEADLINE_S)
        came = [await busy.next() for _ in order[1:]]
        assert came[:2] == ["urgent"] * 2
        assert came[-1] == "batch"
        # The two keys of a tenant share its turns.
        fair = [name.partition("-")[0] for name in came[2:-1]]
        assert [at for at, name in enumerate(fair) if name == "one"] in ([0, 2], [0, 1])
        busy.finish()
        assert [await status(wire) for wire in wires] == [200] * len(order)
        await until(lambda: not fleet.counts(), "nothing is left", DEADLINE_S)
    finally:
        for wire in wires:
            wire.close()
        await fleet.close()
        await engine.stop()


async def test_a_saturated_models_requests_fill_its_fallback_and_then_wait(monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "error")
    scripts = {"m": Busy(), "f": Busy()}
    engines = {name: await Engine(busy).start() for name, busy in scripts.items()}
    routes = [
        Route(
            name,
            "VLLM",
            endpoints=(Endpoint(name, engines[name].address),),
            capacity=CAPACITY,
            fallbacks=("f",) if name == "m" else (),
            wait_before_fallback_s=0.0,
        )
        for name in scripts
    ]
    fleet = await Fleet.start(routes, workers=WORKERS)
    wires = []
    try:
        wires += [await ask(fleet, f"{number % 3}") for number in range(40)]
        await until(lambda: held(fleet) == 40 - 2 * CAPACITY, "the others wait", DEADLINE_S)
        counts = fleet.counts()
        assert (counts["in flight m"], counts["in flight f"]) == (CAPACITY, CAPACITY)
        assert counts["active m"] == 40 - CAPACITY
        for wire in wires[::4]:  # some leave, among them perhaps those that are served
            wire.reset()
        await until(lambda: fleet.counts()["active, all"] <= 30, "they are gone", DEADLINE_S)
        assert fleet.kill(0)
        for busy in scripts.values():
            busy.finish()
        left = [wire for at, wire in enumerate(wires) if at % 4]
        answers = await asyncio.gather(*map(status, left))
        assert set(answers) <= {200, 0}
        assert 200 in answers
        await until(lambda: not fleet.counts(), "nothing is left", DEADLINE_S)
    finally:
        for wire in wires:
            wire.close()
        await fleet.close()
        for engine in engines.values():
            await engine.stop()
