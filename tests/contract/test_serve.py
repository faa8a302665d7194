"""`kubeai serve` against a Kubernetes API, with the process kubelet as the node's agent."""

import asyncio
import contextlib
import os
import re
import secrets
import signal
import urllib.parse

import aiohttp
import pytest
from fakes import forked
from harness import chat, model, until
from machines import serving
from operators import as_operator, is_ready

from kubeai.kube.client import Kube
from kubeai.kube.resources import CONFIGMAPS, LEASES, MODELS, PODS
from kubeai.processes import Command

STREAMS = 50
TOKENS = 40  # 2 s at the model's rate
ARGS = ("--startup-delay=1s", "--decode-tokens-per-second=20", "--max-batch=64")


@contextlib.asynccontextmanager
async def node(tmp_path, kubeconfig):
    """A node whose pods are processes of this machine."""
    reader, writer = os.pipe()
    arguments = (
        *("--kubeconfig", kubeconfig, "--data-dir", str(tmp_path / "node")),
        *("--node-name", f"node-{secrets.token_hex(4)}", "--ready-fd", str(writer)),
    )
    process = await forked.spawn(Command("kubeai.local.kubelet", arguments, pass_fds=(writer,)))
    os.close(writer)
    try:
        with os.fdopen(reader) as pipe:
            assert "ready" in await asyncio.to_thread(pipe.readline)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


@pytest.fixture
def account(api_server, namespace, tmp_path):
    """A kubeconfig for `kubeai serve`."""
    return str(as_operator(api_server, namespace).kubeconfig(tmp_path / "account", namespace))


@pytest.fixture
async def cluster(kube_api, namespace, tmp_path):
    async with node(tmp_path, kube_api):
        client = await Kube.connect(kube_api)
        yield client
        for found in (await client.list(MODELS, namespace))[0]:
            await client.delete(MODELS, found["metadata"]["name"], namespace)
        await client.close()


# The streams take 2 s, or many more on a busy machine.
PATIENT = {"drainAccept": "0s", "drainTimeout": "30s"}


async def apply(client, namespace, manifest):
    await client.create(MODELS, manifest, namespace)


async def test_a_model_scales_from_zero_streams_and_drains_on_sigterm(
    account, cluster, namespace, tmp_path
):
    await apply(cluster, namespace, model("chat", args=ARGS, maxReplicas=1))
    async with (
        serving(tmp_path, account, namespace, gateway=PATIENT) as serve,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        up = serve.said("serving")
        async with session.get(f"{up['health']}/readyz") as response:
            assert response.status == 200
        answer = await chat(session, up["endpoint"], "chat", "wake up")
        assert answer.whole, answer
        lease = await cluster.get(LEASES, "kubeai.org", namespace)
        assert lease["spec"]["holderIdentity"] == "kubeai-1"
        await until("the autoscaler's state is kept", lambda: state(cluster, namespace))

        chats = [
            asyncio.create_task(chat(session, up["endpoint"], "chat", f"{n}", max_tokens=TOKENS))
            for n in range(STREAMS)
        ]

        async def all_have_begun():
            over = sum(one.done() for one in chats)  # first: who ends after that is active before
            async with session.get(up["metrics"]) as response:
                text = await response.text()
            active = re.search(r'request_model="chat",request_type="http"} (\d+)', text)
            return over + int(active[1]) == STREAMS

        await until("all streams have begun", all_have_begun)
        serve.process.send_signal(signal.SIGTERM)
        answers = await asyncio.gather(*chats)
        assert [answer.error for answer in answers if not answer.whole] == []
        async with asyncio.timeout(40):
            assert await serve.process.wait() == 0
        lease = await cluster.get(LEASES, "kubeai.org", namespace)
        assert not lease["spec"].get("holderIdentity"), "handed over, not left to expire"


async def state(client, namespace):
    found, _ = await client.list(CONFIGMAPS, namespace)
    return [c for c in found if "lastCalculationTime" in c.get("data", {}).get("models", "")]


async def test_requests_during_the_drain_are_served_and_connections_closed(
    account, cluster, namespace, tmp_path
):
    await apply(cluster, namespace, model("chat", args=ARGS, minReplicas=1))
    gateway = {"gateway": {"drainAccept": "2s", "drainTimeout": "20s"}}
    async with (
        serving(tmp_path, account, namespace, **gateway) as serve,
        aiohttp.ClientSession() as session,
    ):
        up = serve.said("serving")
        assert (await chat(session, up["endpoint"], "chat", "hi")).whole
        serve.process.send_signal(signal.SIGTERM)
        await until("the drain has begun", lambda: serve.said("stopping"))
        async with session.get(f"{up['health']}/readyz") as response:
            assert response.status == 503
        async with session.get(f"{up['endpoint']}/models") as response:
            assert response.status == 200
            assert response.headers["Connection"] == "close"
        async with asyncio.timeout(15):
            assert await serve.process.wait() == 0
        answer = await chat(session, up["endpoint"], "chat", "too late")
        assert answer.error


async def test_a_configured_address_of_another_replica_is_followed_and_a_bad_one_ignored(
    account, namespace, tmp_path
):
    """With a config as a Go program writes it: zero values for what it does not set."""
    zeros = {
        "modelServers": {"OLlama": {"images": None}},
        "messaging": {"errorMaxBackoff": "0s", "streams": None},
        "cacheProfiles": {"none": {}},
    }
    async with serving(tmp_path, account, namespace) as one:
        metrics = one.said("serving")["metrics"]
        async with aiohttp.ClientSession() as session, session.get(metrics) as response:
            assert response.headers["X-KubeAI-Loads"] == "/loads"
        peer = urllib.parse.urlsplit(metrics).netloc
        config = zeros | {"fixedSelfMetricAddrs": ["127.0.0.1:", peer]}
        async with serving(tmp_path, account, namespace, name="kubeai-2", **config) as two:
            assert two.said("ignoring invalid config entry")["path"] == "fixedSelfMetricAddrs[0]"
            await until("the other is heard", lambda: two.said("peer connected"))
            assert two.said("peer connected")["peer"] == peer


async def test_with_an_external_gateway_kubeai_serves_no_requests_but_runs_models(
    account, cluster, namespace, tmp_path
):
    await apply(cluster, namespace, model("chat", args=ARGS, minReplicas=1))
    async with (
        serving(tmp_path, account, namespace, proxy={"mode": "external"}) as serve,
        aiohttp.ClientSession() as session,
    ):
        up = serve.said("serving")
        assert up["endpoint"] == "none"
        async with session.get(f"{up['health']}/readyz") as response:
            assert response.status == 200

        async def serves():
            pods, _ = await cluster.list(PODS, namespace, labels="kubeai.org/model=chat")
            ready = [pod for pod in pods if is_ready(pod)]
            return ready and ready[0]["status"]["podIP"]

        await until("a pod is ready", serves)
        answer = await chat(session, f"http://{await serves()}:8000/v1", "chat", "hi")
        assert answer.whole, answer
        serve.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await serve.process.wait() == 0
