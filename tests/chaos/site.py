"""One KubeAI of the chaos test: `kubeai local` with mock engines, its faults and its HTTP load.

An :class:`Outage` is a time in which HTTP requests to a site may fail, because a fault took
something away that they needed. Faults of the broker, of the network to it, and of the messenger
have none.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
from harness import Local, model, scrape, until

from kubeai.simulation.text import render, reply

FAST = ("--prefill-tokens-per-second=0", "--decode-tokens-per-second=0")
REPLY_TOKENS = 8
HTTP_INTERVAL_S = 0.25
HTTP_TIMEOUT_S = 90.0
# Requests that were in flight with a killed process fail at once; later ones are held.
GRACE_S = 3.0
WARM, COLD, ADAPTED, UNKNOWN = "warm", "cold", "adapted", "unknown"
MODELS = (
    model(WARM, args=FAST, minReplicas=2, maxReplicas=2),
    model(COLD, args=FAST, minReplicas=0, maxReplicas=1),
    model(
        ADAPTED,
        args=FAST,
        minReplicas=1,
        maxReplicas=1,
        adapters=[{"name": "law", "url": "pvc://loras/law"}],
    ),
)
# What requests name, and how often.
NAMES = {WARM: 60, COLD: 10, ADAPTED: 14, "adapted_law": 14, UNKNOWN: 2}


class Ask(NamedTuple):
    """A request, and the text of its only right response; None: it is a 404."""

    body: dict[str, Any]
    text: str | None


def ask(name: str, text: str) -> Ask:
    """A chat with one message."""
    body = {
        "model": name,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": REPLY_TOKENS,
    }
    if name == UNKNOWN:
        return Ask(body, None)
    adapter = name.partition("_")[2]
    prompt = render([("user", text)])
    return Ask(body, reply(prompt, limit=REPLY_TOKENS, salt=adapter).text)


def problem(asked: Ask, status: int, body: Any) -> str:
    """What is wrong with a response; "" if nothing is."""
    if asked.text is None:
        return "" if status == 404 and "error" in body else f"status {status} instead of 404"
    if status != 200:
        return f"status {status}"
    try:
        text, name = body["choices"][0]["message"]["content"], body["model"]
    except (KeyError, IndexError, TypeError):
        return "not a chat completion"
    if name != asked.body["model"]:
        return f"from the model {name}"
    return "" if text == asked.text else "the response of another request"


class Outage(NamedTuple):
    """A time in which HTTP requests may fail; on CLOCK_MONOTONIC, in seconds."""

    begin_s: float
    end_s: float


class HttpFailure(NamedTuple):
    begin_s: float
    end_s: float
    why: str


class Site:
    """A `kubeai local` that is started again after its supervisor was killed."""

    def __init__(self, folder: Path, config: dict[str, Any], environment: dict[str, str]) -> None:
        self._folder, self._config, self._environment = folder, config, environment
        adapter = folder / "loras" / "law"
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "adapter_config.json").write_text("{}")
        self.local = self._new(*MODELS)
        self.http_requests = 0
        self.http_failures: list[HttpFailure] = []
        self._outages: list[Outage] = []
        self._supervisor = asyncio.Lock()  # held while it is being replaced

    def _new(self, *models: dict[str, Any]) -> Local:
        return Local(
            self._folder / "site",
            *models,
            config=self._config,
            workers=2,
            arguments=("--volume", f"loras={self._folder}/loras"),
            env=self._environment,
        )

    async def start(self) -> None:
        await self.local.start()
        async with aiohttp.ClientSession() as session:
            for name in (WARM, ADAPTED, "adapted_law"):
                await until(f"{name} serves", lambda name=name: self._serves(session, name), 60)
            await until("the streams are connected", lambda: self._is_connected(session), 60)

    async def stop(self) -> None:
        if self.local.process is not None and self.local.process.returncode is None:
            await self.local.stop(signal.SIGKILL)
        await until("no process is left", lambda: not self.local.processes(), 20)

    async def _serves(self, session: aiohttp.ClientSession, name: str) -> bool:
        with contextlib.suppress(aiohttp.ClientError):
            return not await self._post(session, ask(name, "ready?"))
        return False

    async def _is_connected(self, session: aiohttp.ClientSession) -> bool:
        url = self.local.metrics.replace("/metrics", "/readyz?verbose")
        async with session.get(url) as response:
            return "message streams connected" in await response.text()

    # -- faults ------------------------------------------------------------------------------------

    async def kill_worker(self, source: random.Random) -> None:
        self._kill(self.local.workers(), source)

    async def kill_engine(self, source: random.Random) -> None:
        self._kill(self.local.engines(), source)

    def _kill(self, pids: list[int], source: random.Random) -> None:
        if pids:
            with self._outage(), contextlib.suppress(ProcessLookupError):
                os.kill(source.choice(pids), signal.SIGKILL)

    async def kill_messenger(self, _source: random.Random) -> None:
        self._signal_messengers(signal.SIGKILL)

    async def suspend_messenger(self, source: random.Random) -> None:
        suspended = self._signal_messengers(signal.SIGSTOP)
        await asyncio.sleep(source.uniform(1, 8))
        for pid in suspended:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def messengers(self) -> list[int]:
        processes = self.local.processes().items()
        return [pid for pid, command in processes if "kubeai.messenger" in command]

    def _signal_messengers(self, number: int) -> list[int]:
        pids = self.messengers()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return pids

    async def restart_supervisor(self, source: random.Random) -> None:
        """Kill the process that all others of a `kubeai local` die with, and start it again."""
        async with self._supervisor:
            with self._outage():
                await self.local.stop(signal.SIGKILL)
                await until("no process is left", lambda: not self.local.processes(), 20)
                await asyncio.sleep(source.uniform(0, 2))
                self.local = self._new()
                await self.local.start()

    @contextlib.contextmanager
    def _outage(self) -> Iterator[None]:
        begin_s = time.monotonic()
        # Requests that fail meanwhile must find it, so it lasts until it is replaced.
        self._outages.append(Outage(begin_s, float("inf")))
        at = len(self._outages) - 1
        try:
            yield
        finally:
            self._outages[at] = Outage(begin_s, time.monotonic() + GRACE_S)

    async def describe(self) -> str:
        """What the site says about its messages, for people."""
        samples = await scrape(self.local.metrics)
        series = [f"{name} {value:g}" for name, value in samples.items() if "_message" in name]
        said = [line for line in self.local.log if "message" in line]
        return "\n".join([self.local.metrics, *series, *said[-10:]])

    # -- HTTP load ---------------------------------------------------------------------------------

    async def send_http(self, seed: int) -> None:
        """Send HTTP requests, one every `HTTP_INTERVAL_S`, until cancelled."""
        source = random.Random(seed)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                name = source.choices(list(NAMES), list(NAMES.values()))[0]
                asked = ask(name, f"over HTTP, {self.http_requests}")
                self.http_requests += 1
                group.create_task(self._send_one(session, asked))
                await asyncio.sleep(HTTP_INTERVAL_S)

    async def _send_one(self, session: aiohttp.ClientSession, asked: Ask) -> None:
        begin_s = time.monotonic()
        try:
            why = await self._post(session, asked)
        except (aiohttp.ClientError, TimeoutError) as error:
            why = f"{type(error).__name__}: {error}"
        if why:
            self.http_failures.append(HttpFailure(begin_s, time.monotonic(), why))

    async def _post(self, session: aiohttp.ClientSession, asked: Ask) -> str:
        timeout = aiohttp.ClientTimeout(total=HTTP_TIMEOUT_S)
        url = f"{self.local.endpoint}/chat/completions"
        async with session.post(url, json=asked.body, timeout=timeout) as response:
            return problem(asked, response.status, await response.json())

    def unexplained(self) -> list[HttpFailure]:
        """The failed HTTP requests that no outage overlaps."""
        return [
            failure
            for failure in self.http_failures
            if not any(
                failure.begin_s <= outage.end_s and outage.begin_s <= failure.end_s
                for outage in self._outages
            )
        ]
