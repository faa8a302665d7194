"""From KubeAI in Go to this one and back, on a real control plane, while clients send requests.

docs/start/from-kubeai-in-go.md describes the steps, and docs/explain/move-from-kubeai-in-go.md has
the counts that this test prints.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import upstreams
from fakes.hub import Hub, Repository
from harness import until
from helms import CHART, IMAGE
from servers import ApiServer
from service_traffic import ServiceAddress, Traffic
from sites import RELEASE, Site, hub_with_weights, release_cluster

from kubeai.kube.resources import CONFIGMAPS, CRDS, LEASES, MODELS, PODS, PVCS, SERVICES
from kubeai.operator.leader import GO_CONTROLLER_LEASE_NAME, LEASE_NAME

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not upstreams.UPSTREAM, reason="UPSTREAM names no clone of KubeAI in Go"),
]
OF_INSTANCE = "app.kubernetes.io/instance"
OF_KUBEAI = f"app.kubernetes.io/name=kubeai,{OF_INSTANCE}=kubeai"
OF_GO = f"{OF_KUBEAI},helm.sh/chart=kubeai-0.22.1"
GO, HERE, DETACHED = "KubeAI in Go", "this KubeAI", "move, detached"


def gpu_model(name: str, **spec) -> dict:
    spec = {
        "url": f"hf://mock/{name}",
        "engine": "VLLM",
        "features": ["TextGeneration"],
        "resourceProfile": "nvidia-gpu-l4:1",
        "minReplicas": 1,
        **spec,
    }
    return {"metadata": {"name": name}, "spec": spec}


def models(hub: Hub) -> list[dict]:
    """Of each kind that differs when KubeAI changes."""
    weights = {"HF_ENDPOINT": hub.url}
    prefix = {"strategy": "PrefixHash", "prefixHash": {"meanLoadFactor": 125}}
    return [
        gpu_model("cold", minReplicas=0, scaleDownDelaySeconds=1),
        gpu_model("fixed", autoscalingDisabled=True, replicas=2, minReplicas=0),
        gpu_model("cached", cacheProfile="shared", env=weights),
        gpu_model("adapted", adapters=[{"name": "fin", "url": "hf://mock/fin"}], env=weights),
        gpu_model("prefix", minReplicas=2, loadBalancing=prefix),
        gpu_model("changed"),
        gpu_model("embed", features=["TextEmbedding"]),
    ]


class Move(Site):
    """A namespace in which KubeAI in Go is installed, and everything is looked at."""

    def __init__(self, api: ApiServer, folder: Path) -> None:
        vllm = upstreams.engine(folder)
        options = ("--engine-env", f"VLLM={vllm}", "--capacity", "nvidia.com/gpu=16")
        super().__init__(api, RELEASE, folder, *options, programs=str(upstreams.program()))
        self.go_chart = upstreams.chart(folder)

    @property
    def go_values(self) -> dict:
        """The values of both charts; apart from what this machine needs, a user's."""
        here = {"belongs-to": self.namespace}
        mine = {key: self.values[key] for key in ("nodeSelector", "volumes", "volumeMounts")}
        name = {"name": "IDENTITY", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
        gpu = {"nvidia.com/gpu": "1"}
        return mine | {
            "env": [*self.values["env"], name],
            "resourceProfiles": {
                "nvidia-gpu-l4": {
                    "nodeSelector": here,
                    "requests": {**gpu, "cpu": "10m", "memory": "1Mi"},
                    "limits": gpu,
                }
            },
            "cacheProfiles": {"shared": {"sharedFilesystem": {"storageClassName": RELEASE}}},
            "modelAutoscaling": {"interval": "1s", "timeWindow": "5s"},
        }

    async def install_go(self) -> None:
        await asyncio.to_thread(
            self.helm,
            *("install", "kubeai", str(self.go_chart), "--wait"),
            values=self.go_values,
        )

    async def upgrade(self) -> None:
        """To this KubeAI. On this machine each pod must be told where to listen."""
        await asyncio.to_thread(
            self.helm,
            *("upgrade", "kubeai", str(CHART), *IMAGE, "--wait"),
            values=self.go_values | {"args": ["--host=$(POD_IP)"]},
        )

    async def detach(self) -> None:
        """Leave the pods of KubeAI in Go to themselves; they still serve."""
        await self.kubectl("delete", "deployment", "kubeai", "--cascade=orphan")
        await self.kubectl("delete", "replicasets", "--cascade=orphan", "--selector", OF_KUBEAI)

    async def end_detached(self, traffic: Traffic) -> None:
        """Take them out of the Service, and delete them once new connections go elsewhere."""
        label = f"{OF_INSTANCE}=kubeai-in-go"
        await self.kubectl("label", "pods", "--overwrite", label, "--selector", OF_GO)
        await traffic.answers()  # those that were in flight have ended
        await self.kubectl("delete", "pods", "--selector", label, "--grace-period=1")

    async def state(self) -> dict[str, str]:
        """The uids of what both programs keep."""
        found = {}
        for resource, name in (
            (CONFIGMAPS, "kubeai-autoscaler-state"),
            (PVCS, "shared-model-cache-shared"),
            (SERVICES, "kubeai"),
            (CRDS, "models.kubeai.org"),
            *((MODELS, each["metadata"]["name"]) for each in await self._models()),
        ):
            obj = await self.kube.get(resource, name)
            found[f"{resource.kind} {name}"] = obj["metadata"]["uid"]
        return found

    async def _models(self) -> list[dict]:
        return (await self.kube.list(MODELS, self.namespace))[0]

    async def roll_back(self) -> None:
        await asyncio.to_thread(self.helm, "rollback", "kubeai", "1", "--wait")

    async def holder(self, lease: str) -> str:
        found = await self.kube.get(LEASES, lease, self.namespace)
        return found["spec"].get("holderIdentity") or ""

    async def kubeai_pods(self, labels: str = OF_KUBEAI) -> list[str]:
        pods, _ = await self.kube.list(PODS, self.namespace, labels=labels)
        return [pod["metadata"]["name"] for pod in pods]

    async def leads_as(self, who: str) -> None:
        """Wait until only ``who`` has pods, and one of them holds both leases."""

        async def alone() -> bool:
            all_, go = set(await self.kubeai_pods()), set(await self.kubeai_pods(OF_GO))
            wanted = go if who == GO else all_ - go
            holder = await self.holder(GO_CONTROLLER_LEASE_NAME)
            # The controller of KubeAI in Go is <host name>_<uid>.
            holds = "_" in holder if who == GO else holder in wanted
            return holds and wanted == all_ and await self.holder(LEASE_NAME) in wanted

        await until(f"{who} leads alone", alone, 90)

    async def engines(self) -> dict[str, str]:
        """Name by uid of the engines' pods that neither program has a reason to replace."""
        others = "app=model,model!=cold,model!=changed"
        pods, _ = await self.kube.list(PODS, self.namespace, labels=others)
        return {pod["metadata"]["uid"]: pod["metadata"]["name"] for pod in pods}

    async def adapter_loaded(self) -> None:
        """KubeAI in Go never answers requests that came before."""

        async def loaded() -> bool:
            labels = "adapter.kubeai.org/fin"
            return bool((await self.kube.list(PODS, self.namespace, labels=labels))[0])

        await until("the adapter is loaded", loaded, 60)

    async def change(self) -> None:
        """Change a Model, so that its pod is replaced."""
        before, _ = await self.kube.list(PODS, self.namespace, labels="model=changed")
        await self.kube.patch(MODELS, "changed", {"spec": {"env": {"CHANGED": "1"}}})

        async def replaced() -> bool:
            pods, _ = await self.kube.list(PODS, self.namespace, labels="model=changed")
            return not {pod["metadata"]["uid"] for pod in pods} & {
                pod["metadata"]["uid"] for pod in before
            }

        await until("the Model's pod is replaced", replaced, 90)

    async def is_cold(self) -> None:
        async def cold() -> bool:
            pods, _ = await self.kube.list(PODS, self.namespace, labels="model=cold")
            return not pods

        await until("the Model is at zero", cold, 180)


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[ApiServer]:
    with release_cluster(tmp_path_factory.mktemp("cluster"), "kubectl") as server:
        yield server


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with hub_with_weights() as hub:
        hub.repositories["mock/fin"] = Repository({"adapter_config.json": b"{}"})
        yield hub


@pytest.fixture
async def move(api, tmp_path, hub) -> AsyncIterator[Move]:
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": RELEASE}})
    assert code in (201, 409), answer
    move = Move(api, tmp_path)
    await move.start()
    move.make_volume()
    try:
        yield move
    finally:
        await move.close()


def start_clients(traffic: Traffic, move: Move) -> None:
    for keeps in (True, False):
        traffic.start("stream", "fixed", keeps=keeps)
        traffic.start("chat", "cached", keeps=keeps)
        traffic.start("stream", "changed", keeps=keeps)
        traffic.start("chat", "adapted_fin", keeps=keeps)
        traffic.start("stream", "prefix", keeps=keeps)
        traffic.start("embeddings", "embed", keeps=keeps)
    traffic.start("chat", "cold", keeps=False, ready=move.is_cold)


COUNTS = {"fixed": 2, "changed": 1, "cached": 1, "adapted": 1, "prefix": 2, "embed": 1}


async def test_models_move_from_kubeai_in_go_and_back(move, hub):
    await move.install_go()
    for each in models(hub):
        await move.kube.create(MODELS, each)
    await move.until_ready(COUNTS, 120)
    await move.adapter_loaded()
    await move.leads_as(GO)
    (loaded,) = move.folder.rglob("model.bin")
    file = loaded.stat()
    state = await move.state()
    async with ServiceAddress(move.kube, RELEASE, "kubeai") as address:
        traffic = Traffic(address.url)
        try:
            async with traffic:
                await traffic.phase(GO, at_least=0)
                start_clients(traffic, move)
                await _there_and_back(move, traffic)
        finally:
            print(traffic.table(), *traffic.failures, sep="\n")
    assert await move.state() == state
    after = loaded.stat()
    assert (after.st_ino, after.st_mtime_ns) == (file.st_ino, file.st_mtime_ns), "loaded again"
    counts = traffic.counts
    for phase in (HERE, f"{HERE}, again"):
        assert not counts[phase].failed, phase
    new = [each for each in traffic.failures if DETACHED in each and "new connection" in each]
    assert new == [], "only responses on connections that were kept can be cut"


async def _there_and_back(move: Move, traffic: Traffic) -> None:
    engines = await move.engines()
    await traffic.answers()
    await traffic.phase(f"restart of {GO}", at_least=0)
    await move.kubectl("rollout", "restart", "deployment/kubeai")
    await move.kubectl("rollout", "status", "deployment/kubeai")
    await move.leads_as(GO)
    await traffic.answers()
    await traffic.phase("move, short", at_least=0)
    await move.upgrade()
    await move.leads_as(HERE)
    await traffic.answers()
    await traffic.phase(HERE)
    assert await move.engines() == engines
    await move.change()
    await traffic.answers()
    assert "kubeai-in-go" in await move.kubectl("get", "roles")
    await move.upgrade()
    assert "kubeai-in-go" not in await move.kubectl("get", "roles")
    await traffic.phase("way back", at_least=0)
    await move.roll_back()
    await move.leads_as(GO)
    await traffic.answers()
    assert await move.engines() == engines
    await traffic.phase(f"{GO}, again")
    await traffic.phase(DETACHED, at_least=0)
    await move.detach()
    await move.upgrade()
    await move.end_detached(traffic)
    await move.leads_as(HERE)
    await traffic.answers()
    await traffic.phase(f"{HERE}, again")
    assert await move.engines() == engines
