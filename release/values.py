"""The comments in a chart's values.yaml, which describe its values.

A value is described by the comment lines directly above it, with its indentation, or else by the
comment at the end of its line. Headings (``# == Heading ----``) and examples, which are list items
or indented, are not part of a description. Called by release/charts.py and docs/generate/helm.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

HEADING = re.compile(r"# == (.*?) -*")
EXAMPLE = re.compile(r"#(  | - ).*")
REMARK = re.compile(r"\s# (.*)$")


def above(lines: Sequence[str], line: int) -> list[str]:
    """Return the comment lines directly above a line, with the same indentation."""
    indent = len(lines[line]) - len(lines[line].lstrip())
    found: list[str] = []
    for text in reversed(lines[:line]):
        if not text.startswith(" " * indent + "#"):
            break
        found.insert(0, text.strip())
    return found


def heading(lines: Sequence[str], line: int) -> str | None:
    """Return the last heading directly above a line."""
    found = [match[1] for text in above(lines, line) if (match := HEADING.fullmatch(text))]
    return found[-1] if found else None


def comment(lines: Sequence[str], line: int) -> str:
    """Return what describes the value whose key is on a line; empty if nothing does."""
    words = [
        text.removeprefix("#").strip()
        for text in above(lines, line)
        if not HEADING.fullmatch(text) and not EXAMPLE.fullmatch(text)
    ]
    if not words and (found := REMARK.search(lines[line])):
        words = [found[1]]
    return " ".join(words)
