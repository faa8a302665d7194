"""The operator in a whole cluster: real controller-manager and scheduler, kwok for the kubelets."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import pytest
from operators import CONFIG, World, until
from servers import CONTROL_PLANE, ApiServer, assets, cluster, install_models, node

from kubeai.api.config.system import parse_config
from kubeai.api.model import decode_model
from kubeai.kube.client import Kube
from kubeai.kube.resources import JOBS, MODELS, PODS
from kubeai.podspec.cache import JOB_LABEL, load_job
from kubeai.podspec.container import Object

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
    folder = tmp_path_factory.mktemp("cluster") / "servers"
    with cluster(folder, prepare=install_models) as server:
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

    def cordon(self, name: str, unschedulable: bool = True) -> None:
        path = f"/api/v1/nodes/{self.kube.namespace}-{name}"
        patch = {"spec": {"unschedulable": unschedulable}}
        assert self.api.request("PATCH", path, patch, "application/merge-patch+json")[0] == 200

    def evict(self, pod: Object) -> int:
        """Evict a pod as `kubectl drain` does; the status code of the response."""
        meta = {"name": pod["metadata"]["name"], "namespace": self.kube.namespace}
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}
        path = f"/api/v1/namespaces/{self.kube.namespace}/pods/{meta['name']}/eviction"
        return self.api.request("POST", path, eviction)[0]

    def create_budget(self, **spec: object) -> None:
        """A PodDisruptionBudget with the selector of docs/how-to/high-availability.md."""
        no_job = {"key": JOB_LABEL, "operator": "DoesNotExist"}
        selector = {"matchLabels": {"model": "m"}, "matchExpressions": [no_job]}
        budget = {"metadata": {"name": "m"}, "spec": {"selector": selector, **spec}}
        code, answer = self.api.request("POST", self._budgets(), budget)
        assert code == 201, answer

    async def budget_is(self, expected: int, allowed: int) -> None:
        def is_so() -> bool:
            _, budget = self.api.request("GET", f"{self._budgets()}/m")
            status = budget.get("status", {})
            seen[:] = [budget]
            counts = status.get("expectedPods"), status.get("disruptionsAllowed")
            is_current = status.get("observedGeneration") == budget["metadata"]["generation"]
            return is_current and counts == (expected, allowed)

        seen: list[Object] = []
        try:
            await until(is_so, f"{allowed} of {expected} pods may be evicted")
        except AssertionError as error:
            raise AssertionError(f"{error}; {seen[0].get('status')}") from None

    def _budgets(self) -> str:
        return f"/apis/policy/v1/namespaces/{self.kube.namespace}/poddisruptionbudgets"

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
    world.cordon("one")
    assert world.evict(pod) == 201

    async def moved():
        return await world.where() == ["other"] and len(replica.endpoints("m") or []) == 1

    await until(moved, "a pod on the other node serves")
    await world.replicas_are(1, 1)


@pytest.mark.parametrize(
    ("budget", "allowed_of_four"),
    [
        ({"maxUnavailable": 1}, 1),
        ({"maxUnavailable": "50%"}, 2),
        ({"minAvailable": "50%"}, 2),
        ({"minAvailable": 1}, 3),
    ],
    ids=str,
)
async def test_budget_allows_evictions_by_the_models_scale(world, budget, allowed_of_four):
    world.add_node("one")
    world.start()
    await world.create(autoscalingDisabled=True, replicas=2)
    await world.replicas_are(2, 2)
    world.create_budget(**budget)
    await world.budget_is(2, 1)

    world.cordon("one")  # so that the evicted pod's successor does not become ready
    first, second = await world.pods()
    assert world.evict(first) == 201
    assert world.evict(second) == 429
    world.cordon("one", False)
    await world.budget_is(2, 1)

    await world.kube.patch(MODELS, "m", {"spec": {"replicas": 4}}, subresource="scale")
    await world.budget_is(4, allowed_of_four)


async def test_budget_of_a_model_leaves_out_the_pods_of_its_cache_jobs(world):
    """The disruption controller cannot count them: a Job has no scale."""
    world.add_node("one")
    world.start()
    made = await world.create(autoscalingDisabled=True, replicas=2)
    await world.replicas_are(2, 2)
    made["spec"]["cacheProfile"] = "nfs"
    profiles = "cacheProfiles: {nfs: {sharedFilesystem: {storageClassName: x}}}"
    config = parse_config(CONFIG + profiles)
    await world.kube.create(JOBS, load_job(decode_model(made), config))
    await world.pods_once(3)
    world.create_budget(maxUnavailable=1)
    await world.budget_is(2, 1)


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
