"""LeaderWorkerSet for tests: its CustomResourceDefinition, and a controller that makes the pods."""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import yaml
from servers import ApiServer, assets, wait_until

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import PODS, SETS

Object = dict[str, Any]
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
NAME = "leaderworkersets.leaderworkerset.x-k8s.io"
SERVED = "/apis/leaderworkerset.x-k8s.io/v1/leaderworkersets"
LABEL = "leaderworkerset.sigs.k8s.io/"
_TEMPLATE = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
# The fields that KubeAI sets. The real one, which tests/cluster/build.sh gets, checks pods too.
_SPEC = {
    "type": "object",
    "required": ["leaderWorkerTemplate"],
    "properties": {
        "replicas": {"type": "integer", "default": 1},
        "startupPolicy": {"type": "string", "enum": ["LeaderCreated", "LeaderReady"]},
        "leaderWorkerTemplate": {
            "type": "object",
            "required": ["workerTemplate"],
            "properties": {
                "size": {"type": "integer", "default": 1},
                "restartPolicy": {"type": "string"},
                "leaderTemplate": _TEMPLATE,
                "workerTemplate": _TEMPLATE,
            },
        },
    },
}


def definition(server: ApiServer) -> Object:
    """LeaderWorkerSet's own where it is there, else one with the fields that are used."""
    folder = assets("leaderworkersets.yaml")
    if server.kind == "real" and folder is not None:
        found: Object = yaml.safe_load((folder / "leaderworkersets.yaml").read_text())
        return found
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": _SPEC}}},
    }
    names = {"kind": "LeaderWorkerSet", "plural": "leaderworkersets", "shortNames": ["lws"]}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME},
        "spec": {
            "group": "leaderworkerset.x-k8s.io",
            "scope": "Namespaced",
            "names": names,
            "versions": [version],
        },
    }


@contextlib.contextmanager
def installed(server: ApiServer) -> Iterator[None]:
    """The API has LeaderWorkerSets within the block."""
    code, answer = server.request("POST", CRDS, definition(server))
    assert code == 201, answer
    try:
        wait_until(lambda: server.request("GET", SERVED)[0] == 200, "LeaderWorkerSets are served")
        yield
    finally:
        server.request("DELETE", f"{CRDS}/{NAME}")
        wait_until(lambda: server.request("GET", SERVED)[0] == 404, "they are gone")


class Controller:
    """Makes the pods of each set, and deletes them with it: what LeaderWorkerSet's own does."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._made: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._follow = asyncio.create_task(
            kube.follow(SETS, kube.namespace, replaced=self._replaced, changed=self._changed)
        )

    async def stop(self) -> None:
        self._follow.cancel()
        await asyncio.gather(self._follow, *self._tasks, return_exceptions=True)

    def _replaced(self, sets: list[Object]) -> None:
        for one in sets:
            self._changed("ADDED", one)

    def _changed(self, kind: str, one: Object) -> None:
        uid = one["metadata"]["uid"]
        if kind == "DELETED":
            self._start(self._delete(one))
        elif uid not in self._made:
            self._made.add(uid)
            self._start(self._create(one))

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            print("the controller of LeaderWorkerSets failed:", repr(task.exception()))

    async def _create(self, one: Object) -> None:
        group = one["spec"]["leaderWorkerTemplate"]
        for index in range(group["size"]):
            pod = copy.deepcopy(group["workerTemplate" if index else "leaderTemplate"])
            await self._kube.create(PODS, self._pod(one, pod, index))

    def _pod(self, one: Object, pod: Object, index: int) -> Object:
        meta, name = one["metadata"], f"{one['metadata']['name']}-0"
        pod["metadata"]["name"] = f"{name}-{index}" if index else name
        pod["metadata"]["labels"] |= {
            f"{LABEL}name": meta["name"],
            f"{LABEL}group-index": "0",
            f"{LABEL}worker-index": str(index),
        }
        # A StatefulSet in truth, which the embedded API does not have.
        owner = {"apiVersion": SETS.api_version, "kind": SETS.kind, "name": meta["name"]}
        owner |= {"uid": meta["uid"], "controller": True}
        pod["metadata"]["ownerReferences"] = [owner]
        variables = {
            "LWS_LEADER_ADDRESS": f"{name}.{meta['name']}.{meta['namespace']}",
            "LWS_GROUP_SIZE": str(one["spec"]["leaderWorkerTemplate"]["size"]),
            "LWS_WORKER_INDEX": str(index),
        }
        for container in pod["spec"]["containers"]:
            env = [{"name": key, "value": value} for key, value in variables.items()]
            container["env"] = [*env, *container.get("env", ())]
        return pod

    async def _delete(self, one: Object) -> None:
        selector = f"{LABEL}name={one['metadata']['name']}"
        pods, _ = await self._kube.list(PODS, self._kube.namespace, labels=selector)
        for pod in pods:
            with contextlib.suppress(ApiError):
                await self._kube.delete(PODS, pod["metadata"]["name"])
