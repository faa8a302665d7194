"""The table of Models, from the summaries that ``GET /ui/api/state`` lists.

Only ``name`` and ``state`` are required in a summary. A column is left out if no Model has a value
for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from kubeai.logs import printable

if TYPE_CHECKING:
    from rich.table import Table

Summary = Mapping[str, Any]

_STYLES = {
    "Ready": "green",
    "Starting": "yellow",
    "Degraded": "yellow",
    "Failed": "red",
    "Scaled to zero": "dim",
    "Deleting": "dim",
}


class Shown(msgspec.Struct, frozen=True):
    """Models that a table shows, and how many there are. Others are only counted."""

    models: list[dict[str, Any]]
    count: int


def attention_first(models: Sequence[Summary]) -> list[Summary]:
    """The Models that have requests or a problem, then the others; each in the given order."""
    return sorted(models, key=_is_quiet)


def models_table(
    models: Sequence[Summary], rows_max: int | None = None, count: int | None = None
) -> Table:
    """A table with a row for each Model, in the given order.

    ``count``: of Models, if ``models`` are not all. With more than ``rows_max``, those that need no
    attention are left out first, and the last row counts those that are left out.
    """
    from rich.table import Table
    from rich.text import Text

    shown, count = list(models), count or len(models)
    if rows_max is not None and count > rows_max:
        shown = attention_first(shown)[: max(rows_max - 1, 0)]
    # The reason takes what the other columns leave: a narrow terminal cuts it off first.
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    names = ("MODEL", "STATE", "READY", "IN FLIGHT", "HELD", "REQ/S", "TOKENS/S", "TTFT", "P99")
    rows = [_cells(model) for model in shown]
    used = [n for n, _ in enumerate(names) if n < 3 or any(row[n] for row in rows)]
    for n in used:
        table.add_column(names[n], no_wrap=True, justify="left" if n < 2 else "right")
    table.add_column("WHY", no_wrap=True, overflow="ellipsis", ratio=1)
    for model, row in zip(shown, rows, strict=True):
        state = Text(row[1], style=_STYLES.get(row[1], ""))
        cells = [state if n == 1 else Text(row[n]) for n in used]
        table.add_row(*cells, Text(_why(model), style="dim"))
    if len(shown) < count:
        table.add_row(Text(f"… and {count - len(shown)} more", style="dim"))
    return table


def _cells(model: Summary) -> list[str]:
    rates, ttft = model.get("rates") or {}, model.get("ttft_s") or {}
    return [
        printable(str(model["name"])),
        printable(str(model["state"])),
        _replicas(model.get("replicas") or {}),
        _count(model.get("in_flight")),
        _count(model.get("held")),
        _rate(rates.get("requests_per_s")),
        _rate(rates.get("output_tokens_per_s")),
        _seconds(ttft.get("p50")),
        _seconds(ttft.get("p99")),
    ]


def _is_quiet(model: Summary) -> bool:
    """Whether a Model has neither requests nor a state that needs attention."""
    busy = model.get("in_flight") or model.get("held")
    return not busy and model["state"] in ("Ready", "Scaled to zero")


def _replicas(replicas: Mapping[str, Any]) -> str:
    return f"{replicas['ready']}/{replicas['desired']}" if replicas else ""


def _why(model: Summary) -> str:
    """Why a Model is in its state; nothing for a Model that serves as it should."""
    if model["state"] == "Ready":
        return ""
    reason, message = str(model.get("reason") or ""), str(model.get("message") or "")
    return printable(message or reason)


def _count(value: object) -> str:
    return "" if value is None else str(value)


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"
