"""``kubeai local``: the same on one machine, without a cluster."""

# No postponed annotations: typer evaluates those of the command.
from pathlib import Path
from typing import Annotated

import typer

from kubeai.cli.options import (
    EngineEnv,
    LogFormat,
    Port,
    Workers,
    default_data_dir,
    run_async,
    set_log_format,
)


def local(
    manifests: Annotated[
        list[Path] | None,
        typer.Argument(metavar="MANIFEST", help="Manifest files or directories to apply."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Listen address of the OpenAI-compatible API.")
    ] = "127.0.0.1",
    port: Port = 8000,
    workers: Workers = 1,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory for state, logs and the kubeconfig (default $XDG_DATA_HOME/kubeai)."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="System config file (YAML).")] = None,
    api_port: Annotated[
        int,
        typer.Option(
            help="Port of the Kubernetes API; 0 reuses the previous port or picks a free one.",
            min=0,
            max=65535,
        ),
    ] = 0,
    namespace: Annotated[
        str, typer.Option(help="Namespace whose Models are served; created if missing.")
    ] = "default",
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Serve these weights, without a manifest, on the best engine that is installed: "
            "hf://, ollama://, pvc:// or s3://. Repeatable.",
        ),
    ] = None,
    volume: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="Directory that serves as the volume of the claim NAME, for pvc://NAME/<path>. "
            "Repeatable.",
        ),
    ] = None,
    engine_env: EngineEnv = None,
    gpus: Annotated[
        str,
        typer.Option(
            metavar="all|none|N|UUIDs",
            help="NVIDIA GPUs to assign to replicas: all that are found, none, the first N, or "
            "those with these UUIDs, separated by commas.",
        ),
    ] = "all",
    swap: Annotated[
        bool,
        typer.Option(
            "--swap",
            help="Scale down the least recently used idle Model when another one is requested "
            "and does not fit.",
        ),
    ] = False,
    require_keys: Annotated[
        bool,
        typer.Option(
            "--require-keys",
            help="Require an API key of every client, as gateway.keys.required does. Create one "
            "with kubeai key create.",
        ),
    ] = False,
    log_format: LogFormat = "auto",
) -> None:
    """Run on this machine without a cluster, with the same manifests and plain kubectl."""
    from kubeai.local.app import PROCESSES, Options, run
    from kubeai.processes import ForkServer
    from kubeai.terminal.screen import open_screen

    set_log_format(log_format)
    options = Options(
        manifests=tuple(manifests or ()),
        host=host,
        port=port,
        workers=workers,
        data_dir=(data_dir or default_data_dir()).absolute(),
        config=config,
        api_port=api_port,
        namespace=namespace,
        models=tuple(model or ()),
        engine_envs=tuple(engine_env or ()),
        volumes=tuple(volume or ()),
        gpus=gpus,
        swap=swap,
        require_keys=require_keys,
    )
    with open_screen() as screen:
        fork_server = ForkServer(*PROCESSES)
        try:
            if screen is not None:
                screen.guard()
            run_async(run(options, fork_server.spawn, screen.show if screen else None))
        finally:
            fork_server.close()
