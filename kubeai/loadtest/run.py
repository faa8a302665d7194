"""Sends load to a real endpoint: starts generators, shows progress and summarises the results.

Generator processes create the load, so that counting and printing here do not affect the
measurement. Generators report every 0.25 s; neither Ctrl-C nor the death of a generator loses more.
For ``kubeai bench run``, and for the commands that send several loads one after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from time import monotonic
from typing import Any, NamedTuple

import msgspec

from kubeai.errors import KubeAIError
from kubeai.loadtest import endpoint, environment, saturation
from kubeai.loadtest.client import Address
from kubeai.loadtest.endpoint import Prepared
from kubeai.loadtest.messages import Batch, Failed, FromGenerator, Go, Ready, Stop, frame, receive
from kubeai.loadtest.progress import Progress
from kubeai.loadtest.reports import compare
from kubeai.loadtest.reports.output import Outputs
from kubeai.loadtest.scenario import ENDLESS, ClosedLoop, Exact, Scenario
from kubeai.simulation import results
from kubeai.simulation.results import Gaps, Measurement, Objective, Results, Selection

START_DELAY_S = 0.05  # so that all generators know the start time before it passes
PROGRESS_INTERVAL_S = 0.25
STOP_TIMEOUT_S = 5.0
FAILED = 1
INTERRUPTED = 128  # plus the signal's number


class GeneratorError(KubeAIError):
    """A generator process failed."""


class Interrupted(Exception):
    """A signal arrived before anything was sent."""


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The load to send, and what to report."""

    scenario: Scenario
    processes: int = 1
    shape_given: bool = False  # whether the user chose the kind of traffic
    ignore_eos: bool | None = None  # None: with exact lengths, if the engine knows it
    objective: Objective = Objective()
    selection: Selection = Selection()
    name: str = ""


class Measured(NamedTuple):
    """A run's results, and whether a generator failed or a signal ended it."""

    results: Results
    error_messages: dict[str, str]  # by kind of failure: the endpoint's first message
    failed: bool


class Collector:
    """Measurements reported so far by all generators."""

    def __init__(self) -> None:
        self.measurements: list[Measurement] = []
        self.gaps = Gaps()
        self.error_messages: dict[str, str] = {}
        self.dropped = 0
        self.used_up = False
        self.message_counts: dict[str, int] = {}
        self.problems: list[str] = []

    def note(self, batch: Batch) -> None:
        """Add a batch of one generator."""
        self.measurements += batch.measurements
        self.gaps.merge(batch.gaps)
        self.error_messages = batch.error_messages | self.error_messages
        self.message_counts = batch.message_counts  # there is one generator, by message
        if batch.last:
            self.dropped += batch.dropped
            self.used_up = self.used_up or batch.used_up


class GeneratorProcess:
    """A generator process, seen from the main process."""

    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self.number, self.process = number, process
        self.usage = saturation.GeneratorUsage()

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

    async def finish(self, work: Coroutine[Any, Any, Any]) -> Any:
        """The coroutine's result; a signal cancels it and raises `Interrupted`."""
        task = await self.run_until_signal(work)
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        raise Interrupted


async def run(run_options: RunOptions, outputs: Outputs) -> int:
    """Send the load, then print and write the results; returns the exit status.

    KubeAIError if nothing could be sent: the endpoint is down or lacks the model, or a traffic
    file is invalid.
    """
    signals = Signals()
    try:
        prepared = await prepare(run_options, signals)
        measured = await measure(run_options, prepared, signals)
    except Interrupted:
        return interrupted(signals)
    found = measured.results
    _print_results(found, measured.error_messages)
    outputs.write([found])
    if signals.number:
        return INTERRUPTED + signals.number
    succeeded = found.summary["requests"] > found.summary["failed"]
    return 0 if succeeded and not measured.failed else FAILED


def interrupted(signals: Signals) -> int:
    """Report that a signal arrived before anything was sent; returns the exit status."""
    print("interrupted before anything was sent", file=sys.stderr)
    return INTERRUPTED + signals.number


async def prepare(run_options: RunOptions, signals: Signals) -> Prepared:
    """Complete the scenario with what the endpoint reports; `Interrupted` by a signal."""
    scenario = run_options.scenario
    if scenario.via is not None and not scenario.url:
        return Prepared(scenario, None, _unmeasured_lengths(scenario))
    prepared: Prepared = await signals.finish(
        endpoint.prepare(
            run_options.scenario,
            shape_given=run_options.shape_given,
            ignore_eos=run_options.ignore_eos,
        )
    )
    return prepared


async def measure(run_options: RunOptions, prepared: Prepared, signals: Signals) -> Measured:
    """Send the load of ``prepared``; `Interrupted` if a signal arrives before that."""
    scenario = prepared.scenario
    described = environment.describe(prepared.server)
    collector = Collector()
    async with _start_generators(scenario, run_options.processes) as generators:
        await signals.finish(_ready(generators))
        with Progress() as progress:
            await _measure(generators, collector, progress, signals)
    usages = [generator.usage for generator in generators]
    found = _summarize(run_options, prepared, collector, usages, signals.number)
    found.environment = described
    return Measured(found, collector.error_messages, bool(collector.problems))


# -- preparation -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _start_generators(
    scenario: Scenario, processes: int
) -> AsyncIterator[list[GeneratorProcess]]:
    if isinstance(scenario.load, ClosedLoop):
        processes = min(processes, scenario.load.concurrency)
    if scenario.in_flight_max is not None:
        processes = min(processes, scenario.in_flight_max)
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
    prepared: Prepared,
    collector: Collector,
    usages: Sequence[saturation.GeneratorUsage],
    interrupted: int,
) -> Results:
    scenario = prepared.scenario
    ended_s = max((usage.wall_s for usage in usages), default=0.0)
    found = results.summarize(
        run_options.name or f"{scenario.model} at {_target(scenario)}",
        _setting(run_options, scenario, collector, usages),
        collector.measurements,
        collector.gaps,
        warm_up_s=scenario.warm_up_s,
        objective=run_options.objective,
        selection=run_options.selection,
        warnings=[
            *prepared.warnings,
            *_warnings(scenario, collector, ended_s, interrupted=bool(interrupted)),
            *_client_warnings(scenario, collector, usages),
        ],
    )
    found.summary |= collector.message_counts
    return found


def _target(scenario: Scenario) -> str:
    return scenario.via.requests_url if scenario.via else Address(scenario.url).authority


def _unmeasured_lengths(scenario: Scenario) -> list[str]:
    """The warning about exact lengths without an endpoint that counts tokens."""
    if not isinstance(scenario.traffic, Exact):
        return []
    return ["no endpoint's URL is given to count tokens: the lengths of prompts are approximate"]


def _warnings(
    scenario: Scenario, collector: Collector, ended_s: float, *, interrupted: bool
) -> list[str]:
    found = list(collector.problems)
    if scenario.via is not None:
        found.append("sent by message: responses arrive whole, without TTFT, TPOT and ITL")
    kept = [one for one in collector.measurements if one.due_s >= scenario.warm_up_s]
    if interrupted:
        found.append(
            f"interrupted after {ended_s:.1f} s: {collector.dropped} in-flight requests are not "
            "counted"
        )
    if not kept and collector.measurements:
        found.append(f"all {len(collector.measurements)} requests were part of the warm-up")
    if collector.used_up and ended_s < scenario.begin_until_s < math.inf:
        found.append(f"ran out of conversations {ended_s:.1f} s after the start")
    if isinstance(scenario.traffic, Exact):
        counted = [
            (one.conversation, one.prompt_tokens, one.output_tokens)
            for one in kept
            if not one.error
        ]
        traffic = scenario.traffic
        found += endpoint.length_warnings(traffic.lengths, traffic.seed, counted)
    return found


def _client_warnings(
    scenario: Scenario, collector: Collector, usages: Sequence[saturation.GeneratorUsage]
) -> list[str]:
    late_s = [
        one.sent_s - one.due_s for one in collector.measurements if one.due_s >= scenario.warm_up_s
    ]
    return saturation.warnings(usages, late_s, warm_up_s=scenario.warm_up_s)


def _setting(
    run_options: RunOptions,
    scenario: Scenario,
    collector: Collector,
    usages: Sequence[saturation.GeneratorUsage],
) -> dict[str, Any]:
    """The settings to repeat the run. Only header names: the values may be secrets."""
    traffic = msgspec.to_builtins(scenario.traffic)
    if traffic.get("shape", {}).get("conversations") == ENDLESS:
        del traffic["shape"]["conversations"]
    if "lengths" in traffic:
        traffic["lengths"]["words"] = len(traffic["lengths"]["words"])
    endless = math.isinf(scenario.begin_until_s)
    return {
        "url": scenario.url,
        "via": msgspec.to_builtins(scenario.via),
        "model": scenario.model,
        "traffic": traffic,
        "load": msgspec.to_builtins(scenario.load),
        "max_concurrency": scenario.in_flight_max,
        "seed": scenario.seed,
        "stream": scenario.stream,
        "body": scenario.extra_body,
        "warm_up_s": scenario.warm_up_s,
        "duration_s": None if endless else scenario.begin_until_s - scenario.warm_up_s,
        "num_prompts": scenario.requests_max,
        "timeout_s": scenario.timeout_s,
        "headers": [name for name, _ in scenario.headers],
        "goodput": msgspec.to_builtins(run_options.objective),
        "client": saturation.cost(usages),
        "said": collector.error_messages,
    }


def _print_results(found: Results, error_messages: dict[str, str]) -> None:
    print(compare.table([found]))
    for error, message in error_messages.items():
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
