"""The main process of ``kubeai bench run``: starts workers, shows progress and reports results.

Worker processes generate the load, so that counting and printing here do not affect the
measurement. Workers report every 0.25 s; neither Ctrl-C nor the death of a worker loses more.
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
from kubeai.loadtest.client import Address, Answer, Client, EndpointError
from kubeai.loadtest.plan import (
    ENDLESS,
    Batch,
    ClosedLoop,
    Failed,
    Go,
    Plan,
    Ready,
    Stop,
    Told,
    frame,
    receive,
)
from kubeai.loadtest.progress import Progress
from kubeai.simulation import records
from kubeai.simulation.records import Gaps, Objective, Record, Results

PROBE_TIMEOUT_S = 10.0
START_DELAY_S = 0.05  # so that all workers know the start time before it passes
PROGRESS_INTERVAL_S = 0.25
STOP_TIMEOUT_S = 5.0
MODELS_SHOWN = 10
FAILED = 1
INTERRUPTED = 128  # plus the signal's number


class WorkerError(KubeAIError):
    """A worker process failed."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The load to send, and what to do with the results."""

    plan: Plan
    processes: int = 1
    objective: Objective = Objective()
    name: str = ""
    json_path: Path | None = None
    html_path: Path | None = None


class Measured:
    """Measurements reported so far by all workers."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.gaps = Gaps()
        self.said: dict[str, str] = {}
        self.dropped = 0
        self.used_up = False
        self.problems: list[str] = []

    def note(self, batch: Batch) -> None:
        self.records += batch.records
        self.gaps.merge(batch.gaps)
        self.said = batch.said | self.said
        if batch.last:
            self.dropped += batch.dropped
            self.used_up = self.used_up or batch.used_up


class Worker:
    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self.number, self.process = number, process
        self.usage = saturation.Usage()

    def order(self, message: Plan | Go | Stop) -> None:
        assert self.process.stdin is not None
        if not self.process.stdin.is_closing():
            self.process.stdin.write(frame(message))

    async def told(self) -> Told:
        """The worker's next message; WorkerError if it exited without one."""
        assert self.process.stdout is not None
        try:
            body = await receive(self.process.stdout)
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self.process.wait()
            how = f"signal {-code}" if code < 0 else f"exit status {code}"
            raise WorkerError(f"process {self.number} exited ({how})") from None
        message: Told = msgspec.msgpack.decode(body, type=Told)
        return message

    async def listen(self, measured: Measured, progress: Progress) -> None:
        """Collect the worker's batches until the last one, or until it exits."""
        try:
            while True:
                batch = await self.told()
                assert isinstance(batch, Batch)
                measured.note(batch)
                progress.note(self.number, batch)
                self.usage.note(batch)
                if batch.last:
                    return
        except WorkerError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            measured.problems.append(
                f"{error} after {self.usage.wall_s:.1f} s: its in-flight requests are missing"
            )
            progress.gone(self.number)

    async def end(self) -> None:
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
        self._came = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._note, number)

    def _note(self, number: int) -> None:
        self.number = number
        self._came.set()
        for each in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().remove_signal_handler(each)
            signal.signal(each, signal.SIG_DFL)

    async def or_end(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Wait until the coroutine ends or a signal arrives; the task may still be running."""
        task = asyncio.create_task(work)
        signalled = asyncio.create_task(self._came.wait())
        try:
            await asyncio.wait((task, signalled), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            signalled.cancel()
        return task


async def run(asked: Asked) -> int:
    """Send the load, then print and write the results; returns the exit status.

    KubeAIError if nothing could be sent: the endpoint is down or lacks the model, or a traffic
    file is invalid.
    """
    signals = Signals()
    preparing = await signals.or_end(_find_model(asked.plan))
    if not preparing.done():
        return await _nothing(preparing, signals)
    plan: Plan = preparing.result()
    measured = Measured()
    async with _workers(plan, asked.processes) as workers:
        preparing = await signals.or_end(_ready(workers))
        if not preparing.done():
            return await _nothing(preparing, signals)
        preparing.result()
        with Progress() as progress:
            await _measure(workers, measured, progress, signals)
    found = results(asked, plan, measured, [worker.usage for worker in workers], signals.number)
    _tell(found, measured)
    _write(asked, found)
    if signals.number:
        return INTERRUPTED + signals.number
    succeeded = found.summary["requests"] > found.summary["failed"]
    return 0 if succeeded and not measured.problems else FAILED


async def _nothing(task: asyncio.Task[Any], signals: Signals) -> int:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    print("interrupted before anything was sent", file=sys.stderr)
    return INTERRUPTED + signals.number


# -- preparation -----------------------------------------------------------------------------------


async def _find_model(plan: Plan) -> Plan:
    """List the endpoint's models and set the plan's model if there is only one.

    An endpoint without a model list is assumed to have the model. EndpointError if the endpoint is
    down, denies access or does not list the model.
    """
    address = Address(plan.url)
    client = Client(address, plan.headers, timeout_s=min(PROBE_TIMEOUT_S, plan.timeout_s))
    try:
        await client.find()
        answer = await client.send(client.request("GET", "/models"))
    finally:
        client.close()
    models = _models(address, answer)
    if models is None:
        if not plan.model:
            raise EndpointError(f"{address.url}: does not list its models: set --model")
    elif not plan.model and len(models) == 1:
        return msgspec.structs.replace(plan, model=models[0])
    elif plan.model not in models:
        raise EndpointError(f"{address.url}: {_lacking(plan.model, models)}")
    return plan


def _lacking(model: str, models: list[str]) -> str:
    if not models:
        return "has no models"
    more = f", and {len(models) - MODELS_SHOWN} more" if len(models) > MODELS_SHOWN else ""
    said = f"has no model {model!r}, but" if model else "has several models: set --model to one of"
    return f"{said} {', '.join(models[:MODELS_SHOWN])}{more}"


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


def _models(address: Address, answer: Answer) -> list[str] | None:
    """The endpoint's models; None if it has no model list."""
    if not answer.status or answer.error == "timeout":
        raise EndpointError(f"{address.url}/models: {answer.error}")
    if answer.status in (401, 403) or (answer.status >= 500 and answer.status != 501):
        raise EndpointError(f"{address.url}/models: {answer.error}: {answer.said}".rstrip(": "))
    try:
        return [model.id for model in msgspec.json.decode(answer.body, type=_Models).data]
    except msgspec.DecodeError:
        return None


@contextlib.asynccontextmanager
async def _workers(plan: Plan, processes: int) -> AsyncIterator[list[Worker]]:
    if isinstance(plan.load, ClosedLoop):
        processes = min(processes, plan.load.concurrency)
    workers: list[Worker] = []
    try:
        for number in range(processes):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "kubeai.loadtest.worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                # Ctrl-C goes to this process only; it stops the workers.
                start_new_session=True,
            )
            workers.append(Worker(number, process))
            workers[-1].order(msgspec.structs.replace(plan, worker=number, workers=processes))
        yield workers
    finally:
        await asyncio.gather(*(worker.end() for worker in workers))


async def _ready(workers: Sequence[Worker]) -> None:
    for worker in workers:
        message = await worker.told()
        if isinstance(message, Failed):
            raise WorkerError(message.why)
        assert isinstance(message, Ready)


# -- measurement -----------------------------------------------------------------------------------


async def _measure(
    workers: Sequence[Worker], measured: Measured, progress: Progress, signals: Signals
) -> None:
    start_s = monotonic() + START_DELAY_S
    for worker in workers:
        worker.order(Go(start_s))
    showing = asyncio.create_task(_show(progress, start_s))
    try:
        listening = await signals.or_end(_listen(workers, measured, progress))
        if not listening.done():
            for worker in workers:
                worker.order(Stop())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(listening, STOP_TIMEOUT_S)
        else:
            listening.result()
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)


async def _listen(workers: Sequence[Worker], measured: Measured, progress: Progress) -> None:
    await asyncio.gather(*(worker.listen(measured, progress) for worker in workers))


async def _show(progress: Progress, start_s: float) -> None:
    while True:
        progress.show(monotonic() - start_s)
        await asyncio.sleep(PROGRESS_INTERVAL_S)


# -- results ---------------------------------------------------------------------------------------


def results(
    asked: Asked,
    plan: Plan,
    measured: Measured,
    usages: Sequence[saturation.Usage],
    interrupted: int,
) -> Results:
    kept = [record for record in measured.records if record.due_s >= plan.warm_up_s]
    ended_s = max((usage.wall_s for usage in usages), default=0.0)
    warnings = list(measured.problems)
    if interrupted:
        warnings.append(
            f"interrupted after {ended_s:.1f} s: {measured.dropped} in-flight requests are not "
            "counted"
        )
    if not kept and measured.records:
        warnings.append(f"all {len(measured.records)} requests were part of the warm-up")
    if measured.used_up and ended_s < plan.begin_until_s < math.inf:
        warnings.append(f"ran out of conversations {ended_s:.1f} s after the start")
    late_s = [record.sent_s - record.due_s for record in kept]
    warnings += saturation.warnings(usages, late_s, warm_up_s=plan.warm_up_s)
    return records.results(
        asked.name or f"{plan.model} at {Address(plan.url).authority}",
        _setting(asked, plan, measured, usages),
        measured.records,
        measured.gaps,
        warm_up_s=plan.warm_up_s,
        objective=asked.objective,
        warnings=warnings,
    )


def _setting(
    asked: Asked, plan: Plan, measured: Measured, usages: Sequence[saturation.Usage]
) -> dict[str, Any]:
    """The settings to repeat the run. Only header names: the values may be secrets."""
    traffic = msgspec.to_builtins(plan.traffic)
    if traffic.get("shape", {}).get("conversations") == ENDLESS:
        del traffic["shape"]["conversations"]
    endless = math.isinf(plan.begin_until_s)
    return {
        "url": plan.url,
        "model": plan.model,
        "traffic": traffic,
        "load": msgspec.to_builtins(plan.load),
        "seed": plan.seed,
        "stream": plan.stream,
        "body": plan.more,
        "warm_up_s": plan.warm_up_s,
        "duration_s": None if endless else plan.begin_until_s - plan.warm_up_s,
        "requests_max": plan.requests_max,
        "timeout_s": plan.timeout_s,
        "headers": [name for name, _ in plan.headers],
        "objective": msgspec.to_builtins(asked.objective),
        "client": saturation.cost(usages),
        "said": measured.said,
    }


def _tell(found: Results, measured: Measured) -> None:
    print(compare.table([found]))
    for error, said in measured.said.items():
        if said and error in found.errors:
            print(f"{error}: first message: {compare.printable(said)}")
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


def _write(asked: Asked, found: Results) -> None:
    try:
        if asked.json_path is not None:
            records.write(found, asked.json_path)
        if asked.html_path is not None:
            from kubeai.loadtest.report import report

            asked.html_path.write_text(report([found]), encoding="utf-8")
    except OSError as error:
        raise KubeAIError(f"{error.filename}: {error.strerror}") from None
