"""Kill the operator at every single write of a Model's life: the final state is the same.

A proxy in front of the API counts the writes: create → scale to 3 → roll out → adapter →
delete with cache. For each k (or each sixteenth, see STEP) the operator is killed before the k-th
change is sent and, in another life, after it is made; a new one starts at once. What a cluster's
other parts do (nodes, engines, the loader, the Job controller, the collectors of pods and of
garbage) this test does itself, on both APIs.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
from datetime import UTC, datetime

import pytest
from fakes.lora import Engine
from operators import CONFIG, Replica, World, as_operator, until
from proxies import Proxy

from kubeai.kube.client import Kube
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS, JOBS, MODELS, PODS, PVCS
from kubeai.podspec.adapters import url_hash

pytestmark = pytest.mark.timeout(400)
STEP = int(os.environ.get("CRASH_STEP", "16"))  # 1: every change, as CI does on the real API
LIVES_AT_ONCE = 4  # of 8, one needed 85 of its 90 s beside other work
LIFE_TIMEOUT_S = 90.0
CLAIM = "shared-model-cache-fast"
SETTINGS = (
    CONFIG.replace("interval: 100ms", "interval: 10m")
    + "cacheProfiles: {fast: {sharedFilesystem: {storageClassName: nfs}}}\n"
    + "allowPodAddressOverride: true\n"
)
ADAPTER = "hf://org/adapter"


class Surroundings:
    """Nodes, engines and loaders, the Job controller and the collectors of one namespace."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self.engines: dict[str, Engine] = {}
        self.alive: set[str] = set()
        self.most = 0
        self.folders: set[str] = set()  # in the cache
        self._jobs: set[asyncio.Task[None]] = set()
        namespace = kube.namespace
        self._tasks = [
            asyncio.create_task(
                kube.follow(PODS, namespace, replaced=self._replaced, changed=self._pod)
            ),
            asyncio.create_task(
                kube.follow(JOBS, namespace, replaced=lambda jobs: None, changed=self._job)
            ),
            asyncio.create_task(
                kube.follow(MODELS, namespace, replaced=lambda models: None, changed=self._model)
            ),
        ]

    async def stop(self) -> None:
        for task in [*self._tasks, *self._jobs]:
            task.cancel()
        await asyncio.gather(*self._tasks, *self._jobs, return_exceptions=True)
        await asyncio.gather(*(engine.stop() for engine in self.engines.values()))

    def run(self, pod: str, command: list[str]):
        return self.engines[pod].run(command)

    def _replaced(self, pods) -> None:
        for pod in pods:
            self._pod("ADDED", pod)

    def _pod(self, kind: str, pod) -> None:
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        if kind == "DELETED" or "deletionTimestamp" in pod["metadata"]:
            self.alive.discard(uid)
            if kind != "DELETED":  # a delete that was cut off half way: the pod collector's
                self._do(self._kube.delete(PODS, name, uid=uid, grace_s=0))
            return
        self.alive.add(uid)
        self.most = max(self.most, len(self.alive))
        if kind == "ADDED":
            self._do(self._start(name))

    async def _start(self, name: str) -> None:
        old = self.engines.pop(name, None)
        if old is not None:
            await old.stop()
        engine = self.engines[name] = Engine()
        port = await engine.start()
        where = {"model-pod-ip": "127.0.0.1", "model-pod-port": str(port)}
        await self._kube.patch(PODS, name, {"metadata": {"annotations": where}})
        running = {"running": {"startedAt": _now()}}
        containers = [
            {
                "name": name,
                "image": "i",
                "imageID": "i",
                "ready": True,
                "restartCount": 0,
                "state": running,
            }
            for name in ("server", "loader")
        ]
        status = {
            "phase": "Running",
            "podIP": "127.0.0.1",
            "podIPs": [{"ip": "127.0.0.1"}],
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": containers,
        }
        await self._kube.patch(PODS, name, {"status": status}, subresource="status")

    def _job(self, kind: str, job) -> None:
        if kind == "DELETED":
            return
        if "deletionTimestamp" in job["metadata"]:
            self._do(self._collect(job))
        elif not (job.get("status") or {}).get("conditions"):
            self._do(self._finish(job))

    async def _finish(self, job) -> None:
        container = job["spec"]["template"]["spec"]["containers"][0]
        if container["name"] == "loader":
            self.folders.add(container["args"][1])
        else:
            self.folders.difference_update(container["command"][3:])
        ends = ("SuccessCriteriaMet", "Complete")
        status = {
            "startTime": _now(),
            "completionTime": _now(),
            "succeeded": 1,
            "uncountedTerminatedPods": {},
            "conditions": [
                {"type": end, "status": "True", "lastTransitionTime": _now()} for end in ends
            ],
        }
        await self._kube.patch(
            JOBS, job["metadata"]["name"], {"status": status}, subresource="status"
        )

    def _model(self, kind: str, model) -> None:
        if kind == "DELETED":
            self._do(self._delete_jobs(model["metadata"]["uid"]))

    async def _delete_jobs(self, owner: str) -> None:
        for job in (await self._kube.list(JOBS, self._kube.namespace))[0]:
            if owner in [o["uid"] for o in job["metadata"].get("ownerReferences", ())]:
                await self._kube.delete(JOBS, job["metadata"]["name"])

    async def _collect(self, job) -> None:
        meta = {"uid": job["metadata"]["uid"], "finalizers": []}
        await self._kube.patch(JOBS, job["metadata"]["name"], {"metadata": meta})

    def _do(self, work) -> None:
        async def do() -> None:
            with contextlib.suppress(ApiError):  # it is gone, or somebody was faster
                await work

        task = asyncio.create_task(do())
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Life:
    """One namespace with an operator that is killed once."""

    def __init__(self, api, namespace: str, directory) -> None:
        self._api = api
        self._directory = directory
        self._namespace = namespace
        self.killed = asyncio.Event()
        self.kubes: list[Kube] = []
        self.replicas: list[Replica] = []
        self._dead: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        directory = self._directory
        self.kube = await self._connect(self._api, directory / "direct")
        self.world = World(self.kube)
        self.around = Surroundings(self.kube)
        self.proxy = Proxy(self._api, self.around.run)
        await self.proxy.start()
        account = await asyncio.to_thread(as_operator, self._api, self._namespace)
        self._operator_api = account._replace(url=self.proxy.url)
        await self._start_operator()

    async def _connect(self, api, file) -> Kube:
        kube = await Kube.connect(str(api.kubeconfig(file, self._namespace)))
        self.kubes.append(kube)
        return kube

    async def _start_operator(self) -> None:
        kube = await self._connect(self._operator_api, self._directory / "proxied")
        self.replicas.append(Replica(kube, "one", SETTINGS))

    def kill(self) -> None:
        """Gone without a word, in the middle of whatever it does."""
        replica = self.replicas.pop()
        replica.operator.leader.release = _nothing
        replica.task.cancel()
        self._dead.append(replica.task)
        self.killed.set()

    async def _restart(self) -> None:
        await self.killed.wait()
        await asyncio.gather(*self._dead, return_exceptions=True)
        await self._start_operator()

    async def close(self) -> None:
        self.proxy.uncut()  # what is written while it stops (Events) kills nobody
        for replica in self.replicas:
            await replica.stop()
        await asyncio.gather(*self._dead, return_exceptions=True)
        await self.around.stop()
        await self.proxy.stop()
        for kube in self.kubes:
            await kube.close()

    async def live(self) -> tuple[dict, dict]:
        """The whole life of a Model; how it was before its deletion, and what is left after it."""
        restart = asyncio.create_task(self._restart())
        try:
            async with asyncio.timeout(LIFE_TIMEOUT_S):
                return await self._steps()
        finally:
            restart.cancel()
            await asyncio.gather(restart, return_exceptions=True)

    async def _steps(self) -> tuple[dict, dict]:
        world = self.world
        made = await world.create(
            cacheProfile="fast",
            adapters=[{"name": "first", "url": "hf://org/first"}],
            files=[{"path": "/etc/prompt", "content": "Be kind."}],
            autoscalingDisabled=True,
            replicas=1,
            image="vllm",
        )
        folder = f"/models/m-{made['metadata']['uid']}"
        await self._settled(1, first="hf://org/first")
        assert self.around.folders == {folder}
        await self.kube.patch(MODELS, "m", {"spec": {"replicas": 3}}, subresource="scale")
        await self._settled(3, first="hf://org/first")
        await self.kube.patch(MODELS, "m", {"spec": {"args": ["--new"], "files": None}})
        await self._settled(3, first="hf://org/first")
        adapters = [{"name": "second", "url": ADAPTER}]
        await self.kube.patch(MODELS, "m", {"spec": {"adapters": adapters}})
        await self._settled(3, second=ADAPTER)
        assert self.around.most <= 4
        alive = await self._snapshot()
        await self.kube.delete(MODELS, "m")
        await until(self._is_gone, "the Model, its pods and Jobs are gone")
        assert self.around.folders == set()
        return alive, await self._snapshot()

    async def _settled(self, replicas: int, **adapters: str) -> None:
        hashes = {name: url_hash(url) for name, url in adapters.items()}

        async def settled() -> bool:
            pods = await self.world.pods()
            model = await self.world.model()
            conditions = model.get("status", {}).get("conditions", [])
            says = {c["type"]: c["reason"] for c in conditions}
            generations = {c["observedGeneration"] for c in conditions}
            args = model["spec"].get("args", [])
            maps, _ = await self.kube.list(CONFIGMAPS, self._namespace)
            has_files = any(one["metadata"]["name"] == "model-m-files" for one in maps)
            return (
                has_files == bool(model["spec"].get("files"))
                and len(pods) == replicas
                and all(_adapters(pod) == hashes for pod in pods)
                and all(_has_args(pod, args) for pod in pods)
                and says.get("Progressing") == "UpToDate"
                and says.get("AdaptersLoaded") == "Loaded"
                and says.get("Degraded") == "AsExpected"
                and generations == {model["metadata"]["generation"]}
            )

        await until(settled, f"{replicas} replicas with {adapters}", LIFE_TIMEOUT_S)
        for pod in await self.world.pods():
            assert self.around.engines[pod["metadata"]["name"]].adapters == adapters

    async def _is_gone(self) -> bool:
        for resource in (MODELS, PODS, JOBS):
            if (await self.kube.list(resource, self._namespace))[0]:
                return False
        return True

    async def _snapshot(self) -> dict:
        """Everything that the operator keeps, without what differs between two lives."""
        found = {}
        for resource in (MODELS, PODS, JOBS, PVCS, CONFIGMAPS):
            items, _ = await self.kube.list(resource, self._namespace)
            for item in items:
                if item["metadata"]["name"] in ("kube-root-ca.crt", "kubeai-autoscaler-state"):
                    continue
                name = item["metadata"]["name"]
                if resource is PODS:  # it ends in what follows from the Model's uid
                    name = f"pod {len([key for key in found if key[0] == 'pods'])}"
                found[resource.plural, name] = _timeless(item)
        return found


def _adapters(pod) -> dict[str, str]:
    prefix = "adapter.kubeai.org/"
    labels = pod["metadata"]["labels"].items()
    return {key.removeprefix(prefix): value for key, value in labels if key.startswith(prefix)}


def _has_args(pod, args: list[str]) -> bool:
    return set(args) <= set(pod["spec"]["containers"][0]["args"])


def _timeless(item) -> dict:
    """The parts that must be the same, whoever was killed when."""
    meta = item["metadata"]
    timely = ("pod-hash", "kubeai.org/model-uid")
    labels = {k: v for k, v in (meta.get("labels") or {}).items() if k not in timely}
    conditions = (item.get("status") or {}).get("conditions") or []
    return {
        "labels": labels,
        "annotations": sorted(meta.get("annotations") or {}),
        "finalizers": meta.get("finalizers"),
        "replicas": (item.get("status") or {}).get("replicas"),
        "conditions": {
            c["type"]: (c["status"], c["reason"], c["message"]) for c in conditions if "reason" in c
        },
        "data": item.get("data"),
    }


async def _nothing() -> None:
    pass


async def _life(api, directory, cut=None) -> tuple[tuple[dict, dict], list[str], bool]:
    """The outcome of one life, its calls, and whether the operator was killed in it."""
    namespace = f"test-{secrets.token_hex(4)}"
    await asyncio.to_thread(
        api.request, "POST", "/api/v1/namespaces", {"metadata": {"name": namespace}}
    )
    directory.mkdir()
    life = Life(api, namespace, directory)
    await life.start()
    if cut is not None:
        k, when = cut
        life.proxy.cut(k, when, life.kill)
    try:
        return await life.live(), life.proxy.calls, life.killed.is_set()
    except BaseException as error:
        error.add_note(f"cut: {cut}; calls: {life.proxy.calls}")
        for resource in (MODELS, PODS, JOBS, PVCS):
            error.add_note(str((await life.kube.list(resource, namespace))[0]))
        raise
    finally:
        await life.close()


def _differences(expected, outcome) -> list:
    """What two lives ended in, where it is not the same."""
    return [
        (key, before.get(key), after.get(key))
        for before, after in zip(expected, outcome, strict=True)
        for key in before.keys() | after.keys()
        if before.get(key) != after.get(key)
    ]


async def test_operator_killed_at_any_write_converges_to_the_same_state(api_server, tmp_path):
    expected, calls, _ = await _life(api_server, tmp_path / "unharmed")
    print(*calls, sep="\n")
    cuts = list(itertools.product(range(1, len(calls) + 1, STEP), ("before", "after")))
    free = asyncio.Semaphore(LIVES_AT_ONCE)
    lived, missed = [], []

    async def one(k: int, when: str) -> None:
        async with free:
            outcome, made, killed = await _life(api_server, tmp_path / f"{k}-{when}", (k, when))
        different = _differences(expected, outcome)
        assert not different, f"{different}; killed {when} call {k} of {made}"
        lived.append((k, when))
        if not killed:  # this life needed fewer calls: what is told in Events may differ by a few
            missed.append((k, when))

    async with asyncio.TaskGroup() as lives:
        for cut in cuts:
            lives.create_task(one(*cut))
    print(f"{len(calls)} changes, {len(cuts) - len(missed)} lives with a kill")
    assert sorted(lived) == sorted(cuts)
    assert len(missed) <= len(cuts) // 10
