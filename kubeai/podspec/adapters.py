"""LoRA adapters: the loader sidecar that fetches them, and the engine's API to load them.

Pure. The operator runs the commands and sends the requests (`kubeai.operator.adapters`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from kubeai.api.config.system import SystemConfig
from kubeai.api.model import Model
from kubeai.podspec.container import Object, container_resources
from kubeai.podspec.sources import environment, every_source

LABEL_PREFIX = "adapter.kubeai.org/"  # + an adapter's name, on a pod
LOADING = "loading"  # the label's value while it is unknown what the engine has loaded
# The engine's restart count when the adapters were loaded: a restarted engine has none of them.
RESTARTS_ANNOTATION = "kubeai.org/adapters-loaded-at-restart"
LOADER_CONTAINER = "loader"
ROOT = "/adapters"
_VOLUME = "adapters"
# Sleeps until SIGTERM. A bare `sleep` ignores SIGTERM as a container's first process, and would
# keep a deleted pod and its GPUs for the whole grace period.
_SLEEP = "trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done"
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
    """Add the loader container to the pod of a Model with adapters.

    It does not depend on which adapters there are: they come and go without a new pod.
    """
    if not model.spec.adapters:
        return
    source = every_source(config.secret_names)
    mount = {"name": _VOLUME, "mountPath": ROOT}
    loader: dict[str, Any] = {
        "name": LOADER_CONTAINER,
        "image": config.model_loading.image,
        "command": ["sh", "-c", _SLEEP],
        "env": environment(model, {}, {}, source),
        "envFrom": msgspec.to_builtins(model.spec.env_from),
        "resources": container_resources(config.model_loading.resources),
        "securityContext": config.model_server_pods.security_context,
        "volumeMounts": [mount, *source.mounts],
    }
    spec = pod["spec"]
    spec["containers"].append({key: value for key, value in loader.items() if value})
    server["volumeMounts"].append(mount | {"readOnly": True})
    have = {volume["name"] for volume in spec["volumes"]}
    volumes = [{"name": _VOLUME, "emptyDir": {}}, *source.volumes]
    spec["volumes"] += [volume for volume in volumes if volume["name"] not in have]


def fetch_command(name: str, url: str) -> list[str]:
    """The loader's command to fetch an adapter."""
    return ["load", url, adapter_directory(name)]


def remove_command(name: str) -> list[str]:
    """The loader's command to remove an adapter's files."""
    return ["rm", "-rf", "--", adapter_directory(name)]


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
