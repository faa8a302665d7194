"""The HTML report that ``kubeai bench`` writes for one or more runs, or for a sweep.

It opens with a verdict and the main figures, then shows plots and what differed between the runs;
everything else is folded away. External text (names, settings, errors) is escaped.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from kubeai.loadtest.reports import charts, compare, verdict
from kubeai.loadtest.reports.charts import Axis, Bar, Point
from kubeai.loadtest.reports.compare import Cell, Row
from kubeai.loadtest.reports.page import key, page, text
from kubeai.simulation.results import Results, Sweep

ENDPOINTS_MAX = 24  # bars; with more endpoints, only the busiest are drawn
SPREAD_TITLE = "Requests per endpoint"
# Parts of a run's setting that were measured, not chosen.
MEASURED = ("client", "said", "preemptions")


def report(runs: Sequence[Results], sweep: Sweep | None = None) -> str:
    """Render the report of one or more runs; the first is the baseline.

    Latencies are in milliseconds, times within a run in seconds.
    """
    names = list(sweep.held) if sweep is not None else [run.name for run in runs]
    title = "kubeai bench: " + ", ".join(text(name) for name in names)
    plots = "".join(_sweep_plots(runs, sweep) if sweep is not None else _plots(runs))
    columns = _columns(runs, sweep)
    differed, shared = _settings(runs)
    figures = "".join(_group(*group) for group in compare.figures(runs).items())
    errors = compare.errors(runs)
    several = "<b>Marked</b>: best in its row. ×: ratio to the first run."
    parts = [
        f"<h1>{title}</h1>",
        _verdict(runs, sweep),
        _warnings(runs),
        _tiles(runs, sweep),
        f'<h2>Charts</h2><div class="plots">{plots}</div>' if plots else "",
        f"<h2>What differed</h2>{_table(columns, 'settings', differed)}" if differed else "",
        _folded(
            "All figures",
            (f"<p>{several}</p>" if len(runs) > 1 else "") + _table(columns, "figures", figures),
        ),
        _folded("Errors", _table(columns, "errors", f"<tbody>{_rows(errors)}</tbody>"), opened=True)
        if errors
        else "",
        _folded("Settings" if len(runs) == 1 else "Other settings",
                _table(columns, "settings", shared)) if shared else "",
        _folded("Environment", _table(columns, "settings", _environment(runs))),
    ]  # fmt: skip
    return page(title, "\n".join(filter(None, parts)))


def _verdict(runs: Sequence[Results], sweep: Sweep | None) -> str:
    found = "".join(f"<p>{text(each)}</p>" for each in verdict.sentences(runs, sweep))
    return f'<div class="verdict">{found}</div>'


def _tiles(runs: Sequence[Results], sweep: Sweep | None) -> str:
    found = "".join(
        f'<div class="tile">{"" if tile.run is None else key(tile.run)}{text(tile.label)}'
        f"<b>{text(tile.value)}</b><small>{text(tile.note)}</small></div>"
        for tile in verdict.tiles(runs, sweep)
    )
    return f'<div class="tiles">{found}</div>' if found else ""


def _warnings(runs: Sequence[Results]) -> str:
    found = [
        f"<li><b>{text(run.name)}</b>: {html.escape(warning)}</li>"
        for run in runs
        for warning in compare.warnings(run)
    ]
    return f'<ul class="warnings">{"".join(found)}</ul>' if found else ""


def _folded(title: str, body: str, *, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{title}</summary>{body}</details>"


# -- tables ----------------------------------------------------------------------------------------


def _table(names: Sequence[tuple[int, str]], kind: str, body: str) -> str:
    """A table with a column for each run; ``names`` has their colours and names."""
    heads = "".join(f'<th scope="col">{key(at)}{text(name)}</th>' for at, name in names)
    head = f"<thead><tr><td></td>{heads}</tr></thead>"
    return f'<div class="wide"><table class="{kind}">{head}{body}</table></div>'


def _columns(runs: Sequence[Results], sweep: Sweep | None) -> list[tuple[int, str]]:
    """The colour and name of each run. The runs of a sweep have the colours of their targets."""
    colours = list(range(len(runs)))
    if sweep is not None:
        for colour, positions in enumerate(sweep.runs.values()):
            for at in positions:
                colours[at] = colour
    return [(colour, run.name) for colour, run in zip(colours, runs, strict=True)]


def _group(title: str, rows: list[Row]) -> str:
    width = 1 + len(rows[0].cells)
    head = f'<tr><th class="group" scope="rowgroup" colspan="{width}">{title}</th></tr>'
    return f"<tbody>{head}{_rows(rows)}</tbody>"


def _rows(rows: list[Row]) -> str:
    return "".join(
        f'<tr><th scope="row">{html.escape(row.label)}</th>{"".join(map(_cell, row.cells))}</tr>'
        for row in rows
    )


def _cell(cell: Cell) -> str:
    shown = f"<b>{cell.text}</b>" if cell.best else cell.text
    return f"<td>{shown}<small>{cell.ratio}</small></td>"


def _settings(runs: Sequence[Results]) -> tuple[str, str]:
    """The rows of settings that differ; those that all runs share, and what was measured."""
    chosen = [{k: v for k, v in run.setting.items() if k not in MEASURED} for run in runs]
    measured = [{k: v for k, v in run.setting.items() if k in MEASURED} for run in runs]
    rows = list(_value_rows(list(map(_shown, chosen))))
    differed = "".join(row for row, alike in rows if not alike)
    others = [row for row, alike in rows if alike]
    others += [row for row, _ in _value_rows(list(map(_shown, measured)))]
    return (
        f"<tbody>{differed}</tbody>" if differed else "",
        f"<tbody>{''.join(others)}</tbody>" if others else "",
    )


def _environment(runs: Sequence[Results]) -> str:
    rows = _value_rows([_shown(run.environment) for run in runs])
    return f"<tbody>{''.join(row for row, _ in rows)}</tbody>"


def _shown(values: dict[str, object]) -> dict[str, str]:
    return {
        name: value
        if isinstance(value, str)
        else json.dumps(value, ensure_ascii=False, default=str)
        for name, value in compare.flat(values)
    }


def _value_rows(found: list[dict[str, str]]) -> Iterator[tuple[str, bool]]:
    """One row per value, and whether all runs share it; it then spans one cell."""
    for name in dict.fromkeys(name for each in found for name in each):
        values = [text(each.get(name, compare.MISSING)) for each in found]
        alike = len(set(values)) == 1
        cells = "".join(f"<td>{value}</td>" for value in values)
        if alike:
            cells = f'<td colspan="{len(values)}">{values[0]}</td>'
        yield f'<tr><th scope="row">{text(name)}</th>{cells}</tr>', alike


# -- plots -----------------------------------------------------------------------------------------


class Plot(NamedTuple):
    """A plot of one of the runs' curves."""

    curve: str  # in Results.curves
    title: str
    about: str
    x: Callable[[Sequence[float]], Axis]
    y: Callable[[Sequence[float]], Axis]


PLOTS = (
    Plot(
        "ttft_ms",
        "TTFT",
        "share of requests with at most this time to first token",
        charts.log_ms,
        charts.shares,
    ),
    Plot(
        "e2el_ms",
        "E2EL",
        "share of requests with at most this end-to-end latency",
        charts.log_ms,
        charts.shares,
    ),
    Plot("in_flight", "In flight", "requests over the run", charts.in_s, charts.in_units),
    Plot("ttft_ms_over_time", "TTFT over the run", "mean, by due time", charts.in_s, charts.in_ms),
)


class Comparison(NamedTuple):
    """A plot with a bar for each run."""

    title: str
    about: str
    key: str  # in Results.summary
    figure: str  # in that, if it has several
    axis: Callable[[Sequence[float]], Axis]
    scale: float = 1.0


COMPARISONS = (
    Comparison("Mean TTFT", "lower is better", "ttft_ms", "mean", charts.in_ms),
    Comparison("Cache hit rate", "of prompt tokens", "hit_rate", "", charts.in_percent, 100),
    Comparison("Output tokens", "per second", "output_tokens_per_s", "", charts.in_units),
)


def _plots(runs: Sequence[Results]) -> Iterator[str]:
    names = [run.name for run in runs]
    if len(runs) > 1:
        yield from _comparisons(runs)
    for plot in PLOTS:
        curves = [_points(run, plot) for run in runs]
        points = [point for curve in curves for point in curve]
        if points:
            across, up = plot.x([x for x, _ in points]), plot.y([y for _, y in points])
            svg = charts.lines(plot.title, names, curves, across, up)
            yield _figure(names, plot.title, plot.about, svg)
    total = {name: sum(run.spread.get(name, 0) for run in runs) for r in runs for name in r.spread}
    if total:
        shown = sorted(sorted(total, key=lambda name: -total[name])[:ENDPOINTS_MAX])
        few = f", the busiest {ENDPOINTS_MAX} of {len(total)}" if len(total) > len(shown) else ""
        yield _figure(names, SPREAD_TITLE, f"by count{few}", _spread(runs, shown))


def _comparisons(runs: Sequence[Results]) -> Iterator[str]:
    for each in COMPARISONS:
        groups = []
        for at, run in enumerate(runs):
            value = run.summary.get(each.key)
            value = value.get(each.figure) if isinstance(value, dict) else value
            if value is not None and math.isfinite(value):
                about = f"{run.name}: {value * each.scale:,.4g}"
                groups.append((run.name, [Bar(at, value * each.scale, about)]))
        if len(groups) > 1:
            axis = each.axis([bar.value for _, (bar,) in groups])
            yield _figure([], each.title, each.about, charts.bars(each.title, groups, axis))


def _points(run: Results, plot: Plot) -> list[Point]:
    found = [(x, y) for x, y in run.curves.get(plot.curve, []) if math.isfinite(x + y)]
    rises = plot.y is charts.shares  # cumulative: starts at 0
    return [(found[0][0], 0.0), *found] if found and rises else found


def _spread(runs: Sequence[Results], endpoints: Sequence[str]) -> str:
    """For each endpoint, one bar per run that used it."""
    groups = [
        (
            name,
            [
                Bar(at, run.spread[name], f"{name}, {run.name}: {run.spread[name]:,}")
                for at, run in enumerate(runs)
                if name in run.spread
            ],
        )
        for name in endpoints
    ]
    axis = charts.in_units([bar.value for _, group in groups for bar in group])
    return charts.bars(SPREAD_TITLE, groups, axis)


def _figure(names: Sequence[str], title: str, about: str, svg: str) -> str:
    keys = "".join(f"<span>{key(at)}{text(name)}</span>" for at, name in enumerate(names))
    legend = f'<div class="legend">{keys}</div>' if len(names) > 1 else ""
    head = f"<figcaption><b>{text(title)}</b>: {about}{legend}</figcaption>"
    return f"<figure>{head}{svg}</figure>"


# -- sweeps ----------------------------------------------------------------------------------------


def _sweep_plots(runs: Sequence[Results], sweep: Sweep) -> Iterator[str]:
    """What each SLO limits, then hit rate and throughput, over the request rate."""
    for limit in sweep.limits:
        if limit.metric == "errors" and not any(run.errors for run in runs):
            continue
        percent = limit.metric in ("goodput", "errors")
        y = charts.in_percent if percent else charts.log_ms
        bound = limit.most if limit.least is None else limit.least
        yield from _over_rate(runs, sweep, limit.label, f"SLO: {limit.name}", limit.value, y, bound)
    yield from _over_rate(
        runs, sweep, "Cache hit rate", "of prompt tokens", _hit_percent, charts.in_percent
    )
    yield from _over_rate(
        runs,
        sweep,
        "Output tokens",
        "per second",
        lambda summary: summary.get("output_tokens_per_s"),
        charts.in_units,
    )


def _hit_percent(summary: dict[str, float | None]) -> float | None:
    share = summary.get("hit_rate")
    return None if share is None else share * 100


def _over_rate(
    runs: Sequence[Results],
    sweep: Sweep,
    title: str,
    about: str,
    value: Callable[[dict[str, float | None]], float | None],
    y: Callable[[Sequence[float]], Axis],
    limit: float | None = None,
) -> Iterator[str]:
    curves: list[list[Point]] = []
    for target, positions in sweep.runs.items():
        pairs = zip(sweep.rates[target], positions, strict=True)
        found = [(rate, value(runs[at].summary)) for rate, at in pairs]
        curves.append([(rate, one) for rate, one in found if one is not None])
    points = [point for curve in curves for point in curve]
    if not points:
        return
    values = [one for _, one in points] + ([] if limit is None else [limit])
    across = charts.logarithmic([rate for rate, _ in points], charts.number)
    names = list(sweep.runs)
    svg = charts.lines(title, names, curves, across, y(values), limit)
    yield _figure(names, title, f"over requests per second; {html.escape(about)}", svg)
