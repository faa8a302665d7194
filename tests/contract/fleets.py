"""Three replicas of `kubeai serve` in one namespace, and what a Kubernetes Service is to clients.

Each replica listens on an address of its own, on the port that all have. :class:`Service` probes
them as a kubelet does and gives each new connection to one that is ready; :class:`Traffic` is
its clients, which never retry; :class:`Watched` records what happened to Models and pods.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import socket
import time
from collections import defaultdict
from pathlib import Path

import aiohttp
from aiohttp.abc import AbstractResolver
from harness import START_TIMEOUT_S, chat, scrape, until
from machines import Machine, Serve, launched
from servers import ApiServer

from kubeai.kube.client import Kube
from kubeai.kube.resources import LEASES, MODELS, PODS

HOSTS = ("127.0.0.2", "127.0.0.3", "127.0.0.4")
SERVICE = "kubeai"
PROBE_PERIOD_S = 0.5
PROBE_TIMEOUT_S = 1.0
EXIT_TIMEOUT_S = 45.0
ANSWER_TIMEOUT_S = 120.0
IN_FLIGHT_MAX = 2_000  # requests by schedule: beyond, it is the clients that are too slow


class Replica:
    """One `kubeai serve`: its process comes and goes, its name and addresses stay."""

    def __init__(self, fleet: Fleet, name: str, host: str, ports: tuple[int, int, int]) -> None:
        self.name, self.host = name, host
        self._port, health_port, metrics_port = ports
        self.endpoint = f"http://{host}:{self._port}/openai/v1"
        self.serve: Serve | None = None
        self._health = f"{host}:{health_port}"
        self._metrics = f"{host}:{metrics_port}"
        self._fleet = fleet
        self._life = contextlib.AsyncExitStack()

    async def launch(self) -> None:
        fleet = self._fleet
        await fleet.tell_of(self)
        addresses = {"healthAddress": self._health, "metricsAddr": self._metrics}
        options = fleet.config | addresses
        one = launched(
            *(fleet.directory, fleet.account, fleet.namespace),
            name=self.name,
            host=self.host,
            port=self._port,
            workers=1,
            **options,
        )
        self.serve = await self._life.enter_async_context(one)

    async def readyz(self) -> tuple[int, str]:
        """Status and text; status 0 without an answer in time."""
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"http://{self._health}/readyz") as answer,
            ):
                return answer.status, (await answer.text()).strip()
        except (OSError, aiohttp.ClientError, TimeoutError) as error:
            return 0, repr(error)

    async def is_ready(self) -> bool:
        return (await self.readyz())[0] == 200

    async def until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        await until(f"{self.name} is ready", self.is_ready, timeout_s)

    async def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.serve.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(EXIT_TIMEOUT_S):
            code = await self.serve.process.wait()
        await self._life.aclose()
        return code

    async def kill(self) -> None:
        """Kill all its processes at once, as when its machine fails."""
        await self._life.aclose()

    async def series(self) -> dict[str, float]:
        """Its metrics."""
        return await scrape(self.serve.said("serving")["metrics"])


class Fleet(Machine):
    """A namespace, a kubelet that binds its pods, and replicas that the test launches."""

    is_alone = True

    def __init__(self, api: ApiServer, namespace: str, directory: Path) -> None:
        super().__init__(api, namespace, directory)
        self.config |= {
            "leaderElection": {
                "leaseDuration": "5s",
                "renewDeadline": "3s",
                "retryPeriod": "500ms",
            },
            "gateway": {"drainAccept": "2s", "drainTimeout": "30s"},
        }
        ports = _free_ports(3)
        self.port = ports[0]
        self.replicas = [
            Replica(self, f"kubeai-{number}", host, ports) for number, host in enumerate(HOSTS)
        ]
        self.endpoint = self.replicas[0].endpoint
        self._told: set[str] = set()

    async def serve(self, **config) -> None:
        """Nothing runs until :meth:`launch`."""

    async def launch(self, *replicas: Replica) -> None:
        """These, or all three, until they are ready."""
        for replica in replicas or self.replicas:
            await replica.launch()
        for replica in replicas or self.replicas:
            await replica.until_ready()

    async def tell_of(self, replica: Replica) -> None:
        """Create the replica's pod, by which the other replicas discover it."""
        if replica.name in self._told:
            return
        self._told.add(replica.name)
        labels = {"app.kubernetes.io/name": "kubeai", "app.kubernetes.io/instance": "fleet"}
        pod = {
            "metadata": {"name": replica.name, "labels": labels},
            "spec": {"nodeName": "elsewhere", "containers": [{"name": "kubeai", "image": "i"}]},
        }
        await self.kube.create(PODS, pod)
        status = {"phase": "Running", "podIP": replica.host, "podIPs": [{"ip": replica.host}]}
        await self.kube.patch(PODS, replica.name, {"status": status}, subresource="status")

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            for replica in self.replicas:
                await replica.kill()

    async def leader(self) -> Replica | None:
        lease = await self.kube.get(LEASES, "kubeai.org", self.namespace)
        holder = lease["spec"].get("holderIdentity")
        return next((one for one in self.replicas if one.name == holder), None)

    async def settled(self, name: str, count: int) -> bool:
        """Whether a Model's spec, pods and status all have ``count`` replicas, all ready."""
        found = await self.kube.get(MODELS, name, self.namespace)
        status = found.get("status", {}).get("replicas", {})
        said = found["spec"].get("replicas"), status.get("all"), status.get("ready")
        return said == (count, count, count) and len(await self.pods(name)) == count


class Service(AbstractResolver):
    """The resolver of clients' connections: a new one goes to a ready replica, each in turn."""

    def __init__(self, replicas: list[Replica]) -> None:
        self._replicas = replicas
        self._ready: set[str] = set()
        self._turn = itertools.count()
        self._probes: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Service:
        self._probes = [asyncio.create_task(self._probe(one)) for one in self._replicas]
        await until("all replicas are ready", lambda: len(self._ready) == len(self._replicas))
        return self

    async def __aexit__(self, *_: object) -> None:
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)

    async def _probe(self, replica: Replica) -> None:
        while True:
            is_ready = await replica.is_ready()
            (self._ready.add if is_ready else self._ready.discard)(replica.host)
            await asyncio.sleep(PROBE_PERIOD_S)

    async def resolve(self, host, port=0, family=socket.AF_INET):
        assert host == SERVICE
        ready = sorted(self._ready)
        if not ready:
            raise OSError("no replica is ready")
        chosen = ready[next(self._turn) % len(ready)]
        return [
            {
                "hostname": host,
                "host": chosen,
                "port": port,
                "family": socket.AF_INET,
                "proto": 0,
                "flags": socket.AI_NUMERICHOST,
            }
        ]

    async def close(self) -> None:
        pass


class Traffic:
    """Streams one after the other and requests by a schedule, on connections that are kept."""

    def __init__(
        self,
        service: Service,
        port: int,
        model: str,
        *,
        streams: int,
        stream_tokens: int,
        per_s: float,
        tokens: int = 4,
    ) -> None:
        self.failures: list[str] = []
        self.asked = self.streamed = 0
        self.slowest_s = self.late_max_s = 0.0
        self._url = f"http://{SERVICE}:{port}/openai/v1"
        self._model = model
        self._service = service
        self._streams, self._stream_tokens = streams, stream_tokens
        self._per_s, self._tokens = per_s, tokens
        self._in_flight: set[asyncio.Task[None]] = set()
        self._ending = asyncio.Event()

    async def __aenter__(self) -> Traffic:
        connector = aiohttp.TCPConnector(limit=0, resolver=self._service, use_dns_cache=False)
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        self._began_s = time.monotonic()
        self._tasks = [
            asyncio.create_task(self._keep_streaming(number)) for number in range(self._streams)
        ]
        self._tasks.append(asyncio.create_task(self._keep_asking()))
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        """What is open ends well; where the test has failed already, at once."""
        self._ending.set()
        if kind is not None:
            for task in (*self._tasks, *self._in_flight):
                task.cancel()
        await asyncio.gather(*self._tasks, *self._in_flight, return_exceptions=kind is not None)
        await self._session.close()

    def figures(self) -> str:
        return (
            f"{self.asked} requests, {self.streamed} streams, {len(self.failures)} failures; "
            f"slowest request {self.slowest_s:.2f} s, "
            f"at most {self.late_max_s:.2f} s behind the schedule"
        )

    def _failed(self, what: str, error: object) -> None:
        self.failures.append(f"{time.monotonic() - self._began_s:.3f} s: {what}: {error}")

    async def _keep_streaming(self, number: int) -> None:
        for turn in itertools.count():
            if self._ending.is_set():
                return
            name = f"stream {number}.{turn}"
            answer = await chat(
                self._session, self._url, self._model, name, max_tokens=self._stream_tokens
            )
            self.streamed += 1
            if not answer.whole or answer.chunks != self._stream_tokens:
                self._failed(name, answer)
                await asyncio.sleep(PROBE_PERIOD_S)  # a broken service is not to be stormed

    async def _keep_asking(self) -> None:
        for number in itertools.count():
            due_s = self._began_s + number / self._per_s
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))
            if self._ending.is_set():
                return
            self.late_max_s = max(self.late_max_s, time.monotonic() - due_s)
            assert len(self._in_flight) < IN_FLIGHT_MAX
            task = asyncio.create_task(self._ask(f"request {number}"))
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)

    async def _ask(self, name: str) -> None:
        question = {"role": "user", "content": name}
        body = {"model": self._model, "messages": [question], "max_tokens": self._tokens}
        began_s = time.monotonic()
        self.asked += 1
        try:
            async with self._session.post(f"{self._url}/chat/completions", json=body) as answer:
                text = await answer.text()
                if answer.status != 200:
                    self._failed(name, f"{answer.status} {text}")
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._failed(name, f"{error!r} after {time.monotonic() - began_s:.3f} s")
        self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)


class Watched:
    """What a watch that lasts saw: how many replicas each Model wanted, which pods there were."""

    def __init__(self, kube: Kube, namespace: str) -> None:
        self.wanted: dict[str, list[int]] = defaultdict(list)
        self.pods: dict[str, set[str]] = defaultdict(set)
        self.lists = 0
        self._tasks = [
            asyncio.create_task(
                kube.follow(resource, namespace, labels=labels, replaced=replaced, changed=changed)
            )
            for resource, labels, replaced, changed in (
                (MODELS, "", self._models, self._model),
                (PODS, "app=model", self._all_pods, self._pod),
            )
        ]

    async def __aenter__(self) -> Watched:
        await until("Models and pods are listed", lambda: self.lists == 2)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def woken(self, name: str) -> int:
        """Count the Model's scale-ups from zero."""
        return sum(before == 0 < after for before, after in itertools.pairwise(self.wanted[name]))

    def shrunk(self) -> list[str]:
        """The Models that were ever scaled down."""
        return [
            name
            for name, wanted in self.wanted.items()
            if any(after < before for before, after in itertools.pairwise(wanted))
        ]

    def _models(self, models: list[dict]) -> None:
        self.lists += 1
        for model in models:
            self._model("ADDED", model)

    def _model(self, kind: str, model: dict) -> None:
        wanted = self.wanted[model["metadata"]["name"]]
        now = model["spec"].get("replicas") or 0
        if kind != "DELETED" and wanted[-1:] != [now]:
            wanted.append(now)

    def _all_pods(self, pods: list[dict]) -> None:
        self.lists += 1
        for pod in pods:
            self._pod("ADDED", pod)

    def _pod(self, kind: str, pod: dict) -> None:
        self.pods[pod["metadata"]["labels"]["model"]].add(pod["metadata"]["uid"])


def _free_ports(count: int) -> list[int]:
    """Free a moment ago on the first address; who else uses these addresses chose other ones."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server((HOSTS[0], 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
