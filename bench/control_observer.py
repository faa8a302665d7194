"""What ``control_plane.py`` does to a cluster and sees of it: writes, requests, watches."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import aiohttp
from timed_serve import DEADLINE_S, Serve

from kubeai.api.model import Model
from kubeai.kube.client import Kube
from kubeai.kube.resources import MODELS, PODS
from kubeai.operator.pods import PodObject, observe

AT_A_TIME = 16  # API requests that the load generator keeps in flight


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
