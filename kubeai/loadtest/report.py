"""The HTML report that ``kubeai bench`` writes for one or more runs.

One self-contained HTML file without scripts; external text (names, settings, errors) is escaped.
The plots are SVG generated here rather than by matplotlib, so that the report works without the
``plots`` extra, follows the light or dark colour scheme and stays small.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from kubeai.loadtest import compare
from kubeai.loadtest.compare import Cell, Row, printable
from kubeai.simulation.results import Results

COLOURS = 6  # Okabe and Ito's colour-blind-safe palette; a seventh run reuses the first colour
ENDPOINTS_MAX = 24  # bars; with more endpoints, only the busiest are drawn
# Plot dimensions in view box units; the width fits a phone at text size.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 250, 50, 16, 8, 26
LABEL_CHARS, LABEL_WIDTH, BAR, GAP = 19, 116, 9, 7
BARS_TITLE = "Requests per endpoint"
LADDER = [step * 10.0**power for power in range(-6, 13) for step in (1, 2, 5)]

Point = tuple[float, float]
Show = Callable[[float], str]


def report(runs: Sequence[Results]) -> str:
    """Render the report of one or more runs; the first is the baseline.

    Plot sizes are in view box units, 440 across. Latencies are in milliseconds, times within a run
    in seconds.
    """
    title = "kubeai bench: " + ", ".join(_text(run.name) for run in runs)
    groups = compare.figures(runs)
    errors, plots = compare.errors(runs), "".join(_plots(runs))
    several = "<b>Marked</b>: best in its row. ×: ratio to the first run."
    parts = [
        f"<h1>{title}</h1>",
        _warnings(runs),
        "<h2>Settings</h2>",
        _table(runs, "settings", _settings(runs)),
        "<h2>Results</h2>",
        f"<p>{several}</p>" if len(runs) > 1 else "",
        _table(runs, "figures", "".join(_group(*group) for group in groups.items())),
        f'<h2>Plots</h2><div class="plots">{plots}</div>' if plots else "",
        f"<h2>Errors</h2>{_table(runs, 'errors', f'<tbody>{_rows(errors)}</tbody>')}"
        if errors
        else "",
    ]
    return _PAGE.format(title=title, style=_STYLE, body="\n".join(filter(None, parts)))


def _text(value: str) -> str:
    return html.escape(printable(value))


def _warnings(runs: Sequence[Results]) -> str:
    found = [
        f"<li><b>{_text(run.name)}</b>: {html.escape(warning)}</li>"
        for run in runs
        for warning in compare.warnings(run)
    ]
    return f'<ul class="warnings">{"".join(found)}</ul>' if found else ""


# -- tables ----------------------------------------------------------------------------------------


def _table(runs: Sequence[Results], kind: str, body: str) -> str:
    heads = "".join(
        f'<th scope="col">{_key(at)}{_text(run.name)}</th>' for at, run in enumerate(runs)
    )
    head = f"<thead><tr><td></td>{heads}</tr></thead>"
    return f'<div class="wide"><table class="{kind}">{head}{body}</table></div>'


def _key(at: int) -> str:
    """A run's colour swatch."""
    return f'<i class="key c{at % COLOURS}"></i>'


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
    text = f"<b>{cell.text}</b>" if cell.best else cell.text
    return f"<td>{text}<small>{cell.ratio}</small></td>"


def _settings(runs: Sequence[Results]) -> str:
    """One row per setting; a value that all runs share spans one cell."""
    found = [dict(_flat(run.setting)) for run in runs]
    rows = []
    for key in dict.fromkeys(key for each in found for key in each):
        values = [_text(each.get(key, compare.MISSING)) for each in found]
        cells = "".join(f"<td>{value}</td>" for value in values)
        if len(set(values)) == 1:
            cells = f'<td colspan="{len(values)}">{values[0]}</td>'
        rows.append(f'<tr><th scope="row">{_text(key)}</th>{cells}</tr>')
    return f"<tbody>{''.join(rows)}</tbody>"


def _flat(setting: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in setting.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        elif isinstance(value, str):
            yield f"{above}{key}", value
        else:
            yield f"{above}{key}", json.dumps(value, ensure_ascii=False, default=str)


# -- plots -----------------------------------------------------------------------------------------


class Axis(NamedTuple):
    """A plot's axis: its range, ticks and tick labels."""

    low: float
    high: float
    ticks: list[float]
    show: Show
    log: bool = False

    def share(self, value: float) -> float:
        """Position along the axis, from 0 to 1; values outside the range are clamped."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _linear(values: Sequence[float], show: Show, least: float = 0.0) -> Axis:
    """A linear axis from 0 with at most six ticks; ``least`` is the smallest step."""
    top = max(values)
    rough = max(top / 5, least, LADDER[0])
    step = next((step for step in LADDER if step >= rough), rough)
    count = max(1, math.ceil(top / step))
    return Axis(0.0, count * step, [at * step for at in range(count + 1)], show)


def _log(values: Sequence[float], show: Show) -> Axis:
    """A logarithmic axis whose ends are in the series 1, 2, 5, 10, …"""
    known = [value for value in values if value > LADDER[0]] or [1.0]
    low = max(step for step in LADDER if step <= min(known))
    high = min((step for step in LADDER if step > max(known)), default=10 * max(known))
    ticks, tens = ([t for t in LADDER[::every] if low <= t <= high] for every in (1, 3))
    return Axis(low, high, ticks if len(ticks) <= 8 else tens, show, log=True)


def _shares(values: Sequence[float]) -> Axis:
    return Axis(0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 0.9, 1.0], lambda share: f"{share * 100:g} %")


def _number(value: float) -> str:
    return f"{value:,g}"


def _seconds(value: float) -> str:
    return f"{value:,g} s" if value else "0"


def _milliseconds(value: float) -> str:
    return _seconds(value / 1e3) if value >= 1e3 or not value else f"{value:g} ms"


_in_ms, _in_s = partial(_linear, show=_milliseconds), partial(_linear, show=_seconds)
_log_ms = partial(_log, show=_milliseconds)  # long tails would dominate a linear axis


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
        "Time to first token",
        "share of requests with at most this latency",
        _log_ms,
        _shares,
    ),
    Plot("took_ms", "End to end", "share of requests with at most this latency", _log_ms, _shares),
    Plot(
        "in_flight",
        "In flight",
        "in-flight requests over the run",
        _in_s,
        partial(_linear, show=_number, least=1),
    ),
    Plot(
        "ttft_ms_over_time",
        "Time to first token over the run",
        "mean, by due time",
        _in_s,
        _in_ms,
    ),
)


def _plots(runs: Sequence[Results]) -> Iterator[str]:
    for plot in PLOTS:
        curves = [_points(run, plot) for run in runs]
        if any(curves):
            yield _figure(runs, plot.title, plot.about, _lines(runs, curves, plot))
    total = {name: sum(run.spread.get(name, 0) for run in runs) for r in runs for name in r.spread}
    if total:
        names = sorted(sorted(total, key=lambda name: -total[name])[:ENDPOINTS_MAX])
        few = f", the busiest {ENDPOINTS_MAX} of {len(total)}" if len(total) > len(names) else ""
        yield _figure(runs, BARS_TITLE, f"by count{few}", _bars(runs, names))


def _figure(runs: Sequence[Results], title: str, about: str, svg: str) -> str:
    keys = "".join(f"<span>{_key(at)}{_text(run.name)}</span>" for at, run in enumerate(runs))
    legend = f'<div class="legend">{keys}</div>' if len(runs) > 1 else ""
    head = f"<figcaption><b>{title}</b>: {about}{legend}</figcaption>"
    return f"<figure>{head}{svg}</figure>"


def _points(run: Results, plot: Plot) -> list[Point]:
    found = [(x, y) for x, y in run.curves.get(plot.curve, []) if math.isfinite(x + y)]
    rises = plot.y is _shares  # cumulative: starts at 0
    return [(found[0][0], 0.0), *found] if found and rises else found


def _lines(runs: Sequence[Results], curves: Sequence[list[Point]], plot: Plot) -> str:
    points = [point for curve in curves for point in curve]
    across, up = plot.x([x for x, _ in points]), plot.y([y for _, y in points])
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(value: float) -> str:
        return f"{LEFT + across.share(value) * width:.1f}"

    def y(value: float) -> str:
        return f"{TOP + (1 - up.share(value)) * height:.1f}"

    parts = [f'<rect class="area" x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/>']
    for tick in up.ticks:
        parts.append(f'<path d="M{LEFT} {y(tick)}h{width}"/>')
        parts.append(_label(LEFT - 6, y(tick), up.show(tick), "end", "middle"))
    for tick in across.ticks:
        parts.append(f'<path d="M{x(tick)} {TOP}v{height}"/>')
        parts.append(_label(x(tick), HEIGHT - BOTTOM + 18, across.show(tick), "middle"))
    for at, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        # A single point is drawn as a zero-length line; the round caps make it a dot.
        line = " ".join(f"{x(a)},{y(b)}" for a, b in (curve * 2 if len(curve) == 1 else curve))
        name = f"<title>{_text(run.name)}</title>"
        parts.append(f'<polyline class="c{at % COLOURS}" points="{line}">{name}</polyline>')
    return _svg(plot.title, HEIGHT, parts)


def _bars(runs: Sequence[Results], names: Sequence[str]) -> str:
    """Horizontal bars: for each endpoint, one bar per run that used it."""
    across = _linear([run.spread.get(n, 0) for run in runs for n in names], _number, least=1)
    width, y, parts = WIDTH - LABEL_WIDTH - RIGHT, TOP + GAP / 2, []
    for name in names:
        having = [at for at, run in enumerate(runs) if name in run.spread]
        short = name if len(name) <= LABEL_CHARS else "…" + name[1 - LABEL_CHARS :]
        parts.append(_label(LABEL_WIDTH - 6, y + BAR * len(having) / 2, short, "end", "middle"))
        for at in having:
            count = runs[at].spread[name]
            about = f"<title>{_text(name)}, {_text(runs[at].name)}: {count:,}</title>"
            place = f'x="{LABEL_WIDTH}" y="{y:g}" width="{across.share(count) * width:.1f}"'
            parts.append(f'<rect class="c{at % COLOURS}" {place} height="{BAR - 1}">{about}</rect>')
            y += BAR
        y += GAP
    height = y - GAP / 2 - TOP
    grid = [f'<rect class="area" x="{LABEL_WIDTH}" y="{TOP}" width="{width}" height="{height:g}"/>']
    for tick in across.ticks:
        x = f"{LABEL_WIDTH + across.share(tick) * width:.1f}"
        grid.append(f'<path d="M{x} {TOP}v{height:g}"/>')
        grid.append(_label(x, TOP + height + 18, across.show(tick), "middle"))
    return _svg(BARS_TITLE, TOP + height + BOTTOM, [*grid, *parts])


def _label(x: float | str, y: float | str, text: str, anchor: str, baseline: str = "auto") -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}" dominant-baseline="{baseline}"'
    return f"<text {place}>{_text(text)}</text>"


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg role="img" aria-label="{title}" viewBox="0 0 {WIDTH} {height:g}">'
    return f"{head}{''.join(parts)}</svg>"


# -- HTML ------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c2024; --faint: #5f6873; --rule: #dde1e6; --mark: #e3f1e8;
  --warn: #fff3d1; --edge: #d18f00;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #e69f00; --c5: #56b4e9;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15181c; --ink: #e4e7ea; --faint: #9aa4af; --rule: #323941; --mark: #1d3a2b;
    --warn: #3a2f12; --edge: #e69f00;
    --c0: #4aa3e0; --c1: #ec7a2c; --c2: #22b98c; --c3: #dc97bd; --c4: #f0c04a; --c5: #9bd6fb;
  }
}
* { box-sizing: border-box; }
body {
  max-width: 75rem; margin: 0 auto; padding: 1.5rem 1rem 3rem;
  background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; margin: 0 0 1rem; }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p { color: var(--faint); margin: 0 0 .6rem; }
p b, td b { background: var(--mark); color: var(--ink); padding: .1em .35em; border-radius: .25em; }
td b { margin-right: -.35em; }
.warnings {
  margin: 0; padding: .7rem 1rem .7rem 2rem; background: var(--warn);
  border-left: 4px solid var(--edge); overflow-wrap: anywhere;
}
.wide { overflow-x: auto; }
.key {
  display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  border-radius: .2em; background: currentColor;
}
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem 0 .2rem 1.4rem; text-align: right; vertical-align: top; }
thead th { min-width: 8rem; max-width: 14rem; overflow-wrap: anywhere; vertical-align: bottom; }
thead .key { display: block; width: 1.4rem; height: .3rem; margin: 0 0 .3rem auto; }
.settings .key { margin-left: 0; }
tr > :first-child {
  position: sticky; left: 0; padding-left: 0; text-align: left; background: var(--paper);
}
tbody th { font-weight: normal; }
tbody tr { border-top: 1px solid var(--rule); }
.group { font-weight: bold; padding-top: .9rem; }
td small { display: inline-block; min-width: 4.2em; color: var(--faint); }
td:nth-child(2) small { min-width: 0; }
.settings { font-size: .9rem; }
.settings td, .settings thead th { text-align: left; overflow-wrap: anywhere; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.plots {
  display: grid; gap: 1.8rem 2.5rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
}
figure { margin: 0; max-width: 36rem; break-inside: avoid; }
.legend { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .9rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; margin-top: .4rem; font-size: 11px; }
svg text { fill: currentColor; }
svg path { stroke: var(--rule); stroke-width: 1; }
svg polyline {
  fill: none; stroke: currentColor; stroke-width: 1.5;
  stroke-linejoin: round; stroke-linecap: round;
}
svg rect { fill: currentColor; }
svg .area { fill: none; }
@media (max-width: 40rem) {
  body { font-size: 14px; padding: 1rem .8rem 2rem; }
  th, td { padding-left: .9rem; }
  thead th { min-width: 6rem; font-size: .85em; }
  td b { margin-right: 0; }
  td small { display: block; }
}
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; }
  * { print-color-adjust: exact; }
  .wide { overflow: visible; }
  tr > :first-child { position: static; background: none; }
  .figures tbody, tr { break-inside: avoid; }
  h2, p { break-after: avoid; }
  .plots { grid-template-columns: 1fr 1fr; }
}
"""
