"""``kubeai serve``: the gateway and the operator of a cluster."""

# No postponed annotations: typer evaluates those of the command.
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from kubeai.cli.options import LogFormat, Port, Workers, run_async, set_log_format


def serve(
    host: Annotated[
        str,
        typer.Option(
            help="Listen address of the OpenAI-compatible API. Also used for metrics and "
            "health if the config sets only their ports."
        ),
    ] = "0.0.0.0",
    port: Port = 8000,
    workers: Workers = 1,
    log_format: LogFormat = "auto",
) -> None:
    """Run the gateway and the operator for a Kubernetes cluster.

    Reads the system config from $CONFIG_PATH and serves the Models in $POD_NAMESPACE. $POD_NAME
    is the identity for leader election. Connects with $KUBECONFIG, or else with the pod's
    service account.
    """
    set_log_format(log_format)
    run_async(_serve(host, port, workers))


async def _serve(host: str, port: int, workers: int) -> None:
    from kubeai.api.config.system import load_config
    from kubeai.kube.client import Kube
    from kubeai.logs import get_logger
    from kubeai.supervisor.listeners import authority
    from kubeai.supervisor.supervisor import Supervisor

    config_path = os.environ.get("CONFIG_PATH")
    config = load_config(Path(config_path) if config_path else None)
    config = config.listening_on(host)
    log = get_logger(__name__)
    lease = config.leader_election
    # A write that a leader has sent is delivered or dropped before a peer can lead.
    kube = await Kube.connect(unacknowledged_max_s=lease.lease_duration_s - lease.renew_deadline_s)

    def started() -> None:
        log.info(
            "serving",
            endpoint=f"http://{authority(host, supervisor.port)}/openai/v1"
            if supervisor.port
            else "none",
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
