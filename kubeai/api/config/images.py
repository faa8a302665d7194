"""The default images of the engines: the one place where their releases are chosen.

The chart's values and the tables in docs/ are tested to be equal. docs/reference/engines/index.md
says how each release was verified.
"""

from __future__ import annotations

from kubeai.api.model import Engine

_VLLM = "v0.33.0"
_OLLAMA = "ollama/ollama:0.35.1"
_SPEACHES = "ghcr.io/speaches-ai/speaches:0.8.3"
_INFINITY = "michaelf34/infinity:0.0.77"
_SGLANG = "lmsysorg/sglang:v0.5.23"
_LLAMA_CPP = "ghcr.io/ggml-org/llama.cpp"
_LLAMA_CPP_BUILD = "b11429"

# Engine → image name of resource profiles → image.
DEFAULT_IMAGES: dict[Engine, dict[str, str]] = {
    "VLLM": {
        "default": f"vllm/vllm-openai:{_VLLM}",
        "nvidia-gpu": f"vllm/vllm-openai:{_VLLM}",
        "gh200": f"vllm/vllm-openai:{_VLLM}",
        "cpu": f"vllm/vllm-openai-cpu:{_VLLM}",
        "google-tpu": "vllm/vllm-tpu:23194d83e8f2a6783b0d8c275f5f8a22faab9aec",
        "amd-gpu": f"vllm/vllm-openai-rocm:{_VLLM}",
    },
    "OLlama": {
        "default": _OLLAMA,
        "nvidia-gpu": _OLLAMA,
        "amd-gpu": f"{_OLLAMA}-rocm",
    },
    "FasterWhisper": {
        "default": f"{_SPEACHES}-cpu",
        "nvidia-gpu": f"{_SPEACHES}-cuda",
    },
    "Infinity": {
        "default": _INFINITY,
        "nvidia-gpu": _INFINITY,
        "cpu": f"{_INFINITY}-cpu",
        "amd-gpu": f"{_INFINITY}-rocm",
    },
    "SGLang": {
        "default": _SGLANG,
        "nvidia-gpu": _SGLANG,
        "gh200": _SGLANG,
        "cpu": f"{_SGLANG}-xeon",
        "amd-gpu": "lmsysorg/sglang-rocm:v0.5.18-rocm724-mi30x-20260825",
    },
    "LlamaCpp": {
        "default": f"{_LLAMA_CPP}:server-{_LLAMA_CPP_BUILD}",
        "cpu": f"{_LLAMA_CPP}:server-{_LLAMA_CPP_BUILD}",
        "nvidia-gpu": f"{_LLAMA_CPP}:server-cuda-{_LLAMA_CPP_BUILD}",
        "gh200": f"{_LLAMA_CPP}:server-cuda-{_LLAMA_CPP_BUILD}",
        "amd-gpu": f"{_LLAMA_CPP}:server-rocm-{_LLAMA_CPP_BUILD}",
    },
}
