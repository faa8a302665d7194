"""The Model that `kubeai local --model` makes from a URL."""

import json

import pytest

from kubeai.api.config.system import parse_config
from kubeai.errors import KubeAIError
from kubeai.local import from_url
from kubeai.local.engines import ENGINES, PROGRAMS, Found

CONFIG = parse_config("")


def installed(*engines, version=""):
    return [
        Found(e, PROGRAMS[e].title, PROGRAMS[e].install, "/p" if e in engines else "", version)
        for e in ENGINES
    ]


ALL = installed(*ENGINES)


def draft(url, found=ALL):
    return from_url.draft(url, found)


@pytest.mark.parametrize(
    ("url", "engine", "feature", "name"),
    [
        ("hf://Qwen/Qwen3-0.6B", "VLLM", "TextGeneration", "qwen3-0.6b"),
        ("ollama://qwen2.5:0.5b", "OLlama", "TextGeneration", "qwen2.5-0.5b"),
        ("ollama://nomic-embed-text", "OLlama", "TextEmbedding", "nomic-embed-text"),
        ("ollama://hf.co/org/Name-GGUF:Q4_K_M", "OLlama", "TextGeneration", "name-gguf-q4-k-m"),
        ("pvc://weights/small", "VLLM", "TextGeneration", "small"),
        ("pvc://weights/a/b/", "VLLM", "TextGeneration", "b"),
        ("pvc://weights", "VLLM", "TextGeneration", "weights"),
        ("pvc://weights?model=tiny:1b", "OLlama", "TextGeneration", "tiny-1b"),
        ("s3://bucket/llama", "VLLM", "TextGeneration", "llama"),
        ("hf://BAAI/bge-small-en-v1.5", "Infinity", "TextEmbedding", "bge-small-en-v1.5"),
        ("hf://intfloat/e5-base", "Infinity", "TextEmbedding", "e5-base"),
        ("hf://sentence-transformers/all-mpnet", "Infinity", "TextEmbedding", "all-mpnet"),
        ("hf://BAAI/bge-reranker-base", "Infinity", "Reranking", "bge-reranker-base"),
        ("s3://bucket/embedder", "VLLM", "TextEmbedding", "embedder"),
        ("hf://Systran/faster-whisper-small", "FasterWhisper", "SpeechToText",
         "faster-whisper-small"),
        ("hf://openai/whisper-large-v3", "VLLM", "SpeechToText", "whisper-large-v3"),
        ("hf://org/Name-GGUF:Q4_K_M", "LlamaCpp", "TextGeneration", "name-gguf-q4-k-m"),
        ("hf://org/Nomic-Embed-GGUF", "LlamaCpp", "TextEmbedding", "nomic-embed-gguf"),
        ("pvc://weights/small.gguf", "LlamaCpp", "TextGeneration", "small.gguf"),
        ("pvc://weights?model=a/b.gguf", "LlamaCpp", "TextGeneration", "b.gguf"),
        ("hf://org/a__b.-c..d-", "VLLM", "TextGeneration", "a-b.c.d"),
        ("hf://org/" + 39 * "x" + ".yz", "VLLM", "TextGeneration", 39 * "x"),
    ],
)  # fmt: skip
def test_the_url_decides_the_engine_the_feature_and_the_name(url, engine, feature, name):
    one = draft(url)
    assert (one.engine.engine, one.feature, one.name) == (engine, feature, name)
    model = from_url.manifest(one, 0, CONFIG)
    assert model["metadata"]["name"] == name
    assert model["spec"]["url"] == url


def test_vllm_serves_embeddings_where_infinity_is_not_installed():
    one = draft("hf://BAAI/bge-small-en-v1.5", installed("VLLM"))
    assert (one.engine.engine, one.feature) == ("VLLM", "TextEmbedding")


@pytest.mark.parametrize("url", ["hf://Qwen/Qwen3-0.6B", "hf://BAAI/bge-small-en-v1.5"])
def test_sglang_serves_what_vllm_would_where_it_alone_is_installed(url):
    assert draft(url, installed("SGLang")).engine.engine == "SGLang"
    assert draft(url, installed("SGLang", "VLLM")).engine.engine == "VLLM"
    with pytest.raises(KubeAIError, match="vLLM is not installed"):
        draft("hf://openai/whisper-large-v3", installed("SGLang"))


@pytest.mark.parametrize(
    ("url", "found", "message"),
    [
        ("hf://org/x", (), "vLLM is not installed.*pip install vllm.*--engine-env VLLM=DIR"),
        (
            "hf://org/x-embed",
            (),
            "neither Infinity nor vLLM is installed.*infinity-emb.*--engine-env Inf",
        ),
        ("ollama://x", ("VLLM",), "Ollama is not installed.*ollama.com.*--engine-env OLlama=DIR"),
        ("hf://org/x-GGUF", ("VLLM",), "llama.cpp is not installed.*--engine-env LlamaCpp=DIR"),
        ("hf://org/x", ("OLlama",), "Ollama, which is installed, .*ollama://hf.co/org/x"),
        ("gs://bucket/x", ENGINES, "gs:// needs a cacheProfile"),
        ("oci://r.io/x:1", ENGINES, "no container runtime.*--volume NAME=DIR and pvc://NAME"),
        ("hf://org/---", ENGINES, "no letter or digit"),
    ],
)
def test_what_cannot_be_served_is_an_error_with_a_remedy(url, found, message):
    with pytest.raises(KubeAIError, match=f"^--model {url}: .*({message})"):
        draft(url, installed(*found))


def test_what_is_no_url_is_an_error_that_names_the_option():
    with pytest.raises(KubeAIError, match=r"^--model: 'Qwen/Qwen3' must be a URL with one of"):
        draft("Qwen/Qwen3")


def test_a_model_without_gpus_has_one_replica_and_starts_on_demand():
    spec = from_url.manifest(draft("hf://Qwen/Qwen3-0.6B"), 0, CONFIG)["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (0, 1)
    assert spec["resourceProfile"] == "cpu:1"


def test_a_model_on_gpus_may_have_one_replica_on_each():
    config = from_url_config()
    spec = from_url.manifest(draft("hf://Qwen/Qwen3-0.6B"), 4, config)["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (0, 4)
    assert spec["resourceProfile"] == "nvidia-gpu:1"


def from_url_config():
    from kubeai.local.app import _load_config

    return _load_config(None)


def test_a_recent_vllm_fits_the_context_length_to_its_memory():
    def args(version):
        one = draft("hf://org/x", installed("VLLM", version=version))
        return from_url.manifest(one, 0, CONFIG)["spec"].get("args")

    assert args("0.32.0") == ["--max-model-len=auto"]
    assert args("0.10.2") is None
    assert args("") is None


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("hf://org/x", "chat/completions"),
        ("hf://org/x-embed", "embeddings"),
        ("hf://org/x-rerank", "rerank"),
    ],
)
def test_the_first_request_names_the_model_and_its_endpoint(url, path):
    one = draft(url)
    line = from_url.curl(one, "http://h:1/openai/v1")
    assert line.startswith(f"curl http://h:1/openai/v1/{path} ")
    body = json.loads(line.partition("-d '")[2].removesuffix("'"))
    assert body["model"] == one.name


def test_the_first_request_to_a_transcriber_sends_a_file():
    line = from_url.curl(draft("hf://Systran/faster-whisper-small"), "http://h/v1")
    assert line == (
        "curl http://h/v1/audio/transcriptions -F model=faster-whisper-small -F file=@speech.wav"
    )
