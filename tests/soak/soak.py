"""Run mixed load on real workers while engines die, stall and reset: ``make soak``.

    SOAK_SECONDS=60 python tests/soak/soak.py

Two workers run under the real supervisor, with three engine processes, one of which is killed
every few seconds and restarted. The load consists of streamed and non-streamed chats, prompts of
400 KB, audio uploads, requests for a model at zero replicas, and clients that disconnect. Every
response ends with a checksum of its content. The run passes if

- no truncated response looked complete, and none was truncated without a reason;
- every count in the load table is 0 within two seconds of the end;
- no worker was replaced, and none logged a fault;
- the workers' memory grew by at most ``GROWTH_MAX_SHARE`` from the end of the warm-up (a quarter of
  the time) to the last quarter, and they hold no more descriptors than idle connections need.

``SOAK_SEED`` repeats a run's random choices, but not its timing.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1]))

from fakes.fleet import Fleet
from fakes.wire import CHUNKED, Broken, Message, Wire, answer, chunk, connect, until
from stalls import Stalls

from kubeai.routing.routes import Endpoint, Route

WORKERS = 2
ENGINES = 3
CLIENTS = 32
BETWEEN_BYTES_S = 1.0
STALL_S = 2.5  # longer than the gateway's timeout
KILL_EVERY_S = 5.0
GROWTH_MAX_SHARE = 0.10
GROWTH_SLACK_BYTES = 4 << 20
SETTLE_S = 2.0
LOCAL_ROUTES_IDLE_MAX = 64
FAULTS = ["reset", "fin", "stall", "no answer", "500"]
WANTED = re.compile(rb"tag-(\d+)-(\w+)-(\d+)-([\w ]+)-")


def seal(text: bytes) -> bytes:
    return text + b" %08x" % zlib.crc32(text)


def is_sealed(data: bytes, tag: int) -> bool:
    return data.startswith(b"%d " % tag) and seal(data[:-9]) == data


# -- an engine -------------------------------------------------------------------------------------


async def answer_one(wire: Wire, request: Message) -> bool:
    """Respond as the request's tag says; returns whether to keep the connection."""
    tag, style, size, fault = WANTED.search(request.body).groups()
    size, fault = int(size), fault.decode()
    body = seal(b"%d " % int(tag) + b"w" * size)
    if fault == "500":
        await wire.send(answer(500, b"{}"))
        return True
    if fault == "no answer":
        wire.reset()
        return False
    stop = len(body) if fault == "none" else random.randrange(len(body))
    if style == b"whole":
        await wire.send(answer(200, body)[: len(answer(200, body)) - (len(body) - stop)])
    else:
        await wire.send(CHUNKED)
        step = max(1, size // 20)
        for at in range(0, stop, step):
            await wire.send(chunk(body[at : min(at + step, stop)]))
            await asyncio.sleep(0.002)
        if fault == "none":
            await wire.send(b"0\r\n\r\n")
    if fault == "none":
        return True
    if fault == "stall":
        await asyncio.sleep(STALL_S)
    (wire.reset if fault == "reset" else wire.close)()
    return False


async def run_engine(port: int) -> None:
    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        wire = Wire(reader, writer)
        with suppress(Broken, ConnectionError):
            while await answer_one(wire, await wire.request()):
                pass
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", port, limit=1 << 20, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


class Engine:
    """An engine process, which is restarted on the same port."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.port = 0

    async def start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            __file__,
            "--engine",
            str(self.port),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self.port = int(await self._process.stdout.readline())

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(f"pod-{self.number}", f"127.0.0.1:{self.port}")

    async def kill(self) -> None:
        if self._process.returncode is None:  # the run may end between a kill and a restart
            self._process.send_signal(signal.SIGKILL)
        await self._process.wait()


# -- the load --------------------------------------------------------------------------------------


class Soak:
    def __init__(self, seconds: float, seed: int) -> None:
        self.seconds = seconds
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[list[int]] = []  # per second and worker
        self.last_death_s = 0.0
        self.stalls = Stalls()  # the engines may have stood still as well, beyond the timeout
        self.tag = 0
        self.engines = [Engine(number) for number in range(ENGINES)]

    async def run(self) -> None:
        for engine in self.engines:
            await engine.start()
        self.fleet = await Fleet.start(
            self._routes(),
            workers=WORKERS,
            demanded=self._demanded,
            hold_timeout_s=20.0,
            first_byte_timeout_s=5.0,
            between_bytes_timeout_s=BETWEEN_BYTES_S,
            drain_accept_s=0.0,
            drain_timeout_s=2.0,
        )
        try:
            await self._load()
        finally:
            await self.fleet.close()
            for engine in self.engines:
                await engine.kill()

    async def _load(self) -> None:
        pids = self.fleet.pids
        files = [descriptors(pid) for pid in pids]
        self.ends_s = time.monotonic() + self.seconds
        others = [asyncio.create_task(each) for each in (self._kill(), self._watch(pids))]
        async with self.stalls.watched():
            await asyncio.gather(*(self._client() for _ in range(CLIENTS)))
        for task in others:
            task.cancel()
        ends = await asyncio.gather(*others, return_exceptions=True)
        self.wrong += [
            f"internal error of the soak test: {end!r}"
            for end in ends
            if not isinstance(end, asyncio.CancelledError)
        ]
        try:
            await until(lambda: not self.fleet.counts(), "", SETTLE_S)
        except AssertionError:
            self.wrong.append(f"still counted after {SETTLE_S} s: {self.fleet.counts()}")
        if self.fleet.pids != pids:
            self.wrong.append("a worker died")
            return
        try:
            # Idle upstream connections close after 4 s. A connection to the local routes has both
            # ends in the worker.
            most = 2 * LOCAL_ROUTES_IDLE_MAX + 2
            await until(
                lambda: all(descriptors(p) <= n + most for p, n in zip(pids, files, strict=True)),
                "",
                8,
            )
        except AssertionError:
            self.wrong.append(
                f"descriptors: {files} at the start, {list(map(descriptors, pids))} at the end"
            )

    def _routes(self) -> list[Route]:
        endpoints = tuple(engine.endpoint for engine in self.engines)
        features = ("TextGeneration", "SpeechToText")
        return [
            Route("hashed", "VLLM", features, strategy="PrefixHash", endpoints=endpoints),
            Route("least", "FasterWhisper", features, endpoints=endpoints),
            Route("cold", "VLLM", features),
        ]

    def _demanded(self, model: str) -> None:
        """Scale the cold model up for one second, as the operator would."""
        loop = asyncio.get_running_loop()
        warm = Route(model, "VLLM", endpoints=(self.engines[0].endpoint,))
        loop.call_later(0.1, self.fleet.route, model, warm)
        loop.call_later(1.1, self.fleet.route, model, Route(model, "VLLM"))

    async def _kill(self) -> None:
        while True:
            await asyncio.sleep(KILL_EVERY_S)
            engine = self.random.choice(self.engines)
            self.last_death_s = time.monotonic()
            await engine.kill()
            self.seen["engines killed"] += 1
            routes = {route.model: route for route in self._routes()}
            if self.random.random() < 0.5:  # whether the operator notices the pod's end
                for model in ("hashed", "least"):
                    rest = tuple(e for e in routes[model].endpoints if e != engine.endpoint)
                    self.fleet.route(
                        model,
                        Route(
                            model,
                            routes[model].engine,
                            routes[model].features,
                            strategy=routes[model].strategy,
                            endpoints=rest,
                        ),
                    )
            await asyncio.sleep(0.5)
            await engine.start()
            for model in ("hashed", "least"):
                self.fleet.route(model, routes[model])

    async def _watch(self, pids: list[int]) -> None:
        while True:
            self.memory.append([resident_bytes(pid) for pid in pids])
            await asyncio.sleep(1)

    async def _client(self) -> None:
        wire: Wire | None = None
        while time.monotonic() < self.ends_s:
            began_s = time.monotonic()
            what, fault = "connection refused", ""
            try:
                wire = wire or await connect(self.fleet.port)
                fault, request = self._request()
                async with asyncio.timeout(40):
                    what = await self._exchange(wire, request, self.tag, fault)
            except (Broken, ConnectionError):
                what = "cut"
                since_s = began_s - BETWEEN_BYTES_S
                stalled_s = self.stalls.within_s(since_s, time.monotonic())
                if fault == "none" and self.last_death_s < since_s and not stalled_s:
                    self.wrong.append("a response was truncated without a reason")
            except TimeoutError:
                what = "hung"
                self.wrong.append("a request took 40 s")
            self.seen[what] += 1
            if wire is not None and (what != "whole" or self.random.random() < 0.3):
                self.random.choice([wire.close, wire.reset])()
                wire = None
        if wire is not None:
            wire.close()

    def _request(self) -> tuple[str, bytes]:
        source = self.random
        self.tag += 1
        fault = source.choice(FAULTS) if source.random() < 0.1 else "none"
        style = source.choice(["whole", "stream"])
        size = source.choice([100, 3000, 100_000])
        wanted = f"tag-{self.tag}-{style}-{size}-{fault}-"
        kind = source.random()
        if kind < 0.1:
            return fault, recording(source.choice(["least", "hashed"]), wanted)
        model = "cold" if kind < 0.12 else source.choice(["hashed", "least"])
        prompt = f"{source.randrange(50)} {wanted}" + "p" * (400_000 if kind > 0.9 else 800)
        messages = [{"role": "user", "content": prompt}]
        body = json.dumps({"model": model, "messages": messages}).encode()
        head = "POST /openai/v1/chat/completions HTTP/1.1\r\nHost: h\r\n"
        return fault, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    async def _exchange(self, wire: Wire, request: bytes, tag: int, fault: str) -> str:
        leaves = self.random.random() < 0.1
        if leaves:
            request = request[: self.random.randrange(2 * len(request))]
        await wire.send(request)
        if leaves:
            await asyncio.sleep(self.random.random() * 0.1)
            return "left"
        answered = await wire.answer()
        if answered.status != 200:
            if answered.status not in (500, 502, 503, 504):
                self.wrong.append(f"status {answered.status}: {answered.body[:200]!r}")
            return f"status {answered.status}"
        if not is_sealed(answered.body, tag):
            self.wrong.append(f"looked complete ({fault}): {len(answered.body)} bytes of {tag}")
        return "whole"

    # -- results -----------------------------------------------------------------------------------

    def judge_memory(self) -> str:
        """The growth from the warm-up to the end, of the worker that grew most."""
        quarter = len(self.memory) // 4
        if quarter < 3:
            return "the run was too short to judge"
        grown = []
        for worker in range(WORKERS):
            samples = [each[worker] for each in self.memory]
            early = statistics.median(samples[quarter : 2 * quarter])
            late = statistics.median(samples[-quarter:])
            grown.append((late / early - 1, early, late))
            if late > early * (1 + GROWTH_MAX_SHARE) + GROWTH_SLACK_BYTES:
                self.wrong.append(f"worker {worker} grew from {early} to {late} bytes")
        share, early, late = max(grown)
        eighth = len(self.memory) // 8 or 1
        course = [
            statistics.median(max(each) for each in self.memory[at : at + eighth]) / 1e6
            for at in range(0, eighth * 8, eighth)
        ]
        return (
            f"{early / 1e6:.1f} MB after warm-up, {late / 1e6:.1f} MB at the end ({share:+.1%}); "
            f"by eighths of the time: {' '.join(f'{each:.1f}' for each in course)}"
        )


def recording(model: str, wanted: str) -> bytes:
    part = '--b\r\nContent-Disposition: form-data; name="{}"{}\r\n\r\n'
    body = (part.format("model", "") + model + "\r\n" + part.format("prompt", "") + wanted).encode()
    body += ("\r\n" + part.format("file", '; filename="a.wav"')).encode() + bytes(150_000)
    body += b"\r\n--b--\r\n"
    return (
        "POST /openai/v1/audio/transcriptions HTTP/1.1\r\nHost: h\r\n"
        f"Content-Type: multipart/form-data; boundary=b\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def main() -> int:
    if sys.argv[1:2] == ["--engine"]:
        uvloop.run(run_engine(int(sys.argv[2])))
        return 0
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    seed = int(os.environ.get("SOAK_SEED", random.randrange(1 << 32)))
    os.environ.setdefault("LOG_LEVEL", "error")
    soak = Soak(seconds, seed)
    print(f"SOAK_SEED={seed} SOAK_SECONDS={seconds:.0f}", flush=True)
    with tempfile.TemporaryFile() as log:
        ours = os.dup(2)
        os.dup2(log.fileno(), 2)  # the workers' logs, which are searched for faults
        try:
            uvloop.run(soak.run())
        finally:
            os.dup2(ours, 2)
        log.seek(0)
        logs = log.read().decode(errors="replace")
    for line in ("Traceback", "an exchange failed", "cleanup failed"):
        if line in logs:
            soak.wrong.append("a process reported a fault: " + logs[logs.index(line) :][:2000])
    memory = soak.judge_memory()
    print(f"requests          {soak.tag} ({soak.tag / seconds:.0f} per second)")
    for what, count in soak.seen.most_common():
        print(f"  {what:16}{count}")
    print(f"workers' memory   {memory}")
    for wrong, count in Counter(soak.wrong).most_common(20):
        print(f"WRONG             {wrong} ({count} times)")
    print("failed" if soak.wrong else "passed")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
