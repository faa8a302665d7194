"""llama.cpp's pod, as KubeAI in Go builds it."""

import pytest
from fakes.engine_pods import env, pod, server

from kubeai.errors import ModelError

ARGS = ["--host", "0.0.0.0", "--port", "8000", "--alias", "m", "--metrics"]


@pytest.mark.parametrize(
    ("url", "weights"),
    [
        ("hf://org/name-GGUF", ["-hf", "org/name-GGUF"]),
        ("hf://org/name-GGUF:Q4_K_M", ["-hf", "org/name-GGUF:Q4_K_M"]),
        ("pvc://claim?model=a.gguf", ["-m", "/model/a.gguf"]),
        ("pvc://claim/folder?model=b/a.gguf", ["-m", "/model/b/a.gguf"]),
        ("pvc://claim/folder/a.gguf", ["-m", "/model"]),
    ],
)
def test_the_image_starts_the_server_with_the_weights_and_the_users_args(url, weights):
    container = server(pod("LlamaCpp", url=url, args=["--ctx-size", "8192"]))
    assert "command" not in container
    assert container["args"] == [*ARGS, *weights, "--ctx-size", "8192"]


@pytest.mark.parametrize(
    ("features", "more"),
    [
        (["TextGeneration"], []),
        ([], []),
        (["TextEmbedding"], ["--embedding"]),
        (["Reranking"], ["--reranking"]),
        (["TextEmbedding", "Reranking"], ["--reranking"]),
    ],
)
def test_embeddings_and_reranking_need_an_option(features, more):
    args = server(pod("LlamaCpp", features=features))["args"]
    assert args == [*ARGS, "-hf", "org/name", *more]


def test_what_is_downloaded_from_a_hub_is_kept_outside_the_home_directory():
    built = pod("LlamaCpp")
    assert env(built)["LLAMA_CACHE"] == "/llama-cache"
    assert {"name": "llama-cache", "mountPath": "/llama-cache"} in server(built)["volumeMounts"]
    assert {"name": "llama-cache", "emptyDir": {}} in built["spec"]["volumes"]
    local = pod("LlamaCpp", url="pvc://claim/a.gguf")
    assert "env" not in server(local)
    assert "llama-cache" not in {volume["name"] for volume in local["spec"]["volumes"]}


@pytest.mark.parametrize(
    ("spec", "field", "reason"),
    [
        ({"url": "pvc://claim"}, "spec.url", "needs the GGUF file: pvc://claim?model=<file>.gguf"),
        ({"url": "pvc://claim/folder"}, "spec.url", "needs the GGUF file"),
        ({"url": "pvc://claim?model=a/../b.gguf"}, "spec.url", "inside the volume without"),
        (
            {"features": ["TextGeneration", "TextEmbedding"]},
            "spec.features",
            "cannot serve TextGeneration together with TextEmbedding",
        ),
        (
            {"features": ["Reranking", "TextGeneration"]},
            "spec.features",
            "cannot serve TextGeneration together with Reranking",
        ),
        ({"features": ["SpeechToText"]}, "spec.features", "does not support SpeechToText"),
    ],
)
def test_what_the_server_cannot_serve_is_reported_by_its_field(spec, field, reason):
    with pytest.raises(ModelError) as caught:
        pod("LlamaCpp", **spec)
    assert caught.value.field == field
    assert reason in str(caught.value)
