"""The operator in a whole cluster: real controller-manager and scheduler, kwok for the kubelets."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import pytest
from operators import CONFIG, World, until
from servers import CONTROL_PLANE, ApiServer, assets, cluster, install_models, node

from kubeai.kube.client import Kube
from kubeai.kube.resources import MODELS, PODS

pytestmark = pytest.mark.cluster

PROFILES = """
resourceProfiles:
  nvidia-gpu-l4:
    requests: {{nvidia.com/gpu: "1", cpu: "6", memory: 24Gi}}
    limits: {{nvidia.com/gpu: "1"}}
    nodeSelector: {{gpu: l4, belongs-to: {namespace}}}
    tolerations: [{{key: nvidia.com/gpu, operator: Equal, value: present, effect: NoSchedule}}]
"""
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[ApiServer]:
    if assets(*CONTROL_PLANE) is None:
        pytest.skip("KUBEBUILDER_ASSETS holds no whole control plane")
    with cluster(tmp_path_factory.mktemp("cluster") / "servers") as server:
        install_models(server)
        yield server


class Cluster(World):
    """A namespace, nodes of its own, and the operator's config for them."""

    def __init__(self, kube: Kube, api: ApiServer) -> None:
        super().__init__(kube)
        self.api = api
        self._nodes: list[str] = []
        self.config = PROFILES.format(namespace=kube.namespace) + "".join(
            line for line in CONFIG.splitlines(True) if not line.startswith("resourceProfiles")
        )

    def add_node(self, name: str, gpu: str = "", count: int = 0) -> None:
        labels = {"belongs-to": self.kube.namespace} | ({"gpu": gpu} if gpu else {})
        capacity = {"nvidia.com/gpu": str(count)} if gpu else {}
        made = node(
            f"{self.kube.namespace}-{name}", capacity, labels, taints=[GPU_TAINT] if gpu else []
        )
        code, answer = self.api.request("POST", "/api/v1/nodes", made)
        assert code == 201, answer
        self._nodes.append(made["metadata"]["name"])

    async def where(self, name: str = "m") -> list[str]:
        """The nodes of a Model's pods, ``-`` for a pod that has none."""
        prefix = f"{self.kube.namespace}-"
        pods = await self.pods(name)
        return sorted(pod["spec"].get("nodeName", "-").removeprefix(prefix) for pod in pods)

    async def message(self, type_: str, name: str = "m") -> str:
        conditions = (await self.status(name)).get("conditions") or []
        return next((c["message"] for c in conditions if c["type"] == type_), "")

    async def close(self) -> None:
        await super().close()
        for name in self._nodes:
            self.api.request("DELETE", f"/api/v1/nodes/{name}")


@pytest.fixture
async def world(api, tmp_path):
    namespace = f"test-{secrets.token_hex(4)}"
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    assert code == 201, answer
    kube = await Kube.connect(str(api.kubeconfig(tmp_path / "kubeconfig", namespace)))
    world = Cluster(kube, api)
    try:
        yield world
    finally:
        await world.close()


async def test_two_gpu_replica_is_scheduled_only_where_two_are_free(world):
    world.add_node("no-gpu")
    world.add_node("a100", "a100", 8)
    world.add_node("l4-one", "l4", 1)
    world.add_node("l4-two", "l4", 2)
    replica = world.start(config=world.config)
    await world.create(resourceProfile="nvidia-gpu-l4:2", autoscalingDisabled=True, replicas=1)
    await world.replicas_are(1, 1)
    assert await world.where() == ["l4-two"]
    assert len(replica.endpoints("m")) == 1

    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 2}}, subresource="scale")
    await world.replicas_are(2, 1)

    async def told():
        message = await world.message("Progressing")
        return "Unschedulable" in message and "Insufficient nvidia.com/gpu" in message

    await until(told, "why the second replica does not start")
    assert await world.condition("Ready") == ("True", "SomeReplicasReady")
    assert await world.where() == ["-", "l4-two"]

    world.add_node("l4-four", "l4", 4)
    await world.replicas_are(2, 2)
    assert await world.where() == ["l4-four", "l4-two"]


async def test_unschedulable_model_reports_it(world):
    world.add_node("l4-one", "l4", 1)
    world.start(config=world.config)
    await world.create(resourceProfile="nvidia-gpu-l4:2", minReplicas=1)

    async def told():
        message = await world.message("Ready")
        is_so = await world.condition("Ready") == ("False", "Unschedulable")
        return is_so and "Insufficient nvidia.com/gpu" in message

    await until(told, "Unschedulable, and for which resource")


async def test_a_cordoned_nodes_pod_that_is_evicted_comes_back_elsewhere(world):
    """What `kubectl drain` does."""
    world.add_node("one", "l4", 2)
    replica = world.start(config=world.config)
    await world.create(resourceProfile="nvidia-gpu-l4:2", autoscalingDisabled=True, replicas=1)
    await world.replicas_are(1, 1)
    world.add_node("other", "l4", 2)
    (pod,) = await world.pods()
    name = f"{world.kube.namespace}-one"
    path = f"/api/v1/nodes/{name}"
    patch = {"spec": {"unschedulable": True}}
    assert world.api.request("PATCH", path, patch, "application/merge-patch+json")[0] == 200
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod["metadata"]["name"], "namespace": world.kube.namespace},
    }
    path = f"/api/v1/namespaces/{world.kube.namespace}/pods/{pod['metadata']['name']}/eviction"
    assert world.api.request("POST", path, eviction)[0] == 201

    async def moved():
        return await world.where() == ["other"] and len(replica.endpoints("m") or []) == 1

    await until(moved, "a pod on the other node serves")
    await world.replicas_are(1, 1)


async def test_deleted_models_objects_are_garbage_collected_without_operator(world):
    world.add_node("one", "l4", 8)
    replica = world.start(config=world.config)
    file = {"path": "/etc/prompt.txt", "content": "Be kind."}
    await world.create(
        resourceProfile="nvidia-gpu-l4:1", autoscalingDisabled=True, replicas=2, files=[file]
    )
    await world.replicas_are(2, 2)
    await replica.stop()
    world.replicas.remove(replica)
    await world.kube.delete(MODELS, "m")

    async def gone():
        pods, _ = await world.kube.list(PODS, world.kube.namespace)
        path = f"/api/v1/namespaces/{world.kube.namespace}/configmaps/model-m-files"
        code, _ = await asyncio.to_thread(world.api.request, "GET", path)
        return not pods and code == 404

    await until(gone, "pods and files are collected")
