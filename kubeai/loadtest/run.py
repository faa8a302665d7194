"""The main process of ``kubeai bench run``: starts generators, shows progress and reports results.

Generator processes create the load, so that counting and printing here do not affect the
measurement. Generators report every 0.25 s; neither Ctrl-C nor the death of a generator loses more.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from kubeai.errors import KubeAIError
from kubeai.loadtest import compare, saturation
from kubeai.loadtest.client import Address, Client, EndpointError, Response
from kubeai.loadtest.messages import Batch, Failed, FromGenerator, Go, Ready, Stop, frame, receive
from kubeai.loadtest.progress import Progress
from kubeai.loadtest.scenario import ENDLESS, ClosedLoop, Scenario
from kubeai.simulation import results
from kubeai.simulation.results import Gaps, Measurement, Objective, Results

PROBE_TIMEOUT_S = 10.0
START_DELAY_S = 0.05  # so that all generators know the start time before it passes
PROGRESS_INTERVAL_S = 0.25
STOP_TIMEOUT_S = 5.0
MODELS_SHOWN = 10
FAILED = 1
INTERRUPTED = 128  # plus the signal's number


class GeneratorError(KubeAIError):
    """A generator process failed."""


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The load to send, and what to do with the results."""

    scenario: Scenario
    processes: int = 1
    objective: Objective = Objective()
    name: str = ""
    json_path: Path | None = None
    html_path: Path | None = None


class Collector:
    """Measurements reported so far by all generators."""

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []
        self.gaps = Gaps()
        self.error_messages: dict[str, str] = {}
        self.dropped = 0
        self.used_up = False
        self.problems: list[str] = []

    def note(self, batch: Batch) -> None:
        """Add a batch of one generator."""
        self.measurements += batch.measurements
        self.gaps.merge(batch.gaps)
        self.error_messages = batch.error_messages | self.error_messages
        if batch.last:
            self.dropped += batch.dropped
            self.used_up = self.used_up or batch.used_up


class GeneratorProcess:
    """A generator process, seen from the main process."""

    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self.number, self.process = number, process
        self.usage = saturation.Usage()

    def send(self, message: Scenario | Go | Stop) -> None:
        """Send a message; no effect if the process has closed its stdin."""
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(frame(message))

    async def receive(self) -> FromGenerator:
        """The generator's next message; GeneratorError if it exited without one."""
        assert self.process.stdout is not None
        try:
            body = await receive(self.process.stdout)
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self.process.wait()
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            raise GeneratorError(f"process {self.number} exited ({how})") from None
        message: FromGenerator = msgspec.msgpack.decode(body, type=FromGenerator)
        return message

    async def collect(self, collector: Collector, progress: Progress) -> None:
        """Collect the generator's batches until the last one, or until it exits."""
        try:
            while True:
                batch = await self.receive()
                assert isinstance(batch, Batch)
                collector.note(batch)
                progress.note(self.number, batch)
                self.usage.note(batch)
                if batch.last:
                    return
        except GeneratorError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            collector.problems.append(
                f"{error} after {self.usage.wall_s:.1f} s: its in-flight requests are missing"
            )
            progress.gone(self.number)

    async def stop(self) -> None:
        """Close its stdin and wait until it exits; kill it after `STOP_TIMEOUT_S`."""
        with contextlib.suppress(ProcessLookupError):
            if self.process.stdin is not None:
                self.process.stdin.close()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
                await self.process.wait()


class Signals:
    """Ctrl-C (or SIGTERM) sets ``number``; a second one has its default effect."""

    def __init__(self) -> None:
        self.number = 0
        self._received = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._note, number)

    def _note(self, number: int) -> None:
        self.number = number
        self._received.set()
        for each in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)

    async def run_until_signal(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Wait until the coroutine ends or a signal arrives; the task may still be running."""
        task = asyncio.create_task(work)
        signalled = asyncio.create_task(self._received.wait())
        try:
            await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            signalled.cancel()
        return task


async def run(run_options: RunOptions) -> int:
    """Send the load, then print and write the results; returns the exit status.

    KubeAIError if nothing could be sent: the endpoint is down or lacks the model, or a traffic
    file is invalid.
    """
    signals = Signals()
    preparing = await signals.run_until_signal(_find_model(run_options.scenario))
    if not preparing.done():
        return await _interrupted(preparing, signals)
    scenario: Scenario = preparing.result()
    collector = Collector()
    async with _start_generators(scenario, run_options.processes) as generators:
        preparing = await signals.run_until_signal(_ready(generators))
        if not preparing.done():
            return await _interrupted(preparing, signals)
        preparing.result()
        with Progress() as progress:
            await _measure(generators, collector, progress, signals)
    found = _summarize(
        run_options,
        scenario,
        collector,
        [generator.usage for generator in generators],
        signals.number,
    )
    _print_results(found, collector)
    _write(run_options, found)
    if signals.number:
        return INTERRUPTED + signals.number
    succeeded = found.summary["requests"] > found.summary["failed"]
    return 0 if succeeded and not collector.problems else FAILED


async def _interrupted(task: asyncio.Task[Any], signals: Signals) -> int:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    print("interrupted before anything was sent", file=sys.stderr)
    return INTERRUPTED + signals.number


# -- preparation -----------------------------------------------------------------------------------


async def _find_model(scenario: Scenario) -> Scenario:
    """List the endpoint's models and set the scenario's model if there is only one.

    An endpoint without a model list is assumed to have the model. EndpointError if the endpoint is
    down, denies access or does not list the model.
    """
    address = Address(scenario.url)
    client = Client(address, scenario.headers, timeout_s=min(PROBE_TIMEOUT_S, scenario.timeout_s))
    try:
        await client.resolve()
        response = await client.send(client.request("GET", "/models"))
    finally:
        client.close()
    models = _models(address, response)
    if models is None:
        if not scenario.model:
            raise EndpointError(f"{address.url}: does not list its models: set --model")
    elif not scenario.model and len(models) == 1:
        return msgspec.structs.replace(scenario, model=models[0])
    elif scenario.model not in models:
        raise EndpointError(f"{address.url}: {_missing_model(scenario.model, models)}")
    return scenario


def _missing_model(model: str, models: list[str]) -> str:
    if not models:
        return "has no models"
    more = f", and {len(models) - MODELS_SHOWN} more" if len(models) > MODELS_SHOWN else ""
    problem = (
        f"has no model {model!r}, but" if model else "has several models: set --model to one of"
    )
    return f"{problem} {', '.join(models[:MODELS_SHOWN])}{more}"


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _models(address: Address, response: Response) -> list[str] | None:
    """The endpoint's models; None if it has no model list."""
    if not response.status or response.error == "timeout":
        raise EndpointError(f"{address.url}/models: {response.error}")
    if response.status in (401, 403) or (response.status >= 500 and response.status != 501):
        raise EndpointError(
            f"{address.url}/models: {response.error}: {response.error_message}".rstrip(": ")
        )
    try:
        return [model.id for model in msgspec.json.decode(response.body, type=_Models).data]
    except msgspec.DecodeError:
        return None


@contextlib.asynccontextmanager
async def _start_generators(
    scenario: Scenario, processes: int
) -> AsyncIterator[list[GeneratorProcess]]:
    if isinstance(scenario.load, ClosedLoop):
        processes = min(processes, scenario.load.concurrency)
    generators: list[GeneratorProcess] = []
    try:
        for number in range(processes):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "kubeai.loadtest.generator"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # Ctrl-C goes to this process only; it stops the generators.
                start_new_session=True,
            )
            generators.append(GeneratorProcess(number, process))
            generators[-1].send(
                msgspec.structs.replace(scenario, generator=number, generators=processes)
            )
        yield generators
    finally:
        await asyncio.gather(*(generator.stop() for generator in generators))


async def _ready(generators: Sequence[GeneratorProcess]) -> None:
    for generator in generators:
        message = await generator.receive()
        if isinstance(message, Failed):
            raise GeneratorError(message.why)
        assert isinstance(message, Ready)


# -- measurement -----------------------------------------------------------------------------------


async def _measure(
    generators: Sequence[GeneratorProcess],
    collector: Collector,
    progress: Progress,
    signals: Signals,
) -> None:
    start_s = monotonic() + START_DELAY_S
    for generator in generators:
        generator.send(Go(start_s))
    showing = asyncio.create_task(_show(progress, start_s))
    try:
        collecting = await signals.run_until_signal(_collect(generators, collector, progress))
        if not collecting.done():
            for generator in generators:
                generator.send(Stop())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(collecting, STOP_TIMEOUT_S)
        else:
            collecting.result()
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def _collect(
    generators: Sequence[GeneratorProcess], collector: Collector, progress: Progress
) -> None:
    await asyncio.gather(*(generator.collect(collector, progress) for generator in generators))


async def _show(progress: Progress, start_s: float) -> None:
    while True:
        progress.show(monotonic() - start_s)
        await asyncio.sleep(PROGRESS_INTERVAL_S)


# -- results ---------------------------------------------------------------------------------------


def _summarize(
    run_options: RunOptions,
    scenario: Scenario,
    collector: Collector,
    usages: Sequence[saturation.Usage],
    interrupted: int,
) -> Results:
    kept = [
        measurement
        for measurement in collector.measurements
        if measurement.due_s >= scenario.warm_up_s
    ]
    ended_s = max((usage.wall_s for usage in usages), default=0.0)
    warnings = list(collector.problems)
    if interrupted:
        warnings.append(
            f"interrupted after {ended_s:.1f} s: {collector.dropped} in-flight requests are not "
            "counted"
        )
    if not kept and collector.measurements:
        warnings.append(f"all {len(collector.measurements)} requests were part of the warm-up")
    if collector.used_up and ended_s < scenario.begin_until_s < math.inf:
        warnings.append(f"ran out of conversations {ended_s:.1f} s after the start")
    late_s = [measurement.sent_s - measurement.due_s for measurement in kept]
    warnings += saturation.warnings(usages, late_s, warm_up_s=scenario.warm_up_s)
    return results.summarize(
        run_options.name or f"{scenario.model} at {Address(scenario.url).authority}",
        _setting(run_options, scenario, collector, usages),
        collector.measurements,
        collector.gaps,
        warm_up_s=scenario.warm_up_s,
        objective=run_options.objective,
        warnings=warnings,
    )


def _setting(
    run_options: RunOptions,
    scenario: Scenario,
    collector: Collector,
    usages: Sequence[saturation.Usage],
) -> dict[str, Any]:
    """The settings to repeat the run. Only header names: the values may be secrets."""
    traffic = msgspec.to_builtins(scenario.traffic)
    if traffic.get("shape", {}).get("conversations") == ENDLESS:
        del traffic["shape"]["conversations"]
    endless = math.isinf(scenario.begin_until_s)
    return {
        "url": scenario.url,
        "model": scenario.model,
        "traffic": traffic,
        "load": msgspec.to_builtins(scenario.load),
        "seed": scenario.seed,
        "stream": scenario.stream,
        "body": scenario.extra_body,
        "warm_up_s": scenario.warm_up_s,
        "duration_s": None if endless else scenario.begin_until_s - scenario.warm_up_s,
        "requests_max": scenario.requests_max,
        "timeout_s": scenario.timeout_s,
        "headers": [name for name, _ in scenario.headers],
        "objective": msgspec.to_builtins(run_options.objective),
        "client": saturation.cost(usages),
        "said": collector.error_messages,
    }


def _print_results(found: Results, collector: Collector) -> None:
    print(compare.table([found]))
    for error, message in collector.error_messages.items():
        if message and error in found.errors:
            print(f"{error}: first message: {compare.printable(message)}")
    print(client_line(found.setting["client"]))
    sys.stdout.flush()


def client_line(cost: dict[str, Any]) -> str:
    """The load generator's CPU cost: per chunk over all processes, and the busiest one's core."""
    each, kernel = cost["cpu_us_per_chunk"], cost["kernel_us_per_chunk"]
    parts = []
    if each is not None:
        parts.append(f"{each:.1f} µs of CPU per chunk ({kernel:.1f} in the kernel)")
    parts.append(f"{cost['cpu_share']:.0%} of a core".replace("%", " %"))
    parts.append(f"{cost['processes']} process" + ("es" if cost["processes"] > 1 else ""))
    return "client: " + ", ".join(parts)


def _write(run_options: RunOptions, found: Results) -> None:
    try:
        if run_options.json_path is not None:
            results.write(found, run_options.json_path)
        if run_options.html_path is not None:
            from kubeai.loadtest.report import report

            run_options.html_path.write_text(report([found]), encoding="utf-8")
    except OSError as error:
        raise KubeAIError(f"{error.filename}: {error.strerror}") from None
