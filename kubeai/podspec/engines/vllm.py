"""vLLM: text generation, embeddings, reranking; LoRA adapters loaded while it runs."""

from __future__ import annotations

import re
from collections.abc import Iterable

from kubeai.api.model import Model
from kubeai.api.model_url import ModelURL
from kubeai.podspec.cache import weights
from kubeai.podspec.container import Server, literal, startup_probe
from kubeai.podspec.images import parse_image

STARTUP_FAILURES = 5400  # 3 hours: the largest models take long to download and to load
# The form of older images. It works up to at least 0.33, which warns that it is deprecated.
MODULE_COMMAND = ["python3", "-m", "vllm.entrypoints.openai.api_server"]
SERVE_COMMAND = ["vllm", "serve"]
# Releases since this one have the program `vllm` with `serve` and all of its options.
SERVE_SINCE = (0, 6)
# A vLLM version: the whole tag (v0.33.0, 0.9-gpu-py312), or a part of it after the word vllm
# (rocm7.0.0_vllm_0.11.1_20251103).
_TAG_VERSION = re.compile(r"v?(\d+)\.(\d+)(?![\d])")
_NAMED_VERSION = re.compile(r"vllm[-_:]v?(\d+)\.(\d+)(?![\d])")
_MODEL_OPTION = re.compile(r"--model(=|$)")
_NEWEST = re.compile(r"(^|[-_.])(latest|nightly)([-_.]|$)")


def has_serve(image: str) -> bool:
    """Whether an image has ``vllm serve``, as far as its name and tag say.

    True for a vLLM image (its name contains ``vllm``) whose tag is a version from 0.6 on, or
    ``latest`` or ``nightly`` with or without more words, or that has no tag and no digest. False
    for everything else: other names, digests alone, commits.
    """
    name, tag, digest = parse_image(image.lower())
    version = _NAMED_VERSION.search(f"{name}:{tag}")
    if version is None and "vllm" in name:
        version = _TAG_VERSION.match(tag)
    if version is not None:
        return tuple(map(int, version.groups())) >= SERVE_SINCE
    if "vllm" not in name:
        return False
    return bool(_NEWEST.search(tag)) if tag else not digest


def names_model(args: Iterable[str]) -> bool:
    """Whether a Model's arguments have vLLM's option for the model."""
    return any(_MODEL_OPTION.match(arg) for arg in args)


def server(model: Model, url: ModelURL, image: str = "") -> Server:
    """vLLM's own OpenAI server, started by ``vllm serve`` if image and arguments allow it."""
    streamed = url.scheme == "s3" and not model.spec.cache_profile
    source = literal(url.base) if streamed else weights(model, url)
    # `vllm serve` takes the model as its first argument, and refuses it beside the user's --model.
    serve = has_serve(image) and not names_model(model.spec.args)
    args = [source if serve else f"--model={source}", f"--served-model-name={model.metadata.name}"]
    if streamed:
        args.append("--load-format=runai_streamer")  # streams weights from the bucket
    lora = bool(model.spec.adapters)
    return Server(
        command=list(SERVE_COMMAND if serve else MODULE_COMMAND),
        args=args,
        more_args=["--enable-lora"] if lora else [],
        env={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"} if lora else {},
        startup_probe=startup_probe(failures=STARTUP_FAILURES),
    )
