"""Runs traffic on simulated engines with the gateway's own routing, once per setting.

For ``kubeai bench simulate`` and, with the requests of an access log, ``kubeai bench replay``.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args

import msgspec

from kubeai.loadtest import environment
from kubeai.loadtest.arguments import OptionError
from kubeai.loadtest.reports import compare
from kubeai.loadtest.reports.output import Outputs
from kubeai.loadtest.scenario import ClosedLoop, Load, RequestLoop, Scenario
from kubeai.loadtest.scenario import Traffic as Sent
from kubeai.simulation import cluster, results
from kubeai.simulation.access_logs import LoggedRequest, read_access_log
from kubeai.simulation.presets import PRESETS
from kubeai.simulation.results import Objective, Results, Selection
from kubeai.simulation.sessions import Traffic
from kubeai.simulation.setting import Setting, Strategy
from kubeai.simulation.traffic import Conversation

T = TypeVar("T")

RUNS_MAX = 100
INTERRUPTED = 130  # exit status


class LogReplay(msgspec.Struct, frozen=True, tag="access log"):
    """Requests from an access log, at its times."""

    path: str
    model: str
    speed: float = 1.0  # 2: twice as many requests a second
    output_tokens: int | None = None  # of each response; None: estimated from its size

    def requests(self) -> Iterator[LoggedRequest]:
        """The requests in order; TrafficError if the file cannot be used."""
        for one in read_access_log(Path(self.path), self.model).requests:
            one.at_s /= self.speed
            # Embeddings and the like generate no tokens.
            if self.output_tokens is not None and one.output_tokens:
                one.output_tokens = self.output_tokens
            yield one


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """Traffic and the settings to run it with."""

    traffic: Sent | LogReplay
    load: Load  # a setting's own concurrency overrides it
    preset: str
    settings: tuple[Setting, ...]
    seed: int
    warm_up_s: float = 0.0
    requests_max: int | None = None
    objective: Objective = Objective()
    selection: Selection = Selection()

    @property
    def scenario(self) -> Scenario:
        """The traffic and load, as for a real endpoint."""
        assert not isinstance(self.traffic, LogReplay)
        return Scenario(
            url="",
            model="",
            traffic=self.traffic,
            load=self.load,
            seed=self.seed,
            requests_max=self.requests_max,
        )

    @property
    def request_times(self) -> Iterator[float] | None:
        """The start times of requests, if the load is a rate of requests."""
        return self.scenario.request_times() if isinstance(self.load, RequestLoop) else None

    def conversations(self) -> Iterator[Traffic]:
        """The traffic, the same for every setting."""
        if isinstance(self.traffic, LogReplay):
            return itertools.islice(self.traffic.requests(), self.requests_max)
        every = (conversation for _, conversation in self.scenario.conversations())
        # A rate of requests has as many times as there are requests.
        return every if isinstance(self.load, RequestLoop) else _first(every, self.requests_max)


def _first(every: Iterator[Conversation], requests: int | None) -> Iterator[Traffic]:
    """Conversations with ``requests`` turns in total; the last one may be truncated."""
    left = sys.maxsize if requests is None else requests
    for one in every:
        if left <= 0:
            return
        turns = one.turns[:left]
        left -= len(turns)
        yield one if len(turns) == len(one.turns) else msgspec.structs.replace(one, turns=turns)


def settings(
    *,
    preset: str,
    cache_blocks: int | None,
    engines: int,
    strategies: str,
    concurrencies: Sequence[int],
    **ring: Any,
) -> tuple[Setting, ...]:
    """One per strategy and concurrency. ``ring``: fields of `Setting`; None uses the default."""
    if preset not in PRESETS:
        raise OptionError(f"--preset: {preset!r} is not one of {', '.join(PRESETS)}")
    engine = PRESETS[preset]
    if cache_blocks is not None:
        engine = msgspec.structs.replace(engine, cache_blocks=cache_blocks)
    names = [name.strip() for name in strategies.split(",")]
    for name in names:
        if name not in get_args(Strategy):
            raise OptionError(
                f"--strategies: {name!r} is not one of {', '.join(get_args(Strategy))}"
            )
    given: dict[str, Any] = {key: value for key, value in ring.items() if value is not None}
    found = tuple(
        Setting(
            engines=engines,
            engine=engine,
            strategy=name,  # type: ignore[arg-type]
            concurrency=concurrency,
            **given,
        )
        for concurrency, name in itertools.product(concurrencies, names)
    )
    if len(found) > RUNS_MAX:
        raise OptionError(f"--strategies: {len(found)} runs, the limit is {RUNS_MAX}")
    return found


def run(simulation: Simulation, outputs: Outputs, measured: Results | None = None) -> int:
    """Run all settings in parallel on all cores, then print and write the results.

    ``measured``: results of the real requests, shown beside the simulated ones. Exits the process
    after Ctrl-C.
    """
    described = environment.describe()
    jobs = [(simulation, number) for number in range(len(simulation.settings))]
    found, interrupted = in_processes(simulate_one, jobs, lambda one: f"{one.name}: done")
    if measured is not None:
        found.append(measured)
    for one in found:
        one.environment = described
    _print_results(simulation, found)
    outputs.write(found)
    if interrupted:
        exit_interrupted()
    return 0


def in_processes(
    function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], done: Callable[[T], str]
) -> tuple[list[T], bool]:
    """Call a function with each job's arguments, in parallel on all cores.

    Returns the results in order, and whether Ctrl-C ended it early. ``done``: a line for stderr.
    """
    found: list[T] = []
    # Spawn: a forked process would inherit locks held by this process's threads.
    pool = ProcessPoolExecutor(
        min(len(jobs), os.cpu_count() or 1),
        mp_context=get_context("spawn"),
        initializer=signal.signal,  # only this process handles Ctrl-C; it terminates the others
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        for future in [pool.submit(function, *job) for job in jobs]:
            found.append(future.result())
            print(done(found[-1]), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        # The futures fail with their processes. Cancelled ones would make the pool's thread print a
        # traceback when it finds that its processes are gone.
        for child in active_children():
            child.terminate()
        print(f"interrupted: {len(found)} of {len(jobs)} runs completed", file=sys.stderr)
        return found, True
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    pool.shutdown()
    return found, False


def exit_interrupted() -> NoReturn:
    """Exit after `in_processes` was interrupted.

    If a process was terminated while it sent its results, the pool's thread waits for the rest of
    them forever, and the end of the interpreter waits for that thread.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def _print_results(simulation: Simulation, found: list[Results]) -> None:
    for concurrency in dict.fromkeys(setting.concurrency for setting in simulation.settings):
        group = [one for one in found if one.setting.get("concurrency", concurrency) == concurrency]
        if group:
            print(compare.table(group))


def simulate_one(simulation: Simulation, number: int) -> Results:
    """Run one of the settings, in this process."""
    setting = simulation.settings[number]
    times = simulation.request_times
    run = cluster.simulate(setting, simulation.conversations(), request_times=times)
    closed = isinstance(simulation.load, ClosedLoop)
    described = msgspec.to_builtins(setting)
    if not closed:
        del described["concurrency"]
    return results.summarize(
        f"{setting.name}, {setting.concurrency:,} at a time" if closed else setting.name,
        {
            "simulated": simulation.preset,
            "traffic": msgspec.to_builtins(simulation.traffic),
            "load": "closed" if closed else msgspec.to_builtins(simulation.load),
            "num_prompts": simulation.requests_max,
            **described,
            "preemptions": run.preemptions,
        },
        run.measurements,
        run.gaps,
        warm_up_s=simulation.warm_up_s,
        objective=simulation.objective,
        selection=simulation.selection,
    )
