"""An upgrade from the previous version and back, while clients send requests.

The previous version's chart and program come from the repository's history (previous.py).
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import previous
import pytest
from fakes.hub import Hub
from fleets import Watched
from harness import model, scrape, until
from helms import CHART, IMAGE, config_of
from kubelets import is_serving
from servers import ApiServer
from service_traffic import ServiceAddress, Traffic
from sites import RELEASE, Site, hub_with_weights, release_cluster

from kubeai.api.config.system import parse_config
from kubeai.api.model import decode_model
from kubeai.api.usage import grouped
from kubeai.client.usage import read_usage
from kubeai.kube.resources import CONFIGMAPS, CRDS, MODELS, PODS, PVCS, SECRETS
from kubeai.operator.plan import Template, template_of

# Without the fixtures: to build the previous version takes minutes, and has its own limit.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600, func_only=True)]
KEY, KEY_NAME = "sk-of-the-clients-0123456789", "clients"
OF_KUBEAI = "app.kubernetes.io/name=kubeai,app.kubernetes.io/instance=kubeai"
STATE = "kubeai-autoscaler-state"
COUNTS = {"scaled": 1, "two": 2, "cached": 1}
REPLICAS = 2


class Upgrade(Site):
    """A release of two replicas that require an API key, and its Models."""

    def __init__(self, api: ApiServer, folder: Path, before: Path) -> None:
        super().__init__(api, RELEASE, folder, programs=str(before))
        self._before = before

    @property
    def values(self) -> dict:
        gateway = {"keys": {"required": True}, "drainAccept": "5s", "drainTimeout": "30s"}
        return super().values | {
            "replicaCount": REPLICAS,
            "gateway": gateway,
            "terminationGracePeriodSeconds": 60,
        }

    async def install_previous(self) -> None:
        await asyncio.to_thread(
            self.helm,
            *("install", "kubeai", str(self._before / "charts/kubeai"), *IMAGE, "--wait"),
            values=self.values | {"command": [previous.PROGRAM]},
        )

    async def create_key(self) -> None:
        data = {"api_key": base64.b64encode(KEY.encode()).decode()}
        meta = {"name": KEY_NAME, "labels": {"kubeai.org/api-key": "true"}}
        await self.kube.create(SECRETS, {"metadata": meta, "data": data})

    async def kubeai_pods(self, *, of_previous: bool) -> list[dict]:
        """The ready pods of one of the versions."""
        pods, _ = await self.kube.list(PODS, self.namespace, labels=OF_KUBEAI)
        return [
            pod
            for pod in pods
            if is_serving(pod)
            and (pod["spec"]["containers"][0].get("command") == [previous.PROGRAM]) == of_previous
        ]

    async def mixed(self) -> None:
        """Begin the upgrade and stop the rollout once it has created the first pod."""
        upgrade = ("upgrade", "kubeai", str(CHART), *IMAGE)
        await asyncio.to_thread(self.helm, *upgrade, values=self.values)

        async def begun() -> bool:
            pods, _ = await self.kube.list(PODS, self.namespace, labels=OF_KUBEAI)
            return len(pods) > REPLICAS

        await until("the rollout has begun", begun)
        await self.kubectl("rollout", "pause", "deployment/kubeai")

        async def both() -> bool:
            return bool(
                await self.kubeai_pods(of_previous=True)
                and await self.kubeai_pods(of_previous=False)
            )

        await until("both versions have ready pods", both, 60)

    async def hear_each_other(self) -> bool:
        """Whether each replica gets the counts of all others."""
        pods = [
            *await self.kubeai_pods(of_previous=True),
            *await self.kubeai_pods(of_previous=False),
        ]
        for pod in pods:
            series = await scrape(f"http://{pod['status']['podIP']}:8080/metrics")
            silent_s = [s for name, s in series.items() if name.startswith("kubeai_peer_silence")]
            if len(silent_s) != len(pods) - 1 or max(silent_s) > 3:
                return False
        return True

    async def engines(self) -> dict[str, dict]:
        """The engines' pods that are not going away, by uid."""
        pods, _ = await self.kube.list(PODS, self.namespace, labels="app=model")
        return {
            pod["metadata"]["uid"]: pod
            for pod in pods
            if "deletionTimestamp" not in pod["metadata"]
        }

    async def unchanged(self, engines: dict[str, dict]) -> set[str]:
        """The engines whose pods the current version would create in the same way."""
        config = parse_config(config_of(self.helm.render("kubeai", values=self.values)))
        found, _ = await self.kube.list(MODELS, self.namespace)
        hashes = {}
        for each in found:
            template = template_of(decode_model(each), config)
            assert isinstance(template, Template)
            hashes[each["metadata"]["name"]] = template.hash
        return {
            uid
            for uid, pod in engines.items()
            if pod["metadata"]["labels"]["pod-hash"] == hashes[pod["metadata"]["labels"]["model"]]
        }

    async def state(self) -> dict[str, Any]:
        """What an upgrade keeps: who the stored objects are, and the autoscaler's averages."""
        found = await self.kube.get(CONFIGMAPS, STATE, self.namespace)
        claim = await self.kube.get(PVCS, "shared-model-cache-shared", self.namespace)
        kept, _ = await self.kube.list(MODELS, self.namespace)
        return {
            "averages of": sorted(json.loads(found["data"]["models"])["models"]),
            "state": found["metadata"]["uid"],
            "claim": claim["metadata"]["uid"],
            "models": {each["metadata"]["name"]: each["metadata"]["uid"] for each in kept},
            "definition": (await self.kube.get(CRDS, "models.kubeai.org"))["metadata"]["uid"],
        }

    async def requests_counted(self) -> int:
        """Of the key, by the usage that is stored once no replica runs."""
        await self.kubectl("scale", "deployment/kubeai", "--replicas=0")

        async def gone() -> bool:
            return not (await self.kube.list(PODS, self.namespace, labels=OF_KUBEAI))[0]

        await until("no replica runs", gone, 60)
        (usage,) = grouped(await read_usage(self.kube, self.namespace), "key")
        assert usage.names["key"] == KEY_NAME
        return usage.counts.requests


@pytest.fixture(scope="module")
def api(tmp_path_factory) -> Iterator[ApiServer]:
    with release_cluster(tmp_path_factory.mktemp("cluster"), "kubectl") as server:
        yield server


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    async with hub_with_weights() as hub:
        yield hub


@pytest.fixture
async def site(api, tmp_path) -> AsyncIterator[Upgrade]:
    before = await asyncio.to_thread(previous.build)
    code, answer = api.request("POST", "/api/v1/namespaces", {"metadata": {"name": RELEASE}})
    assert code == 201, answer
    site = Upgrade(api, tmp_path, before)
    await site.start()
    site.make_volume()
    yield site
    await site.close()


async def create_models(site: Upgrade, hub: Hub) -> None:
    prefix = {"strategy": "PrefixHash"}
    for each in (
        model("scaled", minReplicas=1, maxReplicas=3, targetRequests=2, scaleDownDelaySeconds=600),
        model("two", autoscalingDisabled=True, replicas=2, loadBalancing=prefix),
        model("cached", minReplicas=1, cacheProfile="shared", env={"HF_ENDPOINT": hub.url}),
    ):
        await site.kube.create(MODELS, each)
    await site.until_ready(COUNTS)


async def test_upgrade_and_rollback_lose_no_request_and_restart_no_engine(site, hub):
    await site.install_previous()
    await site.create_key()
    await create_models(site, hub)
    (loaded,) = site.folder.rglob("model.bin")
    file = loaded.stat()
    async with ServiceAddress(site.kube, RELEASE, "kubeai") as address:
        traffic = Traffic(address.url, KEY)
        try:
            async with Watched(site.kube, RELEASE) as watched, traffic:
                await _upgrade_and_roll_back(site, watched, traffic)
        finally:
            print(traffic.table(), *traffic.failures, sep="\n")
    assert traffic.failures == []
    assert watched.shrunk() == []
    after = loaded.stat()
    assert (after.st_ino, after.st_mtime_ns) == (file.st_ino, file.st_mtime_ns), "loaded again"
    sent = sum(count.succeeded for count in traffic.counts.values())
    assert await site.requests_counted() == sent


async def _upgrade_and_roll_back(site: Upgrade, watched: Watched, traffic: Traffic) -> None:
    for keeps in (True, False):
        traffic.start("stream", "scaled", keeps=keeps)
        traffic.start("chat", "two", keeps=keeps)
        traffic.start("chat", "cached", keeps=keeps)
    await traffic.phase("previous version", at_least=5)
    state = await site.state()
    engines = await site.engines()
    kept = await site.unchanged(engines)
    await traffic.phase("both versions", at_least=0)
    await site.mixed()
    await until("all replicas hear each other", site.hear_each_other, 30)
    await traffic.answers()
    await site.kubectl("rollout", "resume", "deployment/kubeai")
    await site.kubectl("rollout", "status", "deployment/kubeai", "--timeout=120s")
    await traffic.phase("current version", at_least=5)
    assert await site.state() == state
    assert kept <= (await site.engines()).keys()
    await traffic.phase("rollback", at_least=0)
    await asyncio.to_thread(site.helm, "rollback", "kubeai", "1", "--wait")
    await traffic.phase("previous version, again", at_least=5)
    assert len(await site.kubeai_pods(of_previous=True)) == REPLICAS
    assert await site.state() == state
    assert kept <= (await site.engines()).keys()
