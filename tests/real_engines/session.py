"""One run of `kubeai local` with real engines: its Models, the clients, and what was checked.

Checks are coroutines that raise an exception if the behaviour is wrong, and may return a note.
Every one has a limit. A failed check does not end the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import msgspec
import openai
from harness import Local, pods, replicas, until

from kubeai.kube.client import Kube
from kubeai.kube.resources import MODELS

CHECK_TIMEOUT_S = 120.0
START_TIMEOUT_S = 600.0  # vLLM takes 45 s on two idle cores, several times that on busy ones
STOP_TIMEOUT_S = 60.0
REQUEST_TIMEOUT_S = 90.0
BETWEEN_REQUESTS_S = 0.3
KILL_TIMEOUT_S = 10.0
LOG_LINES_SHOWN = 40
CLAIM = "weights"  # its directory is that of the tiny models
# Scales to zero a few seconds after the last request; requests wait for slow engines.
CONFIG = {
    "modelAutoscaling": {"interval": "1s", "timeWindow": "5s"},
    "gateway": {
        "drainAccept": "0s",
        "drainTimeout": "10s",
        "holdTimeout": "10m",
        "decompressBodies": True,
    },
}

Check = Callable[["Session"], Awaitable[str | None]]


class Outcome(msgspec.Struct):
    """One check of one engine."""

    check: str
    passed: bool
    seconds: float
    note: str = ""


class Session:
    """A running `kubeai local`, with the clients of the checks. ``model`` is under test."""

    def __init__(self, local: Local, kube: Kube) -> None:
        self.local, self.kube = local, kube
        self.model = ""
        self.outcomes: list[Outcome] = []
        self.base_url = local.endpoint  # ends with /openai/v1
        self.root_url = local.endpoint.removesuffix("/openai/v1")
        self.openai = openai.AsyncOpenAI(
            base_url=self.base_url, api_key="none", max_retries=0, timeout=REQUEST_TIMEOUT_S
        )
        self.anthropic = anthropic.AsyncAnthropic(
            base_url=f"{self.root_url}/openai",
            api_key="none",
            max_retries=0,
            timeout=REQUEST_TIMEOUT_S,
        )
        self.http = httpx2.AsyncClient(base_url=self.root_url, timeout=START_TIMEOUT_S)

    async def close(self) -> None:
        await self.openai.close()
        await self.anthropic.close()
        await self.http.aclose()

    async def check(self, name: str, run: Check, timeout_s: float = CHECK_TIMEOUT_S) -> bool:
        """Run a check and record what became of it; returns whether it passed."""
        started = time.monotonic()
        passed, note = True, ""
        try:
            async with asyncio.timeout(timeout_s):
                note = await run(self) or ""
        except Exception as error:
            passed, note = False, f"{type(error).__name__}: {error}"[:600]
            if isinstance(error, TimeoutError) and not str(error):
                note = f"no result within {timeout_s:.0f} s"
            traceback.print_exc(limit=3)
        seconds = time.monotonic() - started
        self.outcomes.append(Outcome(name, passed, seconds, note))
        state = "ok    " if passed else "FAILED"
        print(f"  {state} {seconds:7.2f} s  {name}{f': {note}' if note else ''}", flush=True)
        return passed

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """POST JSON to a route below /openai; AssertionError unless the status is 200."""
        response = await self.http.post(f"/openai{path}", json={"model": self.model, **body})
        assert response.status_code == 200, f"{path}: {response.status_code} {response.text[:300]}"
        return response.json()

    async def patch(self, **spec: Any) -> None:
        """Change the spec of the model under test."""
        await self.kube.patch(MODELS, self.model, {"spec": spec}, self.kube.namespace)

    async def pods(self) -> list[dict[str, Any]]:
        return await pods(self.kube, self.model)

    async def addresses(self) -> list[str]:
        """The addresses of the model's ready pods, as ``host:port``."""
        return [f"{pod['status']['podIP']}:8000" for pod in await self.pods() if is_ready(pod)]

    async def ready(self, count: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until exactly ``count`` replicas exist, all of them ready."""

        async def reached() -> bool:
            _, everything, ready = await replicas(self.kube, self.model)
            return everything == ready == count == len(await self.pods())

        await until(f"{count} replicas of {self.model} are ready", reached, timeout_s)

    def show_logs(self) -> None:
        """Print the ends of the engines' logs, which are deleted with their pods."""
        for path in sorted(self.local.data_dir.glob("state/pods/*/server/*.log")):
            print(f"  {path}:")
            for line in path.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]:
                print(f"    {line[:300]}", flush=True)

    async def metrics(self, address: str, *names: str) -> list[float]:
        """The sums of an engine's Prometheus series with these names."""
        text = (await self.http.get(f"http://{address}/metrics")).text
        sums: Counter[str] = Counter()
        for line in text.splitlines():
            if line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                sums[series.partition("{")[0]] += float(value)
        missing = [name for name in names if name not in sums]
        assert not missing, f"the engine has no metric {missing}"
        return [sums[name] for name in names]


def is_ready(pod: dict[str, Any]) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


class Traffic:
    """One request after the other, until it is stopped; records each that fails."""

    def __init__(self, session: Session, send: Check) -> None:
        self._session, self._send = session, send
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.answered = 0
        self.slowest_s = 0.0
        self.failures: list[str] = []

    async def __aenter__(self) -> Traffic:
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        assert self._task is not None
        await self._task

    async def _run(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                await self._send(self._session)
                self.answered += 1
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}"[:200])
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), BETWEEN_REQUESTS_S)


@contextlib.asynccontextmanager
async def running(
    directory: Path, models: list[dict[str, Any]], engine: str, environment: Path, weights: Path
) -> AsyncIterator[Session]:
    """A `kubeai local` with one engine. Nothing of it is left running after the block."""
    local = Local(
        directory,
        *models,
        config=CONFIG,
        arguments=(
            *("--engine-env", f"{engine}={environment}"),
            *("--volume", f"{CLAIM}={weights}"),
            *("--log-format", "json"),
        ),
    )
    try:
        await local.start()
        async with local.kube() as kube:
            session = Session(local, kube)
            try:
                yield session
            finally:
                await session.close()
    finally:
        (directory / "kubeai.log").write_text("\n".join([*local.out, *local.log]))
        try:
            if local.process is not None:
                await local.stop()
        finally:
            await _kill_all(local)


async def _kill_all(local: Local) -> None:
    """Kill what is left of a `kubeai local` that did not stop as it should."""
    ours = set(_ancestors())  # a shell that names the directory is no engine
    for pid, command in local.processes().items():
        if pid in ours:
            continue
        print(f"  killing {pid}, which is still running: {command[:120]}", flush=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await until(
        "all processes have ended", lambda: not local.processes().keys() - ours, KILL_TIMEOUT_S
    )


def _ancestors() -> Iterator[int]:
    """The processes that this one runs under."""
    pid = os.getpid()
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid
