"""The command line: serve · local · load · bench · uninstall · mock-engine · crd.

A user error is reported as one line on stderr with exit status 2, never as a traceback.
"""

# No postponed annotations: typer evaluates the annotations of the commands, which use names that
# are local to _app.
import asyncio
import os
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

from kubeai.errors import KubeAIError

USAGE_ERROR = 2


def main() -> None:
    """Entry point of ``kubeai``."""
    try:
        if sys.argv[1:2] == ["mock-engine"]:
            # Engines start on demand while a request waits, so skip typer, which takes 150 ms to
            # import.
            from kubeai import mock_engine

            raise SystemExit(mock_engine.main(sys.argv[2:]))
        _app()()
    except KubeAIError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None


def _app() -> Any:
    import typer

    app = typer.Typer(
        name="kubeai",
        help="Inference gateway and model operator for Kubernetes.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def version(show: bool) -> None:
        if show:
            from kubeai import __version__

            print(__version__)
            raise typer.Exit

    @app.callback()
    def options(
        _: Annotated[
            bool,
            typer.Option("--version", callback=version, is_eager=True, help="Print the version."),
        ] = False,
    ) -> None:
        pass

    @app.command()
    def serve(
        host: Annotated[
            str,
            typer.Option(
                help="Listen address of the OpenAI-compatible API. Also used for metrics and "
                "health if the config sets only their ports."
            ),
        ] = "0.0.0.0",
        port: Annotated[
            int, typer.Option(help="Port of the OpenAI-compatible API.", min=0, max=65535)
        ] = 8000,
        workers: Annotated[
            int, typer.Option(help="Number of data-plane processes.", min=1, max=63)
        ] = 1,
    ) -> None:
        """Run the gateway and the operator for a Kubernetes cluster.

        Reads the system config from $CONFIG_PATH and serves the Models in $POD_NAMESPACE. $POD_NAME
        is the identity for leader election. Connects with $KUBECONFIG, or else with the pod's
        service account.
        """
        _run(_serve(host, port, workers))

    @app.command()
    def local(
        manifests: Annotated[
            list[Path] | None, typer.Argument(help="Manifest files or directories to apply.")
        ] = None,
        host: Annotated[
            str, typer.Option(help="Listen address of the OpenAI-compatible API.")
        ] = "127.0.0.1",
        port: Annotated[
            int,
            typer.Option(
                help="Port of the OpenAI-compatible API; 0 picks a free port.", min=0, max=65535
            ),
        ] = 8000,
        workers: Annotated[
            int, typer.Option(help="Number of data-plane processes.", min=1, max=63)
        ] = 1,
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
    ) -> None:
        """Run on this machine without a cluster, with the same manifests and plain kubectl."""
        from kubeai.local.app import Options, run

        data_home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
        options = Options(
            manifests=tuple(manifests or ()),
            host=host,
            port=port,
            workers=workers,
            data_dir=(data_dir or data_home / "kubeai").absolute(),
            config=config,
            api_port=api_port,
            namespace=namespace,
        )
        _run(run(options))

    @app.command()
    def load(
        url: Annotated[
            str, typer.Argument(help="hf://<owner>/<name>, or s3://, gs://, oss://<bucket>/<path>.")
        ],
        folder: Annotated[Path, typer.Argument(help="Target directory; replaced if it exists.")],
        parallel: Annotated[
            int,
            typer.Option(help="Number of parts (Hugging Face: files) to fetch at a time.", min=1),
        ] = 8,
    ) -> None:
        """Download model weights into a directory, all or nothing. Rerun to resume.

        Reads $HF_TOKEN and $HF_ENDPOINT; $AWS_ACCESS_KEY_ID, $AWS_SECRET_ACCESS_KEY, $AWS_REGION
        and $AWS_ENDPOINT_URL; $GOOGLE_APPLICATION_CREDENTIALS; $OSS_ACCESS_KEY_ID,
        $OSS_ACCESS_KEY_SECRET and $OSS_REGION.
        """
        from kubeai.loading import load

        asyncio.run(load(url, folder, parallel=parallel))

    @app.command()
    def uninstall(
        yes: Annotated[bool, typer.Option("--yes", help="Confirm the deletion.")] = False,
        helm_release: Annotated[
            str,
            typer.Option(
                help="Delete the Models only if Helm is uninstalling this release. For the "
                "chart's hook, with --job."
            ),
        ] = "",
        job: Annotated[str, typer.Option(help="Name of the hook's Job.")] = "",
        timeout: Annotated[
            int, typer.Option(help="Seconds to wait until the Models are gone.", min=1)
        ] = 600,
    ) -> None:
        """Delete all Models of $POD_NAMESPACE, wait until they are gone, and delete their caches.

        Needs --yes, or --helm-release and --job.
        """
        if not yes and not (helm_release and job):
            raise KubeAIError("uninstall deletes all Models of the namespace; confirm with --yes")
        _run(_uninstall("" if yes else helm_release, job, float(timeout)))

    @app.command()
    def crd() -> None:
        """Print the CustomResourceDefinition of Model, for kubectl apply."""
        from kubeai.api.crd import crd_yaml

        print(crd_yaml(), end="")

    @app.command("mock-engine", add_help_option=False)
    def mock_engine() -> None:
        """Run a mock vLLM server: generated text, realistic timing, no GPU needed."""
        raise AssertionError("main() handles this command before typer is imported")

    from kubeai.loadtest.commands import app as bench  # imports only typer

    app.add_typer(bench(), name="bench")
    return app


async def _serve(host: str, port: int, workers: int) -> None:
    from kubeai.api.config.system import load_config
    from kubeai.kube.client import Kube
    from kubeai.logs import get_logger
    from kubeai.supervisor.supervisor import Supervisor

    config_path = os.environ.get("CONFIG_PATH")
    config = load_config(Path(config_path) if config_path else None)
    config = config.listening_on(host)
    log = get_logger(__name__)
    lease = config.leader_election
    # A write that a leader has sent is delivered or dropped before another replica can lead.
    kube = await Kube.connect(unacknowledged_max_s=lease.lease_duration_s - lease.renew_deadline_s)

    def started() -> None:
        log.info(
            "serving",
            endpoint=f"http://{host}:{supervisor.port}/openai/v1",
            metrics=f"http://{supervisor.metrics_address}/metrics",
            health=f"http://{supervisor.health_address}",
            workers=workers,
        )

    try:
        supervisor = Supervisor(
            kube,
            config,
            namespace=os.environ.get("POD_NAMESPACE") or kube.namespace,
            pod=os.environ.get("POD_NAME", ""),
            identity=os.environ.get("POD_NAME") or f"{socket.gethostname()}-{os.getpid()}",
            host=host,
            port=port,
            workers=workers,
            started=started,
        )
        await supervisor.run()
    finally:
        await kube.close()


async def _uninstall(helm_release: str, job: str, timeout_s: float) -> None:
    from kubeai.kube.client import Kube
    from kubeai.operator.uninstall import require_helm_uninstall, uninstall

    kube = await Kube.connect()
    namespace = os.environ.get("POD_NAMESPACE") or kube.namespace
    try:
        if helm_release:
            await require_helm_uninstall(kube, namespace, helm_release, job)
        await uninstall(kube, namespace, timeout_s)
    finally:
        await kube.close()


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Run a command's coroutine on uvloop."""
    import uvloop

    from kubeai.logs import setup_logging

    setup_logging()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)
