"""How commands reach the Kubernetes API: the options, and the connection."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kubeai.cli.options import default_data_dir
from kubeai.errors import KubeAIError

if TYPE_CHECKING:
    from kubeai.kube.client import Kube

Kubeconfig = Annotated[
    Path | None,
    typer.Option(
        help="Kubeconfig. Default: $KUBECONFIG, the pod's service account, ~/.kube/config, or that "
        "of kubeai local, whichever is found first.",
    ),
]
Namespace = Annotated[
    str,
    typer.Option("--namespace", "-n", help="Namespace of KubeAI (default: the kubeconfig's)."),
]


@asynccontextmanager
async def connected(kubeconfig: Path | None) -> "AsyncIterator[Kube]":
    """A client of the Kubernetes API. ``kubeconfig``: as given; None: see the option."""
    from kubeai.kube.client import Kube

    kube = await Kube.connect(_find_kubeconfig(kubeconfig))
    try:
        yield kube
    finally:
        await kube.close()


def _find_kubeconfig(given: Path | None) -> str | None:
    """The kubeconfig to use; None: what `Kube.connect` finds."""
    if given is not None:
        return str(given)
    if os.environ.get("KUBECONFIG") or os.environ.get("KUBERNETES_SERVICE_HOST"):
        return None
    places = Path.home() / ".kube" / "config", default_data_dir() / "kubeconfig"
    for path in places:
        if path.is_file():
            print(f"using {path}", file=sys.stderr)
            return str(path)
    raise KubeAIError(
        f"no Kubernetes API: KUBECONFIG is not set, this is not a pod, and there is neither "
        f"{places[0]} nor {places[1]}; start `kubeai local`, or use --kubeconfig"
    )
