"""Replicas that share their loads, on loopback and the test's clock."""

import asyncio
import contextlib

from aiohttp import web

from kubeai._load import LoadTable
from kubeai._pick import Picker
from kubeai._prefix import PrefixIndex
from kubeai._queue_table import QueueTable
from kubeai._ring import Ring
from kubeai.kube.errors import ApiError
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route
from kubeai.supervisor.peers.peers import LOADS_PATH, METRICS_HEADERS, Peers


class Kube:
    """Pods of replicas, as the API would report them."""

    def __init__(self, pods=()):
        self.pods = {name: _pod(name, ip) for name, ip in pods}
        self.followers = []

    async def get(self, resource, name, namespace):
        if name not in self.pods:
            raise ApiError(404, "NotFound", name)
        return self.pods[name]

    async def follow(self, resource, namespace, *, labels, type, replaced, changed):
        import msgspec

        self.labels = labels
        self.followers.append(lambda kind, pod: changed(kind, msgspec.convert(pod, type)))
        replaced([msgspec.convert(pod, type) for pod in self.pods.values()])
        await asyncio.Event().wait()

    def tell(self, kind, name, ip, phase="Running"):
        for follower in self.followers:
            follower(kind, _pod(name, ip, phase))


def _pod(name, ip, phase="Running"):
    labels = {"app.kubernetes.io/name": "kubeai", "app.kubernetes.io/instance": "ai"}
    return {"metadata": {"name": name, "labels": labels}, "status": {"phase": phase, "podIP": ip}}


class Clock:
    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s


class Replica:
    """One replica's load table with a worker, its routes, its peers, and its loads route."""

    def __init__(self, name="one", addresses=(), kube=None, pod="", port=None):
        self.clock = Clock()
        self.table = LoadTable.create(64, 1)
        self.worker = LoadTable.attach(self.table.fd, 0)
        self.index = PrefixIndex.create(64, 1024)
        self.queues = QueueTable.create(64, 1)
        self.publisher = Publisher(self.table, self.index, self.queues)
        self.peers = Peers(
            kube or Kube(),
            "ns",
            name,
            self.table,
            self.index,
            self.publisher,
            pod=pod,
            addresses=addresses,
            clock=self.clock,
            queues=self.queues,
        )
        self.port = port
        self.held = []

    async def __aenter__(self):
        app = web.Application()
        app.router.add_get(LOADS_PATH, self.peers.serve)
        app.router.add_get("/metrics", announce)
        self._runner = web.AppRunner(app, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.address = f"127.0.0.1:{port}"
        self._task = asyncio.create_task(self.peers.run(self.port or port))
        return self

    async def __aexit__(self, *_):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self.peers.close()
        await self._runner.cleanup()
        self.held.clear()
        self.worker.close()
        self.table.close()
        self.queues.close()

    def route(self, *pods, model="m", capacity=0):
        """Set the model's endpoints."""
        endpoints = tuple(Endpoint(pod, "10.0.0.1:8000") for pod in pods)
        route = Route(model, "VLLM", endpoints=endpoints, capacity=capacity)
        self.publisher.update(model, route)
        self.peers.rerouted(model)
        self.worker.acknowledge(self.publisher.version)
        return self.publisher.route(model)

    def ring(self, model="m"):
        route = self.publisher.route(model)
        ring = Ring(self.worker, route.row, route.generation)
        for endpoint in route.endpoints:
            ring.set(endpoint.name, endpoint.row, endpoint.generation)
        return ring

    def picker(self, model="m"):
        queues = QueueTable.attach(self.queues.fd, 0, self.queues.wake_fds)
        picker = Picker(self.ring(model))
        picker.limit(self.publisher.route(model).capacity, queues)
        return picker

    def serve(self, pod, count=1, model="m"):
        """Start ``count`` requests of this replica to an endpoint."""
        route = self.publisher.route(model)
        (endpoint,) = (e for e in route.endpoints if e.name == pod)
        ring = Ring(self.worker, route.row, route.generation)
        ring.set(pod, endpoint.row, endpoint.generation)
        self.held += [ring.pick_least() for _ in range(count)]

    def in_flight(self, pod, model="m"):
        return self.table.in_flight(self.publisher.endpoint_rows(model)[pod])

    def reclaim(self):
        self.peers.freed(self.publisher.reclaim([self.worker.acknowledged(0)]))


@contextlib.asynccontextmanager
async def two():
    """Two replicas; the second listens to the first."""
    async with Replica("one") as one, Replica("two", [one.address]) as two:
        yield one, two


async def announce(request):
    """``/metrics`` of a replica that serves its loads too."""
    return web.Response(text="kubeai_build 1\n", headers=METRICS_HEADERS)


@contextlib.asynccontextmanager
async def page(handler, path=LOADS_PATH):
    """Another program's responses at the address of a peer, for the loads and for ``/metrics``."""
    app = web.Application()
    app.router.add_get(path, handler)
    if path == LOADS_PATH:
        app.router.add_get("/metrics", announce)
    async with site(app) as address:
        yield address


@contextlib.asynccontextmanager
async def site(app):
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
