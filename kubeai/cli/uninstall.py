"""``kubeai uninstall``: deletes all Models and their caches."""

# No postponed annotations: typer evaluates those of the command.
import os
from typing import Annotated

import typer

from kubeai.cli.options import run_async
from kubeai.errors import KubeAIError


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
    run_async(_uninstall("" if yes else helm_release, job, float(timeout)))


async def _uninstall(helm_release: str, job: str, timeout_s: float) -> None:
    from kubeai.kube.client import Kube
    from kubeai.operator.uninstall import require_helm_uninstall
    from kubeai.operator.uninstall import uninstall as delete_models

    kube = await Kube.connect()
    namespace = os.environ.get("POD_NAMESPACE") or kube.namespace
    try:
        if helm_release:
            await require_helm_uninstall(kube, namespace, helm_release, job)
        await delete_models(kube, namespace, timeout_s)
    finally:
        await kube.close()
