"""How to reach the cluster: the pod's service account, or a kubeconfig.

The service account, and a kubeconfig whose user has only a token (like that of `kubeai local`), are
read here. Other kubeconfigs (client certificates, exec plugins, OIDC, several files) are loaded by
kubernetes_asyncio. It is imported only then, because it adds 0.3 s and 40 MB to a process.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import yaml

from kubeai.errors import KubeAIError

if TYPE_CHECKING:
    from kubernetes_asyncio.client.configuration import Configuration

ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TOKEN_MAX_AGE_S = 60.0
RENEW_INTERVAL_S = 10.0
# What reading a kubeconfig raises if there is none, or it is not one.
UNREADABLE = OSError, yaml.YAMLError, LookupError, TypeError, ValueError


class Credentials(Protocol):
    """What a request is authenticated with."""

    async def authorization(self) -> str:
        """The value of the Authorization header; "" for none. OSError if it cannot be read."""
        ...

    async def renew(self) -> bool:
        """Obtain new credentials after a 401. False if there are none: do not try again."""
        ...


@dataclass(frozen=True, slots=True)
class Access:
    """The cluster's address, its TLS settings, the credentials, and the default namespace."""

    host: str  # scheme, host and port
    namespace: str
    credentials: Credentials
    ca_file: str | None = None
    cert_file: str | None = None  # of the client, as well as `key_file`
    key_file: str | None = None
    verify_tls: bool = True
    tls_server_name: str | None = None
    proxy: str | None = None


async def load_access(kubeconfig: str | None = None) -> Access:
    """Use ``kubeconfig``, else $KUBECONFIG, else the pod's service account.

    KubeAIError if the one that applies cannot be read. Does not contact the server.
    """
    path = kubeconfig or os.environ.get("KUBECONFIG")
    if not path:
        return _in_cluster()
    if missing := _missing_files(path):
        raise KubeAIError(f"kubeconfig {missing[0]}: no such file")
    return _with_token(path) or await _with_kubernetes_asyncio(path)


# -- the pod's service account -------------------------------------------------------------------


class _ServiceAccount:
    """The service account's token, read again each minute because the kubelet rotates it."""

    def __init__(self, token_file: Path) -> None:
        self._file = token_file
        self._read()

    def _read(self) -> None:
        token = self._file.read_text().strip()
        if not token:
            raise OSError(f"{self._file} is empty")
        self._authorization = f"Bearer {token}"
        self._read_at_s = time.monotonic()

    async def authorization(self) -> str:
        if time.monotonic() - self._read_at_s >= TOKEN_MAX_AGE_S:
            self._read()
        return self._authorization

    async def renew(self) -> bool:
        return False


def _in_cluster() -> Access:
    host = os.environ.get("KUBERNETES_SERVICE_HOST")
    port = os.environ.get("KUBERNETES_SERVICE_PORT")
    authority = ACCOUNT_DIR / "ca.crt"
    try:
        if not host or not port:
            raise OSError("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not both set")
        credentials = _ServiceAccount(ACCOUNT_DIR / "token")
        if not authority.read_bytes():
            raise OSError(f"{authority} is empty")
    except (OSError, UnicodeDecodeError) as error:
        raise KubeAIError(
            f"no Kubernetes API: KUBECONFIG is not set and this is not a pod ({error})"
        ) from error
    if ":" in host or "%" in host:  # IPv6
        host = f"[{host}]"
    return Access(
        host=f"https://{host}:{port}",
        namespace=_default_namespace() or _account_namespace() or "default",
        credentials=credentials,
        ca_file=str(authority),
    )


def _account_namespace() -> str:
    try:
        return (ACCOUNT_DIR / "namespace").read_text().strip()
    except OSError:
        return ""


def _default_namespace() -> str:
    return os.environ.get("POD_NAMESPACE", "")


# -- kubeconfigs ---------------------------------------------------------------------------------


def _missing_files(paths: str) -> list[str]:
    return [path for path in paths.split(os.pathsep) if not Path(path).is_file()]


class _Token:
    """A token that does not change."""

    def __init__(self, token: str) -> None:
        self._authorization = f"Bearer {token.strip()}"

    async def authorization(self) -> str:
        return self._authorization

    async def renew(self) -> bool:
        return False


def _with_token(path: str) -> Access | None:
    """Read a kubeconfig whose user has only a token. None: it has something else, or is invalid."""
    try:
        context, cluster, user = current_context(Path(path))
        if user.keys() != {"token"} or not cluster.keys() <= {"server", "certificate-authority"}:
            return None
        host, token = cluster["server"], user["token"]
        authority = None
        if host.startswith("https") and "certificate-authority" in cluster:
            authority = Path(path).parent / cluster["certificate-authority"]
            if not authority.is_file():
                return None
        if not token.strip():
            return None
    except (*UNREADABLE, AttributeError):
        return None  # kubernetes_asyncio reports what is wrong
    return Access(
        host=host.rstrip("/"),
        namespace=context.get("namespace") or _default_namespace() or "default",
        credentials=_Token(token),
        ca_file=None if authority is None else str(authority),
    )


def current_context(kubeconfig: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The context that a kubeconfig selects, its cluster and its user. Raises `UNREADABLE`."""
    content = yaml.safe_load(kubeconfig.read_text())
    context = _named(content["contexts"], content["current-context"])["context"]
    cluster = _named(content["clusters"], context["cluster"])["cluster"]
    return context, cluster, _named(content["users"], context["user"])["user"]


def _named(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The only item of this name. ValueError if there is none, or several."""
    (item,) = [item for item in items if item["name"] == name]
    return item


class _Loader(Protocol):
    """kubernetes_asyncio's loader, which runs exec plugins and reads token files again."""

    async def load_and_set(self, configuration: Configuration) -> None: ...


class _Reloaded:
    """Credentials of a kubeconfig that kubernetes_asyncio loaded."""

    def __init__(self, configuration: Configuration, loader: _Loader) -> None:
        self._configuration = configuration
        self._loader = loader
        self._renewed_at_s = float("-inf")

    async def authorization(self) -> str:
        settings = await self._configuration.auth_settings()
        return str(settings.get("BearerToken", {}).get("value") or "").strip()

    async def renew(self) -> bool:
        now_s = time.monotonic()
        if now_s - self._renewed_at_s < RENEW_INTERVAL_S:
            return False
        self._renewed_at_s = now_s
        try:
            await self._loader.load_and_set(self._configuration)
        except Exception:  # a plugin can fail in any way, and the 401 is the more useful error
            return False
        return True


async def _with_kubernetes_asyncio(path: str) -> Access:
    from kubernetes_asyncio import config
    from kubernetes_asyncio.client.configuration import Configuration

    configuration = Configuration()
    try:
        loader = await config.load_kube_config(config_file=path, client_configuration=configuration)
    except config.ConfigException as error:
        raise KubeAIError(f"kubeconfig {path}: {error}") from error
    except Exception as error:  # an invalid file can raise anything
        raise KubeAIError(f"kubeconfig {path}: not a valid kubeconfig ({error})") from error
    context = (loader.current_context or {}).get("context") or {}
    return Access(
        host=str(configuration.host),
        namespace=context.get("namespace") or _default_namespace() or "default",
        credentials=_Reloaded(configuration, loader),
        ca_file=configuration.ssl_ca_cert,
        cert_file=configuration.cert_file,
        key_file=configuration.key_file,
        verify_tls=configuration.verify_ssl,
        tls_server_name=configuration.tls_server_name,
        proxy=configuration.proxy,
    )
