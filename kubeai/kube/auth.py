"""How to reach the cluster: a kubeconfig, or the pod's service account."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple, Protocol

from kubeai.errors import KubeAIError
from kubeai.imports import without_init

with without_init("kubernetes_asyncio", "kubernetes_asyncio.client") as (_, client):
    from kubernetes_asyncio.client.configuration import Configuration

    if not hasattr(client, "Configuration"):  # names that `config` imports from the package
        client.Configuration, client.ApiClient = Configuration, None  # type: ignore[attr-defined]
    from kubernetes_asyncio import config as kube_config

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Loader(Protocol):
    """Reloads a kubeconfig's credentials."""

    async def load_and_set(self, configuration: Configuration) -> None: ...


class Access(NamedTuple):
    """The cluster's address and credentials, and the namespace to use by default."""

    configuration: Configuration
    namespace: str
    loader: Loader | None  # None: the service account, whose token is reread by itself


async def load_access(kubeconfig: str | None = None) -> Access:
    """Use ``kubeconfig``, else $KUBECONFIG, else the pod's service account.

    KubeAIError if the one that applies cannot be read. Does not contact the server.
    """
    configuration = Configuration()
    path = kubeconfig or os.environ.get("KUBECONFIG")
    environment = os.environ.get("POD_NAMESPACE", "")
    if not path:
        try:
            _in_cluster(configuration)
        except kube_config.ConfigException as error:
            raise KubeAIError(
                f"no Kubernetes API: KUBECONFIG is not set and this is not a pod ({error})"
            ) from error
        namespace = environment or _account_namespace() or "default"
        return Access(configuration, namespace, None)
    missing = _missing_files(path)
    if missing:
        raise KubeAIError(f"kubeconfig {missing[0]}: no such file")
    try:
        loader = await kube_config.load_kube_config(
            config_file=path, client_configuration=configuration
        )
    except kube_config.ConfigException as error:
        raise KubeAIError(f"kubeconfig {path}: {error}") from error
    except Exception as error:  # an invalid file can raise anything
        raise KubeAIError(f"kubeconfig {path}: not a valid kubeconfig ({error})") from error
    context = (loader.current_context or {}).get("context") or {}
    namespace = context.get("namespace") or environment or "default"
    return Access(configuration, namespace, loader)


def _in_cluster(configuration: Configuration) -> None:
    kube_config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]


def _missing_files(paths: str) -> list[str]:
    return [path for path in paths.split(os.pathsep) if not Path(path).is_file()]


def _account_namespace() -> str:
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return ""
