"""Measure the control plane on a real Kubernetes API: reaction times, CPU, memory and writes.

    export KUBEBUILDER_ASSETS=$(tests/cluster/build.sh)
    python bench/control_plane.py [--quick] [--only wake] [--json FILE]

The cluster consists of etcd, kube-apiserver, controller-manager, scheduler and kwok
(`tests/contract/servers.py`), all on this machine, without client-side rate limits for scheduler
and controller-manager. `kubeai serve` runs in a separate process with one worker and with the
timers of ``timed_serve.py``. The load generator and its watches run in this process.

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
import itertools
import json
import random
import signal
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import msgspec
import uvloop
import yaml
from control_cluster import CONFIG, Cluster, Storm, running_cluster
from control_observer import (
    Engine,
    Observer,
    at_a_time,
    chat,
    first_publish,
    manifest,
    set_ready,
    spread,
)
from timed_serve import Serve

from kubeai.api.config.system import parse_config
from kubeai.api.model import Model
from kubeai.kube.client import Kube
from kubeai.kube.resources import MODELS, PODS
from kubeai.operator import events
from kubeai.operator.operator import POD_SELECTOR
from kubeai.operator.pods import PodObject, observe
from kubeai.podspec import build_pod

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "contract"))
from servers import CONTROL_PLANE, ApiServer, assets

PARTS = ("wake", "burst", "leaving", "scale", "storm", "takeover")
CHANGE_INTERVAL_S = 0.02
# Pods that no scheduler handles: the benchmark itself sets them ready.
UNSCHEDULED = {
    "modelServerPods": {
        "jsonPatches": [{"op": "add", "path": "/spec/schedulerName", "value": "nobody"}]
    }
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


class Bench(Cluster):
    """The parts, each in a namespace of its own."""

    def __init__(self, api: ApiServer, folder: Path, effort: Effort) -> None:
        super().__init__(api, folder)
        self.effort = effort

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
        """Seconds from a signal to the leader until the peer leads."""
        patient = {"gateway": {}}  # default drain settings
        async with self.space(space) as kube, self.serve(kube, patient) as first:
            await first.logged("leading")
            async with self.serve(kube, patient, "two") as second:
                await second.logged("serving")
                await asyncio.sleep(random.uniform(2, 4))  # at a random time between two renewals
                began_s = time.monotonic()
                first.process.send_signal(number)
                return (await second.logged("leading"))[0] - began_s


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
    options = parser.parse_args()
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
