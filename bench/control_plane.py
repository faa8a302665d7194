"""Measure the control plane on a real Kubernetes API: reaction times, CPU, memory and writes.

    export KUBEBUILDER_ASSETS=$(tests/cluster/build.sh)
    python bench/control_plane.py [--quick] [--only wake] [--json FILE]

The cluster consists of etcd, kube-apiserver, controller-manager, scheduler and kwok
(`tests/contract/servers.py`), all on this machine, without client-side rate limits for scheduler
and controller-manager. `kubeai serve` runs in a separate process with one worker, which this file
instruments with timers (``--serve``). The load generator and its watches run in this process.

Parts:

- ``wake``: one request to a Model at zero replicas. Measures the time until the load generator's
  watch reports the new pod, and the time from the pod being ready (as reported by that watch, or,
  for ``since_sent``, as sent to the API) until the engine receives the request;
- ``burst``: creates 50 Models of 5 replicas at once and waits until every status reports 5 ready
  replicas. Alternates with a script that creates 250 such pods and waits until its watch reports
  them ready. Both keep 16 API requests in flight;
- ``leaving``: the time from a pod terminating or becoming unready (as reported by the load
  generator's watch, or, for ``since_sent``, as sent to the API) until the supervisor sends the
  worker a route without it. The API notifies the two watches in no particular order, so some times
  are negative;
- ``scale``: 1,000 Models of 10 pods. Measures a restart until synced, memory, the duration of a
  reconcile (including its writes) while pods become unready and ready again, and, while nothing
  changes, the CPU use and every write in the API's audit log;
- ``storm``: starts while the API responds to each write with 409, 429 or 500. Measures the most
  writes to one object in any second, and checks that the state is right after the storm;
- ``takeover``: two replicas of KubeAI with the default lease settings; the leader is killed or
  terminated.
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
AT_A_TIME = 16  # API requests that the load generator keeps in flight
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
# Pods that no scheduler handles: the benchmark itself sets them ready.
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
    models: int  # in burst
    leaving: int
    scale: int  # Models of 10 pods
    changes_s: float
    idle_s: float
    storm_s: float
    takeovers: int


FULL = Effort(60, 5, 50, 200, 1000, 30.0, 60.0, 20.0, 3)
QUICK = Effort(8, 1, 10, 20, 50, 4.0, 4.0, 3.0, 1)


# -- kubeai serve, with timers ---------------------------------------------------------------------


def serve_with_timers() -> None:
    """Run `kubeai serve`; for each line on stdin, print the measurements since the previous one."""
    reconciles: list[
        tuple[float, float]
    ] = []  # duration in total, and without API calls, in seconds
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

    def timed_publish(supervisor: Supervisor, model: str, route: Any) -> None:
        publish(supervisor, model, route)
        count = 0 if route is None else len(route.endpoints)
        published.append((time.monotonic(), model, count))

    def answer() -> None:
        nonlocal reconciles, published
        for _ in sys.stdin:
            taken = {"reconciles": reconciles, "published": published}
            reconciles, published = [], []
            print(json.dumps(taken), flush=True)

    Controller.reconcile, Supervisor._publish, Kube._call = timed, timed_publish, called
    threading.Thread(target=answer, daemon=True).start()
    sys.argv = ["kubeai", "serve", "--host", "127.0.0.1", "--port", "0"]
    from kubeai.cli import main as kubeai

    kubeai()


def covered(spans: list[tuple[float, float]]) -> float:
    """The total time covered by the spans, which may overlap."""
    total_s, until_s = 0.0, -math.inf
    for began_s, ended_s in sorted(spans):
        total_s += max(0.0, ended_s - max(began_s, until_s))
        until_s = max(until_s, ended_s)
    return total_s


class Serve:
    """A `kubeai serve` process and its log lines with their arrival times."""

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

    async def logged(self, event: str, after_s: float = 0.0) -> tuple[float, dict[str, Any]]:
        """Wait for a log line; returns its arrival time (CLOCK_MONOTONIC) and its fields."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                for at_s, entry in self.log:
                    if entry.get("event") == event and at_s >= after_s:
                        return at_s, entry
                if self.process.returncode is not None:
                    raise SystemExit(f"kubeai serve ended: {self.log[-3:]}")
                await self._news.wait()

    async def endpoint(self) -> str:
        return str((await self.logged("serving"))[1]["endpoint"])

    async def measured(self) -> dict[str, Any]:
        """The measurements since the previous call."""
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


# -- load generator --------------------------------------------------------------------------------


class Observer:
    """The load generator's own watch of one namespace, with the time of each observation."""

    def __init__(self, kube: Kube, labels: str = "") -> None:
        self.pods: dict[str, float] = {}  # pod name → time first seen
        self.model_of: dict[str, str] = {}
        self.ready: dict[str, float] = {}  # pod name → ready since
        self.leaving: set[str] = set()
        self.fallen: dict[str, float] = {}  # pod name → unready or terminating since
        self.models: dict[str, Model] = {}
        self.as_wanted: set[str] = set()  # Models whose status reports all desired replicas ready
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
        desired, reported = model.spec.replicas, model.status.replicas
        if (
            desired is not None
            and reported is not None
            and reported.all == reported.ready == desired
        ):
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
            raise SystemExit(f"timed out after {DEADLINE_S:.0f} s: {what}") from None

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def at_a_time(jobs: Iterable[Awaitable[Any]], count: int = AT_A_TIME) -> None:
    """Run all jobs, ``count`` concurrently."""
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
    """The p50, p99 and maximum of the times, in milliseconds."""
    ordered = sorted(times_s)
    return {
        "n": len(ordered),
        "p50_ms": statistics.median(ordered) * 1e3,
        "p99_ms": ordered[math.ceil(len(ordered) * 0.99) - 1] * 1e3,
        "worst_ms": ordered[-1] * 1e3,
    }


class Engine(asyncio.Protocol):
    """A server with a constant response that records the arrival time of each request."""

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
    """The cluster that all parts use, with one namespace per part."""

    def __init__(self, api: ApiServer, folder: Path, effort: Effort) -> None:
        self.api = api
        self.folder = folder
        self.effort = effort

    @contextlib.asynccontextmanager
    async def space(self, name: str) -> AsyncIterator[Kube]:
        """Create a namespace; yields the load generator's connection to it."""
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
        """Start `kubeai serve`. ``url``: an API address to use instead of the cluster's."""
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
            await serve.logged("leading")
            observer = Observer(kube)
            for i in range(self.effort.wakes):
                name = f"m{i}"
                await kube.create(MODELS, manifest(name, there))
                await observer.until("the Model is known", lambda n=name: n in observer.as_wanted)
                began_s = time.monotonic()
                request = asyncio.create_task(chat(session, url, name))
                (pod,) = await observer.until(
                    "a pod", lambda n=name: [p for p, m in observer.model_of.items() if m == n]
                )
                created.append(observer.pods[pod] - began_s)
                ready_s = time.monotonic()
                await set_ready(kube, pod, True)
                came_s = await Engine.came.get()
                sent_on.append(came_s - ready_s)
                seen_s = await observer.until("it is seen", lambda p=pod: observer.ready.get(p))
                seen.append(came_s - seen_s)
                await request
                answered.append(time.monotonic() - began_s)
                await kube.delete(MODELS, name)
            await observer.close()
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
            await serve.logged("leading")
            observer = Observer(kube)
            for pair in range(self.effort.pairs):
                turns = [
                    (ours, self._models_at_once(kube, observer, f"m{pair}", count, replicas)),
                    (script, self._pods_at_once(kube, observer, f"p{pair}", count * replicas)),
                ]
                for times, turn in turns if pair % 2 else reversed(turns):
                    times.append(await turn)
            await observer.close()
        return {
            "models": count,
            "replicas": replicas,
            "ours_s": statistics.median(ours),
            "script_s": statistics.median(script),
            "ratio": statistics.median(o / s for o, s in zip(ours, script, strict=True)),
            "runs": {"ours": ours, "script": script},
        }

    async def _models_at_once(
        self, kube: Kube, observer: Observer, prefix: str, count: int, replicas: int
    ) -> float:
        names = [f"{prefix}-{i}" for i in range(count)]
        began_s = time.monotonic()
        await at_a_time(kube.create(MODELS, manifest(n, minReplicas=replicas)) for n in names)
        await observer.until("every status", lambda: observer.as_wanted.issuperset(names))
        took_s = time.monotonic() - began_s
        await at_a_time(kube.delete(MODELS, name) for name in names)
        await observer.until("no pod is left", lambda: not observer.pods)
        return took_s

    async def _pods_at_once(self, kube: Kube, observer: Observer, prefix: str, count: int) -> float:
        model = msgspec.convert(manifest("any"), Model)
        pod = build_pod(model, parse_config(yaml.safe_dump(CONFIG)))
        meta = {
            "annotations": pod["metadata"]["annotations"]
        }  # no label and no owner: KubeAI ignores them
        names = [f"{prefix}-{i}" for i in range(count)]
        began_s = time.monotonic()
        await at_a_time(kube.create(PODS, pod | {"metadata": meta | {"name": n}}) for n in names)
        await observer.until("every pod is ready", lambda: observer.ready.keys() >= set(names))
        took_s = time.monotonic() - began_s
        await at_a_time(kube.delete(PODS, name, grace_s=0) for name in names)
        await observer.until("no pod is left", lambda: not observer.pods)
        return took_s

    async def leaving(self) -> dict[str, Any]:
        count, replicas = 20, 5
        times: dict[str, list[float]] = {"terminating": [], "not ready": []}
        seen: dict[str, list[float]] = {kind: [] for kind in times}
        async with self.space("leaving") as kube, self.serve(kube, {}) as serve:
            await serve.logged("leading")
            observer = Observer(kube)
            names = [f"m{i}" for i in range(count)]
            await at_a_time(kube.create(MODELS, manifest(n, minReplicas=replicas)) for n in names)
            whole = lambda: observer.as_wanted.issuperset(names)  # noqa: E731
            await observer.until("every status", whole)
            turns = zip(range(self.effort.leaving), itertools.cycle(times), strict=False)
            for i, kind in turns:
                name = names[i % count]
                pod = next(p for p, m in observer.model_of.items() if m == name)
                await serve.measured()
                began_s = time.monotonic()
                if kind == "terminating":
                    await kube.delete(PODS, pod)
                else:
                    await set_ready(kube, pod, False)
                published_s = await first_publish(serve, name, replicas - 1)
                times[kind].append(published_s - began_s)
                seen_s = await observer.until("it is seen", lambda p=pod: observer.fallen.get(p))
                seen[kind].append(published_s - seen_s)
                if kind == "not ready":
                    await set_ready(kube, pod, True)
                await observer.until(
                    "five are ready again",
                    lambda: (
                        len(observer.ready) == count * replicas and not observer.leaving and whole()
                    ),
                )
            await observer.close()
        return {
            kind: {"since_seen": spread(seen[kind]), "since_sent": spread(times[kind])}
            for kind in times
        }

    async def scale(self) -> dict[str, Any]:
        effort, replicas = self.effort, 10
        found: dict[str, Any] = {"models": effort.scale, "pods": effort.scale * replicas}
        names = [f"m{i}" for i in range(effort.scale)]
        async with self.space("scale") as kube:
            observer = Observer(kube)
            async with self.serve(kube, {}) as serve:
                await serve.logged("leading")
                began_s = time.monotonic()
                await at_a_time(
                    kube.create(MODELS, manifest(n, minReplicas=replicas)) for n in names
                )
                await observer.until("every status", lambda: len(observer.as_wanted) == len(names))
                found["made_s"] = time.monotonic() - began_s
                found["maker_mb"] = serve.resident_mb
                serve.process.terminate()
                await serve.process.wait()
            held, _ = await kube.list(PODS, kube.namespace, labels=POD_SELECTOR, type=PodObject)
            assert sum(observe(pod).ready for pod in held) == found["pods"], len(held)
            began_s = time.monotonic()
            async with self.serve(kube, {}) as serve:
                found["synced_s"] = (await serve.logged("synced"))[0] - began_s
                found["serving_s"] = (await serve.logged("serving"))[0] - began_s
                await serve.logged("leading")
                await self._quiet(serve)
                found["at_rest_s"] = time.monotonic() - began_s
                found["synced_mb"] = serve.resident_mb
                found["first"] = spread([t for t, _ in (await serve.measured())["reconciles"]])
                found |= await self._changes(kube, observer, serve)
                found |= await self._idle(kube, serve)
                found["resident_mb"] = serve.resident_mb
            await observer.close()
        return found

    async def _quiet(self, serve: Serve) -> None:
        """Wait until the supervisor is nearly idle."""
        while True:
            before_s = serve.cpu_s
            await asyncio.sleep(1)
            if serve.cpu_s - before_s < 0.1:
                return

    async def _changes(self, kube: Kube, observer: Observer, serve: Serve) -> dict[str, Any]:
        """Every 20 ms, set a pod unready, set it ready again, or (one time in 21) delete it."""
        pods = random.Random(1).sample(sorted(observer.pods), len(observer.pods))
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
        await observer.until("all is well", lambda: len(observer.as_wanted) == self.effort.scale)
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
        await asyncio.sleep(events.DELAY_S + 2)  # until the Events about the changes are written
        read, cpu_s, began_s = log.stat().st_size, serve.cpu_s, time.monotonic()
        await asyncio.sleep(self.effort.idle_s)
        cpu_s, took_s = serve.cpu_s - cpu_s, time.monotonic() - began_s
        await asyncio.sleep(1)  # the audit log is written with a delay
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
            observer = Observer(kube)
            storm.rages = True
            async with self.serve(kube, {}, url=storm.url) as serve:
                await serve.logged("leading")
                await asyncio.sleep(self.effort.storm_s)
                storm.rages = False
                began_s = time.monotonic()
                await observer.until("every status", lambda: observer.as_wanted.issuperset(names))
                took_s = time.monotonic() - began_s
                right = Counter(observer.model_of.values()) == dict.fromkeys(names, 3)
            await observer.close()
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
        patient = {"gateway": {}}  # default drain settings
        async with self.space(space) as kube, self.serve(kube, patient) as first:
            await first.logged("leading")
            async with self.serve(kube, patient, "two") as second:
                await second.logged("serving")
                await asyncio.sleep(random.uniform(2, 4))  # at a random time between two renewals
                began_s = time.monotonic()
                first.process.send_signal(number)
                return (await second.logged("leading"))[0] - began_s


async def chat(session: aiohttp.ClientSession, url: str, model: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    async with session.post(url, json=body) as answer:
        assert answer.status == 200, await answer.text()
        await answer.read()


async def set_ready(kube: Kube, pod: str, ready: bool) -> None:
    """Set the Ready condition, as a kubelet does, and keep the other conditions."""
    condition = {"type": "Ready", "status": "True" if ready else "False"}
    patch = {"status": {"conditions": [condition]}}
    await kube.patch(PODS, pod, patch, subresource="status", kind="strategic")


async def first_publish(serve: Serve, model: str, count: int) -> float:
    """The time at which the route first had at most ``count`` endpoints."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            for at_s, name, endpoints in (await serve.measured())["published"]:
                if name == model and endpoints <= count:
                    return at_s
            await asyncio.sleep(0.005)


# -- failing API -----------------------------------------------------------------------------------


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


# -- command line ----------------------------------------------------------------------------------


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
        serve_with_timers()
        return 0
    if assets(*CONTROL_PLANE) is None:
        print("KUBEBUILDER_ASSETS has no control plane binaries: see tests/cluster/README.md")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # stops the cluster
    results: dict[str, Any] = {}
    if options.only and options.json and options.json.exists():
        results = json.loads(options.json.read_text())  # keep the results of other parts
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
