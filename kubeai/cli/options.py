"""Options that several commands share, and what runs a command's coroutine."""

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

Port = Annotated[
    int,
    typer.Option(help="Port of the OpenAI-compatible API; 0 picks a free port.", min=0, max=65535),
]
Workers = Annotated[int, typer.Option(help="Number of data-plane processes.", min=1, max=63)]
BaseUrl = Annotated[
    str,
    typer.Option(help="URL of the OpenAI-compatible API.", envvar="OPENAI_BASE_URL"),
]
ApiKey = Annotated[
    str,
    typer.Option(
        help="API key, if the endpoint needs one.",
        envvar=["KUBEAI_API_KEY", "OPENAI_API_KEY"],
        show_default=False,
    ),
]
EngineEnv = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIR",
        help="Virtual environment that holds an engine: VLLM, OLlama, FasterWhisper, Infinity, "
        "SGLang or LlamaCpp. Repeatable.",
    ),
]
Output = Annotated[
    str, typer.Option("--output", "-o", help="Format: table or json.", metavar="FORMAT")
]
LogFormat = Annotated[
    str,
    typer.Option(
        help="Format of the log: console (lines for people), json, or auto: console if stderr is "
        "a terminal. Default: $KUBEAI_LOG_FORMAT, or else auto.",
        show_default=False,
        metavar="FORMAT",
    ),
]


def default_data_dir() -> Path:
    """Where `kubeai local` keeps its state without ``--data-dir``."""
    data_home = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data_home) / "kubeai"


def check_output(chosen: str) -> bool:
    """Whether ``--output`` asks for JSON."""
    from kubeai.errors import KubeAIError

    if chosen not in ("table", "json"):
        raise KubeAIError(f"--output: {chosen!r} is not table or json")
    return chosen == "json"


def set_log_format(chosen: str) -> None:
    """Apply ``--log-format`` to this process and those that it starts."""
    from kubeai.errors import KubeAIError
    from kubeai.logs import FORMAT_VARIABLE, FORMATS

    if chosen not in FORMATS:
        raise KubeAIError(f"--log-format: {chosen!r} is not one of {', '.join(FORMATS)}")
    if chosen != "auto":
        os.environ[FORMAT_VARIABLE] = chosen


def run_async(main: Coroutine[Any, Any, None]) -> None:
    """Run a command's coroutine on uvloop."""
    import uvloop

    from kubeai.logs import setup_logging

    setup_logging()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)
