"""Compare the strategies on simulated engines.

Writes bench/results/routing.json, docs/explain/routing.md and the data of its plot.

    python bench/routing.py [--trace FILE] [--full] [--plots] [--check]        # make bench-routing

The picks are made by the gateway's own compiled code, in virtual time (kubeai/simulation): the same
code writes the same figures on every machine. ``--trace``: an hour of requests in Mooncake's format
(the conversation trace of its FAST'25 release); without it, its rows are left out. ``--full``: up
to 1,000 endpoints, which takes an hour. ``--check``: exit with 1 if a criterion is missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import plot_data
from pages import filled, plot

from kubeai.simulation.cluster import simulate
from kubeai.simulation.presets import PRESETS
from kubeai.simulation.setting import Setting, Strategy
from kubeai.simulation.trace_files import TraceEntry, read_trace
from kubeai.simulation.traffic import SHAPES, Arrivals, Conversation, Shape, generate, timed

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "routing.json"
PAGE = ROOT / "docs/explain/routing.md"
L4, H100 = "llama-3.1-8b-fp8-l4", "llama-3.3-70b-fp8-h100x2"
STRATEGIES: tuple[Strategy, ...] = ("LeastLoad", "PrefixHash", "PrefixCache")
TRACE_REQUESTS = 4_000
SEED = 1


class Case(NamedTuple):
    """Traffic and engines. ``concurrency``: of a closed loop; ``speed``: of the trace."""

    name: str
    shape: Shape | None = None
    concurrency: int = 0
    per_s: float = 0.0  # open loop: conversations that begin per second
    speed: float = 0.0
    preset: str = L4

    def traffic(self, trace: list[TraceEntry], spread_s: float = 0.0) -> Iterable[Conversation]:
        """``spread_s``: spread the times, which the trace rounds down, over this interval."""
        if self.shape is None:
            return _spread(trace, self.speed, spread_s)
        conversations = generate(self.shape, SEED)
        if self.per_s:
            return timed(conversations, Arrivals(per_s=self.per_s).times(SEED))
        return conversations


def _spread(trace: list[TraceEntry], speed: float, spread_s: float) -> list[Conversation]:
    conversations = []
    for number, entry in enumerate(trace[:TRACE_REQUESTS]):
        # A fixed fraction of the interval, in an order that has nothing to do with the trace's.
        later_s = spread_s * (number * 0.618034 % 1.0)
        conversations.append(entry.conversation((entry.timestamp / 1000 + later_s) / speed))
    return sorted(conversations, key=lambda each: each.at_s or 0.0)


def shape(name: str, conversations: int, **more: Any) -> Shape:
    return msgspec.structs.replace(SHAPES[name], conversations=conversations, think_s=2.0, **more)


CHAT = shape("chat", 1000, turns=10)
TABLE = [
    Case("trace", speed=1.0, preset=H100),
    Case("trace, twice as fast", speed=2.0, preset=H100),
    Case("trace, 2.5 times as fast", speed=2.5, preset=H100),
    Case("rag, 150 at a time", shape("rag", 2000), 150),
    Case("rag, 300", shape("rag", 2000), 300),
    Case("agent, 100", shape("agent", 200), 100),
    Case("agent, 300", shape("agent", 600), 300),
    Case("chat of 10 turns, 400", CHAT, 400),
    Case("assistant, 300", shape("assistant", 1000), 300),
    Case("chat of 10 turns, 1,200", shape("chat", 2400, turns=10), 1200),
]
# Mean time to the first token (ms) of a prototype of the cost-aware pick, same traffic and engines.
PROTOTYPE = {
    "trace": 1041,
    "trace, twice as fast": 1695,
    "trace, 2.5 times as fast": 25_946,
    "rag, 150 at a time": 401,
    "rag, 300": 1146,
    "agent, 100": 186,
}
REPLICATED = [TABLE[1], TABLE[3], TABLE[5], TABLE[7]]
TRACE = "trace"
LEVELS = (0.25, 0.5, 0.75, 0.9, 1.1)
SHAPED = {
    "chat": CHAT,
    "assistant": shape("assistant", 1000),
    "rag": shape("rag", 1500),
    "agent": shape("agent", 300),
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "without the index": {"without": ("index",)},
    "without pending work": {"without": ("work",)},
    "without learned rates": {"without": ("rates",)},
}


# Four replicas that pick without the ring's candidates, or do not report prompts to each other.
FOUR_REPLICAS: dict[str, dict[str, Any]] = {
    "4, without the ring": {"expected": False},
    "4, prompts not shared": {"shares_prompts": False},
}


class Run(NamedTuple):
    """One simulation: a case, and what differs from the default setting."""

    part: str  # the table that it belongs to
    case: Case
    strategy: Strategy
    more: dict[str, Any]
    label: str = ""
    spread_s: float = 0.0


class Figures(msgspec.Struct):
    """The result of a run. Times to the first token in ms."""

    part: str
    case: str
    strategy: str
    label: str
    mean: float
    p50: float
    p99: float
    hit_rate: float
    tokens_per_s: float  # generated


_trace: list[TraceEntry] = []


def _load(path: Path | None) -> None:
    if path is not None:
        _trace.extend(read_trace(path))


def measure(run: Run) -> Figures:
    case = run.case
    setting = Setting(
        **{
            "engine": PRESETS[case.preset],
            "strategy": run.strategy,
            "concurrency": case.concurrency or 1,
            "seed": SEED,
            **run.more,
        }
    )
    done = simulate(setting, case.traffic(_trace, run.spread_s))
    well = [one for one in done.measurements if not one.error]
    times = sorted(one.ttft_s * 1e3 for one in well)
    prompts = sum(one.prompt_tokens for one in well)
    return Figures(
        run.part,
        case.name,
        run.strategy,
        run.label,
        round(statistics.fmean(times), 1),
        round(times[len(times) // 2], 1),
        round(times[len(times) * 99 // 100], 1),
        round(sum(max(0, one.cached_tokens) for one in well) / prompts, 3),
        round(sum(one.output_tokens for one in well) / done.ended_s, 1),
    )


def saturation(name: str) -> float:
    """What eight engines can do: conversations per second, or for the trace, its speed.

    A shape's is measured while all engines are busy. The trace's is the generated tokens per second
    of its overload, in proportion to those at its own speed.
    """
    if name == TRACE:
        slow, fast = (measure(Run("", case, "PrefixCache", {})) for case in (TABLE[0], TABLE[2]))
        return fast.tokens_per_s / slow.tokens_per_s
    one = SHAPED[name]
    busy = Setting(engine=PRESETS[L4], strategy="PrefixCache", concurrency=400, seed=SEED)
    done = simulate(busy, generate(msgspec.structs.replace(one, think_s=0.0), SEED))
    ends = sorted(m.ended_s for m in done.measurements if m.turn == one.turns - 1)
    first, last = ends[len(ends) // 5], ends[len(ends) * 3 // 5]
    return len(ends) * 2 / 5 / (last - first)


def runs(with_trace: bool, full: bool, rates: dict[str, float]) -> list[Run]:
    cases = [case for case in TABLE if case.shape or with_trace]
    planned = [
        Run("table", case, strategy, {}) for case in cases for strategy in (*STRATEGIES, "Oracle")
    ]
    for name, rate in rates.items():
        for level in LEVELS:
            if name == TRACE:
                case = Case(f"{name}, {level:.0%}", speed=rate * level, preset=H100)
            else:
                case = Case(f"{name}, {level:.0%}", SHAPED[name], per_s=rate * level)
            planned += [Run("levels", case, strategy, {}) for strategy in STRATEGIES]
    for case in REPLICATED:
        if case.shape or with_trace:
            for replicas in (1, 2, 4, 8):
                more = {"replicas": replicas}
                planned.append(Run("replicas", case, "PrefixCache", more, str(replicas), 3.0))
    planned += [
        Run("replicas", case, "PrefixCache", {"replicas": 4, **more}, label, 3.0)
        for case in REPLICATED
        if case.shape or with_trace
        for label, more in FOUR_REPLICAS.items()
    ]
    for case in (TABLE[1], TABLE[4], TABLE[5], TABLE[7]):
        if case.shape or with_trace:
            planned += [
                Run("parts", case, "PrefixCache", more, label) for label, more in ABLATIONS.items()
            ]
    for engines in (8, 32, 128, *((1000,) if full else ())):
        case = Case(f"{engines}", shape("chat", 60 * engines, turns=6), 40 * engines)
        planned += [Run("endpoints", case, each, {"engines": engines}) for each in STRATEGIES]
    return planned


# -- the criteria of success -----------------------------------------------------------------------


def criteria(figures: list[Figures]) -> Iterator[tuple[bool, str]]:
    """(whether it is met, what)."""
    by = {(one.part, one.case, one.strategy, one.label): one for one in figures}
    for case, mean in PROTOTYPE.items():
        if (one := by.get(("table", case, "PrefixCache", ""))) is not None:
            yield one.mean <= 1.05 * mean, f"{case}: mean {one.mean:,.0f} ms, prototype {mean:,} ms"
    for part in ("table", "levels"):
        for case in dict.fromkeys(one.case for one in figures if one.part == part):
            ours = by[part, case, "PrefixCache", ""]
            others = [by[part, case, each, ""] for each in STRATEGIES[:2]]
            best = min(one.mean for one in others)
            if not case.endswith("110%"):
                yield (
                    ours.mean <= 1.03 * best,
                    f"{case}: mean {ours.mean:,.0f} ms, best other {best:,.0f} ms",
                )
            if part == "table":
                best = min(one.p99 for one in others)
                yield ours.p99 <= best, f"{case}: p99 {ours.p99:,.0f} ms, best other {best:,.0f} ms"
    for case in REPLICATED:
        if ("replicas", case.name, "PrefixCache", "1") in by:
            one = by["replicas", case.name, "PrefixCache", "1"].mean
            for replicas, limit in (("4", 1.1), ("8", 1.2)):
                several = by["replicas", case.name, "PrefixCache", replicas].mean
                yield (
                    several <= limit * one,
                    f"{case.name}, {replicas} replicas: mean {several / one:.2f} times that of one",
                )


# -- the page --------------------------------------------------------------------------------------


def table(figures: list[Figures], part: str, columns: list[tuple[str, str]]) -> list[str]:
    """A Markdown table: a row for each case, a column for each (strategy, label)."""
    by = {(one.case, one.strategy, one.label): one for one in figures if one.part == part}
    head = [f"{strategy} {label}".strip() for strategy, label in columns]
    lines = ["| traffic | " + " | ".join(head) + " |", "|---|" + "--:|" * len(columns)]
    for case in dict.fromkeys(case for case, *_ in by):
        cells = [by[case, strategy, label] for strategy, label in columns]
        lines.append(
            f"| {case} | "
            + " | ".join(
                f"{one.mean:,.0f} / {one.p50:,.0f} / {one.p99:,.0f} ms, {one.tokens_per_s:,.0f}/s, "
                f"{one.hit_rate:.0%}"
                for one in cells
            )
            + " |"
        )
    return lines


def write(figures: list[Figures], judged: list[tuple[bool, str]]) -> None:
    RESULTS.write_text(json.dumps([msgspec.to_builtins(one) for one in figures], indent=1) + "\n")
    page = PAGE.read_text()
    plain = [(strategy, "") for strategy in STRATEGIES]
    page = filled(page, "table", table(figures, "table", [*plain, ("Oracle", "")]))
    page = filled(page, "levels", table(figures, "levels", plain))
    labels = ["1", "2", "4", "8", *FOUR_REPLICAS]
    page = filled(
        page, "replicas", table(figures, "replicas", [("PrefixCache", n) for n in labels])
    )
    page = filled(page, "parts", table(figures, "parts", [("PrefixCache", n) for n in ABLATIONS]))
    page = filled(page, "endpoints", table(figures, "endpoints", plain))
    missed = [f"- {what}" for met, what in judged if not met]
    met = f"{len(judged) - len(missed)} of {len(judged)} criteria are met. Missed:"
    page = filled(page, "criteria", [met, "", *(missed or ["- none"])])
    PAGE.write_text(page)
    plot_data.write()


# -- plots -----------------------------------------------------------------------------------------


def plots(figures: list[Figures]) -> None:
    """Mean times to the first token: of all traffic, and against the load. Needs matplotlib."""
    by = {(one.part, one.case, one.strategy): one.mean / 1e3 for one in figures if not one.label}
    cases = list(dict.fromkeys(one.case for one in figures if one.part == "table"))
    with plot("routing/traffic", (8, 3.8)) as axes:
        for at, strategy in enumerate(STRATEGIES):
            places = [number + (at - 1) * 0.27 for number in range(len(cases))]
            axes.barh(places, [by["table", case, strategy] for case in cases], 0.25, label=strategy)
        axes.set_yticks(range(len(cases)), cases)
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("mean time to first token, s (logarithmic)")
        axes.legend(frameon=False)
    names = dict.fromkeys(one.case.split(",")[0] for one in figures if one.part == "levels")
    with plot("routing/levels", (9, 2.8), 1, len(names), sharey=True) as panels:
        for name, axes in zip(names, panels, strict=True):
            for strategy in STRATEGIES:
                means = [by["levels", f"{name}, {level:.0%}", strategy] for level in LEVELS]
                x = [level * 100 for level in LEVELS]
                axes.plot(x, means, marker="o", ms=3, lw=1.2, label=strategy)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xticks(x)
            axes.set_title(name, fontsize=10)
            axes.set_xlabel("% of saturation")
        panels[0].set_ylabel("mean time to first token, s")
        panels[0].legend(frameon=False, loc="upper left")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trace", type=Path, help="an hour of requests in Mooncake's format")
    parser.add_argument("--full", action="store_true", help="also simulate 1,000 endpoints")
    parser.add_argument("--plots", action="store_true", help="draw docs/explain/routing/*.svg too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a criterion is missed")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with ProcessPoolExecutor(
        options.processes, initializer=_load, initargs=(options.trace,)
    ) as pool:
        names = [*SHAPED, *((TRACE,) if options.trace else ())]
        rates = dict(zip(names, pool.map(saturation, names), strict=True))
        figures = []
        for one in pool.map(measure, runs(options.trace is not None, options.full, rates)):
            what = f"{one.part:10} {one.case:26} {one.strategy:12} {one.label:22}"
            times = f"mean {one.mean:9,.0f} p99 {one.p99:9,.0f} ms"
            print(what, times, f"{one.hit_rate:.0%}", flush=True)
            figures.append(one)
    judged = list(criteria(figures))
    for met, what in judged:
        print("met   " if met else "MISSED", what)
    write(figures, judged)
    if options.plots:
        plots(figures)
    return 0 if all(met for met, _ in judged) or not options.check else 1


if __name__ == "__main__":
    sys.exit(main())
