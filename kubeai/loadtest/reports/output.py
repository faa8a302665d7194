"""Writes the results of all commands of ``kubeai bench`` alike: as JSON, CSV and HTML."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kubeai.errors import KubeAIError
from kubeai.loadtest import arguments, options
from kubeai.loadtest.reports.compare import flat
from kubeai.simulation import results
from kubeai.simulation.results import Results, ResultsFile, Sweep

_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


class Outputs(msgspec.Struct, frozen=True):
    """The files to write; None: not that one. Each has all runs."""

    json: Path | None = None
    csv: Path | None = None
    html: Path | None = None

    def write(self, runs: Sequence[Results], sweep: Sweep | None = None) -> None:
        """Write the files; KubeAIError if one cannot be written."""
        if not runs:
            return
        try:
            if self.json is not None:
                results.write(ResultsFile(runs=list(runs), sweep=sweep), self.json)
            if self.csv is not None:
                self.csv.write_text(table(runs), encoding="utf-8")
            if self.html is not None:
                from kubeai.loadtest.reports.report import report

                self.html.write_text(report(runs, sweep), encoding="utf-8")
        except OSError as error:
            raise KubeAIError(f"{error.filename}: {error.strerror}") from None


def outputs(given: arguments.Files) -> Outputs:
    """Check before the run that the files can be written after it; OptionError if not."""
    return Outputs(
        options.writable("--json", given.json),
        options.writable("--csv", given.csv),
        options.writable("--html", given.html),
    )


def table(runs: Sequence[Results]) -> str:
    """The runs as CSV: a header, and a row for each run.

    Columns are the name, the summary (``ttft_ms.p99``), the failures by kind, the environment and
    the setting. A cell is empty if the run does not have the value.
    """
    rows = [dict(_row(run)) for run in runs]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(_cell, columns))
    for row in rows:
        writer.writerow(_cell(row.get(name)) for name in columns)
    return file.getvalue()


def _row(run: Results) -> Iterator[tuple[str, Any]]:
    yield "name", run.name
    yield from flat(run.summary)
    yield from flat(run.errors, "errors.")
    yield "warnings", "; ".join(run.warnings)
    yield from flat(run.environment, "environment.")
    yield from flat(run.setting, "setting.")


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula gets an apostrophe before it."""
    if value is None or isinstance(value, int | float):
        return value
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return f"'{text}" if text.startswith(_FORMULAS) else text
