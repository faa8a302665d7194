"""SGLang's pod, as KubeAI in Go builds it."""

import pytest
from fakes.engine_pods import pod, server

ARGS = ["--served-model-name=m", "--host=0.0.0.0", "--port=8000"]


@pytest.mark.parametrize(
    ("url", "source", "more"),
    [
        ("hf://org/name", "org/name", []),
        ("pvc://claim/x", "/model", []),
        ("s3://bucket/x", "s3://bucket/x", ["--load-format=runai_streamer"]),
    ],
)
def test_the_weights_are_followed_by_the_users_args(url, source, more):
    container = server(pod("SGLang", url=url, args=["--tp-size=2"]))
    assert container["command"] == ["python3", "-m", "sglang.launch_server"]
    assert container["args"] == [f"--model-path={source}", *ARGS, *more, "--tp-size=2"]


@pytest.mark.parametrize(
    ("features", "more"),
    [
        (["TextGeneration"], []),
        (["TextEmbedding"], ["--is-embedding"]),
        (["Reranking"], ["--is-embedding"]),
    ],
)
def test_embeddings_and_reranking_need_an_option(features, more):
    args = server(pod("SGLang", features=features))["args"]
    assert args == ["--model-path=org/name", *ARGS, *more]


def test_weights_of_a_cache_are_loaded_from_its_folder():
    from kubeai.api.config.system import parse_config

    config = parse_config("cacheProfiles: {c: {sharedFilesystem: {storageClassName: nfs}}}")
    container = server(pod("SGLang", config, url="s3://b/x", cacheProfile="c"))
    assert container["args"] == ["--model-path=/models/m-u-1", *ARGS]
