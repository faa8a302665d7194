"""Measures with their limits, and the tables of docs/explain/performance.md that show them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Bar(NamedTuple):
    """``limit``: as the table shows it; ``most``: the highest value that meets it.

    ``value``: None: not measured. ``command``: measures it.
    """

    what: str
    limit: str
    value: float | None
    most: float
    command: str
    unit: str = " ×"

    def cells(self) -> tuple[str, ...]:
        command = f"`{self.command}`"
        if self.value is None:
            return self.what, self.limit, "not measured", "", command
        met = "yes" if self.value <= self.most else "**no**"
        return self.what, self.limit, f"{self.value:.3g}{self.unit}", met, command


def table_of(bars: Iterable[Bar]) -> str:
    return table(("what", "bar", "measured", "met", "command"), [bar.cells() for bar in bars])


def table(head: tuple[object, ...], rows: Iterable[tuple[object, ...]]) -> str:
    """A table in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
