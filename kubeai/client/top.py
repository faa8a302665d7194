"""``kubeai top``: the gateway's Models, as a live table or once."""

from __future__ import annotations

import asyncio
import sys
from typing import IO, TYPE_CHECKING, Any

import msgspec

from kubeai.client.gateway import Gateway
from kubeai.errors import KubeAIError
from kubeai.logs import printable
from kubeai.terminal.models import models_table

if TYPE_CHECKING:
    from rich.console import RenderableType

PLAIN_COLUMNS = 200  # of a table that is not for a terminal
STREAM_PROBLEMS_MAX = 5  # shown above the live table


async def print_once(gateway: Gateway, *, as_json: bool, out: IO[str]) -> None:
    """Print the state: as JSON, or as a table without styles."""
    async with gateway:
        state = await gateway.state()
    if as_json:
        out.write(msgspec.json.format(msgspec.json.encode(state), indent=2).decode() + "\n")
        return
    from rich.console import Console

    width = None if out.isatty() else PLAIN_COLUMNS
    console = Console(file=out, width=width, highlight=False)
    with console.capture() as captured:
        for problem in _stream_problems(state):
            console.print(problem, markup=False, soft_wrap=True)
        console.print(models_table(state.get("models", [])))
    out.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


async def show_live(gateway: Gateway, interval_s: float) -> None:
    """Show the table on the whole terminal until Ctrl-C; goes on while the gateway is away."""
    from rich.console import Console
    from rich.live import Live

    async with gateway:
        state: dict[str, Any] = await gateway.state()  # an error at first ends the command
        problem = ""
        console = Console(file=sys.stdout, highlight=False)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                view = _view(gateway, state, problem, rows=console.size.height)
                live.update(view, refresh=True)
                await asyncio.sleep(interval_s)
                try:
                    state, problem = await gateway.state(), ""
                except KubeAIError as error:
                    problem = str(error)


def _view(gateway: Gateway, state: dict[str, Any], problem: str, rows: int) -> RenderableType:
    """The screen: a line about the gateway, and the table."""
    from rich.console import Group
    from rich.text import Text

    models = state.get("models", [])
    workers = state.get("workers", [])
    ready = sum(bool(worker.get("ready")) for worker in workers)
    line = (
        f"{gateway.origin}  KubeAI {state.get('version', '?')}  {len(models)} Models  "
        f"{ready} of {len(workers)} workers ready  Ctrl-C leaves"
    )
    head = Text(problem, style="red") if problem else Text(line, style="dim")
    streams = [Text(text, style="red") for text in _stream_problems(state)[:STREAM_PROBLEMS_MAX]]
    for text in (head, *streams):
        text.no_wrap, text.overflow = True, "ellipsis"
    table = models_table(models, rows_max=max(1, rows - 4 - len(streams)))
    return Group(head, *streams, Text(""), table)


def _stream_problems(state: dict[str, Any]) -> list[str]:
    problems = state.get("stream_problems", [])
    return [f"message stream not connected: {printable(str(problem))}" for problem in problems]
