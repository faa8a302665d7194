"""Sources of weights: the URLs each engine supports, and the credentials and volumes they need.

Also builds the environment of every container that fetches weights: an engine, a cache's load Job,
and the adapter loader.

Credentials come from the Secrets named in the system config. All are optional: a pod starts
without them, and public weights need none.
"""

from __future__ import annotations

from collections.abc import Mapping

from kubeai.api.config.system import SecretNames
from kubeai.api.model import Engine, Model, ModelSpec
from kubeai.api.model_url import CACHE_SCHEMES, ModelURL, Scheme, parse_url
from kubeai.errors import ModelError
from kubeai.podspec.container import MODEL_MOUNT, Object

GCP_DIRECTORY = "/secrets/gcp-credentials"
GCP_FILE = "credentials.json"

# What an engine loads by itself. Through a cache, all others support hf, s3, gs and oss.
_DIRECT: dict[Engine, tuple[Scheme, ...]] = {
    "VLLM": ("hf", "pvc", "s3", "oci"),
    "OLlama": ("ollama", "pvc"),
    "FasterWhisper": ("hf", "pvc", "oci"),
    "Infinity": ("hf", "pvc", "oci"),
    "SGLang": ("hf", "pvc", "s3", "oci"),
    "LlamaCpp": ("hf", "pvc", "oci"),
}
_WITHOUT_CACHE: tuple[Engine, ...] = ("OLlama", "LlamaCpp")
_CACHED: tuple[Scheme, ...] = ("s3", "gs", "oss")


class Source:
    """What a pod needs to access its weights, besides the engine's own settings."""

    def __init__(self) -> None:
        self.env: list[Object] = []
        self.volumes: list[Object] = []
        self.mounts: list[Object] = []
        self.pull_secrets: list[str] = []  # for images with weights


def model_url(spec: ModelSpec) -> ModelURL:
    """The Model's parsed URL. ModelError on ``spec.url`` if its engine does not support it."""
    url = parse_url(spec.url)
    direct, cacheable = _DIRECT[spec.engine], spec.engine not in _WITHOUT_CACHE
    through_cache = bool(spec.cache_profile) and cacheable
    if url.scheme not in direct and not through_cache:
        can = ", ".join(f"{scheme}://" for scheme in direct)
        hint = ""
        if url.scheme in _CACHED and cacheable:
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
    if url.model and spec.engine not in ("OLlama", "LlamaCpp"):
        raise ModelError(
            "spec.url", f"{spec.engine} does not support the parameter 'model'", "InvalidURL"
        )
    if spec.engine == "LlamaCpp" and spec.cache_profile:
        raise ModelError(
            "spec.cacheProfile",
            "LlamaCpp does not support caches; remove cacheProfile, or put the file on a claim",
            "InvalidProfile",
        )
    return url


def source(url: ModelURL, secrets: SecretNames) -> Source:
    """The credentials for one URL, or the volume of its claim or image."""
    result = Source()
    if url.scheme == "pvc":
        _add_claim(result, url)
    elif url.scheme == "oci":
        _add_image(result, url, secrets.oci)
    else:
        _add_credentials(result, url.scheme, secrets)
    return result


def every_source(secrets: SecretNames) -> Source:
    """Credentials for all schemes, because adapters may be added while the pod runs."""
    result = Source()
    for scheme in CACHE_SCHEMES:
        _add_credentials(result, scheme, secrets)
    return result


def environment(
    model: Model, own: Mapping[str, str], fields: Mapping[str, str], source: Source
) -> list[Object]:
    """A container's ``own`` variables, its pod ``fields``, credentials, and the Model's variables.

    The Model's variables override all others. They come last, so that they can refer to the others
    as ``$(NAME)``.
    """
    chosen = model.spec.env
    env: list[Object] = [{"name": name, "value": value} for name, value in own.items()]
    env += [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
        for name, path in fields.items()
    ]
    env += source.env
    env = [variable for variable in env if variable["name"] not in chosen]
    return env + [{"name": name, "value": chosen[name]} for name in sorted(chosen)]


def _add_credentials(result: Source, scheme: Scheme, secrets: SecretNames) -> None:
    match scheme:
        case "hf":
            result.env += _from_secret(secrets.huggingface, {"HF_TOKEN": "token"})
        case "s3":
            keys = {"AWS_ACCESS_KEY_ID": "accessKeyID", "AWS_SECRET_ACCESS_KEY": "secretAccessKey"}
            result.env += _from_secret(secrets.aws, keys)
        case "oss":
            keys = {"OSS_ACCESS_KEY_ID": "accessKeyID", "OSS_ACCESS_KEY_SECRET": "accessKeySecret"}
            result.env += _from_secret(secrets.alibaba, keys)
        case "gs":
            _add_gcp(result, secrets.gcp)


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
    """Google's libraries read a key file, whose path is set by a variable."""
    if not secret:
        return
    volume = "gcp-credentials"
    result.env += [
        {"name": "GOOGLE_APPLICATION_CREDENTIALS", "value": f"{GCP_DIRECTORY}/{GCP_FILE}"}
    ]
    items = [{"key": "jsonKeyfile", "path": GCP_FILE}]
    result.volumes += [
        {"name": volume, "secret": {"secretName": secret, "items": items, "optional": True}}
    ]
    result.mounts += [{"name": volume, "mountPath": GCP_DIRECTORY}]


def _add_claim(result: Source, url: ModelURL) -> None:
    result.volumes = [{"name": "model", "persistentVolumeClaim": {"claimName": url.name}}]
    mount = {"name": "model", "mountPath": MODEL_MOUNT}
    sub_path = url.path.strip("/")  # Kubernetes wants it relative
    if sub_path:
        mount["subPath"] = sub_path
    result.mounts = [mount]


def _add_image(result: Source, url: ModelURL, secret: str) -> None:
    """Mount the image as a volume. Image volumes are always read-only; the mount only shows it."""
    result.volumes = [{"name": "model", "image": {"reference": url.ref}}]
    result.mounts = [{"name": "model", "mountPath": MODEL_MOUNT, "readOnly": True}]
    result.pull_secrets = [secret] if secret else []
