"""Helpers of the operator's contract tests: replicas of KubeAI's control plane, and nodes."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter

import yaml
from repository import REPOSITORY
from servers import ApiServer

from kubeai.api.config.system import parse_config
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS, MODELS, PODS
from kubeai.operator import Operator
from kubeai.operator.scaling.scaler import STATE_NAME_DEFAULT

DEADLINE_S = 20.0
CONFIG = """
modelAutoscaling: {interval: 100ms, timeWindow: 400ms}
leaderElection: {leaseDuration: 2s, renewDeadline: 1s, retryPeriod: 200ms}
resourceProfiles: {cpu: {requests: {cpu: 100m}}}
"""


class FakeLoads:
    """Of one replica: what is routed to is in use."""

    def __init__(self, routes):
        self._routes = routes
        self.active_by_model = Counter()
        self.held_by_model = Counter()
        self.used = set()  # pods that are still sent requests

    def active(self, model):
        return self.active_by_model[model] + self.held_by_model[model]

    def held(self, model):
        return self.held_by_model[model]

    def in_flight(self, model, endpoint):
        return 0

    def in_use(self, model, endpoint):
        route = self._routes.get(model)
        routed = route is not None and any(e.name == endpoint for e in route.endpoints)
        return routed or endpoint in self.used

    def ended(self, model):
        return 0

    def complete(self):
        return True


class Replica:
    """One KubeAI replica's control plane, and what it published."""

    def __init__(self, kube, identity, config=CONFIG):
        self.routes = {}
        self.published = []  # (model, names of its endpoints), one after the other
        self.loads = FakeLoads(self.routes)
        self.keys = {}
        parsed = parse_config(config)
        self.operator = Operator(
            kube,
            parsed,
            kube.namespace,
            identity,
            self._publish,
            self.loads,
            self._publish_key if parsed.gateway.keys.required else None,
        )
        self.task = asyncio.create_task(self.operator.run())

    def _publish(self, model, route):
        if route is None:
            self.routes.pop(model, None)
        else:
            self.routes[model] = route
        self.published.append((model, self.endpoints(model)))

    def _publish_key(self, name, key):
        if key is None:
            del self.keys[name]
        else:
            self.keys[name] = key

    def endpoints(self, model):
        route = self.routes.get(model)
        return None if route is None else [endpoint.name for endpoint in route.endpoints]

    async def stop(self):
        await self.operator.stop()
        await self.task

    async def kill(self):
        """Kill the replica; its lease remains."""
        self.task.cancel()
        self.operator.leader.release = nothing
        with contextlib.suppress(asyncio.CancelledError):
            await self.task


async def nothing():
    pass


class Nodes:
    """Says of pods that they are ready, when `ready(pod)` says so; counts what it sees."""

    def __init__(self, kube):
        self.kube = kube
        self.ready = lambda pod: True
        self.pods = {}
        self.most = 0
        self.least_ready = None  # set to a number to begin watching it
        self._told = set()
        self._wake = asyncio.Event()
        self._tasks = [
            asyncio.create_task(
                kube.follow(PODS, kube.namespace, replaced=self._replaced, changed=self._changed)
            ),
            asyncio.create_task(self._tell()),
        ]

    def _replaced(self, pods):
        self.pods = {pod["metadata"]["name"]: pod for pod in pods}
        self._count()

    def _changed(self, kind, pod):
        name = pod["metadata"]["name"]
        if kind == "DELETED":
            self.pods.pop(name, None)
        else:
            self.pods[name] = pod
        self._count()

    def _count(self):
        alive = [p for p in self.pods.values() if "deletionTimestamp" not in p["metadata"]]
        self.most = max(self.most, len(alive))
        if self.least_ready is not None:
            self.least_ready = min(self.least_ready, sum(map(is_ready, alive)))
        self._wake.set()

    async def _tell(self):
        while True:
            await self._wake.wait()
            self._wake.clear()
            for name, pod in list(self.pods.items()):
                uid = pod["metadata"]["uid"]
                if uid not in self._told and self.ready(pod):
                    self._told.add(uid)
                    with contextlib.suppress(ApiError):
                        await self.set_ready(name, ip=f"127.1.0.{len(self._told) % 250 + 1}")

    def look_again(self):
        self._wake.set()

    async def set_ready(self, name, ready=True, ip="127.1.0.1"):
        """Write the status of a pod whose engine has started."""
        server = {
            "name": "server",
            "image": "x",
            "imageID": "",
            "ready": ready,
            "started": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        }
        status = {
            "containerStatuses": [server],
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        }
        await self.kube.patch(PODS, name, {"status": status}, subresource="status")

    async def stop(self):
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def is_ready(pod):
    conditions = pod.get("status", {}).get("conditions") or []
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


class World:
    """One namespace, what runs in it, and who looks after its pods; None: the cluster does."""

    def __init__(self, kube, nodes=None, operator_kube=None):
        self.kube = kube
        self.kubes = [kube] if operator_kube is None else [kube, operator_kube]
        self.operator_kube = operator_kube or kube
        self.nodes = nodes
        self.replicas = []
        self.operator_api: ApiServer | None = None

    async def close(self):
        await asyncio.gather(*(replica.stop() for replica in self.replicas))
        if self.nodes is not None:
            await self.nodes.stop()
        await asyncio.gather(*(one.close() for one in self.kubes))

    def start(self, identity="one", config=CONFIG):
        replica = Replica(self.operator_kube, identity, config)
        self.replicas.append(replica)
        return replica

    async def create(self, name="m", **spec):
        model = {
            "metadata": {"name": name},
            "spec": {
                "url": "hf://org/name",
                "engine": "VLLM",
                "features": ["TextGeneration"],
                "resourceProfile": "cpu:1",
                "image": "registry.example/mock-engine:1",
                "minReplicas": 0,
                **spec,
            },
        }
        return await self.kube.create(MODELS, model)

    async def model(self, name="m"):
        return await self.kube.get(MODELS, name)

    async def pods(self, name="m"):
        """Pods of the model that are not going away."""
        pods, _ = await self.kube.list(PODS, self.kube.namespace, labels=f"model={name}")
        return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]

    async def pods_once(self, count, name="m"):
        """The model's pods, once there are ``count``."""
        found = []

        async def there():
            found[:] = await self.pods(name)
            return len(found) == count

        await until(there, f"{count} pods of {name}")
        return found

    async def status(self, name="m"):
        return (await self.model(name)).get("status") or {}

    async def condition(self, type_, name="m"):
        conditions = (await self.status(name)).get("conditions") or []
        return next(((c["status"], c["reason"]) for c in conditions if c["type"] == type_), None)

    async def is_up_to_date(self, name="m"):
        """Whether the status says so of the Model as it is now."""
        model = await self.model(name)
        return any(
            (c["type"], c["reason"]) == ("Progressing", "UpToDate")
            and c["observedGeneration"] == model["metadata"]["generation"]
            for c in model.get("status", {}).get("conditions", [])
        )

    async def replicas_are(self, all_, ready, name="m"):
        async def told():
            status = await self.status(name)
            return status.get("replicas") == {"all": all_, "ready": ready}

        await until(told, f"{all_} replicas, {ready} ready")

    async def versions(self):
        """resourceVersions of what the operator writes, but for the lease and its first averages.

        When it writes these depends on its clock, not on what a test does.
        """
        found = {}
        for resource in (MODELS, PODS, CONFIGMAPS):
            items, _ = await self.kube.list(resource, self.kube.namespace)
            for item in items:
                key = resource.plural, item["metadata"]["name"]
                found[key] = item["metadata"]["resourceVersion"]
        found.pop((CONFIGMAPS.plural, STATE_NAME_DEFAULT), None)
        return found


def documented_role() -> list[dict]:
    """The rules of a Role, from the table of docs/explain/life-of-a-model.md."""
    text = (REPOSITORY / "docs/explain/life-of-a-model.md").read_text()
    table = text[text.index("## Permissions") :]
    rows = re.findall(r"^\| `([a-z/]+)`(?: \(([a-z.0-9-]+)\))? \| ([a-z, ]+)", table, re.MULTILINE)
    groups = {"models": "kubeai.org"}
    return [
        {
            "apiGroups": [group or groups.get(resource.partition("/")[0], "")],
            "resources": [resource],
            "verbs": [verb.strip() for verb in verbs.split(",")],
        }
        for resource, group, verbs in rows
    ]


def chart_role() -> list[dict]:
    """The rules that the chart gives the operator."""
    text = (REPOSITORY / "charts/kubeai/templates/rbac.yaml").read_text()
    return yaml.safe_load(text[text.index("rules:") : text.index("---")])["rules"]


def keys_role() -> list[dict]:
    """The rules that the chart adds if keys are required."""
    text = (REPOSITORY / "charts/kubeai/templates/keys.yaml").read_text()
    return yaml.safe_load(text[text.index("rules:") : text.index("---\n")])["rules"]


def as_operator(api, namespace: str, *, keys: bool = False):
    """The API for the chart's account, which is made there; the embedded one knows one user.

    ``keys``: as the chart has it if keys are required.
    """
    if api.kind == "embedded":
        return api
    rules = chart_role() + (keys_role() if keys else [])
    return api._replace(token=_account_with(api, namespace, rules))


def _account_with(api, namespace: str, rules: list[dict]) -> str:
    """A service account that may do this much; its token."""

    def post(path, body):
        code, answer = api.request("POST", path, body)
        assert code == 201, answer
        return answer

    core = f"/api/v1/namespaces/{namespace}/serviceaccounts"
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    post(core, {"metadata": {"name": "kubeai"}})
    post(f"{rbac}/roles", {"metadata": {"name": "kubeai"}, "rules": rules})
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "kubeai"}
    account = {"kind": "ServiceAccount", "name": "kubeai", "namespace": namespace}
    binding = {"metadata": {"name": "kubeai"}, "roleRef": role, "subjects": [account]}
    post(f"{rbac}/rolebindings", binding)
    return post(f"{core}/kubeai/token", {"spec": {}})["status"]["token"]


async def until(true, what, timeout_s=DEADLINE_S):
    """Wait for a state, with a deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = true()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return
        assert time.monotonic() < deadline, f"still not: {what}"
        await asyncio.sleep(0.02)
