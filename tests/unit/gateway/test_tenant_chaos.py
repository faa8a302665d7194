"""Queues, fallbacks, canaries, aliases, keys and limits together, at random.

Clients leave, engines fail, replicas come and go, and keys are revoked. Each client that stays gets
one complete response, from a Model that may answer; then nothing is counted any more.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections import Counter

import pytest
import uvloop
from fakes.api_keys import ask as ask_with
from fakes.api_keys import bearer, change, give, keyed, record
from fakes.chats import CHAT
from fakes.wire import CHUNKED, Broken, Engine, Message, Wire, answer, chunk, post
from fakes.world import World

from kubeai._counts import live
from kubeai._key_table import KeyTable
from kubeai.routing.keys import KeyRecord
from kubeai.routing.routes import Block

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # the event loop of the workers
HOLD_S = 0.3
ANSWER_S = 20.0  # far beyond all waits: what takes longer hangs
TENANTS = ("high", "usual", "few", "low")
# Which Models may answer for which.
ANSWERERS = {"m": {"m", "f", "cold", "next"}, "f": {"f"}, "cold": {"cold", "m"}, "next": {"next"}}
ALIASES = {"org/m:1": "m", "gpt_f": "f"}
CAPACITY = {"m": 2, "f": 1, "cold": 2, "next": 1}
FIELDS = {
    "m": {
        "fallbacks": ("f", "cold"),
        "canary": "next",
        "canary_percent": 50,
        "aliases": ("org/m:1",),
    },
    "f": {"aliases": ("gpt_f",)},
    "cold": {"fallbacks": ("m",)},
    "next": {},
}
STATUSES = {200, 404, 429, 500, 502, 503, 504}


def code_of(body: bytes) -> str:
    error = json.loads(body)["error"]
    return error if isinstance(error, str) else str(error["code"])


class Chaos:
    """Random events, reproducible by seed but for the times at which they happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.world: World
        self.engines: dict[str, list[Engine]] = {}
        self.records: dict[str, KeyRecord] = {}
        self.revocations: dict[str, int] = dict.fromkeys(TENANTS, 0)
        self.is_calm = False
        self.faults: list[object] = []  # that engines have seen
        self.seen: Counter[str] = Counter()  # statuses, or the codes of errors

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    # -- engines -----------------------------------------------------------------------------------

    def script(self, model: str):
        async def script(wire: Wire, request: Message) -> None:
            loads = self.world.endpoint_loads(model)
            body = json.loads(request.body)
            if max(loads.values(), default=0) > CAPACITY[model] or body["model"] != model:
                self.faults.append((model, loads, body))
            await asyncio.sleep(self.random.random() * 0.02)
            what = 9 if self.is_calm else self.random.randrange(10)
            if what == 0:
                self.random.choice([wire.close, wire.reset])()
            elif what < 3:
                status = self.random.choice([500, 503, 400, 404])
                await wire.send(answer(status, b'{"error":"x"}', "Content-Type: application/json"))
            elif body.get("stream"):
                said = json.dumps({"model": model, "by": model}).encode()
                await wire.send(CHUNKED + chunk(b"data: %b\n\n" % said))
                await asyncio.sleep(0)
                await wire.send(chunk(b"data: [DONE]\n\n") + chunk(b""))
            else:
                said = json.dumps({"model": model, "by": model}).encode()
                await wire.send(answer(200, said, "Content-Type: application/json"))

        return script

    # -- the cluster -------------------------------------------------------------------------------

    def route(self, model: str, count: int, **more) -> None:
        chosen = dict(enumerate(self.engines[model][:count]))
        self.world.route(
            model,
            {f"{model}-{number}": engine for number, engine in chosen.items()},
            capacity=CAPACITY[model],
            wait_before_fallback_s=self.random.choice([0.0, 0.0, 0.02, 0.1]),
            **FIELDS[model],
            **more,
        )

    async def events(self) -> None:
        while True:
            await asyncio.sleep(self.random.random() * 0.02)
            model = self.random.choice(list(FIELDS))
            what = self.random.randrange(8)
            self.world.publisher.reclaim([self.world.table.version])  # so that rows are reused
            if what == 0 and model == "f":
                self.world.unroute(model)
                await asyncio.sleep(0.005)
                self.route(model, 1)
            elif what == 1:
                name = self.random.choice(TENANTS)
                self.revocations[name] += 1
                change(self.world, name, None)
                await asyncio.sleep(0.005)
                change(self.world, name, self.records[name])
            elif what == 2:
                self.route(model, 0, block=Block("OutOfMemory", "no memory", 0.0))
            else:
                self.route(model, self.random.randrange(3))

    # -- clients -----------------------------------------------------------------------------------

    async def client(self) -> None:
        for _ in range(10):
            wire = await self.world.client()
            try:
                while await self.exchange(wire):
                    pass
            finally:
                self.random.choice([wire.close, wire.reset])()

    async def exchange(self, wire: Wire) -> bool:
        """One request; returns whether another may follow on the connection."""
        tenant = self.random.choice(TENANTS)
        asked = self.random.choice([*FIELDS, "m", "m", *ALIASES])
        streams = self.chance(0.4)
        prompt = [{"role": "user", "content": str(self.random.randrange(30))}]
        body = json.dumps({"model": asked, "stream": streams, "messages": prompt}).encode()
        headers = [bearer(f"sk-{tenant}")]
        if self.chance(0.2):
            headers.append("X-Label-Selector: ")  # the slow path
        request = post(CHAT, body, *headers)
        if self.chance(0.1):
            await wire.send(request[: self.random.randrange(len(request))])
            await asyncio.sleep(self.random.random() * 0.02)
            return False
        revocations = self.revocations[tenant]
        await wire.send(request)
        if self.chance(0.3):  # while it waits, while its turn comes, or while it is served
            await asyncio.sleep(self.random.random() * 0.1)
            return False
        try:
            async with asyncio.timeout(ANSWER_S):
                answered = await wire.answer()
        except (Broken, ConnectionError):
            assert self.revocations[tenant] != revocations, "cut without a reason"
            return False
        self.check(answered, tenant, asked, revocations)
        return self.chance(0.6) and answered.one("connection") != "close"

    def check(self, answered: Message, tenant: str, asked: str, revocations: int) -> None:
        status = answered.status
        self.seen[str(status) if status == 200 else code_of(answered.body)] += 1
        if status == 401:
            assert self.revocations[tenant] > 0
            return
        assert status in STATUSES | {400}, answered
        if status != 200:
            return
        text = answered.body
        if (answered.one("content-type") or "").startswith("text/event-stream"):
            events = [line[6:] for line in text.split(b"\n") if line.startswith(b"data: ")]
            said = json.loads(events[0])
            if "error" in said:
                return
            assert events.count(b"[DONE]") == 1, text
        else:
            said = json.loads(text)
        assert said["model"] == asked
        model = ALIASES.get(asked, asked)
        assert said["by"] in ANSWERERS[model]
        if said["by"] != model:
            self.seen["another Model"] += 1
        named = answered.one("x-kubeai-model")
        if b": " not in text.split(b"data:")[0]:  # the head was written before it was known
            assert named == (None if said["by"] == model else said["by"])


SEEDS = range(int(os.environ.get("CHAOS_SEEDS", "2")))


@pytest.mark.parametrize("seed", SEEDS)
async def test_each_request_gets_one_response_and_nothing_stays_counted(start, seed):
    before = live()
    chaos = Chaos(seed)
    table = KeyTable.create(8, 1)
    rows = {name: (row, table.open_row(row)) for row, name in enumerate(TENANTS)}
    fields = {"high": {"priority": 10}, "few": {"in_flight_max": 3}, "low": {"priority": -5}}
    chaos.records = {
        name: record(name, f"sk-{name}", row=row, generation=generation, **fields.get(name, {}))
        for name, (row, generation) in rows.items()
    }
    world = chaos.world = await keyed(
        start,
        *chaos.records.values(),
        hold_timeout_s=HOLD_S,
        hold_max_requests=8,
        hold_comment_after_s=0.03,
        hold_comment_interval_s=0.02,
        eject_time_s=0.05,
        retries=2,
    )
    world.context.limits = KeyTable.attach(table.fd, 0)
    for model in FIELDS:
        chaos.engines[model] = [await world.engine(chaos.script(model)) for _ in range(2)]
        chaos.route(model, 0 if model == "cold" else 2)
    events = asyncio.create_task(chaos.events())
    try:
        async with asyncio.TaskGroup() as clients:
            for _ in range(16):
                clients.create_task(chaos.client())
    finally:
        assert not events.done(), events.exception()
        events.cancel()
    # What comes next is served at once.
    chaos.is_calm = True
    for model in FIELDS:
        chaos.route(model, 2)
    give(world, *chaos.records.values())
    await world.at_rest()
    for model in FIELDS:
        wire = await world.client()
        async with asyncio.timeout(ANSWER_S):
            body = json.dumps({"model": model}).encode()
            answered = await ask_with(wire, bearer("sk-usual"), body=body)
        assert answered.status == 200, (model, answered)
    await world.at_rest()
    for model in FIELDS:
        routed = world.table.find(model)
        assert routed is not None
        assert not routed.queue
        assert world.queues.head(world.publisher.row(model), 0) == 0
    assert not world.context._held
    assert live() == before
    for name, (row, _) in rows.items():
        assert table.use(row).in_flight == 0, name
    assert not chaos.faults
    assert chaos.seen["200"] > 50
    assert chaos.seen["another Model"] > 0
    world.context.limits.close()
    world.context.limits = None
    table.close()
