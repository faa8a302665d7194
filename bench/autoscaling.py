"""Compare the autoscaler's rule with others on traces: the figures in docs/explain/autoscaling.md.

    python bench/autoscaling.py             # docs/explain/autoscaling/*.svg and the tables
    python bench/autoscaling.py --check     # exits with 1 if the tables are outdated

Needs `pip install -c constraints.txt -e '.[plots]'` and takes some minutes on two cores.

Everything is simulated in virtual time with fixed seeds (kubeai/simulation), so the same code
writes the same bytes. The rule under test is the class that the operator runs.
"""

from __future__ import annotations

import argparse
import math
import sys
from concurrent.futures import ProcessPoolExecutor

from pages import DOCS, filled, plot

from kubeai.operator.scaling import autoscaler
from kubeai.operator.scaling.autoscaler import Autoscaler, Sample
from kubeai.simulation.fleet import Figures, Fleet, Observation, Rule, Tick, run
from kubeai.simulation.rules import Knative, MovingAverage
from kubeai.simulation.traces import Trace, traces

PAGE = DOCS / "autoscaling.md"
INTERVAL_S, WINDOW_S, DELAY_S = 10.0, 600.0, 30.0
PLOTTED_EVERY = 15  # ticks
FLEETS = {"60 s": Fleet(), "300 s": Fleet(startup_s=300.0)}
SLOW_TRACES = ("step", "diurnal", "cold", "clients-ramp")

# Alternative values of each constant, for comparison with the one in use.
VARIANTS: list[tuple[str, float]] = [
    ("EARLY_S", math.inf),  # no early reaction to overload
    ("SHORT_INTERVALS", 10**9),  # no short window
    ("HOLD", 0.0),
    ("HOLD", 0.1),
    ("HOLD", 0.3),
    ("SHORT_INTERVALS", 1),
    ("SHORT_INTERVALS", 3),
    ("TOLERANCE", 0.0),
    ("TOLERANCE", 0.1),
    ("TOLERANCE_MIN", 0.0),
    ("TOLERANCE_MIN", 0.5),
    ("SLACK", 0.0),
    ("SLACK", 0.25),
    ("DRAIN_S", 30.0),
    ("DRAIN_S", 60.0),
    ("DRAIN_S", 240.0),
    ("GROWTH_MAX", 1.0),
    ("GROWTH_MAX", 4.0),
    ("EARLY_S", 0.0),
    ("EARLY_S", 10.0),
    ("SERVICE_S", 5.0),
    ("SERVICE_S", 20.0),
]


class Ours:
    """The operator's rule, with the operator's observations."""

    def __init__(self, fleet: Fleet, average: float) -> None:
        self._core = Autoscaler(INTERVAL_S, WINDOW_S)
        self._target = fleet.target_requests
        self._average = average
        self._next_s = INTERVAL_S

    def decide(self, observation: Observation) -> int | None:
        sample = Sample(
            active=observation.active,
            ended=observation.ended,
            ready=observation.ready,
            replicas=observation.replicas,
            target_requests=self._target,
            min_replicas=0,
            max_replicas=None,
            scale_down_delay_s=DELAY_S,
        )
        first, self._average = self._average, -1.0
        if observation.now_s < self._next_s:
            self._core.observe({"": sample}, observation.now_s)
            if first >= 0:
                self._core.restore({"": first})
            return None
        self._next_s += INTERVAL_S
        return self._core.step({"": sample}, observation.now_s)[""].replicas


def rules(trace: Trace, fleet: Fleet) -> dict[str, Rule]:
    """Every rule, in the steady state of the trace's initial load."""
    target = fleet.target_requests
    average = trace.offered(0.0) * target
    return {
        "KubeAI": Ours(fleet, average),
        "upstream": MovingAverage(target, average=average),
        "KPA, all of the target": Knative(target, utilization=1.0),
        "KPA, 70 % of it": Knative(target, utilization=0.7),
    }


Played = tuple[Figures, list[Tick]]  # with only the plotted ticks


def compare(job: tuple[str, str, str]) -> Played:
    name, rule, startup = job
    trace, fleet = _trace(name), FLEETS[startup]
    one = run(trace, rules(trace, fleet)[rule], fleet)
    return one.figures(), one.ticks[::PLOTTED_EVERY]


def vary(job: tuple[str, float, str]) -> Figures:
    """The operator's rule with another value of a constant."""
    constant, value, name = job
    before = getattr(autoscaler, constant)
    setattr(autoscaler, constant, value)
    try:
        return compare((name, "KubeAI", "60 s"))[0]
    finally:
        setattr(autoscaler, constant, before)


def _trace(name: str) -> Trace:
    return next(trace for trace in traces() if trace.name == name)


# -- tables ----------------------------------------------------------------------------------------


def rules_table(runs: dict[tuple[str, str], Played]) -> list[str]:
    lines = [
        "| trace | rule | replica-hours | wait, mean | wait, p99 | waited > 1 s | changes "
        "| reversals | too many |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (name, rule), (one, _) in runs.items():
        first = name if rule == "KubeAI" else ""
        lines.append(
            f"| {first} | {rule} | {one.replica_hours:.2f} | {one.waits_s / one.served:.1f} s "
            f"| {one.wait_p99_s:.0f} s | {one.waited / one.served:.0%} | {one.changes} "
            f"| {one.reversals} | {one.too_many} |"
        )
    return lines


def constants_table(groups: dict[tuple[str, float], list[Figures]]) -> list[str]:
    lines = [
        "| constant | value | replica-hours | wait, mean | waited > 1 s | changes | reversals "
        "| too many |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for (constant, value), group in groups.items():
        label = "∞" if value >= 10**9 else f"{value:g}"
        if getattr(autoscaler, constant) == value:
            label = f"**{label}**"
        served = sum(one.served for one in group)
        lines.append(
            f"| `{constant}` | {label} | {sum(one.replica_hours for one in group):.1f} "
            f"| {sum(one.waits_s for one in group) / served:.2f} s "
            f"| {sum(one.waited for one in group) / served:.1%} "
            f"| {sum(one.changes for one in group)} | {sum(one.reversals for one in group)} "
            f"| {max(one.too_many for one in group)} |"
        )
    return lines


# -- plots -----------------------------------------------------------------------------------------


def plot_replicas(name: str, runs: dict[str, list[Tick]]) -> None:
    """Plot needed, desired and ready replicas, and below them the waiting requests, per rule."""
    # Clip rules that are far off: they would flatten the others.
    top = 2.2 * max(2.0, *(tick.needed for tick in runs["KubeAI"]))
    shared = {"sharex": True, "sharey": "row", "height_ratios": (3, 1)}
    with plot(f"autoscaling/{name}", (11, 3.4), 2, len(runs), font_size=8, **shared) as axes:
        for (rule, ticks), upper, lower in zip(runs.items(), *axes, strict=True):
            minutes = [tick.now_s / 60 for tick in ticks]
            needed = [t.needed for t in ticks]
            upper.plot(minutes, needed, lw=0.8, color="#999999", label="needed")
            upper.step(minutes, [t.replicas for t in ticks], where="post", lw=1, label="wanted")
            upper.step(minutes, [t.ready for t in ticks], where="post", lw=1, label="ready")
            upper.set_title(rule, fontsize=9)
            upper.set_ylim(0, top)
            lower.plot(minutes, [t.waiting for t in ticks], lw=0.8, color="#c44e52")
            lower.set_xlabel("minutes")
        axes[0][0].set_ylabel("replicas")
        axes[0][0].legend(loc="upper left", frameon=False)
        axes[1][0].set_ylabel("waiting")


# -- command line ----------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="only check that the tables are up to date"
    )
    check = parser.parse_args().check
    before = page = PAGE.read_text()
    names = [trace.name for trace in traces()]
    kinds = list(rules(traces()[0], Fleet()))
    constants = list(dict.fromkeys(constant for constant, _ in VARIANTS))
    used = [(constant, float(getattr(autoscaler, constant))) for constant in constants]
    variants = sorted({*used, *VARIANTS}, key=lambda cv: (constants.index(cv[0]), cv[1]))
    with ProcessPoolExecutor(2) as pool:

        def compared(startup: str, names: list[str]) -> dict[tuple[str, str], Played]:
            jobs = [(name, rule, startup) for name in names for rule in kinds]
            return {job[:2]: one for job, one in zip(jobs, pool.map(compare, jobs), strict=True)}

        runs = compared("60 s", names)
        page = filled(page, "rules", rules_table(runs))
        page = filled(page, "slow rules", rules_table(compared("300 s", list(SLOW_TRACES))))
        varied = pool.map(vary, [(*variant, name) for variant in VARIANTS for name in names])
        groups = {variant: [next(varied) for _ in names] for variant in VARIANTS}
        base = [runs[name, "KubeAI"][0] for name in names]
        groups |= dict.fromkeys(used, base)
        table = constants_table({variant: groups[variant] for variant in variants})
        page = filled(page, "constants", table)
    if check:
        return int(page != before)
    PAGE.write_text(page)
    for name in names:
        plot_replicas(name, {rule: runs[name, rule][1] for rule in kinds})
    return 0


if __name__ == "__main__":
    sys.exit(main())
