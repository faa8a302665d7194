"""llama.cpp's server: GGUF weights, on CPUs and GPUs; text generation, embeddings or reranking."""

from __future__ import annotations

from kubeai.api.model import Model, ModelSpec
from kubeai.api.model_url import ModelURL
from kubeai.errors import ModelError
from kubeai.podspec.container import MODEL_MOUNT, PORT, Server, literal, startup_probe

STARTUP_FAILURES = 5400  # 3 hours, as for vLLM
CACHE_MOUNT = "/llama-cache"
_VOLUME = "llama-cache"


def server(model: Model, url: ModelURL, image: str = "") -> Server:
    """``llama-server``, which the image starts by itself. The user's arguments override these.

    Downloads from a hub go to an emptyDir, because the home directory may not be writable.
    ModelError if it cannot serve the weights or the features.
    """
    _check(model.spec, url)
    hub = url.scheme == "hf"
    return Server(
        args=[
            *("--host", "0.0.0.0"),
            *("--port", str(PORT)),
            *("--alias", model.metadata.name),
            "--metrics",
            *_weights(url),
            *_feature_args(model.spec),
        ],
        env={"LLAMA_CACHE": CACHE_MOUNT} if hub else {},
        volumes=[{"name": _VOLUME, "emptyDir": {}}] if hub else [],
        mounts=[{"name": _VOLUME, "mountPath": CACHE_MOUNT}] if hub else [],
        startup_probe=startup_probe(failures=STARTUP_FAILURES),
    )


def _check(spec: ModelSpec, url: ModelURL) -> None:
    if url.scheme != "hf":
        _check_file(url)
    if "SpeechToText" in spec.features:
        raise ModelError(
            "spec.features", "LlamaCpp does not support SpeechToText", "InvalidFeatures"
        )
    embeds = [one for one in spec.features if one in ("TextEmbedding", "Reranking")]
    if embeds and "TextGeneration" in spec.features:
        raise ModelError(
            "spec.features",
            f"LlamaCpp cannot serve TextGeneration together with {embeds[0]}: "
            "llama-server generates no text while it embeds; use two Models",
            "InvalidFeatures",
        )


def _check_file(url: ModelURL) -> None:
    """Weights on a volume are one file, which ``?model=`` or the path of the claim names."""
    if url.model:
        if url.model.startswith("/") or ".." in url.model.split("/"):
            raise ModelError(
                "spec.url",
                f"{url.original!r}: model must be a path inside the volume without '..'",
                "InvalidURL",
            )
    elif not (url.scheme == "pvc" and url.path.endswith(".gguf")):
        example = f"{url.base}?model=<file>.gguf"
        raise ModelError("spec.url", f"LlamaCpp needs the GGUF file: {example}", "InvalidURL")


def _weights(url: ModelURL) -> list[str]:
    if url.scheme == "hf":
        return ["-hf", literal(url.ref)]  # <org>/<name>[:<quantization>]
    if url.model:
        return ["-m", f"{MODEL_MOUNT}/{literal(url.model)}"]
    return ["-m", MODEL_MOUNT]  # the claim's file itself is mounted there


def _feature_args(spec: ModelSpec) -> list[str]:
    """``--reranking`` includes ``--embedding``."""
    if "Reranking" in spec.features:
        return ["--reranking"]
    return ["--embedding"] if "TextEmbedding" in spec.features else []
