"""The Helm charts on a real API: manifests, pod security, and a release until it is uninstalled."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
import yaml
from fakes.hub import Hub
from harness import model, until
from helms import (
    ALL_ON,
    CHART,
    CHARTS,
    MODELS_CHART,
    config_of,
    delete_models_type,
)
from servers import ApiServer, install_models
from sites import DEPLOYMENTS, RELEASE, Site, hub_with_weights, release_cluster

from kubeai.api.config.system import SystemConfig, parse_config
from kubeai.api.model import decode_model
from kubeai.kube.resources import MODELS, PODS
from kubeai.podspec import build_pod
from kubeai.podspec.cache import evict_job, load_job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]
CACHED = {"cacheProfiles": {"c": {"sharedFilesystem": {"storageClassName": "nfs"}}}}
# Kinds of others, which a bare API does not have.
FOREIGN = ("PodMonitor", "PrometheusRule")


# -- the API takes it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[ApiServer]:
    accounts = ("kubeai", "kubeai-uninstall")
    with release_cluster(tmp_path_factory.mktemp("cluster"), accounts=accounts) as server:
        yield server


@pytest.fixture
def namespace(api) -> str:
    """One in which pods that are not "restricted" are refused."""
    name = f"test-{secrets.token_hex(4)}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    meta = {"name": name, "labels": labels}
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": meta})
    assert code == 201, answer
    return name


@pytest.mark.parametrize("values", [{}, ALL_ON], ids=["default", "all-on"])
def test_the_api_accepts_every_manifest_and_its_pods_are_restricted(helm, api, namespace, values):
    rendered = helm.render("kubeai", "--namespace", namespace, values=values)
    for obj in rendered:
        if obj["kind"] in FOREIGN:
            continue
        code, answer = _try(api, namespace, obj)
        assert code == 201, (obj["kind"], answer)
        template = obj.get("spec", {}).get("template")
        if template and obj["kind"] in ("Deployment", "Job"):
            pod = {"apiVersion": "v1", "kind": "Pod", **template}
            pod["metadata"] = pod["metadata"] | {"name": "p"}
            code, answer = _try(api, namespace, pod)
            assert code == 201, answer
    assert set(FOREIGN) <= {obj["kind"] for obj in rendered} or not values


def test_the_api_accepts_every_model_of_the_catalogue(helm, api, namespace):
    rendered = helm.render("m", "--set", "all.enabled=true", chart=MODELS_CHART)
    assert len(rendered) >= 48
    with models_installed(api):
        for obj in rendered:
            code, answer = _try(api, namespace, obj)
            assert code == 201, answer


@contextlib.contextmanager
def models_installed(api: ApiServer):
    install_models(api)
    try:
        yield
    finally:
        delete_models_type(api)


WARNED = {
    "VLLM": ("hf://o/m", {}),
    "VLLM with adapters": ("hf://o/m", {"adapters": [{"name": "a", "url": "hf://o/a"}]}),
    "OLlama": ("ollama://m", {}),
    "FasterWhisper": ("hf://o/m", {}),
    "Infinity": ("hf://o/m", {}),
    "SGLang": ("hf://o/m", {}),
    "LlamaCpp": ("hf://o/m", {}),
}


def test_docs_list_pod_security_violations_of_engines(helm, api, namespace):
    """By the chart's default values; `modelServerPods` is there to change it."""
    config = parse_config(config_of(helm.render("kubeai", values=CACHED)))
    rows = [
        f"| {name} | {', '.join(_violations(api, namespace, pod))} |"
        for name, pod in _pods_of(config).items()
    ]
    text = (CHARTS.parent / "docs/reference/helm.md").read_text()
    assert [line for line in text.splitlines() if line in rows] == rows, "\n".join(rows)
    section = text[text.index("\n## Pod Security\n") :]
    restricted = yaml.safe_load(section.split("```yaml\n")[1].split("```")[0])
    config = parse_config(config_of(helm.render("kubeai", values=CACHED | restricted)))
    for pod in _pods_of(config).values():
        assert _violations(api, namespace, pod) == []


def _pods_of(config: SystemConfig) -> dict[str, dict]:
    pods = {
        name: build_pod(_decoded(name.partition(" ")[0], url, **spec), config)
        for name, (url, spec) in WARNED.items()
    }
    for name, job in (("a cache's load", load_job), ("a cache's eviction", evict_job)):
        cached = _decoded("VLLM", "hf://o/m", cacheProfile="c")
        pods[name] = job(cached, config)["spec"]["template"]
    return pods


def _decoded(engine: str, url: str, **spec: Any):
    spec = {"url": url, "engine": engine, "features": [], **spec}
    return decode_model({"metadata": {"name": "m", "namespace": "n", "uid": "u"}, "spec": spec})


def _violations(api: ApiServer, namespace: str, pod: dict) -> list[str]:
    """Of "restricted", in the API's words, less the containers' names."""
    meta = {"generateName": "p-", "labels": pod["metadata"].get("labels", {})}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": pod["spec"]}
    code, answer = api.request("POST", f"/api/v1/namespaces/{namespace}/pods?dryRun=All", pod)
    if code == 201:
        return []
    _, _, words = answer["message"].partition('restricted:latest": ')
    return [part.partition(" (")[0] for part in re.split(r"(?<=\)), ", words)]


def _try(api: ApiServer, namespace: str, obj: dict) -> tuple[int, dict]:
    """What the API would say to it, unknown fields and fields given twice being errors."""
    version, kind = obj["apiVersion"], obj["kind"]
    plural = {"Ingress": "ingresses", "NetworkPolicy": "networkpolicies"}.get(
        kind, f"{kind.lower()}s"
    )
    base = f"/apis/{version}" if "/" in version else f"/api/{version}"
    inside = "" if kind == "CustomResourceDefinition" else f"/namespaces/{namespace}"
    path = f"{base}{inside}/{plural}?dryRun=All&fieldValidation=Strict"
    return api.request("POST", path, obj)


# -- a release -------------------------------------------------------------------------------------


@pytest.fixture
async def site(api, tmp_path) -> AsyncIterator[Site]:
    """Of one test after the other: the accounts' tokens are for this namespace."""
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": RELEASE}})
    assert code in (201, 409), answer
    site = Site(api, RELEASE, tmp_path)
    await site.start()
    yield site
    delete_models_type(api)
    await site.close()


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with hub_with_weights() as hub:
        yield hub


async def test_release_installs_serves_upgrades_and_uninstalls_cleanly(site, hub):
    """With Models that run, one of them from a cache that the chart's own loader has filled.

    By `uninstall.deleteModels`; only the Model type stays.
    """
    before = site.objects()
    site.make_volume()
    await site.install("--set", "uninstall.deleteModels=true")
    await site.kube.create(MODELS, model("m", scaleDownDelaySeconds=300))
    from_hub = {"cacheProfile": "shared", "env": {"HF_ENDPOINT": hub.url}}
    await site.kube.create(MODELS, model("cached", scaleDownDelaySeconds=300, **from_hub))
    for name in ("m", "cached"):
        assert await site.ask(name)
        await until(f"{name}'s status says so", lambda name=name: _is_settled(site, name))
    (loaded,) = site.folder.rglob("model.bin")  # a kubelet of processes has claims of its own
    assert loaded.read_bytes() == b"w" * 9
    engines = await _engines(site)
    second = {"podAnnotations": {"release": "second"}, "replicaCount": 2}
    await site.install("--set", "uninstall.deleteModels=true", values=second)
    deployment = await site.kube.get(DEPLOYMENTS, "kubeai")
    assert deployment["status"]["readyReplicas"] == 2
    assert await site.ask("m")
    assert await _engines(site) == engines, "an upgrade of KubeAI touches no engine"
    await asyncio.to_thread(site.helm, "uninstall", "kubeai", "--wait")
    gone = lambda: site.objects() == before  # noqa: E731
    await until("nothing is left", gone, 60)
    code, _ = site.api.request("GET", "/apis/kubeai.org/v1/models")
    assert code == 200, "other namespaces may have Models"
    assert not loaded.exists()


async def test_installing_both_charts_serves_a_model(site):
    """As docs/reference/helm.md says; the mock engine answers, the GPU is kwok's."""
    with site.gpu_node():
        before = site.objects()
        await site.install("--values", str(CHART / "values-nvidia-k8s-device-plugin.yaml"))
        on_gpu, on_cpu = "qwen3-8b-fp8-l4", "opt-125m-cpu"
        await asyncio.to_thread(
            site.helm,
            *("install", "models", str(MODELS_CHART)),
            *("--set", f"catalog.{on_gpu}.enabled=true"),
            *("--set", f"catalog.{on_gpu}.minReplicas=1"),
            *("--set", f"catalog.{on_cpu}.enabled=true"),
            *("--set", f"catalog.{on_cpu}.image=kubeai/mock-engine"),
        )
        assert await site.ask(on_cpu)
        await until("the GPU's Model is ready", lambda: _is_settled(site, on_gpu), 60)
        (pod,), _ = await site.kube.list(PODS, site.namespace, labels=f"model={on_gpu}")
        assert pod["spec"]["nodeName"] == "gpu"
        await asyncio.to_thread(site.helm, "uninstall", "models", "--wait")
        await asyncio.to_thread(site.helm, "uninstall", "kubeai", "--wait")
        await until("nothing is left", lambda: site.objects() == before, 60)


async def _is_settled(site: Site, name: str) -> bool:
    found = await site.kube.get(MODELS, name)
    return found.get("status", {}).get("replicas") == {"all": 1, "ready": 1}


async def _engines(site: Site) -> list[str]:
    found, _ = await site.kube.list(PODS, site.namespace, labels="model=m")
    return sorted(pod["metadata"]["uid"] for pod in found)
