"""Releases of the chart on a real control plane, whose pods are processes of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import kubectls
import pytest
from fakes.hub import Hub, Repository
from harness import until
from helms import CHART, IMAGE, Helm
from kubelets import Kubelet, is_ready, is_serving
from servers import CONTROL_PLANE, ApiServer, assets, cluster, node

from kubeai.kube.client import Kube
from kubeai.kube.resources import PODS, SECRETS, SERVICES, Resource

RELEASE = "release"  # the namespace of one
DEPLOYMENTS = Resource("apps", "v1", "deployments", "Deployment")
ACCOUNT = "spec.serviceAccountName"


@contextlib.contextmanager
def release_cluster(
    folder: Path, *programs: str, accounts: tuple[str, ...] = ("kubeai",)
) -> Iterator[ApiServer]:
    """A control plane for the releases of a test; without it, Helm or a program, skips the test.

    ``accounts``: those of the namespace :data:`RELEASE`.
    """
    if assets(*CONTROL_PLANE, "helm", *programs) is None:
        pytest.skip("KUBEBUILDER_ASSETS holds no whole control plane, or no helm")
    tokens = [f"{RELEASE}:{account}" for account in accounts]
    with cluster(folder / "servers", accounts=tokens) as server:
        yield server


@contextlib.asynccontextmanager
async def hub_with_weights() -> AsyncIterator[Hub]:
    """A hub that has the weights of the Model ``cached``."""
    hub = Hub()
    await hub.start()
    hub.repositories["mock/cached"] = Repository({"config.json": b"{}", "model.bin": b"w" * 9})
    try:
        yield hub
    finally:
        await hub.stop()


class Site:
    """A namespace, a kubelet whose processes are real, and KubeAI's releases there.

    KubeAI's pods run as the chart's account: what the role lacks it cannot do.
    """

    def __init__(
        self, api: ApiServer, namespace: str, folder: Path, *options: str, programs: str = ""
    ) -> None:
        """``options``: more of the kubelet's. ``programs``: a folder that comes first on PATH."""
        self.api, self.namespace, self.folder = api, namespace, folder
        self._path = ("env", f"PATH={programs}:{os.environ['PATH']}") if programs else ()
        self.kubeconfig = str(api.kubeconfig(folder / "kubeconfig", namespace))
        self.helm = Helm(folder, self.kubeconfig, namespace)
        self.kube: Kube
        self._kubelet = Kubelet(
            api,
            self.kubeconfig,
            folder / "kubelet",
            f"machine-{namespace}",
            *("--label", f"belongs-to={namespace}", *options),
            bind=False,
        )

    async def start(self) -> None:
        await asyncio.to_thread(self._kubelet.start, *self._path)
        self.kube = await Kube.connect(self.kubeconfig)
        await self.give_tokens()

    async def close(self) -> None:
        await self.kube.delete(SECRETS, "account")
        await self.kube.close()
        self._kubelet.clean_up()
        self.api.request("DELETE", f"/api/v1/nodes/{self._kubelet.node}")

    @property
    def values(self) -> dict:
        """On this machine a pod has an address of its own, but listens where it is told to."""
        here = {"belongs-to": self.namespace}
        return {
            "nodeSelector": here,
            "env": [
                {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                {"name": "ACCOUNT", "valueFrom": {"fieldRef": {"fieldPath": ACCOUNT}}},
                {"name": "KUBECONFIG", "value": "/app/account/$(ACCOUNT)"},
            ],
            "args": ["--host=$(POD_IP)"],
            "volumes": [{"name": "account", "secret": {"secretName": "account"}}],
            "volumeMounts": [{"name": "account", "mountPath": "/app/account"}],
            "resourceProfiles": {"cpu": {"nodeSelector": here, "requests": {"cpu": "10m"}}},
            "cacheProfiles": {"shared": {"sharedFilesystem": {"storageClassName": RELEASE}}},
            "modelAutoscaling": {"interval": "1s", "timeWindow": "5s"},
            "gateway": {"drainAccept": "0s", "drainTimeout": "5s"},
            "terminationGracePeriodSeconds": 10,
        }

    async def install(self, *options: str, values: dict | None = None) -> None:
        await asyncio.to_thread(
            self.helm,
            *("upgrade", "--install", "kubeai", str(CHART), *IMAGE, "--wait", *options),
            values=self.values | (values or {}),
        )

    async def kubectl(self, *arguments: str) -> str:
        """What kubectl prints, as the cluster's administrator."""
        kubectl = kubectls.Kubectl(kubectls.found()["assets"], self.kubeconfig, self.folder)
        return await asyncio.to_thread(kubectl, *arguments)

    async def until_ready(self, counts: dict[str, int], timeout_s: float = 60) -> None:
        """Wait until each Model has this many pods, all of them ready."""
        for name, count in counts.items():

            async def so(name: str = name, count: int = count) -> bool:
                labels = f"app=model,model={name}"
                pods, _ = await self.kube.list(PODS, self.namespace, labels=labels)
                return len(pods) == count and all(map(is_ready, pods))

            await until(f"{count} pods of {name} are ready", so, timeout_s)

    @contextlib.contextmanager
    def gpu_node(self):
        """As NVIDIA's GPU operator labels one with an L4; kwok plays its kubelet."""
        labels = {"nvidia.com/gpu.family": "ada-lovelace", "nvidia.com/gpu.memory": "23034"}
        taint = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
        made = node("gpu", {"nvidia.com/gpu": "1"}, labels, taints=[taint])
        code, answer = self.api.request("POST", "/api/v1/nodes", made)
        assert code == 201, answer
        try:
            yield made
        finally:
            self.api.request("DELETE", "/api/v1/nodes/gpu")

    async def give_tokens(self) -> None:
        """What the admission plug-in for service accounts and a kubelet's projected volume do."""
        files = {}
        for account, token in self.api.accounts.items():
            server, name = self.api._replace(token=token), account.partition(":")[2]
            files[name] = server.kubeconfig(self.folder / name, self.namespace).read_text()
        await self.kube.create(SECRETS, {"metadata": {"name": "account"}, "stringData": files})

    async def _addresses(self) -> list[str]:
        """What the Service leads to: its EndpointSlices cannot hold loopback's addresses."""
        service = await self.kube.get(SERVICES, "kubeai")
        selector = ",".join(f"{key}={value}" for key, value in service["spec"]["selector"].items())
        (target,) = [port["targetPort"] for port in service["spec"]["ports"]]
        found, _ = await self.kube.list(PODS, self.namespace, labels=selector)
        return [
            f"{pod['status']['podIP']}:{port['containerPort']}"
            for pod in found
            if is_serving(pod)
            for port in pod["spec"]["containers"][0]["ports"]
            if port["name"] == target
        ]

    def make_volume(self) -> None:
        """What a class of shared file systems would make for the claim."""
        spec = {
            "accessModes": ["ReadWriteMany"],
            "capacity": {"storage": "10Gi"},
            "storageClassName": RELEASE,
            "hostPath": {"path": str(self.folder / "volume")},
        }
        volume = {"metadata": {"name": RELEASE}, "spec": spec}
        code, answer = self.api.request("POST", "/api/v1/persistentvolumes", volume)
        assert code == 201, answer

    async def ask(self, name: str) -> str:
        """A chat, as a client of the Service has it once the gateway knows the Model."""
        address, *_ = await until("the Service leads somewhere", self._addresses)
        endpoint = f"http://{address}/openai/v1"
        question = {"model": name, "messages": [{"role": "user", "content": "Hello!"}]}
        async with aiohttp.ClientSession() as session:

            async def known() -> bool:
                async with session.get(f"{endpoint}/models") as answer:
                    return name in [one["id"] for one in (await answer.json())["data"]]

            await until("the gateway knows the Model", known)
            chat = session.post(f"{endpoint}/chat/completions", json=question | {"max_tokens": 4})
            async with chat as answer:
                assert answer.status == 200, await answer.text()
                return (await answer.json())["choices"][0]["message"]["content"]

    def objects(self) -> dict[str, list[str]]:
        """All that is in the namespace, but for what every namespace has, and Events."""
        found: dict[str, list[str]] = {}
        for path in self._collections():
            _, answer = self.api.request("GET", path)
            for obj in answer.get("items") or ():
                if obj["metadata"]["name"] not in ("kube-root-ca.crt", "default", "account"):
                    found.setdefault(path.rsplit("/", 1)[1], []).append(obj["metadata"]["name"])
        return found

    def _collections(self) -> list[str]:
        paths = []
        _, groups = self.api.request("GET", "/apis")
        versions = [g["preferredVersion"]["groupVersion"] for g in groups["groups"]]
        for base in ("/api/v1", *(f"/apis/{version}" for version in versions)):
            _, listed = self.api.request("GET", base)
            paths += [
                f"{base}/namespaces/{self.namespace}/{r['name']}"
                for r in listed.get("resources") or ()
                if r["namespaced"] and "list" in r["verbs"] and r["name"] != "events"
            ]
        return paths
