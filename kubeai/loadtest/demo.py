"""``kubeai bench demo``: what routing by prefix gains, on mock engines behind a real gateway.

It starts ``kubeai local`` with a Model for each strategy, so that the operator, the gateway and the
engines' processes are those of any other use; only the engines compute nothing. Each Model has
engines of its own, whose caches are empty, and all get the same conversations at the same times.
The baseline is a `Service` in front of the engines, without the gateway.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import yaml

from kubeai.errors import KubeAIError
from kubeai.kube.client import Kube
from kubeai.kube.resources import MODELS, PODS
from kubeai.loadtest import run as running
from kubeai.loadtest.reports import compare, verdict
from kubeai.loadtest.reports.output import Outputs
from kubeai.loadtest.scenario import OpenLoop, Scenario, Synthetic
from kubeai.processes import set_death_signal
from kubeai.simulation.results import Results
from kubeai.simulation.traffic import Arrivals, Shape

SERVICE = "Service"
STRATEGIES = ("LeastLoad", "PrefixHash", "PrefixCache")
REPORT = Path("kubeai-demo.html")
ENGINE_PORT = 8000
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 20.0
POLL_S = 0.1
LINES_SHOWN = 5  # of the output of `kubeai local`, if it ends early
COPY_BYTES = 64 << 10
# Each engine computes 3,000 tokens of prompts per second and has room for 16,000 tokens.
ENGINE = (
    "--prefill-tokens-per-second=3000",
    "--decode-tokens-per-second=60",
    "--cache-blocks=1000",
    "--max-batch=64",
)
# Conversations of five turns. At this rate, engines without hits in their caches are nearly
# overloaded.
CHATS = Shape(
    turns=5,
    prompt_tokens=700,
    turn_tokens=80,
    reply_tokens=20,
    think_s=0.5,
)
CONVERSATIONS_PER_S = 0.75  # for each engine


class Demo(msgspec.Struct, frozen=True, kw_only=True):
    """The size of the demonstration."""

    engines: int = 4  # of each strategy
    duration_s: float = 14.0  # for which conversations start, with each strategy
    seed: int = 1


async def run(demo: Demo, outputs: Outputs) -> int:
    """Run the demonstration, then print and write the results; returns the exit status."""
    outputs = msgspec.structs.replace(outputs, html=outputs.html or REPORT)
    signals = running.Signals()
    found: list[Results] = []
    try:
        with tempfile.TemporaryDirectory(prefix="kubeai-demo-") as folder:
            async with (
                _local(demo, Path(folder), signals) as (url, addresses),
                service(addresses, random.Random(demo.seed)) as service_url,
            ):
                found.append(await _measure(demo, SERVICE, service_url, signals))
                for strategy in STRATEGIES:
                    found.append(await _measure(demo, strategy, url, signals))  # noqa: PERF401
    except running.Interrupted:
        if not found:
            return running.interrupted(signals)
    print(compare.table(found))
    print()
    print("\n".join(verdict.sentences(found)))
    outputs.write(found)
    assert outputs.html is not None
    print(f"Report: {outputs.html.absolute()}", flush=True)
    return running.INTERRUPTED + signals.number if signals.number else 0


async def _measure(demo: Demo, name: str, url: str, signals: running.Signals) -> Results:
    """Send the conversations to a strategy's Model; `Interrupted` after a signal."""
    print(f"{name}:", file=sys.stderr, flush=True)
    rate = CONVERSATIONS_PER_S * demo.engines
    count = max(1, round(rate * demo.duration_s))
    scenario = Scenario(
        url=url,
        model=_model_name(name),
        # kube-proxy picks an engine for each connection: with one request each, picks are even.
        headers=(("Connection", "close"),) if name == SERVICE else (),
        endpoint_header="X-Mock-Replica",
        traffic=Synthetic("demo", msgspec.structs.replace(CHATS, conversations=count), demo.seed),
        load=OpenLoop(Arrivals(per_s=rate)),
        seed=demo.seed,
    )
    run_options = running.RunOptions(scenario=scenario, shape_given=True, name=name)
    prepared = await running.prepare(run_options, signals)
    measured = await running.measure(run_options, prepared, signals)
    if signals.number:
        raise running.Interrupted
    return measured.results


# -- kubeai local ----------------------------------------------------------------------------------


def manifests(demo: Demo) -> list[dict[str, Any]]:
    """A Model with mock engines for each strategy, and one for the Service."""
    return [
        {
            "apiVersion": "kubeai.org/v1",
            "kind": "Model",
            "metadata": {"name": _model_name(name)},
            "spec": {
                "url": "hf://kubeai/demo",
                "engine": "VLLM",
                "features": ["TextGeneration"],
                "image": "kubeai/mock-engine",
                "args": list(ENGINE),
                "minReplicas": demo.engines,
                "maxReplicas": demo.engines,
                "loadBalancing": {"strategy": "LeastLoad" if name == SERVICE else name},
            },
        }
        for name in (SERVICE, *STRATEGIES)
    ]


def _model_name(strategy: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", strategy).lower()


@contextlib.asynccontextmanager
async def _local(
    demo: Demo, folder: Path, signals: running.Signals
) -> AsyncIterator[tuple[str, list[str]]]:
    """Run `kubeai local`; yields its URL, and the addresses of the Service's engines."""
    print(
        f"starting kubeai local with {4 * demo.engines} mock engines", file=sys.stderr, flush=True
    )
    (folder / "models.yaml").write_text(yaml.safe_dump_all(manifests(demo)), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kubeai", "local", str(folder / "models.yaml")),
        *("--port", "0", "--data-dir", str(folder / "state")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C goes to this process only, which then stops it
        preexec_fn=partial(set_death_signal, signal.SIGTERM),
    )
    output = _Output(process)
    try:
        url = await signals.finish(output.url())
        kube = await Kube.connect(str(folder / "state" / "kubeconfig"))
        try:
            addresses = await signals.finish(_ready(kube, demo))
        finally:
            await kube.close()
        yield url, addresses
    finally:
        await _stop(process)
        await output.close()


class _Output:
    """Reads what `kubeai local` prints."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._lines: collections.deque[str] = collections.deque(maxlen=LINES_SHOWN)
        self._url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read())

    async def url(self) -> str:
        """Wait for the endpoint; KubeAIError if it ends before, or takes too long."""
        async with _deadline("kubeai local does not start", lambda: list(self._lines)):
            return await self._url

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            text = line.decode(errors="replace").rstrip()
            self._lines.append(text)
            if not self._url.done() and (found := re.search(r"http://[^\s\"']+?/v1\b", text)):
                self._url.set_result(found[0])
        if not self._url.done():
            said = " / ".join(self._lines)
            self._url.set_exception(KubeAIError(f"kubeai local has ended: {said}"))

    async def close(self) -> None:
        """Stop reading, once the process has ended."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        self._url.cancel()


async def _ready(kube: Kube, demo: Demo) -> list[str]:
    """Wait until all engines are ready; the addresses of the Service's."""
    counts: dict[str, int] = {}
    async with _deadline("the engines are not ready", lambda: [str(counts)]):
        while True:
            models, _ = await kube.list(MODELS, kube.namespace)
            counts.update((each["metadata"]["name"], _ready_replicas(each)) for each in models)
            if len(counts) > len(STRATEGIES) and min(counts.values()) >= demo.engines:
                break
            await asyncio.sleep(POLL_S)
    pods, _ = await kube.list(PODS, kube.namespace, labels=f"model={_model_name(SERVICE)}")
    return [pod["status"]["podIP"] for pod in pods]


def _ready_replicas(model: dict[str, Any]) -> int:
    return int(((model.get("status") or {}).get("replicas") or {}).get("ready") or 0)


@contextlib.asynccontextmanager
async def _deadline(problem: str, state: Callable[[], Sequence[str]]) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            yield
    except TimeoutError:
        said = " / ".join(state())
        raise KubeAIError(f"{problem} within {START_TIMEOUT_S:g} s: {said}") from None


async def _stop(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


# -- the Service -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def service(addresses: Sequence[str], source: random.Random) -> AsyncIterator[str]:
    """A Kubernetes Service as kube-proxy implements it: each connection goes to a random engine.

    Yields its URL. A client that has left ends its connection to the engine, and vice versa.
    """
    tasks: set[asyncio.Task[None]] = set()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        with contextlib.suppress(OSError):
            await _splice(reader, writer, source.choice(addresses))

    server = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        host, port = server.sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}/v1"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _splice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str) -> None:
    """Copy both ways between a client and an engine until one of them closes."""
    host, _, port = address.partition(":")
    try:
        back_reader, back_writer = await asyncio.open_connection(host, int(port or ENGINE_PORT))
    except OSError:
        writer.close()
        return
    copies = [
        asyncio.create_task(_copy(reader, back_writer)),
        asyncio.create_task(_copy(back_reader, writer)),
    ]
    try:
        await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in copies:
            each.cancel()
        await asyncio.gather(*copies, return_exceptions=True)
        writer.close()
        back_writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await reader.read(COPY_BYTES):
            writer.write(piece)
            await writer.drain()
