"""Makes a Model from nothing but the URL of its weights, for ``kubeai local --model``. Pure.

Chooses what the model is for, by its name, then the best installed engine that loads such weights,
a name for the Model, and settings that suit one machine. A Model that needs others is written as a
manifest. `draft` only needs to know the engines, so that an error ends the start early; `manifest`
also needs to know the GPUs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from kubeai.api.config.system import ResourceProfile, SystemConfig
from kubeai.api.model import API_VERSION, KIND, NAME_MAX_CHARS, Engine, Feature, decode_model
from kubeai.api.model_url import ModelURL, Scheme, parse_url
from kubeai.errors import KubeAIError, ModelError
from kubeai.local.engines import PROGRAMS, Found
from kubeai.podspec import build_pod

GPU_PROFILE, CPU_PROFILE = "nvidia-gpu", "cpu"
# One GPU and nothing else.
ONE_GPU = ResourceProfile(
    image_name="nvidia-gpu",
    requests={"nvidia.com/gpu": "1"},
    limits={"nvidia.com/gpu": "1"},
)
# What a name says about a model, in the order in which it is tried. Names that say nothing are
# taken for text generation.
_PURPOSES: tuple[tuple[Feature, re.Pattern[str]], ...] = (
    ("Reranking", re.compile(r"rerank|cross-encoder")),
    ("SpeechToText", re.compile(r"whisper")),
    (
        "TextEmbedding",
        re.compile(r"embed|minilm|sentence-transformers|(^|[/_-])(bge|gte|e5)([-_]|$)"),
    ),
)
# llama.cpp loads only GGUF, which the names of files and repositories say.
_GGUF = re.compile(r"gguf")
# FasterWhisper loads only weights in CTranslate2's format, which their names say.
_CTRANSLATE2 = re.compile(r"faster-(distil-)?whisper|ctranslate2|ct2")
# Requests that one replica serves well at the same time.
_TARGET_REQUESTS: dict[Engine, int] = {
    "OLlama": 4,
    "FasterWhisper": 4,
    "Infinity": 100,
    "LlamaCpp": 4,  # the number of its slots
}
_TARGET_GPU, _TARGET_CPU = 32, 8  # of vLLM and SGLang
_VLLM_AUTO_LENGTH = (0, 14)  # the first version that fits the context length to its memory
_CACHED: tuple[Scheme, ...] = ("gs", "oss")


def with_gpu_profile(config: SystemConfig) -> SystemConfig:
    """The config of `kubeai local`: with a profile of one GPU, unless it has its own."""
    profiles = {GPU_PROFILE: ONE_GPU, **config.resource_profiles}
    return msgspec.structs.replace(config, resource_profiles=profiles)


class Draft(NamedTuple):
    """A Model without what depends on the machine's resources."""

    url: ModelURL
    name: str
    feature: Feature
    engine: Found

    @property
    def source(self) -> str:
        """The option that it comes from, for error messages."""
        return _option(self.url.original)


def _option(url: str) -> str:
    return f"--model {url}"


def draft(url: str, installed: Sequence[Found]) -> Draft:
    """Choose the engine, the feature and the name. KubeAIError names the option.

    ``installed``: the list of `kubeai.local.engines.survey`.
    """
    try:
        parsed = parse_url(url, "--model")
    except ModelError as error:
        raise KubeAIError(str(error)) from None
    if parsed.scheme in _CACHED:
        raise KubeAIError(
            f"{_option(url)}: {parsed.scheme}:// needs a cacheProfile; write a manifest, or "
            f"download the weights with `kubeai load` and use --volume and pvc://"
        )
    if parsed.scheme == "oci":
        raise KubeAIError(
            f"{_option(url)}: there is no container runtime on this machine that could mount the "
            f"image; copy its files into a directory, and use --volume NAME=DIR and pvc://NAME"
        )
    feature, engines = _purpose(parsed)
    found = {one.engine: one for one in installed if one.program and not one.image}
    # SGLang serves what vLLM serves, where it alone is installed.
    also: tuple[Engine, ...] = ("SGLang",) if engines[-1] == "VLLM" and _sglang(feature) else ()
    engine = next((found[one] for one in (*engines, *also) if one in found), None)
    if engine is None:
        raise KubeAIError(f"{_option(url)}: {_missing(parsed, engines, found.keys())}")
    return Draft(parsed, _name(parsed), feature, engine)


def _purpose(url: ModelURL) -> tuple[Feature, tuple[Engine, ...]]:
    """What the model is for, and the engines for that, the best first."""
    name = f"{url.ref} {url.model}".lower()
    feature: Feature = next((f for f, hint in _PURPOSES if hint.search(name)), "TextGeneration")
    if url.scheme != "ollama" and _GGUF.search(name):
        return feature, ("LlamaCpp",)
    if url.scheme == "ollama" or url.model:
        # Ollama serves nothing else.
        return feature if feature == "TextEmbedding" else "TextGeneration", ("OLlama",)
    if feature == "SpeechToText":
        return feature, ("FasterWhisper",) if _CTRANSLATE2.search(name) else ("VLLM",)
    if feature in ("TextEmbedding", "Reranking") and url.scheme != "s3":
        return feature, ("Infinity", "VLLM")
    return feature, ("VLLM",)


def _sglang(feature: Feature) -> bool:
    return feature != "SpeechToText"


def _missing(url: ModelURL, engines: Sequence[Engine], found: Any) -> str:
    programs = [PROGRAMS[engine] for engine in engines]
    first, *others = (program.title for program in programs)
    which = f"{first} is not" if not others else f"neither {first} nor {others[0]} is"
    text = (
        f"{which} installed on this machine; install {first} ({programs[0].install}), or name its "
        f"environment with --engine-env {engines[0]}=DIR"
    )
    if url.scheme == "hf" and engines[0] in ("VLLM", "LlamaCpp") and "OLlama" in found:
        text += f"; Ollama, which is installed, runs GGUF weights: ollama://hf.co/{url.ref}"
    return text


def _name(url: ModelURL) -> str:
    """A name for the Model: the last part of the URL, in the characters that names allow."""
    last = (url.model or url.ref.rstrip("/")).rpartition("/")[2].lower()
    name = re.sub(r"[^a-z0-9.]+", "-", last)
    name = re.sub(r"[.-]*\.[.-]*", ".", name).strip("-.")[:NAME_MAX_CHARS].rstrip("-.")
    if not name:
        raise KubeAIError(
            f"{_option(url.original)}: its last part has no letter or digit to name the Model "
            f"after; write a manifest"
        )
    return name


def manifest(one: Draft, gpus: int, config: SystemConfig) -> dict[str, Any]:
    """The Model for a machine with ``gpus`` GPUs. KubeAIError names the option."""
    profile = GPU_PROFILE if gpus else CPU_PROFILE
    engine = one.engine.engine
    target = _TARGET_GPU if gpus else _TARGET_CPU
    spec: dict[str, Any] = {
        "url": one.url.original,
        "engine": engine,
        "features": [one.feature],
        "minReplicas": 0,
        "maxReplicas": max(1, gpus),
        "targetRequests": _TARGET_REQUESTS.get(engine, target),
    }
    if profile in config.resource_profiles:
        spec["resourceProfile"] = f"{profile}:1"
    if engine == "VLLM" and _at_least(one.engine.version, _VLLM_AUTO_LENGTH):
        # Otherwise vLLM exits if a prompt of the model's full length does not fit.
        spec["args"] = ["--max-model-len=auto"]
    model = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": one.name},
        "spec": spec,
    }
    try:
        build_pod(decode_model(model), config)
    except ModelError as error:
        raise KubeAIError(f"{one.source}: {error}") from None
    return model


def _at_least(version: str, least: tuple[int, ...]) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version)
    return numbers is not None and tuple(map(int, numbers.groups())) >= least


def curl(one: Draft, base_url: str) -> str:
    """A command that sends the Model a first request. ``base_url`` ends with ``/v1``."""
    if one.feature == "SpeechToText":
        return f"curl {base_url}/audio/transcriptions -F model={one.name} -F file=@speech.wav"
    requests: dict[Feature, tuple[str, dict[str, Any]]] = {
        "TextGeneration": (
            "chat/completions",
            {"messages": [{"role": "user", "content": "Hello!"}]},
        ),
        "TextEmbedding": ("embeddings", {"input": "Hello!"}),
        "Reranking": ("rerank", {"query": "a fruit", "documents": ["an apple", "a car"]}),
    }
    path, body = requests[one.feature]
    data = json.dumps({"model": one.name, **body})
    return f"curl {base_url}/{path} -H 'Content-Type: application/json' -d '{data}'"
