"""The chart's values files: pods of a profile run on the GPU nodes of the place that a file is for.

On a real scheduler, with nodes that kwok plays.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator

import pytest
from helms import CHART, Helm, config_of
from servers import ApiServer, node, wait_until
from sites import release_cluster

from kubeai.api.config.system import parse_config
from kubeai.api.model import decode_model
from kubeai.podspec import build_pod

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]
NVIDIA = "values-nvidia-k8s-device-plugin.yaml"
LABELS = {"nvidia.com/gpu.family": "ada-lovelace", "nvidia.com/gpu.memory": "23034"}
# How GPU nodes are labelled where a values file is for: (files, profile, labels).
PLACES = {
    "nvidia": ([NVIDIA], "nvidia-gpu-l4", LABELS),
    "eks": (["values-eks.yaml"], "nvidia-gpu-l4", {"karpenter.k8s.aws/instance-gpu-name": "l4"}),
    "gke": (
        ["values-gke.yaml"],
        "nvidia-gpu-l4",
        {"cloud.google.com/gke-accelerator": "nvidia-l4", "cloud.google.com/gke-spot": "true"},
    ),
    "aks": (
        ["values-aks.yaml"],
        "nvidia-gpu-a100-80gb",
        {"node.kubernetes.io/instance-type": "Standard_NC24ads_A100_v4"},
    ),
    "aks-t4": (
        ["values-aks.yaml"],
        "nvidia-gpu-t4",
        {"node.kubernetes.io/instance-type": "Standard_NC4as_T4_v3"},
    ),
    "openshift": ([NVIDIA, "values-openshift.yaml"], "nvidia-gpu-l4", LABELS),
    "k3s": ([NVIDIA, "values-k3s.yaml"], "nvidia-gpu-l4", LABELS),
}


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[ApiServer]:
    with release_cluster(tmp_path_factory.mktemp("cluster"), accounts=()) as server:
        yield server


@pytest.fixture
def namespace(api) -> str:
    name = f"test-{secrets.token_hex(4)}"
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
    assert code == 201, answer
    return name


@pytest.mark.parametrize("place", PLACES)
def test_pods_of_a_profile_run_on_the_gpu_nodes_of_the_place_only(api, namespace, place, tmp_path):
    """On a tainted node with its labels; a node with a GPU of another kind is left alone."""
    files, profile, labels = PLACES[place]
    options = [word for file in files for word in ("--values", str(CHART / file))]
    config = parse_config(config_of(Helm(tmp_path).render("kubeai", *options)))
    spec = {"url": "hf://o/m", "engine": "VLLM", "features": [], "resourceProfile": f"{profile}:1"}
    metadata = {"name": "m", "namespace": namespace, "uid": "u"}
    pod = build_pod(decode_model({"metadata": metadata, "spec": spec}), config)
    pod["metadata"] = {"name": "engine"}
    pod["spec"].pop("serviceAccountName")  # the namespace has no release
    taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
    others = {key: f"no-{value}" for key, value in labels.items()}
    with contextlib.ExitStack() as stack:
        if place == "k3s":
            handler = {"metadata": {"name": "nvidia"}, "handler": "nvidia"}
            stack.enter_context(_created(api, "/apis/node.k8s.io/v1/runtimeclasses", handler))
        for name, its in (("other-gpu", others), (f"gpu-{place}", labels)):
            made = node(name, {"nvidia.com/gpu": "1"}, its, taints=[taint])
            stack.enter_context(_created(api, "/api/v1/nodes", made))
        path = f"/api/v1/namespaces/{namespace}/pods"
        stack.enter_context(_created(api, path, pod))
        wait_until(
            lambda: api.request("GET", f"{path}/engine")[1]["spec"].get("nodeName"),
            "the scheduler has placed the pod",
        )
        assert api.request("GET", f"{path}/engine")[1]["spec"]["nodeName"] == f"gpu-{place}"


@contextlib.contextmanager
def _created(api: ApiServer, path: str, obj: dict) -> Iterator[None]:
    code, answer = api.request("POST", path, obj)
    assert code == 201, answer
    try:
        yield
    finally:
        api.request("DELETE", f"{path}/{obj['metadata']['name']}?gracePeriodSeconds=0")
