"""Requests that end at every possible point, on workers that are being killed.

Four worker processes under the real supervisor; 2,000 requests, nearly all of them aborted, by
the client or by the engine, with FIN or RST; SIGKILLs for workers meanwhile. When the last request
is over, every count is 0 within two seconds, the engines have been let go, and no answer was
another request's or looked whole without being so.

``HAMMER_SEEDS=20`` runs seeds 0 to 19 (``make soak``), ``HAMMER_FIRST_SEED=7`` begins with that.
"""

import asyncio
import json
import os
import random
import zlib

import pytest
import uvloop
from fakes.fleet import Fleet
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, connect, until

from kubeai.routing.routes import Endpoint, Route

LOOP_FACTORIES = {"uvloop": uvloop.new_event_loop}  # quick enough to be both ends of it all

WORKERS = 4
REQUESTS = 2000
CLIENTS = 96  # at a time
KILLS = 5
SETTLE_S = 2.0
FIRST_SEED = int(os.environ.get("HAMMER_FIRST_SEED", "0"))
SEEDS = range(FIRST_SEED, FIRST_SEED + int(os.environ.get("HAMMER_SEEDS", "1")))

# Where an engine ends an exchange: before it has read anything, and so on to a whole answer.
ENGINE_PHASES = [
    "accept",
    "request head",
    "request body",
    "silent",
    "status line",
    "answer head",
    "answer body",
    "mid-stream",
    "whole",
    "whole stream",
]
# Where a client does; it stays for what the engine does to it, most of the time.
CLIENT_PHASES = ["head", "body", "sent", "waiting", "held", "mid-stream", "half-closed"]


def seal(text: str) -> bytes:
    """The checksum that ends an answer, so that a truncated one is detected."""
    return f"{text} {zlib.crc32(text.encode()):08x}".encode()


def is_sealed(data: bytes, tag: int) -> bool:
    text, _, crc = data.decode().rpartition(" ")
    return text.startswith(f"{tag} ") and crc == f"{zlib.crc32(text.encode()):08x}"


class Engines:
    """Four engines that break off at random; ``calm``: they do not."""

    def __init__(self, source: random.Random) -> None:
        self.random = source
        self.calm = False
        self.at_work = 0  # connections with a request that is not answered
        self.fates = dict.fromkeys(ENGINE_PHASES, 0)

    async def start(self) -> list[Endpoint]:
        self._tasks: set[asyncio.Task] = set()
        self._servers = [
            await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=1 << 20, backlog=1024)
            for _ in range(4)
        ]
        ports = [server.sockets[0].getsockname()[1] for server in self._servers]
        return [Endpoint(f"pod-{i}", f"127.0.0.1:{port}") for i, port in enumerate(ports)]

    async def stop(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        wire = Wire(reader, writer)
        try:
            fresh = True
            while await self._exchange(wire, fresh):
                fresh = False
        except (Broken, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _exchange(self, wire: Wire, fresh: bool) -> bool:
        phase = "accept" if fresh and self.random.random() < 0.1 and not self.calm else ""
        if not phase:
            head = await wire.head()
            phase = "whole" if self.calm else self.random.choice(ENGINE_PHASES[1:])
        self.fates[phase] += 1
        self.at_work += 1
        try:
            if await self._answer(wire, phase, head if phase != "accept" else None):
                return True
            self.random.choice([wire.close, wire.reset])()
            return False
        finally:
            self.at_work -= 1

    async def _answer(self, wire: Wire, phase: str, request: Message | None) -> bool:
        if request is None or phase == "request head":
            return False
        if phase == "request body":
            await wire.reader.read(self.random.randrange(1, 50_000))
            return False
        await wire.body(request)
        tag = json.loads(request.body)["tag"]
        if phase == "silent":
            await wire.reader.read()  # until the gateway has had enough
            return False
        words = "x" * self.random.randrange(40_000)
        whole = answer(200, seal(f"{tag} {words}"))
        if phase in ("status line", "answer head", "answer body"):
            head_bytes = whole.index(b"\r\n\r\n") + 4
            least, most = {
                "status line": (0, 12),
                "answer head": (12, head_bytes),
                "answer body": (head_bytes, len(whole)),
            }[phase]
            await wire.send(whole[: self.random.randrange(least, most)])
            await asyncio.sleep(self.random.random() * 0.02)
            return False
        if phase == "whole":
            await wire.send(whole)
            return True
        events = [chunk(b"%d %s" % (tag, words.encode()))]
        events += [chunk(b"y" * self.random.randrange(1, 3000)) for _ in range(10)]
        text = f"{tag} {words}" + "".join("y" * (len(e.split(b"\r\n")[1])) for e in events[1:])
        events.append(chunk(seal(text)[len(text) :]))
        await wire.send(CHUNKED)
        stop = self.random.randrange(len(events)) if phase == "mid-stream" else len(events)
        for event in events[:stop]:
            await wire.send(event)
            await asyncio.sleep(0)
        if phase == "mid-stream":
            await wire.send(b"3\r\nyy"[: self.random.randrange(6)])
            return False
        await wire.send(b"0\r\n\r\n")
        return True


class Hammer:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.engines = Engines(self.random)
        self.tag = 0
        self.kills = 0
        self.seen = {"whole": 0, "refused": 0, "broken": 0, "left": 0}

    async def run(self) -> None:
        endpoints = tuple(await self.engines.start())
        routes = [
            Route("hashed", "VLLM", strategy="PrefixHash", endpoints=endpoints),
            Route("least", "VLLM", endpoints=endpoints),
            Route("cold", "VLLM"),
        ]
        fleet = await Fleet.start(
            routes,
            workers=WORKERS,
            first_byte_timeout_s=0.3,
            retry_budget_min=REQUESTS,  # retries are to be hammered too
            between_bytes_timeout_s=0.5,
            drain_accept_s=0.0,
            drain_timeout_s=2.0,
        )
        try:
            killer = asyncio.create_task(self._kill(fleet))
            async with asyncio.timeout(90):
                await asyncio.gather(*(self._client(fleet.port) for _ in range(CLIENTS)))
            killer.cancel()
            await self._settles(fleet)
            await self._still_serves(fleet)
        finally:
            await fleet.close()
            await self.engines.stop()

    async def _settles(self, fleet: Fleet) -> None:
        try:
            await until(lambda: not fleet.counts(), "every count is 0", SETTLE_S)
        except AssertionError:
            raise AssertionError(f"still counted after {SETTLE_S} s: {fleet.counts()}") from None
        await until(lambda: not self.engines.at_work, "the engines are let go", SETTLE_S)
        assert self.kills >= 3
        assert min(self.seen.values()) > 0, self.seen  # how many depends on the machine
        assert min(self.engines.fates.values()) > 20, self.engines.fates

    async def _still_serves(self, fleet: Fleet) -> None:
        self.engines.calm = True
        await until(lambda: fleet.ready, "every worker is back", 20)
        whole = self.seen["whole"]
        for _ in range(4 * WORKERS):
            await self._request(fleet.port, None)
        assert self.seen["whole"] == whole + 4 * WORKERS
        await until(lambda: not fleet.counts(), "0 again", SETTLE_S)

    async def _kill(self, fleet: Fleet) -> None:
        for number in range(1, KILLS + 1):  # spread over the requests, however fast they go
            due = number * REQUESTS // (KILLS + 1)
            await until(lambda due=due: self.tag >= due, f"{due} requests", 90)
            await until(lambda: fleet.kill(self.random.randrange(WORKERS)), "one to kill", 20)
            self.kills += 1

    async def _client(self, port: int) -> None:
        while self.tag < REQUESTS:
            leaves = self.random.choice(CLIENT_PHASES) if self.random.random() < 0.6 else None
            await self._request(port, leaves)

    async def _request(self, port: int, leaves: str | None) -> None:
        self.tag += 1
        try:
            wire = await connect(port)
        except ConnectionError:
            self.seen["broken"] += 1
            return
        try:
            async with asyncio.timeout(20):
                what = await self._ask(wire, self.tag, leaves)
        except (Broken, ConnectionError):
            what = "broken"
        self.seen[what] += 1
        if what == "left":
            self.random.choice([wire.close, wire.reset])()
        wire.close()

    async def _ask(self, wire: Wire, tag: int, leaves: str | None) -> str:
        model = "cold" if leaves == "held" else self.random.choice(["hashed", "least"])
        size = self.random.choice([10, 1000, 200_000])
        body = json.dumps({"model": model, "tag": tag, "prompt": "p" * size}).encode()
        head = b"POST /openai/v1/completions HTTP/1.1\r\nHost: h\r\n"
        head += b"Content-Length: %d\r\n\r\n" % len(body)
        if leaves == "head":
            await wire.send(head[: self.random.randrange(len(head))])
        elif leaves == "body":
            await wire.send(head, body[: self.random.randrange(len(body))])
        else:
            await wire.send(head, body)
        if leaves in ("head", "body", "waiting", "held"):
            await asyncio.sleep(self.random.random() * 0.05)
        if leaves == "half-closed":
            wire.writer.write_eof()
        if leaves == "mid-stream":
            await wire.reader.read(self.random.randrange(1, 5000))
        if leaves is not None:
            return "left"
        answered = await wire.answer()
        if answered.status != 200:
            assert answered.status in (502, 504), answered
            return "refused"
        assert is_sealed(answered.body, tag), f"not the whole answer to {tag}: {answered}"
        return "whole"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("seed", SEEDS)
async def test_every_count_returns_to_zero_wherever_a_request_ends(seed, capfd, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "error")  # failed attempts are no news here
    try:
        await Hammer(seed).run()
    finally:
        _, log = capfd.readouterr()
        print(log[-5000:])
        print(f"HAMMER_FIRST_SEED={seed}")
    for line in ("Traceback", "an exchange failed", "cleanup failed"):
        assert line not in log, log[log.index(line) - 200 :][:4000]
