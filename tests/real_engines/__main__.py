"""Run real engines behind KubeAI and check what their clients see: ``make real-engines``.

    PYTHONPATH=tests python tests/real_engines [ENGINE …] [--engine-env NAME=DIR] [--python PATH]

Without arguments, all engines are installed and run, one after the other. Exits with 1 if a check
failed or an engine could not be installed. ``docs/contribute/real-engines.md`` says what is needed.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import report
from install import Installer, InstallError
from repository import REPOSITORY
from rich.console import Console
from rich.table import Table
from session import running
from suites import SUITES, run_stage

ROOT = REPOSITORY / "build" / "real-engines"
WEIGHTS = ROOT / "weights"
DOCUMENT = REPOSITORY / "docs/contribute/real-engines.md"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Run real engines behind KubeAI.")
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(SUITES))
    parser.add_argument(
        "--engine-env",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="use an engine that is installed in DIR instead of installing it; repeatable",
    )
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="run only these Models, and keep the last results of the others; repeatable",
    )
    parser.add_argument("--python", default="", help="interpreter of the engines' environments")
    parser.add_argument("--install-only", action="store_true", help="install, and check nothing")
    parser.add_argument("--report-only", action="store_true", help="only write the document again")
    options = parser.parse_args()
    options.engines = [_engine(parser, name) for name in options.engines] or list(SUITES)
    names = {stage.name for each in options.engines for stage in SUITES[each].stages(WEIGHTS)}
    if unknown := set(options.model) - names:
        parser.error(
            f"--model: no Model of these engines is called {', '.join(sorted(unknown))}; there are "
            f"{', '.join(sorted(names))}"
        )
    environments = {}
    for value in options.engine_env:
        name, _, directory = value.partition("=")
        environments[_engine(parser, name)] = Path(directory).expanduser().absolute()
    options.environments = environments
    return options


def _engine(parser: argparse.ArgumentParser, name: str) -> str:
    by_name = {engine.lower(): engine for engine in SUITES}
    if name.lower() not in by_name:
        parser.error(f"unknown engine {name!r}; the engines are {', '.join(SUITES)}")
    return by_name[name.lower()]


def run_engine(engine: str, installer: Installer, options: argparse.Namespace) -> report.Result:
    """Install an engine, run its Models, and return what became of each check."""
    suite = SUITES[engine]
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    version, source = installer.version(engine), installer.source(engine)
    result = report.Result(engine, suite.title, version, source, date)
    print(f"== {suite.title} {version}", flush=True)
    try:
        environment = options.environments.get(engine) or installer.engine(engine)
        weights = installer.weights()
        if options.install_only:
            return result
        if suite.prepare is not None:
            suite.prepare(environment, weights)
        outcomes = asyncio.run(check_engine(engine, environment, weights, options.model))
        result.outcomes = kept(engine, outcomes) if options.model else outcomes
    except (InstallError, AssertionError, OSError) as error:
        result.problem = str(error)
        print(f"  FAILED: {error}", flush=True)
    return result


def kept(engine: str, outcomes: list[report.Outcome]) -> list[report.Outcome]:
    """The last results of an engine with new ones in the place of those of the same checks."""
    old = [one for result in report.load(ROOT / "results", [engine]) for one in result.outcomes]
    by_name = {one.check: one for one in old} | {one.check: one for one in outcomes}
    return list(by_name.values())


async def check_engine(
    engine: str, environment: Path, weights: Path, models: list[str]
) -> list[report.Outcome]:
    """Run an engine's Models, or only those named."""
    stop_at_sigterm()
    directory = ROOT / "run" / engine
    shutil.rmtree(directory, ignore_errors=True)
    stages = [
        stage for stage in SUITES[engine].stages(weights) if not models or stage.name in models
    ]
    manifests = [stage.manifest for stage in stages]
    async with running(directory, manifests, engine, environment, weights) as session:
        for stage in stages:
            await run_stage(session, stage)
        return session.outcomes


def stop_at_sigterm() -> None:
    """Cancel the run at SIGTERM, as at Ctrl-C, so that all processes are stopped."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


def show(results: list[report.Result]) -> None:
    head, *rows = report.table(results)
    shown = Table(*head)
    for row in rows:
        shown.add_row(*(cell.replace("*", "") for cell in row))
    Console().print(shown)


def main() -> int:
    options = arguments()
    results = []
    if not options.report_only:
        installer = Installer(ROOT, options.python)
        for engine in options.engines:
            results.append(run_engine(engine, installer, options))
            if not options.install_only:
                report.save(ROOT / "results", results[-1])
    if not options.install_only:
        everything = report.load(ROOT / "results", list(SUITES))
        DOCUMENT.write_text(report.markdown(everything))
        show(results or everything)
    failed = report.failures(results)
    print(*(f"FAILED {line}" for line in failed), sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
