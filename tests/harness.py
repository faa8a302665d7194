"""Run `kubeai local` end to end, as a process of its own.

Tests wait for states, with deadlines. Nothing here sleeps for a fixed time.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from kubeai.kube.client import Kube
from kubeai.kube.resources import MODELS, PODS

START_TIMEOUT_S = 120.0  # of a machine that is busy with other things
STOP_TIMEOUT_S = 25.0
POLL_S = 0.05
CONFIG = {
    "modelAutoscaling": {"interval": "1s", "timeWindow": "5s"},
    "gateway": {"drainAccept": "0s", "drainTimeout": "5s"},
}


def model(
    name: str,
    *,
    engine: str = "VLLM",
    features: tuple[str, ...] = ("TextGeneration",),
    args: tuple[str, ...] = (),
    **spec: Any,
) -> dict[str, Any]:
    """A Model served by the mock engine."""
    url = f"ollama://{name}" if engine == "OLlama" else f"hf://mock/{name}"
    return {
        "apiVersion": "kubeai.org/v1",
        "kind": "Model",
        "metadata": {"name": name},
        "spec": {
            "url": url,
            "engine": engine,
            "features": list(features),
            "image": "kubeai/mock-engine",
            "args": list(args),
            "scaleDownDelaySeconds": 2,
            **spec,
        },
    }


async def until(
    what: str, check: Callable[[], Awaitable[Any] | Any], timeout_s: float = 20.0
) -> Any:
    """Poll until ``check`` returns something truthy, and return that."""
    last: Any = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                last = check()
                if isinstance(last, Awaitable):
                    last = await last
                if last:
                    return last
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what} (last: {last!r})") from None


class Local:
    """One `kubeai local` process.

    ``log`` collects the lines of its stderr, ``events`` the log events in it, ``out`` its stdout.
    """

    def __init__(
        self,
        data_dir: Path,
        *models: dict[str, Any],
        config: dict[str, Any] | None = None,
        workers: int = 1,
        arguments: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self._env = os.environ | {"COLUMNS": "200"} | (env or {})
        self.data_dir = data_dir
        self.out: list[str] = []
        self.log: list[str] = []
        self.events: list[dict[str, Any]] = []
        self.endpoint = ""
        self.metrics = ""
        self.kubeconfig = str(data_dir / "state" / "kubeconfig")
        data_dir.mkdir(parents=True, exist_ok=True)
        (data_dir / "config.yaml").write_text(yaml.safe_dump(CONFIG | (config or {})))
        self.command = [
            *(sys.executable, "-m", "kubeai", "local"),
            *("--port", "0"),
            *("--workers", str(workers)),
            *("--data-dir", str(data_dir / "state")),
            *("--config", str(data_dir / "config.yaml")),
            *arguments,
        ]
        if models:
            (data_dir / "models.yaml").write_text(yaml.safe_dump_all(models))
            self.command.append(str(data_dir / "models.yaml"))
        self.process: asyncio.subprocess.Process | None = None
        self._readers: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *self.command,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._env,
            limit=1 << 20,
            start_new_session=True,
        )
        self._readers = [
            asyncio.create_task(self._read(self.process.stdout, self.out)),
            asyncio.create_task(self._read(self.process.stderr, self.log)),
        ]
        await until(
            "kubeai local says where it listens",
            lambda: self.process.returncode is not None or self.said("serving"),
            START_TIMEOUT_S,
        )
        if self.process.returncode is not None:
            raise AssertionError(f"kubeai local ended: {self.out} {self.log}")
        (serving,) = self.said("serving")
        self.endpoint, self.metrics = serving["endpoint"], serving["metrics"]

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The log events with this name and these fields so far."""
        wanted = {"event": event, **fields}.items()
        return [logged for logged in self.events if wanted <= logged.items()]

    async def _read(self, stream: asyncio.StreamReader, lines: list[str]) -> None:
        async for line in stream:
            lines.append(line.decode(errors="replace").rstrip())
            if lines is self.log:
                with contextlib.suppress(json.JSONDecodeError):
                    self.events.append(json.loads(line))

    async def stop(self, number: int = signal.SIGINT) -> int:
        """Send the signal and wait; returns the exit status."""
        assert self.process is not None
        if self.process.returncode is None:
            self.process.send_signal(number)
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.process.wait()
        await asyncio.gather(*self._readers)
        return self.process.returncode

    @contextlib.asynccontextmanager
    async def kube(self) -> AsyncIterator[Kube]:
        client = await Kube.connect(self.kubeconfig)
        try:
            yield client
        finally:
            await client.close()

    def processes(self) -> dict[int, str]:
        """All processes of this `kubeai local` (pid → command line), including itself.

        They are recognised by the data directory in their command line or environment, so that
        orphaned processes are found too.
        """
        mark = str(self.data_dir).encode()
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if command and (mark in command or mark in (entry / "environ").read_bytes()):
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        # Workers carry no path; they are children of the process that does.
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) in found:
                continue
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent in found:
                    command = (entry / "cmdline").read_bytes()
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        return found

    def workers(self) -> list[int]:
        return [
            pid for pid, command in self.processes().items() if "kubeai.gateway.worker" in command
        ]

    def engines(self) -> list[int]:
        return [
            pid
            for pid, command in self.processes().items()
            if "mock-engine" in command and "shim" not in command
        ]


@contextlib.asynccontextmanager
async def running(data_dir: Path, *models: dict[str, Any], **options: Any) -> AsyncIterator[Local]:
    """A `kubeai local` that is running inside the block and must exit cleanly after it."""
    local = Local(data_dir, *models, **options)
    try:
        await local.start()
        yield local
    finally:
        print(*local.out, *local.log, sep="\n")  # pytest shows it with a failure
        if local.process is not None:
            await local.stop()


@dataclasses.dataclass
class Answer:
    """What a client received of one streamed chat."""

    status: int = 0
    text: str = ""
    chunks: int = 0
    replica: str = ""  # the mock engine's system_fingerprint
    cached_tokens: int = 0
    prompt_tokens: int = 0
    first_s: float = 0.0  # from sending to the first token
    whole: bool = False  # `data: [DONE]` and a clean end of the stream arrived
    error: str = ""


async def chat(
    session: aiohttp.ClientSession,
    endpoint: str,
    model: str,
    messages: list[dict[str, str]] | str,
    *,
    max_tokens: int = 16,
    headers: dict[str, str] | None = None,
) -> Answer:
    """Send one streamed chat completion; errors are recorded in the Answer."""
    answer = Answer()
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    started = time.monotonic()
    try:
        async with session.post(
            f"{endpoint}/chat/completions", json=body, headers=headers
        ) as response:
            answer.status = response.status
            if response.status != 200:
                answer.error = await response.text()
                return answer
            async for line in response.content:
                if line.startswith(b"data: "):
                    _take(answer, line[6:].strip(), started)
    except (aiohttp.ClientError, TimeoutError) as error:
        answer.error = repr(error)
        answer.whole = False
    return answer


def _take(answer: Answer, data: bytes, started: float) -> None:
    if data == b"[DONE]":
        answer.whole = True
        return
    chunk = json.loads(data)
    answer.replica = chunk.get("system_fingerprint") or answer.replica
    for choice in chunk["choices"]:
        if content := choice["delta"].get("content"):
            answer.first_s = answer.first_s or time.monotonic() - started
            answer.text += content
            answer.chunks += 1
    if usage := chunk.get("usage"):
        answer.prompt_tokens = usage["prompt_tokens"]
        answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


async def pods(client: Kube, name: str) -> list[dict[str, Any]]:
    items, _ = await client.list(PODS, client.namespace, labels=f"model={name}")
    return items


async def replicas(client: Kube, name: str) -> tuple[int, int, int]:
    """A Model's replicas as (wanted, all, ready)."""
    found = await client.get(MODELS, name, client.namespace)
    status = found.get("status", {}).get("replicas", {})
    wanted = found["spec"].get("replicas") or 0
    return wanted, status.get("all", 0), status.get("ready", 0)


async def scrape(url: str) -> dict[str, float]:
    """Parse Prometheus text into {series: value}."""
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        text = await response.text()
    samples = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            samples[series] = float(value)
    return samples


async def received(addresses: list[str]) -> dict[str, list[str]]:
    """Map each request id to the mock engines' addresses that received it, once per receipt."""
    found: dict[str, list[str]] = {}
    async with aiohttp.ClientSession() as session:
        for address in addresses:
            async with session.get(f"http://{address}/mock/requests") as response:
                report = await response.json()
            assert report["forgotten"] == 0
            for request in report["requests"]:
                found.setdefault(request["id"], []).append(address)
    return found
