"""The headless Service of a Model."""

import pytest

from kubeai.api.config.system import SystemConfig
from kubeai.api.model import decode_model
from kubeai.podspec import build_pod
from kubeai.podspec.service import headless_service, service_name


def model(name="m"):
    return decode_model(
        {
            "metadata": {"name": name, "namespace": "ns", "uid": "0123456789"},
            "spec": {"url": "hf://org/name", "engine": "VLLM", "features": []},
        }
    )


def test_the_service_selects_the_models_pods_on_the_port_that_engines_listen_on():
    pod, service = build_pod(model(), SystemConfig()), headless_service(model())
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    (port,) = service["spec"]["ports"]
    (container,) = pod["spec"]["containers"]
    assert (port["name"], port["port"]) == ("inference", 8000)
    assert port["targetPort"] == container["ports"][0]["containerPort"]
    assert service["metadata"]["ownerReferences"] == pod["metadata"]["ownerReferences"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "llama-012345"),
        ("llama-3.1-8b", "llama-3-1-8b-012345"),  # a Service's name has no dots
        ("7b", "model-7b-012345"),  # and begins with a letter
        ("a" * 40, "a" * 40 + "-012345"),
    ],
)
def test_the_name_is_the_models_and_the_beginning_of_its_uid(name, expected):
    assert service_name(model(name)) == expected
