"""A console with a fake operator and a fake Kubernetes API."""

import contextlib

import aiohttp
import msgspec

from kubeai._journal import Entry, Journal
from kubeai._load import LoadTable
from kubeai.api.model import Model
from kubeai.kube.errors import ApiError
from kubeai.operator.view import ModelView, PodView
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route
from kubeai.supervisor.console.app import Console
from kubeai.supervisor.console.state import Fleet, Worker
from kubeai.supervisor.console.traffic import Traffic


def manifest(name, conditions=(), **spec):
    return {
        "apiVersion": "kubeai.org/v1",
        "kind": "Model",
        "metadata": {
            "name": name,
            "uid": "u",
            "resourceVersion": "7",
            "managedFields": [{"manager": "x"}],
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}", "a": "b"},
        },
        "spec": {"url": "hf://a/b", "engine": "VLLM", "features": ["TextGeneration"], **spec},
        "status": {
            "conditions": [
                dict(zip(("type", "status", "reason", "message"), c, strict=True))
                for c in conditions
            ]
        },
    }


READY = ("Ready", "True", "AllReplicasReady", "1 of 1 replica is ready")


class FakeOperator:
    """Models and their pods, as a test sets them."""

    def __init__(self):
        self.views = {}
        self.steps = {}

    def models(self):
        return self.views.values()

    def model(self, name):
        return self.views.get(name)

    def timeline(self, name):
        return self.steps.get(name, ())


class FakeKube:
    """Records calls. ``fault``: raised by the next ones. ``lines``: of each pod's log."""

    def __init__(self):
        self.calls = []
        self.fault = None
        self.objects = {}
        self.lines = [b"hello\n"]
        self.allowed = set()
        self.config_maps = []

    def _call(self, *call):
        self.calls.append(call)
        if self.fault is not None:
            raise self.fault

    async def list(self, r, namespace="", *, labels="", type):
        self._call("list", r.plural, namespace, labels)
        return [msgspec.convert(each, type) for each in self.config_maps], "1"

    async def get(self, r, name, namespace=""):
        if name not in self.objects:
            raise ApiError(404, "NotFound", "gone")
        return self.objects[name]

    async def create(self, r, obj, namespace=""):
        attributes = obj["spec"]["resourceAttributes"]
        verb = attributes["verb"] + ("/" + attributes["subresource"]).rstrip("/")
        return {"status": {"allowed": verb in self.allowed}}

    async def patch(self, r, name, patch, namespace="", *, subresource=""):
        self._call("patch", r.plural, name, patch, namespace, subresource)

    async def apply(self, r, obj, namespace="", *, manager):
        self._call("apply", r.plural, obj["metadata"]["name"], obj, namespace, manager)

    async def delete(self, r, name, namespace=""):
        self._call("delete", r.plural, name, namespace)

    @contextlib.asynccontextmanager
    async def log(self, name, *, container, namespace="", tail_lines):
        self._call("log", name, container, namespace, tail_lines)

        async def blocks():
            for line in self.lines:
                if callable(line):
                    await line()
                else:
                    yield line

        yield blocks()


class World:
    client: aiohttp.ClientSession  # of a console that runs

    def __init__(self, **options):
        self.kube = FakeKube()
        self.operator = FakeOperator()
        self.table = LoadTable.create(64, 1)
        self.publisher = Publisher(self.table)
        self.journal = Journal.create(1, 64)
        self.writer = Journal.attach(self.journal.fd, 0)
        self.now_s = 1000.0
        self.traffic = Traffic(
            self.journal, self.table, lambda: self.now_s, lambda: self.now_s + 1e9
        )
        self.workers = [Worker(0, True, 0)]
        self.console = Console(
            self.kube,
            "default",
            Fleet(self.operator, self.publisher, self.table, self.traffic),
            self.traffic,
            lambda: self.workers,
            lambda: ["nats://jobs: requests: refused"],
            lambda: True,
            **{"local": True, **options},
        )

    def model(
        self,
        name="m",
        *pods,
        conditions=(READY,),
        desired=1,
        strategy="LeastLoad",
        progress="",
        **spec,
    ):
        value = manifest(name, conditions, loadBalancing={"strategy": strategy}, **spec)
        self.kube.objects[name] = value
        views = tuple(
            PodView(pod, f"10.0.0.{n}:80", "Running", True, "", "", n, 100.0 + n)
            for n, pod in enumerate(pods)
        )
        self.operator.views[name] = ModelView(msgspec.convert(value, Model), desired, views)
        endpoints = tuple(Endpoint(pod, f"10.0.0.{n}:80") for n, pod in enumerate(pods))
        route = Route(name, "VLLM", strategy=strategy, endpoints=endpoints, progress=progress)
        delta = self.publisher.update(name, route)
        if delta is not None:
            self.traffic.names.note(delta.route)

    def request(self, model="m", pod=None, **fields):
        """A request that ended now."""
        route = self.publisher.route(model)
        row, generation = -1, 0
        for endpoint in route.endpoints:
            if endpoint.name == pod:
                row, generation = endpoint.row, endpoint.generation
        self.writer.write(
            Entry(
                **{
                    "began_s": self.now_s - 1.0,
                    "waited_s": 0.0,
                    "first_s": 0.25,
                    "duration_s": 1.0,
                    "model_row": route.row,
                    "model_generation": route.generation,
                    "row": row,
                    "generation": generation,
                    "status": 200,
                    "end": "whole",
                    "pick": "cached",
                    "retries": 0,
                    "streamed": True,
                    "estimated_tokens": 100,
                    "expected_tokens": 50,
                    "prompt_tokens": 120,
                    "cached_tokens": 60,
                    "output_tokens": 30,
                    "id": "id",
                    **fields,
                }
            )
        )


@contextlib.asynccontextmanager
async def running(**options):
    world = World(**options)
    await world.console.start()
    connector = aiohttp.UnixConnector(world.console.path)
    async with aiohttp.ClientSession("http://localhost", connector=connector) as world.client:
        yield world
    await world.console.close()
    for each in (world.writer, world.journal, world.table):
        each.close()
