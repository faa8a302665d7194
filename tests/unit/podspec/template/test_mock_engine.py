"""Pods in which the mock engine stands in for another engine."""

import pytest
from fakes.engine_pods import URLS, each_engine, env, pod, server

from kubeai.api.config.system import parse_config


@pytest.mark.parametrize(
    "image",
    [
        "mock-engine",
        "kubeai/mock-engine",
        "registry:5000/x/mock-engine:v1.2",
        "kubeai/mock-engine@sha256:abc",
    ],
)
@each_engine
def test_the_mock_engine_can_stand_in_for_any_engine_and_the_pod_shows_it(engine, image):
    built = pod(engine, image=image, args=["--startup-delay=2s"])
    container, real = server(built), pod(engine)
    assert container["command"] == ["kubeai", "mock-engine"]
    assert container["args"] == [
        f"--engine={engine}",
        f"--model={URLS.get(engine, 'hf://org/name')}",
        "--served-model-name=m",
        "--port=8000",
        "--startup-delay=2s",
    ]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    assert built["metadata"]["annotations"]["kubeai.org/mock-engine"] == "true"
    added = {"POD_IP": None}
    assert env(built) == env(real) | added if "env" in server(real) else added
    assert "kubeai.org/mock-engine" not in real["metadata"]["annotations"]


def test_the_mock_engine_can_be_configured():
    config = parse_config("modelServers: {VLLM: {images: {default: kubeai/mock-engine}}}")
    assert server(pod(config=config, resourceProfile="cpu:1"))["command"][1] == "mock-engine"


@pytest.mark.parametrize("image", ["kubeai/mock-engine-2", "mock-engine/vllm", "vllm", "my-mock"])
def test_other_images_are_not_the_mock_engine(image):
    assert "kubeai.org/mock-engine" not in pod(image=image)["metadata"]["annotations"]
