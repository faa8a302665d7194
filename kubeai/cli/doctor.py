"""``kubeai doctor``: what would fail on this machine, and what to do."""

# No postponed annotations: typer evaluates those of the command.
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kubeai.cli.options import EngineEnv, Output, Port, check_output, default_data_dir

if TYPE_CHECKING:
    from kubeai.local.doctor import Check

_STYLES = {"ok": "32", "warning": "33", "problem": "31"}


def doctor(
    host: Annotated[
        str, typer.Option(help="Listen address that kubeai local would use.")
    ] = "127.0.0.1",
    port: Port = 8000,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Data directory of kubeai local (default $XDG_DATA_HOME/kubeai)."),
    ] = None,
    engine_env: EngineEnv = None,
    output: Output = "table",
) -> None:
    """Check this machine: what is installed, what is missing, what would fail.

    Each line is ok, a warning or a problem, with what to do. Exits with 1 if there is a problem.
    """
    import msgspec

    from kubeai.local.doctor import Setting, examine

    as_json = check_output(output)
    setting = Setting(
        host, port, (data_dir or default_data_dir()).absolute(), tuple(engine_env or ())
    )
    checks = asyncio.run(examine(setting))
    problems = sum(check.status == "problem" for check in checks)
    if as_json:
        report = {"ok": not problems, "checks": checks}
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        _print_checks(checks)
    if problems:
        raise typer.Exit(1)


def _print_checks(checks: "list[Check]") -> None:
    from kubeai.logs import colours_wanted, printable

    colours = colours_wanted() and sys.stdout.isatty()
    width = max(len(check.name) for check in checks)
    for check in checks:
        word = f"{check.status:8}"
        if colours:
            word = f"\x1b[{_STYLES[check.status]}m{word}\x1b[0m"
        print(f"{word} {check.name:{width}}  {printable(check.message)}")
        if check.hint:
            print(f"{'':8} {'':{width}}  -> {check.hint}")
    warnings = sum(check.status == "warning" for check in checks)
    problems = sum(check.status == "problem" for check in checks)
    print(f"\n{_counted(problems, 'problem')}, {_counted(warnings, 'warning')}")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
