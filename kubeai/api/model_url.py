"""The URL of a Model's or an adapter's weights: its schemes, and how it is parsed.

The schema in `kubeai.api.model` checks a Model's URL against `URL_PATTERN`, its scheme and its
length; `parse_url` checks the rest and raises a ModelError, which the Model's conditions then name.
It accepts characters that the pattern does not, because Models that are older than the pattern may
have them in paths.
"""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import parse_qsl

from msgspec import Struct

from kubeai.errors import ModelError

Scheme = Literal["hf", "pvc", "ollama", "s3", "gs", "oss", "oci"]

MODEL_SCHEMES: tuple[Scheme, ...] = ("hf", "pvc", "ollama", "s3", "gs", "oss", "oci")
CACHE_SCHEMES: tuple[Scheme, ...] = ("hf", "s3", "gs", "oss")  # supported by the loader
ADAPTER_SCHEMES: tuple[Scheme, ...] = (*CACHE_SCHEMES, "pvc")
# What KubeAI in Go (0.23) accepts as the url of a Model. Valid for CEL (RE2) and for Python.
URL_PATTERN = "^[a-z0-9]+://[a-zA-Z0-9._:/-]+([?].*)?$"


def listed(schemes: tuple[str, ...]) -> str:
    """The schemes as error messages and descriptions show them."""
    return ", ".join(f"{scheme}://" for scheme in schemes)


class ModelURL(Struct, frozen=True):
    """A Model's parsed URL."""

    original: str
    scheme: Scheme
    ref: str  # everything between :// and ?
    name: str  # ref up to its first slash: organisation, bucket or claim
    path: str = ""  # ref after its first slash
    model: str = ""  # ?model=, on a claim or in an image: a name (OLlama) or a file (LlamaCpp)
    insecure: bool = False  # ?insecure=true, pull without TLS
    pull: bool = True  # ?pull=false, the model is already in the image

    @property
    def base(self) -> str:
        """The URL without its parameters."""
        return f"{self.scheme}://{self.ref}"


_URL = re.compile(r"(?P<scheme>[a-z0-9]+)://(?P<ref>[^?]+)(?:\?(?P<params>.*))?")
_REF = re.compile(r"[A-Za-z0-9_][^\s\x00-\x1f\x7f]*")
_OLLAMA_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/@-]*")
_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
# No leading dash, which a program would read as an option.
_MODEL = re.compile(r"[a-zA-Z0-9._:/][a-zA-Z0-9._:/-]*")
_IMAGE = re.compile(
    r"[A-Za-z0-9._-]+(:[0-9]+)?/[A-Za-z0-9._/-]+(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?"
)
# Supported parameters by scheme.
_PARAMS: dict[str, frozenset[str]] = {
    "pvc": frozenset({"model"}),
    "ollama": frozenset({"insecure", "pull"}),
    "oci": frozenset({"model"}),
}


def parse_url(url: str, field: str = "spec.url") -> ModelURL:
    """Parse a model's URL. ModelError on ``field`` if it is invalid or its scheme unsupported."""
    match = _URL.fullmatch(url)
    if match is None or match["scheme"] not in MODEL_SCHEMES:
        raise ModelError(
            field,
            f"{url!r} must be a URL with one of the schemes {listed(MODEL_SCHEMES)}",
            "InvalidURL",
        )
    scheme: Scheme = match["scheme"]
    ref = match["ref"]
    if not _REF.fullmatch(ref):
        raise ModelError(
            field,
            f"{url!r}: the part after {scheme}:// must start with a letter or digit and must not "
            "contain white space or control characters",
            "InvalidURL",
        )
    name, _, path = ref.partition("/")
    if scheme == "pvc":
        _check_claim(url, name, path, field)
    if scheme == "ollama" and not _OLLAMA_NAME.fullmatch(ref):
        raise ModelError(field, f"{url!r}: {ref!r} is not a valid Ollama model name", "InvalidURL")
    if scheme == "oci":
        _check_image(url, ref, field)
    params = _params(url, scheme, match["params"], field)
    if "model" in params and not _MODEL.fullmatch(params["model"]):
        raise ModelError(
            field, f"{url!r}: {params['model']!r} is not a valid name of a model", "InvalidURL"
        )
    return ModelURL(
        original=url,
        scheme=scheme,
        ref=ref,
        name=name,
        path=path,
        model=params.get("model", ""),
        insecure=_flag(url, params, "insecure", False, field),
        pull=_flag(url, params, "pull", True, field),
    )


def _check_claim(url: str, claim: str, path: str, field: str) -> None:
    if not _CLAIM.fullmatch(claim):
        raise ModelError(
            field, f"{url!r}: {claim!r} is not a valid PersistentVolumeClaim name", "InvalidURL"
        )
    if ".." in path.split("/"):  # Kubernetes rejects such a subPath
        raise ModelError(field, f"{url!r}: the path must not contain '..'", "InvalidURL")


def _check_image(url: str, image: str, field: str) -> None:
    if not _IMAGE.fullmatch(image):
        raise ModelError(
            field,
            f"{url!r}: {image!r} must be an image with its registry: "
            "oci://<registry>/<repository>:<tag>",
            "InvalidURL",
        )


def _params(url: str, scheme: str, query: str | None, field: str) -> dict[str, str]:
    params: dict[str, str] = {}
    known = _PARAMS.get(scheme, frozenset())
    for key, value in parse_qsl(query or "", keep_blank_values=True):
        if scheme == "oci" and key == "via":
            raise ModelError(
                field,
                f"{url!r}: the parameter 'via' is not supported: the image is mounted as an image "
                "volume, which Kubernetes pulls; remove the parameter",
                "InvalidURL",
            )
        if key not in known:
            means = f"known: {', '.join(sorted(known))}" if known else "none are known"
            raise ModelError(
                field,
                f"{url!r}: unknown parameter {key!r} for {scheme}:// ({means})",
                "InvalidURL",
            )
        if key in params:
            raise ModelError(field, f"{url!r}: duplicate parameter {key!r}", "InvalidURL")
        params[key] = value
    return params


def _flag(url: str, params: dict[str, str], key: str, default: bool, field: str) -> bool:
    value = params.get(key)
    if value is None:
        return default
    if value.lower() not in ("true", "false"):
        raise ModelError(field, f"{url!r}: {key} must be true or false", "InvalidURL")
    return value.lower() == "true"
