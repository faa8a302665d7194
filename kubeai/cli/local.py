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

Manifests = Annotated[
    list[Path] | None,
    typer.Argument(metavar="MANIFEST", help="Manifest files or directories to apply."),
]
Host = Annotated[str, typer.Option(help="Listen address of the OpenAI-compatible API.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Directory for state, logs and the kubeconfig (default $XDG_DATA_HOME/kubeai)."
    ),
]
Config = Annotated[Path | None, typer.Option(help="System config file (YAML).")]
ApiPort = Annotated[
    int,
    typer.Option(
        help="Port of the Kubernetes API; 0 reuses the previous port or picks a free one.",
        min=0,
        max=65535,
    ),
]
Namespace = Annotated[
    str, typer.Option(help="Namespace whose Models are served; created if missing.")
]
ModelUrls = Annotated[
    list[str] | None,
    typer.Option(
        metavar="URL",
        help="Serve these weights, without a manifest, on the best engine that is installed: "
        "hf://, ollama://, pvc:// or s3://. Repeatable.",
    ),
]
Volumes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIR",
        help="Directory that serves as the volume of the claim NAME, for pvc://NAME/<path>. "
        "Repeatable.",
    ),
]
Gpus = Annotated[
    str,
    typer.Option(
        metavar="all|none|N|UUIDs",
        help="NVIDIA GPUs to assign to replicas: all that are found, none, the first N, or "
        "those with these UUIDs, separated by commas.",
    ),
]
Swap = Annotated[
    bool,
    typer.Option(
        "--swap",
        help="Scale down the least recently used idle Model when another one is requested "
        "and does not fit.",
    ),
]
RequireKeys = Annotated[
    bool,
    typer.Option(
        "--require-keys",
        help="Require an API key of every client, as gateway.keys.required does. Create one "
        "with kubeai key create.",
    ),
]


def local(
    manifests: Manifests = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    workers: Workers = 1,
    data_dir: DataDir = None,
    config: Config = None,
    api_port: ApiPort = 0,
    namespace: Namespace = "default",
    model: ModelUrls = None,
    volume: Volumes = None,
    engine_env: EngineEnv = None,
    gpus: Gpus = "all",
    swap: Swap = False,
    require_keys: RequireKeys = False,
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
