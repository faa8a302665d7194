"""Where weights come from: which engine takes which URL, with whose credentials, from what volume.

Credentials come from the Secrets that the system config names. All are optional: a pod starts
without them, and public weights need none.
"""

from __future__ import annotations

from kubeai.api.config import SecretNames
from kubeai.api.model import Engine, ModelSpec, ModelURL, Scheme, parse_url
from kubeai.engines.server import MODEL_MOUNT, Object
from kubeai.errors import ModelError

GCP_DIRECTORY = "/secrets/gcp-credentials"
GCP_FILE = "credentials.json"

# What an engine loads by itself. Through a cache, all but OLlama take hf, s3, gs and oss.
_DIRECT: dict[Engine, tuple[Scheme, ...]] = {
    "VLLM": ("hf", "pvc", "s3"),
    "OLlama": ("ollama", "pvc"),
    "FasterWhisper": ("hf", "pvc"),
    "Infinity": ("hf", "pvc"),
}
_CACHED: tuple[Scheme, ...] = ("s3", "gs", "oss")


class Source:
    """What a pod needs for its weights beside the engine's own settings."""

    def __init__(self) -> None:
        self.env: list[Object] = []
        self.volumes: list[Object] = []
        self.mounts: list[Object] = []


def model_url(spec: ModelSpec) -> ModelURL:
    """The Model's URL; ModelError on ``spec.url`` when its engine cannot load from there."""
    url = parse_url(spec.url)
    direct = _DIRECT[spec.engine]
    if url.scheme not in direct and not spec.cache_profile:
        can = ", ".join(f"{scheme}://" for scheme in direct)
        hint = ""
        if url.scheme in _CACHED and spec.engine != "OLlama":
            hint = f", and {url.scheme}:// with a cacheProfile"
        raise ModelError(
            "spec.url",
            f"{spec.engine} cannot load from {url.scheme}://; it loads from {can}{hint}",
            "InvalidURL",
        )
    if url.scheme == "pvc" and spec.engine == "OLlama" and not url.model:
        raise ModelError(
            "spec.url",
            "OLlama needs the model's name on the claim: pvc://<claim>?model=<name>[:<tag>]",
            "InvalidURL",
        )
    if url.model and spec.engine != "OLlama":
        raise ModelError(
            "spec.url", f"the parameter 'model' means nothing to {spec.engine}", "InvalidURL"
        )
    return url


def source(url: ModelURL, secrets: SecretNames) -> Source:
    """Credentials, or the claim's volume, for one URL."""
    result = Source()
    match url.scheme:
        case "hf":
            result.env = _from_secret(secrets.huggingface, {"HF_TOKEN": "token"})
        case "s3":
            keys = {"AWS_ACCESS_KEY_ID": "accessKeyID", "AWS_SECRET_ACCESS_KEY": "secretAccessKey"}
            result.env = _from_secret(secrets.aws, keys)
        case "oss":
            keys = {"OSS_ACCESS_KEY_ID": "accessKeyID", "OSS_ACCESS_KEY_SECRET": "accessKeySecret"}
            result.env = _from_secret(secrets.alibaba, keys)
        case "gs":
            _add_gcp(result, secrets.gcp)
        case "pvc":
            _add_claim(result, url)
    return result


def _from_secret(secret: str, keys: dict[str, str]) -> list[Object]:
    if not secret:
        return []
    return [
        {
            "name": variable,
            "valueFrom": {"secretKeyRef": {"name": secret, "key": key, "optional": True}},
        }
        for variable, key in keys.items()
    ]


def _add_gcp(result: Source, secret: str) -> None:
    """Google's libraries take a key file, and its place by a variable."""
    if not secret:
        return
    volume = "gcp-credentials"
    result.env = [
        {"name": "GOOGLE_APPLICATION_CREDENTIALS", "value": f"{GCP_DIRECTORY}/{GCP_FILE}"}
    ]
    items = [{"key": "jsonKeyfile", "path": GCP_FILE}]
    result.volumes = [
        {"name": volume, "secret": {"secretName": secret, "items": items, "optional": True}}
    ]
    result.mounts = [{"name": volume, "mountPath": GCP_DIRECTORY}]


def _add_claim(result: Source, url: ModelURL) -> None:
    result.volumes = [{"name": "model", "persistentVolumeClaim": {"claimName": url.name}}]
    mount = {"name": "model", "mountPath": MODEL_MOUNT}
    sub_path = url.path.strip("/")  # Kubernetes wants it relative
    if sub_path:
        mount["subPath"] = sub_path
    result.mounts = [mount]
