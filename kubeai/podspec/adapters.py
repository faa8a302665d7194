"""LoRA adapters: the loader sidecar that fetches them, and the engine's API to load them.

Pure. The operator runs the commands and sends the requests (`kubeai.operator.adapters`).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import msgspec

from kubeai.api.config.system import SystemConfig
from kubeai.api.model import Model
from kubeai.api.model_url import parse_url
from kubeai.errors import ModelError
from kubeai.podspec import loader_commands
from kubeai.podspec.container import Object, container_resources
from kubeai.podspec.sources import every_source

LABEL_PREFIX = "adapter.kubeai.org/"  # + an adapter's name, on a pod
LOADING = "loading"  # the label's value while it is unknown what the engine has loaded
# The engine's restart count when the adapters were loaded: a restarted engine has none of them.
RESTARTS_ANNOTATION = "kubeai.org/adapters-loaded-at-restart"
LOADER_CONTAINER = "loader"
ROOT = "/adapters"
CLAIMS_ROOT = "/adapter-claims"  # + a claim's name: where adapters from claims are, read-only
_VOLUME, _CLAIM_VOLUME = "adapters", "adapter-claim-"
_CLAIM_SCHEME = "pvc://"
# The variables of the Model that the loader gets: credentials, endpoints, proxies, certificates.
# Others are meant for the engine and could stop the loader (HF_HUB_OFFLINE, PATH, HOME).
_LOADER_VARIABLE = re.compile(
    r"(AWS|GOOGLE|OSS|HF_XET)_.*|HF_(TOKEN|ENDPOINT|HUB_(DISABLE_XET|(DOWNLOAD|ETAG)_TIMEOUT))"
    r"|HUGGING_FACE_HUB_TOKEN|(HTTP|HTTPS|ALL|NO)_PROXY|SSL_CERT_(FILE|DIR)"
    r"|(REQUESTS|CURL)_CA_BUNDLE",
    re.IGNORECASE,
)
# Of ConfigMaps in the Model's envFrom, whose keys are not known here, the loader gets these: how to
# reach what it loads. Paths, such as those of certificates, may not exist in the loader.
SHARED_VARIABLES = (
    *(f"{protocol}_PROXY" for protocol in ("HTTP", "HTTPS", "ALL", "NO")),
    *(f"{protocol}_proxy" for protocol in ("http", "https", "all", "no")),
    "HF_ENDPOINT",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "OSS_ENDPOINT",
    "OSS_REGION",
)
_REFERENCE = re.compile(r"\$\(([^)]+)\)")
# Alphabet of the label values, as in KubeAI in Go (see `url_hash`).
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"
_FNV_OFFSET, _FNV_PRIME = 0x811C9DC5, 0x01000193


class Call(NamedTuple):
    """A request to an engine: POST ``path`` with ``body`` as JSON."""

    path: str
    body: dict[str, str]


def url_hash(url: str) -> str:
    """An adapter's label value: FNV-1a (32 bits) of its URL in decimal, mapped to `_ALPHABET`.

    Equal to the value that KubeAI in Go writes, so that its pods keep their adapters.
    """
    value = _FNV_OFFSET
    for byte in url.encode():
        value = (value ^ byte) * _FNV_PRIME & 0xFFFFFFFF
    return "".join(_ALPHABET[ord(digit) % len(_ALPHABET)] for digit in str(value))


def adapter_directory(name: str) -> str:
    """The directory of an adapter's files, in the engine's and in the loader's container."""
    return f"{ROOT}/{name}"


def add_loader(model: Model, config: SystemConfig, pod: Object, server: Object) -> None:
    """Add the loader container to the pod of a Model with adapters, and the adapters' claims.

    Apart from the claims, it does not depend on which adapters there are: they come and go without
    a new pod. ModelError names the adapter whose claim cannot be mounted.
    """
    if not model.spec.adapters:
        return
    source = every_source(config.secret_names)
    claims, claim_mounts = _claims(model)
    mount = {"name": _VOLUME, "mountPath": ROOT}
    loader: dict[str, Any] = {
        "name": LOADER_CONTAINER,
        "image": config.model_loading.image,
        "command": loader_commands.wait(),
        "env": _loader_environment(model, source.env),
        # Secrets have credentials. Other keys of ConfigMaps than those that `env` refers to are
        # meant for the engine and could stop the loader.
        "envFrom": msgspec.to_builtins([one for one in model.spec.env_from if one.secret_ref]),
        "resources": container_resources(config.model_loading.resources),
        "securityContext": config.model_server_pods.security_context,
        "volumeMounts": [mount, *source.mounts, *claim_mounts],
    }
    spec = pod["spec"]
    spec["containers"].append({key: value for key, value in loader.items() if value})
    server["volumeMounts"] += [mount | {"readOnly": True}, *claim_mounts]
    have = {volume["name"] for volume in spec["volumes"]}
    volumes = [{"name": _VOLUME, "emptyDir": {}}, *source.volumes, *claims]
    spec["volumes"] += [volume for volume in volumes if volume["name"] not in have]


def _loader_environment(model: Model, credentials: list[Object]) -> list[Object]:
    """Credentials, overridden by the Model's variables that concern the loader, and what these
    refer to as ``$(NAME)``."""
    given = model.spec.env
    chosen = {name for name in given if _LOADER_VARIABLE.fullmatch(name)}
    unread = list(chosen)
    while unread:
        referred = set(_REFERENCE.findall(given[unread.pop()])) & given.keys() - chosen
        chosen |= referred
        unread += referred
    env = [*_from_config_maps(model), *credentials]
    env = [variable for variable in env if variable["name"] not in chosen]
    return env + [{"name": name, "value": given[name]} for name in sorted(chosen)]


def _from_config_maps(model: Model) -> list[Object]:
    """References to the variables that ConfigMaps may have; as in envFrom, later ones count."""
    return [
        {
            "name": name,
            "valueFrom": {
                "configMapKeyRef": {
                    "name": source.config_map_ref.name,
                    "key": name.removeprefix(source.prefix),
                    "optional": True,
                }
            },
        }
        for source in model.spec.env_from
        if source.config_map_ref is not None
        for name in SHARED_VARIABLES
        if name.startswith(source.prefix) and name != source.prefix
    ]


def claim_of(url: str) -> str:
    """The claim that an adapter is on; empty if it is downloaded."""
    return _place(url).partition("/")[0] if url.startswith(_CLAIM_SCHEME) else ""


def _place(url: str) -> str:
    """``<claim>/<path>`` of an adapter on a claim."""
    return url.removeprefix(_CLAIM_SCHEME).partition("?")[0].rstrip("/")


def _claims(model: Model) -> tuple[list[Object], list[Object]]:
    """The volumes and mounts of the claims that adapters are on."""
    names = set()
    for i, adapter in enumerate(model.spec.adapters):
        if adapter.url.startswith(_CLAIM_SCHEME):
            field = f"spec.adapters[{i}].url"
            url = parse_url(adapter.url, field)
            if url.model:
                raise ModelError(
                    field, "an adapter does not support 'model'; remove the parameter", "InvalidURL"
                )
            names.add(url.name)
    volumes, mounts = [], []
    for i, name in enumerate(sorted(names)):
        volume = f"{_CLAIM_VOLUME}{i}"
        volumes.append({"name": volume, "persistentVolumeClaim": {"claimName": name}})
        path = f"{CLAIMS_ROOT}/{name}"
        mounts.append({"name": volume, "mountPath": path, "readOnly": True})
    return volumes, mounts


def fetch_command(name: str, url: str) -> list[str]:
    """The loader's command that puts an adapter into its folder.

    Adapters on a claim are used in place: the engine follows the link.
    """
    if claim_of(url):
        place = f"{CLAIMS_ROOT}/{_place(url)}"
        return loader_commands.link(place, adapter_directory(name))
    return ["load", url, adapter_directory(name)]


def remove_command(name: str) -> list[str]:
    """The loader's command to remove an adapter's files."""
    return loader_commands.remove(adapter_directory(name))


def load_call(name: str) -> Call:
    """The request that makes vLLM load an adapter whose files are present."""
    path = adapter_directory(name)
    return Call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})


def unload_call(name: str) -> Call:
    """The request that makes vLLM unload an adapter."""
    return Call("/v1/unload_lora_adapter", {"lora_name": name})


def refusal(call: Call, status: int, answer: str) -> str:
    """Why vLLM rejected a request; empty on success or if there was nothing to do."""
    if 200 <= status < 300:
        return ""
    text = answer.lower()
    loading = call.path == "/v1/load_lora_adapter"
    if loading and status == 400 and "already" in text and "loaded" in text:
        return ""
    if not loading and status in (400, 404) and "cannot be found" in text:
        return ""
    return f"{call.path} answered {status}: {' '.join(answer.split())}"
