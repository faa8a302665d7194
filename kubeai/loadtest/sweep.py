"""``kubeai bench sweep``: the highest request rate at which service level objectives hold.

A `Search` proposes rates: it doubles the rate until an SLO breaks, then halves the interval between
the highest rate that holds and the lowest that does not, on a logarithmic scale. That assumes that
an SLO that breaks at a rate also breaks above it. Each rate is a run of its own, against a real
endpoint or on simulated engines.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import msgspec

from kubeai.loadtest import arguments, environment, options
from kubeai.loadtest import run as running
from kubeai.loadtest import simulate as simulating
from kubeai.loadtest.arguments import OptionError
from kubeai.loadtest.reports import compare, verdict
from kubeai.loadtest.reports.output import Outputs
from kubeai.loadtest.scenario import Exact, RequestLoop, Synthetic, Traffic
from kubeai.loadtest.simulate import Simulation
from kubeai.simulation.results import Limit, Results, Sweep
from kubeai.simulation.traffic import Arrivals

PROMPTS_MIN = 20  # at each rate, so that it has percentiles
HALVINGS_MAX = 6  # below the first rate
POINTS_MAX = 60
FAILED = 1


class SweepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The SLOs and the rates to try, in requests per second.

    ``rates``: exactly these, in ascending order, until one breaks; (): found by a search from
    ``start`` up to ``highest``, until the interval is within ``precision`` (0.1: 10 %).
    """

    limits: tuple[Limit, ...]
    arrivals: Arrivals  # with a rate that the sweep replaces
    rates: tuple[float, ...] = ()
    start: float = 1.0
    highest: float = 1024.0
    precision: float = 0.1
    duration_s: float = 30.0  # of each rate, unless there is a number of prompts
    num_prompts: int | None = None

    def prompts(self, rate: float) -> int:
        """The number of requests to send at a rate."""
        return self.num_prompts or max(PROMPTS_MIN, math.ceil(rate * self.duration_s))

    def load(self, rate: float) -> RequestLoop:
        """The load at a rate."""
        return RequestLoop(msgspec.structs.replace(self.arrivals, per_s=rate))

    def held(self, found: Results) -> bool:
        """Whether the run keeps all SLOs."""
        return all(limit.met(found.summary) for limit in self.limits)


def plan(given: arguments.Rates, limits: Sequence[Limit]) -> SweepPlan:
    """The plan that the options describe; OptionError if one is invalid."""
    for name, value in (
        ("--start-rate", given.start_rate),
        ("--max-rate", given.max_rate),
        ("--precision", given.precision),
        ("--burstiness", given.burstiness or 1.0),
    ):
        if not 0 < value < math.inf:
            raise OptionError(f"{name}: must be more than 0 and finite")
    if given.max_rate < given.start_rate:
        raise OptionError("--max-rate: must not be less than --start-rate")
    if given.duration is not None and given.num_prompts is not None:
        raise OptionError("--duration: cannot be combined with --num-prompts")
    return SweepPlan(
        limits=tuple(limits),
        arrivals=Arrivals(per_s=given.start_rate, burstiness=given.burstiness or 1.0),
        rates=tuple(sorted(options.rates("--request-rates", given.request_rates))),
        start=given.start_rate,
        highest=given.max_rate,
        precision=given.precision / 100,
        duration_s=options.seconds("--duration", given.duration, 30.0, positive=True),
        num_prompts=given.num_prompts,
    )


class Search:
    """The rates to try. Call `note` with the outcome of ``rate``, until ``rate`` is None."""

    def __init__(self, plan: SweepPlan) -> None:
        self._plan = plan
        self._given = list(plan.rates)
        self.held: float | None = None
        self.broke: float | None = None
        self.rate: float | None = self._given.pop(0) if self._given else plan.start
        self._tried = 0

    def note(self, *, held: bool) -> None:
        """Whether the SLOs hold at ``rate``; sets the next one."""
        assert self.rate is not None
        self._tried += 1
        if held:
            self.held = self.rate
        else:
            self.broke = self.rate
        self.rate = None if self._tried >= POINTS_MAX else self._next(self.rate)

    def _next(self, rate: float) -> float | None:
        plan = self._plan
        if plan.rates:
            return self._given.pop(0) if self._given and self.broke is None else None
        if self.broke is None:
            return None if rate >= plan.highest else min(2 * rate, plan.highest)
        if self.held is None:
            return rate / 2 if rate > plan.start / 2**HALVINGS_MAX else None
        if self.broke <= self.held * (1 + plan.precision):
            return None
        middle = float(f"{math.sqrt(self.held * self.broke):.3g}")
        return middle if self.held < middle < self.broke else None


class SweepTarget(msgspec.Struct):
    """The runs of one target: an endpoint, or a strategy on simulated engines."""

    name: str
    runs: list[Results] = []
    rates: list[float] = []
    held: float | None = None
    broke: float | None = None


def collected(plan: SweepPlan, targets: Sequence[SweepTarget]) -> tuple[list[Results], Sweep]:
    """All runs, and the findings that refer to them by position."""
    runs: list[Results] = []
    sweep = Sweep(limits=list(plan.limits), rates={}, runs={}, held={}, broke={})
    for target in targets:
        order = sorted(range(len(target.runs)), key=target.rates.__getitem__)
        sweep.rates[target.name] = [target.rates[at] for at in order]
        sweep.runs[target.name] = list(range(len(runs), len(runs) + len(order)))
        sweep.held[target.name], sweep.broke[target.name] = target.held, target.broke
        runs += [target.runs[at] for at in order]
    return runs, sweep


# -- a real endpoint -------------------------------------------------------------------------------


async def run(plan: SweepPlan, run_options: running.RunOptions, outputs: Outputs) -> int:
    """Sweep a real endpoint, then print and write the results; returns the exit status."""
    signals = running.Signals()
    try:
        prepared = await running.prepare(run_options, signals)
    except running.Interrupted:
        return running.interrupted(signals)
    scenario = prepared.scenario
    target = SweepTarget(run_options.name or scenario.model)
    search = Search(plan)
    while (rate := search.rate) is not None and not signals.number:
        number = len(target.runs)
        at_rate = msgspec.structs.replace(
            scenario,
            load=plan.load(rate),
            traffic=_other(scenario.traffic, number),
            seed=scenario.seed + number,
            requests_max=plan.prompts(rate),
        )
        named = msgspec.structs.replace(run_options, name=_name(target.name, rate))
        try:
            measured = await running.measure(named, prepared._replace(scenario=at_rate), signals)
        except running.Interrupted:
            break
        found = measured.results
        if number and at_rate.traffic == scenario.traffic:
            found.warnings.append(
                "the prompts are those of the rates before: engines have cached them"
            )
        target.runs.append(found)
        target.rates.append(rate)
        if signals.number:
            break
        search.note(held=plan.held(found))
        print(_line(plan, rate, found), file=sys.stderr, flush=True)
    target.held, target.broke = search.held, search.broke
    status = _finish(plan, [target], outputs)
    return running.INTERRUPTED + signals.number if signals.number else status


def _other(traffic: Traffic, number: int) -> Traffic:
    """The same kind of traffic with other prompts, which engines have not cached."""
    if isinstance(traffic, Synthetic | Exact):
        return msgspec.structs.replace(traffic, seed=traffic.seed + number)
    return traffic


# -- simulated engines -----------------------------------------------------------------------------


def simulate(plan: SweepPlan, simulation: Simulation, outputs: Outputs) -> int:
    """Sweep each strategy on simulated engines, then print and write the results."""
    described = environment.describe()
    jobs = [(plan, simulation, number) for number in range(len(simulation.settings))]
    targets, interrupted = simulating.in_processes(
        simulate_strategy, jobs, lambda target: _verdict(plan, target)
    )
    for target in targets:
        for one in target.runs:
            one.environment = described
    status = _finish(plan, targets, outputs)
    if interrupted:
        simulating.exit_interrupted()
    return status


def simulate_strategy(plan: SweepPlan, simulation: Simulation, number: int) -> SweepTarget:
    """Sweep one of the settings; the traffic is the same at each rate, on empty caches."""
    target = SweepTarget(simulation.settings[number].name)
    search = Search(plan)
    while (rate := search.rate) is not None:
        at_rate = msgspec.structs.replace(
            simulation, load=plan.load(rate), requests_max=plan.prompts(rate)
        )
        found = simulating.simulate_one(at_rate, number)
        found.name = _name(target.name, rate)
        target.runs.append(found)
        target.rates.append(rate)
        search.note(held=plan.held(found))
    target.held, target.broke = search.held, search.broke
    return target


# -- results ---------------------------------------------------------------------------------------


def _name(target: str, rate: float) -> str:
    return f"{target}, {rate:g} requests/s"


def _finish(plan: SweepPlan, targets: Sequence[SweepTarget], outputs: Outputs) -> int:
    runs, sweep = collected(plan, targets)
    for target in targets:
        print(_table(plan, target))
        print(_verdict(plan, target))
        print()
    for one in runs:
        for warning in compare.warnings(one):
            print(f"! {compare.printable(one.name)}: {warning}")
    outputs.write(runs, sweep)
    return 0 if any(held is not None for held in sweep.held.values()) else FAILED


def _table(plan: SweepPlan, target: SweepTarget) -> str:
    lines = [["requests/s", "completed/s", *(limit.label for limit in plan.limits), ""]]
    for at in sorted(range(len(target.runs)), key=target.rates.__getitem__):
        found = target.runs[at]
        values = [verdict.limit_value(limit, found) for limit in plan.limits]
        achieved = f"{found.summary['requests_per_s']:,.2f}"
        outcome = "holds" if plan.held(found) else "breaks"
        lines.append([f"{target.rates[at]:g}", achieved, *values, outcome])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = (
        "  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths, strict=True)) for line in lines
    )
    return "\n".join([compare.printable(target.name), *rows])


def _line(plan: SweepPlan, rate: float, found: Results) -> str:
    values = ", ".join(
        f"{limit.label} {verdict.limit_value(limit, found)}" for limit in plan.limits
    )
    return f"{rate:g} requests/s: {values}: {'holds' if plan.held(found) else 'breaks'}"


def _verdict(plan: SweepPlan, target: SweepTarget) -> str:
    runs, sweep = collected(plan, [target])
    return verdict.of_target(sweep, runs, target.name)
