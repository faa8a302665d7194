"""The cluster of ``control_plane.py``, `kubeai serve` on it, and an API that fails in a storm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import ssl
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import timed_serve
import yaml
from aiohttp import web
from timed_serve import Serve

from kubeai.kube.client import Kube

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "contract"))
from servers import ApiServer, cluster, install_models, node

CALLS_PER_S = 2_000
NODES, PODS_A_NODE = 10, 1_100
CONFIG: dict[str, Any] = {
    "resourceProfiles": {"cpu": {"requests": {"cpu": "1m", "memory": "1Mi"}}},
    "allowPodAddressOverride": True,
    "metricsAddr": "127.0.0.1:0",
    "healthAddress": "127.0.0.1:0",
    "gateway": {"drainAccept": "0s"},
}
NAMESPACE_GONE_MAX_S = 300
AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {
            "level": "Metadata",
            "verbs": ["create", "update", "patch", "delete", "deletecollection"],
            "namespaces": ["scale"],
        },
        {"level": "None"},
    ],
}


@contextlib.contextmanager
def running_cluster(folder: Path):
    policy = folder / "audit.yaml"
    policy.write_text(yaml.safe_dump(AUDIT))
    options = (f"--audit-policy-file={policy}", f"--audit-log-path={folder / 'audit.log'}")
    with cluster(folder / "servers", *options, calls_per_s=CALLS_PER_S) as api:
        install_models(api)
        for i in range(NODES):
            name = f"node-{i}"
            code, answer = api.request(
                "POST", "/api/v1/nodes", node(name, {"pods": str(PODS_A_NODE)})
            )
            assert code == 201, answer
        yield api


class Cluster:
    """A cluster with a namespace for each part, in which `kubeai serve` runs."""

    def __init__(self, api: ApiServer, folder: Path) -> None:
        self.api = api
        self.folder = folder

    @contextlib.asynccontextmanager
    async def space(self, name: str) -> AsyncIterator[Kube]:
        """Create a namespace; yields the load generator's connection to it.

        Afterwards it is deleted, so that what it has does not delay what is measured next.
        """
        code, answer = self.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        assert code == 201, answer
        kube = await Kube.connect(str(self.api.kubeconfig(self.folder / name, name)))
        try:
            yield kube
        finally:
            await kube.close()
            path = f"/api/v1/namespaces/{name}"
            self.api.request("DELETE", path)
            for _ in range(NAMESPACE_GONE_MAX_S):
                if self.api.request("GET", path)[0] == 404:
                    break
                await asyncio.sleep(1.0)

    @contextlib.asynccontextmanager
    async def serve(
        self, kube: Kube, config: dict[str, Any], identity: str = "one", url: str = ""
    ) -> AsyncIterator[Serve]:
        """Start `kubeai serve`. ``url``: an API address to use instead of the cluster's."""
        file = self.folder / f"{kube.namespace}-{identity}.yaml"
        file.write_text(yaml.safe_dump(CONFIG | config))
        api = self.api._replace(url=url) if url else self.api
        kubeconfig = api.kubeconfig(self.folder / f"{kube.namespace}-{identity}", kube.namespace)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, timed_serve.__file__),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=256 << 20,
            env=os.environ
            | {
                "CONFIG_PATH": str(file),
                "KUBECONFIG": str(kubeconfig),
                "POD_NAME": identity,
                "POD_NAMESPACE": kube.namespace,
            },
        )
        serve = Serve(process)
        reader = asyncio.create_task(serve.read())
        try:
            yield serve
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()
            await reader


class Storm:
    """A proxy in front of the API that rejects all writes, except to leases, while ``rages``."""

    KINDS = ((409, "Conflict"), (429, "TooManyRequests"), (500, "InternalError"))

    def __init__(self, api: ApiServer) -> None:
        self._api = api
        self._writes: defaultdict[str, list[float]] = defaultdict(list)  # object → times
        self._random = random.Random(1)
        self.rages = False
        self.answers: Counter[int] = Counter()
        self.url = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Storm]:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_route("*", "/{path:.*}", self._pass)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        trust = ssl.create_default_context(cafile=self._api.ca_file)
        connector = aiohttp.TCPConnector(ssl=trust, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as self._session:
            try:
                yield self
            finally:
                await runner.cleanup()

    def most_a_second(self) -> tuple[int, str]:
        """The most writes to one object in any second, and the object.

        A status write counts for its Model, a create for the requested name.
        """
        return max(
            (sum(at_s <= other < at_s + 1 for other in times[i:]), name)
            for name, times in self._writes.items()
            for i, at_s in enumerate(times)
        )

    async def _pass(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if request.method != "GET" and "/leases" not in request.path:
            name = request.path
            if request.method == "POST":
                name += "/" + json.loads(body)["metadata"]["name"]
            self._writes[name.removesuffix("/status")].append(time.monotonic())
            if self.rages:
                return self._refuse()
        headers = {
            key: value
            for key, value in request.headers.items()
            if key not in ("Host", "Content-Length")
        }
        async with self._session.request(
            request.method, self._api.url + request.path_qs, data=body, headers=headers
        ) as answer:
            kept = {"Content-Type": answer.headers.get("Content-Type", "")}
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            return response

    def _refuse(self) -> web.Response:
        code, reason = self._random.choice(self.KINDS)
        self.answers[code] += 1
        status = {"kind": "Status", "code": code, "reason": reason, "message": "a storm"}
        headers = {"Retry-After": "1"} if code == 429 else {}
        return web.json_response(status, status=code, headers=headers)
