"""vLLM's command: `vllm serve` where the image has it, else the module of older images."""

import pytest
from fakes.engine_pods import model, pod, server

from kubeai.api.config.images import DEFAULT_IMAGES
from kubeai.api.model_url import parse_url
from kubeai.podspec.engines import vllm

MODULE = ["python3", "-m", "vllm.entrypoints.openai.api_server"]
OLD = "vllm/vllm-openai:v0.5.5"


@pytest.mark.parametrize(
    "image",
    [
        "vllm/vllm-openai:v0.6.0",
        "vllm/vllm-openai:v0.33.0",
        "vllm/vllm-openai:v0.10.1.1",
        "vllm/vllm-openai:v0.8.5.post1",
        "vllm/vllm-openai:v1.0.0rc1",
        "vllm/vllm-openai:v0.27.1-aarch64",
        "vllm/vllm-openai:v0.33.0@sha256:" + 64 * "0",
        "registry.example:5000/mirror/vllm-openai:0.11.0-cu128",
        "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo:v0.10.2",
        "nvcr.io/nvidia/vllm:25.09-py3",
        "rocm/vllm:rocm7.0.0_vllm_0.11.1_20251103",
        "rocm/vllm/rocm6.4.1_vllm_0.10.1_20250909",
        "vllm/vllm-openai:latest",
        "vllm/vllm-openai",
        "registry.example:5000/vllm-openai",
        "vllm/vllm-openai:latest-x86_64",
        "vllm/vllm-openai:nightly-0123456789abcdef",
        "vllm/vllm-openai:cu129-nightly",
    ],
)
def test_recent_images_of_vllm_are_started_by_vllm_serve(image):
    container = server(pod(image=image, args=["--x"]))
    assert container["command"] == ["vllm", "serve"]
    # As an option, `vllm serve` warns about the model.
    assert container["args"] == ["org/name", "--served-model-name=m", "--x"]


@pytest.mark.parametrize(
    "image",
    [
        OLD,
        "vllm/vllm-openai:v0.4.3",
        "vllm/vllm-openai@sha256:" + 64 * "0",  # of any version
        "vllm/vllm-tpu:23194d83e8f2a6783b0d8c275f5f8a22faab9aec",
        "vllm/vllm-openai:production",
        "registry.example/team/llm:v2.1.0",  # a version of something else
        "registry.example/team/llm:latest",
        "rocm/vllm:rocm6.2_mi300_ubuntu20.04_vllm_0.5.5",
    ],
)
def test_older_and_unknown_images_are_started_by_the_module(image):
    container = server(pod(image=image, args=["--x"]))
    assert container["command"] == MODULE
    assert container["args"] == ["--model=org/name", "--served-model-name=m", "--x"]


def test_the_default_images_are_started_by_vllm_serve():
    for name, image in DEFAULT_IMAGES["VLLM"].items():
        assert vllm.has_serve(image) == (name != "google-tpu"), name


@pytest.mark.parametrize(
    ("url", "source", "more"),
    [
        ("hf://org/name", "org/name", []),
        ("pvc://claim/x", "/model", []),
        ("s3://bucket/x", "s3://bucket/x", ["--load-format=runai_streamer"]),
    ],
)
@pytest.mark.parametrize(("image", "option"), [("", ""), (OLD, "--model=")])
def test_the_location_of_the_weights_is_followed_by_the_users_args(
    url, source, more, image, option
):
    container = server(pod(url=url, image=image, args=["--max-model-len=9", "--x"]))
    args = [option + source, "--served-model-name=m", *more]
    assert container["args"] == [*args, "--max-model-len=9", "--x"]


def test_adapters_are_enabled_after_the_users_args():
    with_lora = model(adapters=[{"name": "a", "url": "hf://x/y"}])
    container = vllm.server(with_lora, parse_url(with_lora.spec.url))
    assert container.more_args == ["--enable-lora"]
    assert container.env == {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


@pytest.mark.parametrize("args", [["--model=/files/other"], ["--x", "--model", "/files/other"]])
def test_a_model_that_the_arguments_choose_needs_the_module(args):
    # `vllm serve` has one model, and takes ours for an unrecognized argument beside this one.
    container = server(pod(image=DEFAULT_IMAGES["VLLM"]["default"], args=args))
    assert container["command"] == MODULE
    assert container["args"] == ["--model=org/name", "--served-model-name=m", *args]
