"""Options that several commands share, and what runs a command's coroutine."""

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any

import typer

Port = Annotated[
    int,
    typer.Option(help="Port of the OpenAI-compatible API; 0 picks a free port.", min=0, max=65535),
]
Workers = Annotated[int, typer.Option(help="Number of data-plane processes.", min=1, max=63)]


def run_async(main: Coroutine[Any, Any, None]) -> None:
    """Run a command's coroutine on uvloop."""
    import uvloop

    from kubeai.logs import setup_logging

    setup_logging()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)
