"""Measure the control plane on a real Kubernetes API: reaction times, CPU, memory and writes.

    export KUBEBUILDER_ASSETS=$(tests/cluster/build.sh)
    python bench/control_plane.py [--quick] [--only wake] [--json FILE]

The cluster is etcd, kube-apiserver, controller-manager, scheduler and kwok (`tests/contract/
servers.py`), all on this machine; scheduler and controller-manager may send as much as they like.
`kubeai serve` runs in a process of its own with one worker, and this file gives that process stop-
watches (``--serve``); load and looking on are in this process. Parts:

- ``wake``: one request to a Model at zero. Until its pod is seen by a watch of ours; from the
  moment that this watch shows the pod ready (and, ``since_sent``, that we tell the API so) until
  the engine has the request;
- ``burst``: 50 Models of 5 replicas, sent at once, until every status says 5 ready, and beside it
  a script that sends 250 such pods and waits until it has seen them ready, in turns. Both send
  16 requests at a time;
- ``leaving``: from the moment that a watch of ours shows a pod terminating or not ready any more
  (and, ``since_sent``, that we tell the API so) until the supervisor has sent the worker a route
  without it. Which of two watches the API tells first is chance: some times are below zero;
- ``scale``: 1,000 Models of 10 pods: a start until synced, memory, the time of a reconcile (its
  writes included) while pods fall and return, and while nothing changes: CPU, and every
  write in the API's audit log;
- ``storm``: started while the API answers each write with 409, 429 or 500: writes to one object in
  any second, and whether the state is right after the storm;
- ``takeover``: two replicas of KubeAI with the lease's defaults, the leading one killed or ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import signal
import ssl
import statistics
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import msgspec
import uvloop
import yaml
from aiohttp import web

from kubeai.api.config.system import parse_config
from kubeai.api.model import Model
from kubeai.kube.client import Kube
from kubeai.kube.resources import MODELS, PODS
from kubeai.operator import events
from kubeai.operator.controller import Controller
from kubeai.operator.operator import POD_SELECTOR
from kubeai.operator.pods import PodObject, observe
from kubeai.podspec import build_pod
from kubeai.supervisor.supervisor import Supervisor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "contract"))
from servers import CONTROL_PLANE, ApiServer, assets, cluster, install_models, node

PARTS = ("wake", "burst", "leaving", "scale", "storm", "takeover")
AT_A_TIME = 16  # requests that the load has in flight
CALLS_PER_S = 2_000
NODES, PODS_A_NODE = 10, 1_100
CHANGE_INTERVAL_S = 0.02
DEADLINE_S = 300.0
CONFIG: dict[str, Any] = {
    "resourceProfiles": {"cpu": {"requests": {"cpu": "1m", "memory": "1Mi"}}},
    "allowPodAddressOverride": True,
    "metricsAddr": "127.0.0.1:0",
    "healthAddress": "127.0.0.1:0",
    "gateway": {"drainAccept": "0s"},
}
# Pods that no scheduler sees: the bench itself says when they are ready.
UNSCHEDULED = {
    "modelServerPods": {
        "jsonPatches": [{"op": "add", "path": "/spec/schedulerName", "value": "nobody"}]
    }
}
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


@dataclass(frozen=True)
class Effort:
    wakes: int
    pairs: int
    models: int  # of burst
    leaving: int
    scale: int  # Models of 10 pods
    changes_s: float
    idle_s: float
    storm_s: float
    takeovers: int


FULL = Effort(60, 5, 50, 200, 1000, 30.0, 60.0, 20.0, 3)
QUICK = Effort(8, 1, 10, 20, 50, 4.0, 4.0, 3.0, 1)


# -- kubeai serve, with stop-watches ---------------------------------------------------------------


def serve_with_stopwatches() -> None:
    """`kubeai serve`; for each line on standard input, what was measured since the last one."""
    reconciles: list[tuple[float, float]] = []  # seconds, and those without waiting for the API
    published: list[tuple[float, str, int]] = []  # CLOCK_MONOTONIC, model, endpoints
    reconcile, publish, call = Controller.reconcile, Supervisor._publish, Kube._call
    calls: ContextVar[list[tuple[float, float]]] = ContextVar("calls")  # of one reconcile

    async def timed(controller: Controller, name: str) -> float | None:
        began_s = time.monotonic()
        calls.set([])
        try:
            return await reconcile(controller, name)
        finally:
            took_s = time.monotonic() - began_s
            reconciles.append((took_s, took_s - covered(calls.get())))

    async def called(kube: Kube, *arguments: Any, **options: Any) -> bytes:
        began_s = time.monotonic()
        try:
            return await call(kube, *arguments, **options)
        finally:
            calls.get([]).append((began_s, time.monotonic()))

    def told(supervisor: Supervisor, model: str, route: Any) -> None:
        publish(supervisor, model, route)
        count = 0 if route is None else len(route.endpoints)
        published.append((time.monotonic(), model, count))

    def answer() -> None:
        nonlocal reconciles, published
        for _ in sys.stdin:
            taken = {"reconciles": reconciles, "published": published}
            reconciles, published = [], []
            print(json.dumps(taken), flush=True)

    Controller.reconcile, Supervisor._publish, Kube._call = timed, told, called
    threading.Thread(target=answer, daemon=True).start()
    sys.argv = ["kubeai", "serve", "--host", "127.0.0.1", "--port", "0"]
    from kubeai.cli import main as kubeai

    kubeai()


def covered(spans: list[tuple[float, float]]) -> float:
    """The time that some spans cover together."""
    total_s, until_s = 0.0, -math.inf
    for began_s, ended_s in sorted(spans):
        total_s += max(0.0, ended_s - max(began_s, until_s))
        until_s = max(until_s, ended_s)
    return total_s


class Serve:
    """A `kubeai serve` process, and when it logged what."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.pid = process.pid
        self.log: list[tuple[float, dict[str, Any]]] = []
        self._news = asyncio.Event()

    async def read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            try:
                self.log.append((time.monotonic(), json.loads(line)))
            except ValueError:
                print(line.decode(), end="", file=sys.stderr)
            self._news.set()
            self._news = asyncio.Event()

    async def said(self, event: str, after_s: float = 0.0) -> tuple[float, dict[str, Any]]:
        """The first such log line, and when it came (CLOCK_MONOTONIC)."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for at_s, entry in self.log:
                    if entry.get("event") == event and at_s >= after_s:
                        return at_s, entry
                if self.process.returncode is not None:
                    raise SystemExit(f"kubeai serve ended: {self.log[-3:]}")
                await self._news.wait()

    async def endpoint(self) -> str:
        return str((await self.said("serving"))[1]["endpoint"])

    async def measured(self) -> dict[str, Any]:
        """What the stop-watches took since the last call."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        return json.loads(await self.process.stdout.readline())

    @property
    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# -- what the load does and sees -------------------------------------------------------------------


class Eyes:
    """What a watch of the bench's own shows of one namespace, and when it came."""

    def __init__(self, kube: Kube, labels: str = "") -> None:
        self.pods: dict[str, float] = {}  # pod's name → first seen
        self.model_of: dict[str, str] = {}
        self.ready: dict[str, float] = {}  # pod's name → ready since
        self.leaving: set[str] = set()
        self.fallen: dict[str, float] = {}  # pod's name → not ready any more, or terminating, since
        self.models: dict[str, Model] = {}
        self.as_wanted: set[str] = set()  # Models whose status says what they ask for
        self._news = asyncio.Event()
        follow = kube.follow
        self._tasks = [
            asyncio.create_task(coroutine)
            for coroutine in (
                follow(
                    PODS,
                    kube.namespace,
                    labels=labels,
                    type=PodObject,
                    replaced=lambda pods: [self._pod("ADDED", pod) for pod in pods],
                    changed=self._pod,
                ),
                follow(
                    MODELS,
                    kube.namespace,
                    type=Model,
                    replaced=lambda models: [self._model("ADDED", model) for model in models],
                    changed=self._model,
                ),
            )
        ]

    def _pod(self, kind: str, obj: PodObject) -> None:
        pod, now_s = observe(obj), time.monotonic()
        self._news.set()
        if pod.name in self.ready and (pod.terminating or not pod.ready):
            self.fallen.setdefault(pod.name, now_s)
        if kind == "DELETED":
            for known in (self.pods, self.ready, self.model_of):
                known.pop(pod.name, None)
            self.leaving.discard(pod.name)
            return
        self.pods.setdefault(pod.name, now_s)
        self.model_of[pod.name] = pod.model
        if pod.ready:
            self.ready.setdefault(pod.name, now_s)
            if not pod.terminating:
                self.fallen.pop(pod.name, None)
        else:
            self.ready.pop(pod.name, None)
        if pod.terminating:
            self.leaving.add(pod.name)

    def _model(self, kind: str, model: Model) -> None:
        name = model.metadata.name
        self._news.set()
        self.models[name] = model
        self.as_wanted.discard(name)
        if kind == "DELETED":
            del self.models[name]
            return
        wanted, told = model.spec.replicas, model.status.replicas
        if wanted is not None and told is not None and told.all == told.ready == wanted:
            self.as_wanted.add(name)

    async def until(self, what: str, true: Callable[[], Any]) -> Any:
        try:
            async with asyncio.timeout(DEADLINE_S):
                while not (found := true()):
                    await self._news.wait()
                    self._news.clear()
                    for task in self._tasks:
                        if task.done():
                            task.result()
                return found
        except TimeoutError:
            raise SystemExit(f"not within {DEADLINE_S:.0f} s: {what}") from None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def at_a_time(jobs: Iterable[Awaitable[Any]], count: int = AT_A_TIME) -> None:
    """All of them, ``count`` at once."""
    left = iter(jobs)

    async def some() -> None:
        for job in left:
            await job

    await asyncio.gather(*(some() for _ in range(count)))


def manifest(name: str, annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "annotations": annotations or {}},
        "spec": {
            "url": "hf://org/name",
            "engine": "VLLM",
            "features": ["TextGeneration"],
            "resourceProfile": "cpu:1",
            "image": "registry.example/engine:1",
            "minReplicas": 0,
            **spec,
        },
    }


def spread(times_s: list[float]) -> dict[str, float]:
    """p50, p99 and worst of some times, in milliseconds."""
    ordered = sorted(times_s)
    return {
        "n": len(ordered),
        "p50_ms": statistics.median(ordered) * 1e3,
        "p99_ms": ordered[math.ceil(len(ordered) * 0.99) - 1] * 1e3,
        "worst_ms": ordered[-1] * 1e3,
    }


class Engine(asyncio.Protocol):
    """Answers every request with the same few words; notes when one came."""

    came: asyncio.Queue[float]
    HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    BODY = b'{"object": "chat.completion", "choices": []}'

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if b"POST " in data:
            self.came.put_nowait(time.monotonic())
        if data.endswith(b"}"):
            head = (
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            )
            self._transport.write(head % len(self.BODY) + self.BODY)


# -- the parts -------------------------------------------------------------------------------------


class Bench:
    """What all parts measure on. One namespace a part."""

    def __init__(self, api: ApiServer, folder: Path, effort: Effort) -> None:
        self.api = api
        self.folder = folder
        self.effort = effort

    @contextlib.asynccontextmanager
    async def space(self, name: str) -> AsyncIterator[Kube]:
        """A namespace, and the bench's own connection."""
        code, answer = self.api.request("POST", "/api/v1/namespaces", {"metadata": {"name": name}})
        assert code == 201, answer
        kube = await Kube.connect(str(self.api.kubeconfig(self.folder / name, name)))
        try:
            yield kube
        finally:
            await kube.close()
            self.api.request("DELETE", f"/api/v1/namespaces/{name}")

    @contextlib.asynccontextmanager
    async def serve(
        self, kube: Kube, config: dict[str, Any], identity: str = "one", url: str = ""
    ) -> AsyncIterator[Serve]:
        """`kubeai serve`, just started. ``url``: of an API other than the cluster's own."""
        file = self.folder / f"{kube.namespace}-{identity}.yaml"
        file.write_text(yaml.safe_dump(CONFIG | config))
        api = self.api._replace(url=url) if url else self.api
        kubeconfig = api.kubeconfig(self.folder / f"{kube.namespace}-{identity}", kube.namespace)
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, __file__, "--serve"),
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

    async def wake(self) -> dict[str, Any]:
        created, sent_on, seen, answered = [], [], [], []
        Engine.came = asyncio.Queue()
        server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        there = {"model-pod-ip": "127.0.0.1", "model-pod-port": str(port)}
        async with (
            self.space("wake") as kube,
            self.serve(kube, UNSCHEDULED) as serve,
            aiohttp.ClientSession() as session,
        ):
            url = f"{await serve.endpoint()}/chat/completions"
            await serve.said("leading")
            eyes = Eyes(kube)
            for i in range(self.effort.wakes):
                name = f"m{i}"
                await kube.create(MODELS, manifest(name, there))
                await eyes.until("the Model is known", lambda n=name: n in eyes.as_wanted)
                began_s = time.monotonic()
                request = asyncio.create_task(chat(session, url, name))
                (pod,) = await eyes.until(
                    "a pod", lambda n=name: [p for p, m in eyes.model_of.items() if m == n]
                )
                created.append(eyes.pods[pod] - began_s)
                ready_s = time.monotonic()
                await set_ready(kube, pod, True)
                came_s = await Engine.came.get()
                sent_on.append(came_s - ready_s)
                seen_s = await eyes.until("it is seen", lambda p=pod: eyes.ready.get(p))
                seen.append(came_s - seen_s)
                await request
                answered.append(time.monotonic() - began_s)
                await kube.delete(MODELS, name)
            await eyes.close()
        server.close()
        return {
            "created": spread(created),
            "since_seen": spread(seen),
            "since_sent": spread(sent_on),
            "answered": spread(answered),
        }

    async def burst(self) -> dict[str, Any]:
        count, replicas = self.effort.models, 5
        ours, script = [], []
        async with self.space("burst") as kube, self.serve(kube, {}) as serve:
            await serve.said("leading")
            eyes = Eyes(kube)
            for pair in range(self.effort.pairs):
                turns = [
                    (ours, self._models_at_once(kube, eyes, f"m{pair}", count, replicas)),
                    (script, self._pods_at_once(kube, eyes, f"p{pair}", count * replicas)),
                ]
                for times, turn in turns if pair % 2 else reversed(turns):
                    times.append(await turn)
            await eyes.close()
        return {
            "models": count,
            "replicas": replicas,
            "ours_s": statistics.median(ours),
            "script_s": statistics.median(script),
            "ratio": statistics.median(o / s for o, s in zip(ours, script, strict=True)),
            "runs": {"ours": ours, "script": script},
        }

    async def _models_at_once(
        self, kube: Kube, eyes: Eyes, prefix: str, count: int, replicas: int
    ) -> float:
        names = [f"{prefix}-{i}" for i in range(count)]
        began_s = time.monotonic()
        await at_a_time(kube.create(MODELS, manifest(n, minReplicas=replicas)) for n in names)
        await eyes.until("every status", lambda: eyes.as_wanted.issuperset(names))
        took_s = time.monotonic() - began_s
        await at_a_time(kube.delete(MODELS, name) for name in names)
        await eyes.until("no pod is left", lambda: not eyes.pods)
        return took_s

    async def _pods_at_once(self, kube: Kube, eyes: Eyes, prefix: str, count: int) -> float:
        model = msgspec.convert(manifest("any"), Model)
        pod = build_pod(model, parse_config(yaml.safe_dump(CONFIG)))
        meta = {"annotations": pod["metadata"]["annotations"]}  # no label, no owner: not ours
        names = [f"{prefix}-{i}" for i in range(count)]
        began_s = time.monotonic()
        await at_a_time(kube.create(PODS, pod | {"metadata": meta | {"name": n}}) for n in names)
        await eyes.until("every pod is ready", lambda: eyes.ready.keys() >= set(names))
        took_s = time.monotonic() - began_s
        await at_a_time(kube.delete(PODS, name, grace_s=0) for name in names)
        await eyes.until("no pod is left", lambda: not eyes.pods)
        return took_s

    async def leaving(self) -> dict[str, Any]:
        count, replicas = 20, 5
        times: dict[str, list[float]] = {"terminating": [], "not ready": []}
        seen: dict[str, list[float]] = {kind: [] for kind in times}
        async with self.space("leaving") as kube, self.serve(kube, {}) as serve:
            await serve.said("leading")
            eyes = Eyes(kube)
            names = [f"m{i}" for i in range(count)]
            await at_a_time(kube.create(MODELS, manifest(n, minReplicas=replicas)) for n in names)
            whole = lambda: eyes.as_wanted.issuperset(names)  # noqa: E731
            await eyes.until("every status", whole)
            turns = zip(range(self.effort.leaving), itertools.cycle(times), strict=False)
            for i, kind in turns:
                name = names[i % count]
                pod = next(p for p, m in eyes.model_of.items() if m == name)
                await serve.measured()
                began_s = time.monotonic()
                if kind == "terminating":
                    await kube.delete(PODS, pod)
                else:
                    await set_ready(kube, pod, False)
                published_s = await first_publish(serve, name, replicas - 1)
                times[kind].append(published_s - began_s)
                seen_s = await eyes.until("it is seen", lambda p=pod: eyes.fallen.get(p))
                seen[kind].append(published_s - seen_s)
                if kind == "not ready":
                    await set_ready(kube, pod, True)
                await eyes.until(
                    "five are ready again",
                    lambda: len(eyes.ready) == count * replicas and not eyes.leaving and whole(),
                )
            await eyes.close()
        return {
            kind: {"since_seen": spread(seen[kind]), "since_sent": spread(times[kind])}
            for kind in times
        }

    async def scale(self) -> dict[str, Any]:
        effort, replicas = self.effort, 10
        found: dict[str, Any] = {"models": effort.scale, "pods": effort.scale * replicas}
        names = [f"m{i}" for i in range(effort.scale)]
        async with self.space("scale") as kube:
            eyes = Eyes(kube)
            async with self.serve(kube, {}) as serve:
                await serve.said("leading")
                began_s = time.monotonic()
                await at_a_time(
                    kube.create(MODELS, manifest(n, minReplicas=replicas)) for n in names
                )
                await eyes.until("every status", lambda: len(eyes.as_wanted) == len(names))
                found["made_s"] = time.monotonic() - began_s
                found["maker_mb"] = serve.resident_mb
                serve.process.terminate()
                await serve.process.wait()
            held, _ = await kube.list(PODS, kube.namespace, labels=POD_SELECTOR, type=PodObject)
            assert sum(observe(pod).ready for pod in held) == found["pods"], len(held)
            began_s = time.monotonic()
            async with self.serve(kube, {}) as serve:
                found["synced_s"] = (await serve.said("synced"))[0] - began_s
                found["serving_s"] = (await serve.said("serving"))[0] - began_s
                await serve.said("leading")
                await self._quiet(serve)
                found["at_rest_s"] = time.monotonic() - began_s
                found["synced_mb"] = serve.resident_mb
                found["first"] = spread([t for t, _ in (await serve.measured())["reconciles"]])
                found |= await self._changes(kube, eyes, serve)
                found |= await self._idle(kube, serve)
                found["resident_mb"] = serve.resident_mb
            await eyes.close()
        return found

    async def _quiet(self, serve: Serve) -> None:
        """Until the supervisor has next to nothing to do."""
        while True:
            before_s = serve.cpu_s
            await asyncio.sleep(1)
            if serve.cpu_s - before_s < 0.1:
                return

    async def _changes(self, kube: Kube, eyes: Eyes, serve: Serve) -> dict[str, Any]:
        """Every 20 ms a pod falls, returns, or (one of 21) is deleted."""
        pods = random.Random(1).sample(sorted(eyes.pods), len(eyes.pods))
        fallen: set[str] = set()
        cpu_s, began_s = serve.cpu_s, time.monotonic()
        calls: list[float] = []
        for i in range(round(self.effort.changes_s / CHANGE_INTERVAL_S)):
            due_s = began_s + i * CHANGE_INTERVAL_S
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            sent_s = time.monotonic()
            if i % 21 == 20:
                fallen.discard(pods[-1])
                await kube.delete(PODS, pods.pop())
            else:
                pod, ready = pods[-1 - i % 21 // 2], i % 2 == 1
                (fallen.discard if ready else fallen.add)(pod)
                await set_ready(kube, pod, ready)
            calls.append(time.monotonic() - sent_s)
        cpu_s, took_s = serve.cpu_s - cpu_s, time.monotonic() - began_s
        for pod in fallen:
            await set_ready(kube, pod, True)
        await eyes.until("all is well", lambda: len(eyes.as_wanted) == self.effort.scale)
        reconciles = (await serve.measured())["reconciles"]
        return {
            "changes": len(calls),
            "changes_s": took_s,
            "changes_cpu": cpu_s / took_s,
            "calls": spread(calls),
            "reconcile": spread([took_s for took_s, _ in reconciles]),
            "reconcile_own": spread([own_s for _, own_s in reconciles]),
        }

    async def _idle(self, kube: Kube, serve: Serve) -> dict[str, Any]:
        await self._quiet(serve)
        log = self.folder / "audit.log"
        await asyncio.sleep(events.DELAY_S + 2)  # what the changes were worth an Event is written
        read, cpu_s, began_s = log.stat().st_size, serve.cpu_s, time.monotonic()
        await asyncio.sleep(self.effort.idle_s)
        cpu_s, took_s = serve.cpu_s - cpu_s, time.monotonic() - began_s
        await asyncio.sleep(1)  # the log is written a moment later
        writes: Counter[str] = Counter()
        with log.open("rb") as file:
            file.seek(read)
            for line in file:
                event = json.loads(line)
                if event.get("userAgent") == "kubeai":
                    what = event["objectRef"]
                    name = "/".join(filter(None, (what["resource"], what.get("subresource"))))
                    writes[f"{event['verb']} {name}"] += 1
        leases = sum(count for what, count in writes.items() if what.endswith(" leases"))
        return {
            "idle_s": took_s,
            "idle_cpu": cpu_s / took_s,
            "idle_writes": writes.total() - leases,
            "idle_lease_writes": leases,
            "idle_kinds": dict(writes),
        }

    async def storm(self) -> dict[str, Any]:
        names = [f"m{i}" for i in range(20)]
        async with self.space("storm") as kube, Storm(self.api).running() as storm:
            await at_a_time(kube.create(MODELS, manifest(n, minReplicas=3)) for n in names)
            eyes = Eyes(kube)
            storm.rages = True
            async with self.serve(kube, {}, url=storm.url) as serve:
                await serve.said("leading")
                await asyncio.sleep(self.effort.storm_s)
                storm.rages = False
                began_s = time.monotonic()
                await eyes.until("every status", lambda: eyes.as_wanted.issuperset(names))
                took_s = time.monotonic() - began_s
                right = Counter(eyes.model_of.values()) == dict.fromkeys(names, 3)
            await eyes.close()
        return {
            "storm_s": self.effort.storm_s,
            "answers": dict(storm.answers),
            "a_second": storm.most_a_second()[0],
            "object": storm.most_a_second()[1],
            "right": right,
            "after_s": took_s,
        }

    async def takeover(self) -> dict[str, Any]:
        times: dict[str, list[float]] = {"killed": [], "ended": []}
        for turn in range(self.effort.takeovers):
            killed, ended = await asyncio.gather(
                self._succeed(f"killed-{turn}", signal.SIGKILL),
                self._succeed(f"ended-{turn}", signal.SIGTERM),
            )
            times["killed"].append(killed)
            times["ended"].append(ended)
        return {kind: {"worst_s": max(found), "runs": found} for kind, found in times.items()}

    async def _succeed(self, space: str, number: int) -> float:
        """Seconds from a signal to the leader until the other replica leads."""
        patient = {"gateway": {}}  # drains as it does by default
        async with self.space(space) as kube, self.serve(kube, patient) as first:
            await first.said("leading")
            async with self.serve(kube, patient, "two") as second:
                await second.said("serving")
                await asyncio.sleep(random.uniform(2, 4))  # anywhere between two renewals
                began_s = time.monotonic()
                first.process.send_signal(number)
                return (await second.said("leading"))[0] - began_s


async def chat(session: aiohttp.ClientSession, url: str, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    async with session.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()


async def set_ready(kube: Kube, pod: str, ready: bool) -> None:
    """What a kubelet says; the other conditions stay as they are."""
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    patch = {"status": {"conditions": [condition]}}
    await kube.patch(PODS, pod, patch, subresource="status", kind="strategic")


async def first_publish(serve: Serve, model: str, count: int) -> float:
    """When the route had at most ``count`` endpoints for the first time."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for at_s, name, endpoints in (await serve.measured())["published"]:
                if name == model and endpoints <= count:
                    return at_s
            await asyncio.sleep(0.005)


# -- an API in trouble -----------------------------------------------------------------------------


class Storm:
    """A proxy before the API that refuses each write while it rages, but for those to leases."""

    KINDS = ((409, "Conflict"), (429, "TooManyRequests"), (500, "InternalError"))

    def __init__(self, api: ApiServer) -> None:
        self._api = api
        self._writes: defaultdict[str, list[float]] = defaultdict(list)  # object → when
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
        """Writes to one object in any second, and to which.

        A status is of its Model, a create of the name that it asks for.
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


# -- running it ------------------------------------------------------------------------------------


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


def line(result: dict[str, Any], prefix: str = "") -> str:
    parts = []
    for key, value in result.items():
        if isinstance(value, dict):
            parts.append(line(value, f"{prefix}{key} "))
        elif isinstance(value, int | float | str):
            shown = value if isinstance(value, str) else f"{value:.4g}"
            parts.append(f"{prefix}{key} {shown}")
    return ", ".join(parts)


async def run_part(bench: Bench, part: str) -> dict[str, Any]:
    began_s = time.monotonic()
    result: dict[str, Any] = await getattr(bench, part)()
    print(f"{part} ({time.monotonic() - began_s:.0f} s): {line(result)}", flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="run a one-minute sample of all parts")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_with_stopwatches()
        return 0
    if assets(*CONTROL_PLANE) is None:
        print("KUBEBUILDER_ASSETS holds no control plane: see tests/cluster/README.md")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the cluster
    results: dict[str, Any] = {}
    if options.only and options.json and options.json.exists():
        results = json.loads(options.json.read_text())  # the other parts stay
    with TemporaryDirectory() as folder, running_cluster(Path(folder)) as api:
        bench = Bench(api, Path(folder), QUICK if options.quick else FULL)
        for part in PARTS:
            if not options.only or part in options.only:
                results[part] = uvloop.run(run_part(bench, part))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
