"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def cell(text: str) -> str:
    """Text for one cell. A placeholder such as <name>, which would be HTML, becomes code."""
    parts = " ".join(text.replace("|", "\\|").split()).split("`")
    parts[::2] = [
        re.sub(r"(\S*<[\w-]+>\S*?)(?=[.,:;]?(\s|$))", r"`\1`", part) for part in parts[::2]
    ]
    return "`".join(parts)


def code(value: object) -> str:
    """A value as code; empty for None."""
    text = "" if value is None else str(value).replace("|", "\\|")
    return f"`{text}`" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with these column titles."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(
        "|" + "|".join(f" {text} " if text else " " for text in line) + "|\n" for line in lines
    )
