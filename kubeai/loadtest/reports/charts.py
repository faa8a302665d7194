"""Plots as inline SVG: lines and bars that follow the page's colours.

They are made here rather than by matplotlib, so that reports work without the ``plots`` extra,
follow the light or dark colour scheme and stay small. Sizes are in view box units, 440 across.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from kubeai.loadtest.reports.page import COLOURS, text

# Plot dimensions; the width fits a phone at text size.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 440, 250, 50, 24, 8, 26
LABEL_CHARS, LABEL_WIDTH, BAR, GAP = 19, 132, 9, 7
LADDER = [step * 10.0**power for power in range(-6, 13) for step in (1, 2, 5)]

Point = tuple[float, float]
Show = Callable[[float], str]


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


def linear(values: Sequence[float], show: Show, least: float = 0.0) -> Axis:
    """A linear axis from 0 with at most six ticks; ``least`` is the smallest step."""
    top = max(values)
    rough = max(top / 5, least, LADDER[0])
    step = next((step for step in LADDER if step >= rough), rough)
    count = max(1, math.ceil(top / step))
    return Axis(0.0, count * step, [at * step for at in range(count + 1)], show)


def logarithmic(values: Sequence[float], show: Show) -> Axis:
    """A logarithmic axis whose ends are in the series 1, 2, 5, 10, …"""
    known = [value for value in values if value > LADDER[0]] or [1.0]
    low = max(step for step in LADDER if step <= min(known))
    high = min((step for step in LADDER if step > max(known)), default=10 * max(known))
    ticks, tens = ([t for t in LADDER[::every] if low <= t <= high] for every in (1, 3))
    return Axis(low, high, ticks if len(ticks) <= 8 else tens, show, log=True)


def shares(values: Sequence[float]) -> Axis:
    """An axis of a distribution's shares, in percent."""
    return Axis(0.0, 1.0, [0.0, 0.25, 0.5, 0.75, 0.9, 1.0], lambda share: f"{share * 100:g} %")


def number(value: float) -> str:
    """A tick label of a count."""
    return f"{value:,g}"


def percent(value: float) -> str:
    """A tick label of a percentage."""
    return f"{value:g} %"


def seconds(value: float) -> str:
    """A tick label of a time in seconds."""
    return f"{value:,g} s" if value else "0"


def milliseconds(value: float) -> str:
    """A tick label of a time in milliseconds."""
    return seconds(value / 1e3) if value >= 1e3 or not value else f"{value:g} ms"


in_ms, in_s = partial(linear, show=milliseconds), partial(linear, show=seconds)
in_units = partial(linear, show=number, least=1)
in_percent = partial(linear, show=percent)
log_ms = partial(logarithmic, show=milliseconds)  # long tails would dominate a linear axis


def lines(
    title: str,
    names: Sequence[str],
    curves: Sequence[Sequence[Point]],
    across: Axis,
    up: Axis,
    limit: float | None = None,
) -> str:
    """A curve for each name; ``limit``: a dashed line at this height."""
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
    if limit is not None:
        parts.append(f'<path class="limit" d="M{LEFT} {y(limit)}h{width}"/>')
    for at, (name, curve) in enumerate(zip(names, curves, strict=True)):
        # A single point is drawn as a zero-length line; the round caps make it a dot.
        points = [*curve, *curve] if len(curve) == 1 else curve
        line = " ".join(f"{x(a)},{y(b)}" for a, b in points)
        about = f"<title>{text(name)}</title>"
        parts.append(f'<polyline class="c{at % COLOURS}" points="{line}">{about}</polyline>')
    return _svg(title, HEIGHT, parts)


class Bar(NamedTuple):
    """A bar, in the colour of the run at this position."""

    run: int
    value: float
    about: str  # its tooltip


def bars(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], across: Axis) -> str:
    """Horizontal bars in groups, each with a label to its left."""
    width, y, parts = WIDTH - LABEL_WIDTH - RIGHT, TOP + GAP / 2, []
    for label, group in groups:
        short = label if len(label) <= LABEL_CHARS else "…" + label[1 - LABEL_CHARS :]
        parts.append(_label(LABEL_WIDTH - 6, y + BAR * len(group) / 2, short, "end", "middle"))
        for bar in group:
            about = f"<title>{text(bar.about)}</title>"
            place = f'x="{LABEL_WIDTH}" y="{y:g}" width="{across.share(bar.value) * width:.1f}"'
            colour = f'class="c{bar.run % COLOURS}"'
            parts.append(f'<rect {colour} {place} height="{BAR - 1}">{about}</rect>')
            y += BAR
        y += GAP
    height = y - GAP / 2 - TOP
    grid = [f'<rect class="area" x="{LABEL_WIDTH}" y="{TOP}" width="{width}" height="{height:g}"/>']
    for tick in across.ticks:
        x = f"{LABEL_WIDTH + across.share(tick) * width:.1f}"
        grid.append(f'<path d="M{x} {TOP}v{height:g}"/>')
        grid.append(_label(x, TOP + height + 18, across.show(tick), "middle"))
    return _svg(title, TOP + height + BOTTOM, [*grid, *parts])


def _label(x: float | str, y: float | str, label: str, anchor: str, baseline: str = "auto") -> str:
    place = f'x="{x}" y="{y}" text-anchor="{anchor}" dominant-baseline="{baseline}"'
    return f"<text {place}>{text(label)}</text>"


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    head = f'<svg role="img" aria-label="{text(title)}" viewBox="0 0 {WIDTH} {height:g}">'
    return f"{head}{''.join(parts)}</svg>"
