"""What results come to: a few sentences and the main figures, for the top of the HTML report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kubeai.loadtest.reports import compare
from kubeai.simulation.results import Limit, Results, Sweep

ALIKE = 1.05  # runs whose figures differ by less than 5 % are called alike


class Tile(NamedTuple):
    """A main figure. ``run``: the position of the run that it belongs to, for its colour."""

    label: str
    value: str
    note: str = ""
    run: int | None = None


class _Main(NamedTuple):
    """A figure of the summary that tiles and sentences show."""

    label: str
    value: Callable[[Results], float | None]
    show: Callable[[float], str]
    lower: bool  # whether lower is better


def _time(metric: str, figure: str) -> Callable[[Results], float | None]:
    def value(run: Results) -> float | None:
        found: float | None = (run.summary.get(f"{metric}_ms") or {}).get(figure)
        return found

    return value


def _plain(key: str) -> Callable[[Results], float | None]:
    def value(run: Results) -> float | None:
        found: float | None = run.summary.get(key)
        return found

    return value


def milliseconds(value: float) -> str:
    """A time for people: "12.3 ms", "4.57 s"."""
    if value >= 1000:
        return f"{value / 1000:,.3g} s" if value < 1e6 else f"{value / 1000:,.0f} s"
    return f"{value:.3g} ms" if value >= 1 else f"{value:.2g} ms"


def _per_s(value: float) -> str:
    return f"{value:,.0f}/s" if value >= 100 else f"{value:,.3g}/s"


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %" if share >= 0.1 or not share else f"{share * 100:.1f} %"


_TTFT = _Main("mean TTFT", _time("ttft", "mean"), milliseconds, lower=True)
_E2EL = _Main("mean E2EL", _time("e2el", "mean"), milliseconds, lower=True)
_OUTPUT = _Main("output tokens", _plain("output_tokens_per_s"), _per_s, lower=False)
_HITS = _Main("cache hit rate", _plain("hit_rate"), _percent, lower=False)
COMPARED = (
    _TTFT,
    _Main("TTFT p99", _time("ttft", "p99"), milliseconds, lower=True),
    _Main("mean TPOT", _time("tpot", "mean"), milliseconds, lower=True),
    _E2EL,
    _OUTPUT,
    _Main("requests", _plain("requests_per_s"), _per_s, lower=False),
    _Main("goodput", _plain("good_requests_per_s"), _per_s, lower=False),
    _HITS,
)


def sentences(runs: Sequence[Results], sweep: Sweep | None = None) -> list[str]:
    """The verdict on one or more runs, of which the first is the baseline, or on a sweep."""
    if sweep is not None:
        return [of_target(sweep, runs, name) for name in sweep.held]
    if not any(run.summary.get("requests", 0) > run.summary.get("failed", 0) for run in runs):
        return ["No request succeeded."]
    return list(_compared(runs) if len(runs) > 1 else _single(runs[0]))


def tiles(runs: Sequence[Results], sweep: Sweep | None = None) -> list[Tile]:
    """The main figures; of several runs, the best ones."""
    if sweep is not None:
        return [
            Tile(name, "none" if held is None else f"{held:g}/s", _broke(sweep, name), at)
            for at, (name, held) in enumerate(sweep.held.items())
        ]
    return list(_best_tiles(runs) if len(runs) > 1 else _tiles(runs[0]))


# -- one run ---------------------------------------------------------------------------------------


def _single(run: Results) -> Iterator[str]:
    summary = run.summary
    done = summary["requests"] - summary["failed"]
    yield f"{done:,} requests succeeded, {summary['requests_per_s']:,.3g} per second."
    for name, title in (("ttft", "The first token came"), ("e2el", "The response was complete")):
        figures = summary.get(f"{name}_ms") or {}
        percentiles = [figure for figure in figures if figure != "mean"]
        if percentiles:
            last = percentiles[-1]
            yield f"{title} within {milliseconds(figures[last])} for {last[1:]} % of them."
            break
    if (share := summary.get("good_share")) is not None:
        yield f"{_percent(share)} of all requests count towards goodput."


def _tiles(run: Results) -> Iterator[Tile]:
    summary = run.summary
    yield Tile("Requests", _per_s(summary.get("requests_per_s") or 0.0), _failed(run))
    for name in ("ttft", "tpot", "itl", "e2el"):
        figures = summary.get(f"{name}_ms") or {}
        if figures:
            (first, value), *others = figures.items()
            note = ", ".join(f"{figure} {milliseconds(one)}" for figure, one in others)
            yield Tile(f"{name.upper()} {first}", milliseconds(value), note)
    if summary.get("output_tokens"):
        yield Tile("Output tokens", _per_s(summary["output_tokens_per_s"]))
    if (share := summary.get("good_share")) is not None:
        yield Tile("Goodput", _per_s(summary["good_requests_per_s"]), f"{_percent(share)} of all")
    if (hits := summary.get("hit_rate")) is not None:
        yield Tile("Cache hit rate", _percent(hits), "of prompt tokens")


def _failed(run: Results) -> str:
    failed, requests = (run.summary.get(key) or 0 for key in ("failed", "requests"))
    return f"{failed:,} of {requests:,} failed" if failed else f"{requests:,}, none failed"


# -- several runs ----------------------------------------------------------------------------------


def _compared(runs: Sequence[Results]) -> Iterator[str]:
    first = runs[0]
    latency = _TTFT if any(_TTFT.value(run) is not None for run in runs) else _E2EL
    best = _best(runs, latency)
    if best is not None:
        yield _against(runs, latency, best)
    if any(_is_paced(run) for run in runs):
        return
    fastest = _best(runs, _OUTPUT)
    base = _OUTPUT.value(first)
    if fastest and base and (value := _OUTPUT.value(runs[fastest])) and value > ALIKE * base:
        yield (
            f"{runs[fastest].name} generates the most output tokens: {_per_s(value)}, "
            f"{value / base:.2g} times those of {first.name}."
        )


def _is_paced(run: Results) -> bool:
    """Whether the load came at a rate, so that its throughput says nothing about the target."""
    load = run.setting.get("load")
    return isinstance(load, dict) and (
        load.get("type") == "open" or load.get("arrivals") is not None
    )


def _against(runs: Sequence[Results], latency: _Main, best: int) -> str:
    """The best run's latency compared to the baseline's, with the hit rates of both."""
    first, winner = runs[0], runs[best]
    value, base = latency.value(winner), latency.value(first)
    assert value is not None
    values = [one for run in runs if (one := latency.value(run)) is not None]
    if value and max(values) < ALIKE * value:
        return f"All runs have about the same {latency.label}: {latency.show(value)}."
    text = f"{winner.name} has the lowest {latency.label}: {latency.show(value)}"
    if best and base and value:
        text += f", {value / base:.0%} of that of {first.name} ({latency.show(base)})".replace(
            "%", " %"
        )
    hits, before = _HITS.value(winner), _HITS.value(first)
    if hits is not None:
        text += f". Its engines found {_percent(hits)} of the prompt tokens in their caches"
        if best and before is not None:
            text += f", instead of {_percent(before)}"
    return text + "."


def _best_tiles(runs: Sequence[Results]) -> Iterator[Tile]:
    for main in COMPARED:
        best = _best(runs, main)
        if best is None:
            continue
        value, base = main.value(runs[best]), main.value(runs[0])
        assert value is not None
        values = {main.show(one) for run in runs if (one := main.value(run)) is not None}
        note = runs[best].name if len(values) > 1 else "all runs"
        if best and base:
            note += f", ×{value / base:.2g}"
        label = main.label[0].upper() + main.label[1:]
        yield Tile(label, main.show(value), note, best if len(values) > 1 else None)


def _best(runs: Sequence[Results], main: _Main) -> int | None:
    """The position of the run with the best value; None if no run has one."""
    known = [(value, at) for at, run in enumerate(runs) if (value := main.value(run)) is not None]
    if not known:
        return None
    return min(known, key=lambda one: one[0] if main.lower else -one[0])[1]


# -- sweeps ----------------------------------------------------------------------------------------


def of_target(sweep: Sweep, runs: Sequence[Results], target: str) -> str:
    """The highest rate at which a target holds the SLOs, and what breaks above it."""
    slos = " and ".join(limit.name for limit in sweep.limits)
    held, broke = sweep.held[target], sweep.broke[target]
    name = compare.printable(target)
    if held is None:
        text = f"{name} does not hold {slos} at any rate that was tried"
    else:
        text = f"{name} holds {slos} up to {_rate(held)}"
    if broke is None:
        return text + ", the highest rate that was tried."
    at = sweep.runs[target][sweep.rates[target].index(broke)]
    broken = [
        f"{limit.label} is {limit_value(limit, runs[at])}"
        for limit in sweep.limits
        if not limit.met(runs[at].summary)
    ]
    return f"{text}. At {_rate(broke)}, {' and '.join(broken)}."


def limit_value(limit: Limit, run: Results) -> str:
    """A run's value of what is limited."""
    value = limit.value(run.summary)
    if value is None:
        return compare.MISSING
    return f"{value:.3g} %" if limit.metric in ("goodput", "errors") else milliseconds(value)


def _rate(rate: float) -> str:
    return f"{rate:g} requests/s"


def _broke(sweep: Sweep, target: str) -> str:
    broke = sweep.broke[target]
    return "requests; none higher tried" if broke is None else f"requests; breaks at {broke:g}/s"
