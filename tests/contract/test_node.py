"""The process kubelet as a Node of a whole cluster: what the real scheduler gives it runs here."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator

import aiohttp
import pytest
from kubectls import Kubectl
from kubelets import Kubelet, is_alive, is_ready
from operators import CONFIG, World, as_operator, until
from servers import CONTROL_PLANE, ApiServer, assets, cluster, install_models, node

from kubeai.kube.client import Kube
from kubeai.kube.resources import MODELS

pytestmark = pytest.mark.cluster

EXEC_TIMEOUT_S = 10.0
PROFILES = """
resourceProfiles:
  gpu:
    requests: {{nvidia.com/gpu: "1", cpu: 50m}}
    limits: {{nvidia.com/gpu: "1"}}
    nodeSelector: {{belongs-to: {namespace}}}
"""
QUESTION = {"model": "m", "messages": [{"role": "user", "content": "Who are you?"}]}


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[ApiServer]:
    if assets(*CONTROL_PLANE, "kubectl") is None:
        pytest.skip("KUBEBUILDER_ASSETS holds no whole control plane")
    with cluster(tmp_path_factory.mktemp("cluster") / "servers") as server:
        install_models(server)
        yield server


class Machine(World):
    """A namespace, the operator in it, and a kubelet whose Node has two GPUs."""

    def __init__(self, kube: Kube, account: Kube, kubelet: Kubelet) -> None:
        super().__init__(kube, operator_kube=account)
        self.kubelet = kubelet
        self.config = PROFILES.format(namespace=kube.namespace) + "".join(
            line for line in CONFIG.splitlines(True) if not line.startswith("resourceProfiles")
        )

    async def serve(self, replicas: int) -> list[dict]:
        """Create a Model with ``replicas`` replicas and return its pods once all are ready."""
        self.start(config=self.config)
        await self.create(resourceProfile="gpu:1", autoscalingDisabled=True, replicas=replicas)
        await self.replicas_are(replicas, replicas)
        return await self.pods()

    async def exec(self, pod: dict, *command: str):
        container = pod["spec"]["containers"][0]["name"]
        name = pod["metadata"]["name"]
        return await self.kube.exec(name, command, container=container, timeout_s=EXEC_TIMEOUT_S)

    async def main_pid(self, pod: dict) -> int:
        """The pod's first process, told from what a command beside it has for a parent."""
        children = "cat /proc/$PPID/task/$PPID/children"
        return int((await self.exec(pod, "sh", "-c", children)).output.split()[0])


@pytest.fixture
async def machine(api, tmp_path):
    namespace = f"test-{secrets.token_hex(4)}"
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    assert code == 201, answer
    kubeconfig = str(api.kubeconfig(tmp_path / "kubeconfig", namespace))
    name = f"machine-{namespace}"
    kubelet = Kubelet(
        api,
        kubeconfig,
        tmp_path / "kubelet",
        name,
        *("--label", f"belongs-to={namespace}", "--capacity", "nvidia.com/gpu=2"),
        bind=False,
    )
    await asyncio.to_thread(kubelet.start)
    account = as_operator(api, namespace).kubeconfig(tmp_path / "account", namespace)
    machine = Machine(await Kube.connect(kubeconfig), await Kube.connect(str(account)), kubelet)
    try:
        yield machine
    finally:
        await machine.close()
        kubelet.clean_up()
        api.request("DELETE", f"/api/v1/nodes/{name}")


@pytest.fixture
def kubectl(machine, tmp_path) -> Kubectl:
    folder = assets("kubectl")
    assert folder is not None
    return Kubectl(str(folder / "kubectl"), str(tmp_path / "kubeconfig"), tmp_path)


async def ask(pod: dict) -> str:
    """A chat's answer from the pod's own address."""
    url = f"http://{pod['status']['podIP']}:8000"
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/health") as answer:
            assert answer.status == 200
        async with session.post(f"{url}/v1/chat/completions", json=QUESTION) as answer:
            assert answer.status == 200, await answer.text()
            return (await answer.json())["choices"][0]["message"]["content"]


async def test_the_scheduler_gives_it_pods_that_run_and_answer(machine):
    one, other = await machine.serve(replicas=2)
    for pod in (one, other):
        assert pod["spec"]["nodeName"] == machine.kubelet.node
        assert is_ready(pod)
        assert await ask(pod)
    assert one["status"]["podIP"] != other["status"]["podIP"]


async def test_scheduler_respects_the_nodes_capacity(machine):
    await machine.serve(replicas=2)
    await machine.kube.patch(MODELS, "m", {"spec": {"replicas": 3}}, subresource="scale")

    async def told():
        conditions = (await machine.status()).get("conditions") or []
        messages = {c["type"]: c["message"] for c in conditions}
        return "Insufficient nvidia.com/gpu" in messages.get("Progressing", "")

    await until(told, "that there are only two GPUs")
    await machine.replicas_are(3, 2)


async def test_logs_and_commands_go_through_the_api_server(machine, kubectl):
    (pod,) = await machine.serve(replicas=1)
    name = pod["metadata"]["name"]
    assert (await machine.exec(pod, "sh", "-c", "echo $POD_IP")) == (
        0,
        f"{pod['status']['podIP']}\n",
    )
    assert (await machine.exec(pod, "false")).exit_code == 1
    assert await asyncio.to_thread(kubectl, "exec", name, "--", "echo", "hello") == "hello\n"
    assert await asyncio.to_thread(kubectl, "exec", "-i", name, "--", "cat", given="in") == "in"
    assert await ask(pod)
    assert await asyncio.to_thread(kubectl, "logs", name)


async def test_a_drained_nodes_pod_ends_and_comes_back(machine, kubectl):
    (pod,) = await machine.serve(replicas=1)
    engine = await machine.main_pid(pod)
    assert is_alive(engine)
    node_name = machine.kubelet.node
    await asyncio.to_thread(kubectl, "drain", node_name, "--delete-emptydir-data", "--timeout=15s")
    assert not is_alive(engine)
    await machine.replicas_are(1, 0)
    await asyncio.to_thread(kubectl, "uncordon", node_name)
    await machine.replicas_are(1, 1)
    (again,) = await machine.pods()
    assert again["metadata"]["uid"] != pod["metadata"]["uid"]
    assert again["spec"]["nodeName"] == node_name
    assert await ask(again)


async def test_kwok_nodes_and_the_kubelets_node_coexist(machine, api):
    """What one of them runs is not the other's."""
    labels = {"belongs-to": machine.kube.namespace}
    played = node(f"played-{machine.kube.namespace}", {"nvidia.com/gpu": "1"}, labels)
    assert api.request("POST", "/api/v1/nodes", played)[0] == 201
    try:
        pods = await machine.serve(replicas=3)
        nodes = sorted(pod["spec"]["nodeName"] for pod in pods)
        assert nodes == [*[machine.kubelet.node] * 2, played["metadata"]["name"]]
        ours = [pod for pod in pods if pod["spec"]["nodeName"] == machine.kubelet.node]
        for pod in ours:
            assert await ask(pod)
    finally:
        api.request("DELETE", f"/api/v1/nodes/{played['metadata']['name']}")
