"""The results of all engines: kept in files between runs, and shown as
`docs/contribute/real-engines.md`."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from pathlib import Path

import msgspec
from session import Outcome


class Result(msgspec.Struct):
    """One engine's run."""

    engine: str
    title: str
    version: str
    source: str  # where it was installed from, in words
    date: str
    outcomes: list[Outcome] = []
    problem: str = ""  # why nothing could be checked


def save(directory: Path, result: Result) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{result.engine}.json").write_bytes(msgspec.json.encode(result))


def load(directory: Path, engines: Sequence[str]) -> list[Result]:
    """The last results of these engines, in this order."""
    paths = [directory / f"{engine}.json" for engine in engines]
    return [msgspec.json.decode(p.read_bytes(), type=Result) for p in paths if p.exists()]


def failures(results: Sequence[Result]) -> list[str]:
    """What failed, one line each."""
    lines = []
    for result in results:
        if result.problem:
            lines.append(f"{result.title}: {result.problem.splitlines()[0]}")
        failed = (one for one in result.outcomes if not one.passed)
        lines += [f"{result.title}: {one.check}: {one.note}" for one in failed]
    return lines


def table(results: Sequence[Result]) -> list[list[str]]:
    """Checks by engines, with a head row. A cell is the check's seconds, or that it failed."""
    checks = list(dict.fromkeys(_row(one) for result in results for one in result.outcomes))
    rows = [["check", *(result.title for result in results)]]
    rows += [[check, *(_cell(result, check) for result in results)] for check in checks]
    return rows


def _row(outcome: Outcome) -> str:
    """The row of a check. Those of an engine's further Models have a row together."""
    return outcome.check.partition(", ")[0] if _is_life(outcome) else outcome.check


def _is_life(outcome: Outcome) -> bool:
    return outcome.check.startswith(("start from zero", "scale to zero"))


def _cell(result: Result, check: str) -> str:
    found = [one for one in result.outcomes if _row(one) == check]
    if not found:
        return "–"
    if not all(one.passed for one in found):
        return "**failed**"
    return f"{found[0].seconds:.1f} s"


def markdown(results: Sequence[Result]) -> str:
    """The page, from ``page.md``."""
    page = (Path(__file__).parent / "page.md").read_text()
    return page.format(results="\n".join(_results(results)), notes="\n\n".join(_notes(results)))


def _results(results: Sequence[Result]) -> list[str]:
    engines = [["engine", "version", "from", "run on", "problem"]]
    for result in results:
        problem = result.problem.splitlines()[0] if result.problem else ""
        engines.append([result.title, result.version, result.source, result.date, problem])
    return [
        f"On {_machine()}, with other processes running. A cell is the duration of the check.",
        "",
        *_table(table([result for result in results if result.outcomes])),
        "",
        *_table(engines),
    ]


def _notes(results: Sequence[Result]) -> list[str]:
    sections = []
    for result in results:
        noted = [f"- {one.check}: {_one_line(one)}" for one in result.outcomes if one.note]
        if noted:
            sections.append("\n".join([f"### {result.title}", "", *noted]))
    return sections


def _one_line(outcome: Outcome) -> str:
    note = " ".join(outcome.note.split()).replace("<", "&lt;")
    return note if outcome.passed else f"**failed**: {note}"


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in body]


def _machine() -> str:
    cores = os.cpu_count()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return f"{platform.system()} on {platform.machine()}, {cores} cores, {memory_gib:.0f} GiB"
