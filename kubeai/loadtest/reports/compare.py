"""Compares runs of ``kubeai bench``: which figures to show, the best value and the ratios.

Owns the rows of both the terminal table (:func:`table`) and the HTML report (``report``). Figures
that no run has are omitted, such as metrics and percentiles that were not selected; a missing value
is shown as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from kubeai.simulation.results import METRICS, Results

MISSING = "–"
MORE, LESS, NEITHER = 1, -1, 0  # which direction is better


class Figure(NamedTuple):
    """A row of the comparison: where its value is and which direction is better."""

    label: str
    path: tuple[str, ...]  # in Results.summary
    better: int = NEITHER
    scale: float = 1  # from the summary's unit to the label's


class Cell(NamedTuple):
    """A run's value, its ratio to the first run's ("" for the first) and whether it is the best.

    If all runs show the same value, or there is only one run, none is best.
    """

    text: str
    ratio: str
    best: bool


class Row(NamedTuple):
    """A figure's values in all runs."""

    label: str
    cells: list[Cell]  # one per run


COUNTS: dict[str, tuple[Figure, ...]] = {
    "Requests": (
        Figure("all", ("requests",)),
        Figure("failed", ("failed",), LESS),
        Figure("duration, s", ("duration_s",)),
    ),
    "Throughput, per second": (
        Figure("requests", ("requests_per_s",), MORE),
        Figure("goodput, requests", ("good_requests_per_s",), MORE),
        Figure("output tokens", ("output_tokens_per_s",), MORE),
        Figure("tokens", ("tokens_per_s",), MORE),
    ),
    "Messages": (
        Figure("lost (no response)", ("lost",), LESS),
        Figure("duplicate responses", ("duplicates",), LESS),
        Figure("late responses", ("late",), LESS),
        Figure("responses of other runs", ("foreign",)),
    ),
    "Cache and balance": (
        Figure("cache hit rate, %", ("hit_rate",), MORE, 100),
        Figure("spread (busiest ÷ mean)", ("spread",), LESS),
        Figure("requests on the busiest endpoint", ("busiest_requests",), LESS),
    ),
}
TIMES = {f"{title}, ms": (f"{name}_ms", LESS) for name, title in METRICS.items()}
TIMES["Sent late by, ms"] = ("late_ms", NEITHER)  # caused by the load generator


def figures(runs: Sequence[Results]) -> dict[str, list[Row]]:
    """Rows by group title; groups without rows are omitted."""
    found = {title: _rows(runs, group) for title, group in COUNTS.items()}
    for title, (key, better) in TIMES.items():
        found[title] = _rows(
            runs, [Figure(name, (key, name), better) for name in _figure_names(runs, key)]
        )
    return {title: rows for title, rows in found.items() if rows}


def _figure_names(runs: Sequence[Results], key: str) -> list[str]:
    """The mean, and the percentiles that any run has, in ascending order."""
    names = {name for run in runs for name in run.summary.get(key) or ()}
    return sorted(names, key=lambda name: 0.0 if name == "mean" else float(name[1:]))


def errors(runs: Sequence[Results]) -> list[Row]:
    """One row per kind of error, most frequent first."""
    kinds = {kind for run in runs for kind in run.errors}
    counts = {kind: [run.errors.get(kind, 0) for run in runs] for kind in kinds}
    order = sorted(kinds, key=lambda kind: (-sum(counts[kind]), kind))
    return [Row(printable(kind), _cells(counts[kind], NEITHER)) for kind in order]


def warnings(run: Results) -> list[str]:
    """What makes the run's results unreliable: failed requests, and its own warnings."""
    failed, requests = (run.summary.get(key) or 0 for key in ("failed", "requests"))
    reported = [printable(warning) for warning in run.warnings]
    if not requests:
        return ["no requests were measured", *reported]
    if failed == requests:
        return [f"none of {requests:,} requests succeeded", *reported]
    if failed:
        return [f"{failed:,} of {requests:,} requests failed: latencies exclude them", *reported]
    return reported


def table(runs: Sequence[Results]) -> str:
    """Plain text for a terminal, without a trailing newline. "×" is the ratio to the first run."""
    groups = [*figures(runs).items(), ("Errors", errors(runs))]
    lines = [["", *(printable(run.name) for run in runs)]]
    for title, rows in groups:
        lines += [[title]] if rows else []
        lines += [[f"  {row.label}", *_plain(row.cells)] for row in rows]
    full = [line for line in lines if len(line) > 1]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    text = [
        "  ".join(f"{cell:{'>' if at else '<'}{widths[at]}}" for at, cell in enumerate(line))
        for line in lines
    ]
    if len(runs) > 1:
        text += ["", "* best in its row; ×: ratio to the first run"]
    text += [f"! {printable(run.name)}: {each}" for run in runs for each in warnings(run)]
    return "\n".join(line.rstrip() for line in text)


def printable(text: str) -> str:
    """Replace control characters, which could move a terminal's cursor or are invalid in XML."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects, with the path as their name: ``load.arrivals.per_s``."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _plain(cells: Sequence[Cell]) -> list[str]:
    texts = [f"{'*' if cell.best else ''}{cell.text}" for cell in cells]
    ratios = [f" {cell.ratio:>7}" for cell in cells[1:]]
    return [text + ratio for text, ratio in zip(texts, ["", *ratios], strict=True)]


def _rows(runs: Sequence[Results], group: Sequence[Figure]) -> list[Row]:
    values = [(figure, [_value(run, figure) for run in runs]) for figure in group]
    return [
        Row(figure.label, _cells(row, figure.better))
        for figure, row in values
        if any(value is not None for value in row)
    ]


def _value(run: Results, figure: Figure) -> float | None:
    found: object = run.summary
    for key in figure.path:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, int | float) or not math.isfinite(found):
        return None
    return found * figure.scale


def _cells(values: Sequence[float | None], better: int) -> list[Cell]:
    known = [value for value in values if value is not None]
    whole = all(isinstance(value, int) for value in known)
    decimals = 0 if whole else max(_decimals(value) for value in known)
    texts = [MISSING if value is None else f"{value:,.{decimals}f}" for value in values]
    best = f"{(max if better == MORE else min)(known):,.{decimals}f}"
    marked = better != NEITHER and len(set(texts)) > 1
    return [
        Cell(text, _ratio(values[0], value) if at else "", marked and text == best)
        for at, (text, value) in enumerate(zip(texts, values, strict=True))
    ]


def _ratio(first: float | None, value: float | None) -> str:
    if not first or value is None:
        return ""
    return f"×{value / first:,.{_decimals(value / first)}f}"


def _decimals(value: float) -> int:
    """The decimals needed to show three significant digits, at most two; none for 0."""
    return max(0, min(2, 2 - math.floor(math.log10(abs(value))))) if value else 0
