"""A Service's address, and OpenAI clients that send requests to it and count what comes of them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
from harness import until
from kubelets import is_serving

from kubeai.kube.client import Kube
from kubeai.kube.resources import PODS, SERVICES

# Until the nodes of a cluster know which pods a Service has now: some tenths of a second.
LAG_S = 0.3
POD_PORT = 8000
CLIENT_TIMEOUT_S = 60.0
PAUSE_S = 0.1  # between two requests of a client
REASON_MAX_CHARS = 120


class ServiceAddress:
    """Plays kube-proxy on loopback: each new connection goes to one of the Service's ready pods.

    A connection stays with its pod. Which pods the Service has is known :data:`LAG_S` late.
    """

    def __init__(self, kube: Kube, namespace: str, name: str) -> None:
        self._kube, self._namespace, self._name = kube, namespace, name
        self._pods: dict[str, dict[str, Any]] = {}
        self._known: list[str] = []
        self._turn = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self.url = ""

    async def __aenter__(self) -> ServiceAddress:
        service = await self._kube.get(SERVICES, self._name, self._namespace)
        self._selector = service["spec"]["selector"].items()
        follow = self._kube.follow(
            PODS, self._namespace, replaced=self._replaced, changed=self._changed
        )
        self._follower = asyncio.create_task(follow)
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = "http://{}:{}".format(*self._server.sockets[0].getsockname())
        await until("the Service has a ready pod", lambda: self._known)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._follower.cancel()
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(self._follower, *self._tasks, return_exceptions=True)

    def _replaced(self, pods: list[dict[str, Any]]) -> None:
        self._pods = {pod["metadata"]["name"]: pod for pod in pods}
        self._tell()

    def _changed(self, kind: str, pod: dict[str, Any]) -> None:
        if kind == "DELETED":
            self._pods.pop(pod["metadata"]["name"], None)
        else:
            self._pods[pod["metadata"]["name"]] = pod
        self._tell()

    def _tell(self) -> None:
        now = sorted(pod["status"]["podIP"] for pod in self._pods.values() if self._serves(pod))
        asyncio.get_running_loop().call_later(LAG_S, setattr, self, "_known", now)

    def _serves(self, pod: dict[str, Any]) -> bool:
        labels = pod["metadata"].get("labels", {}).items()
        return self._selector <= labels and is_serving(pod)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if not self._known:
                return
            host = self._known[next(self._turn) % len(self._known)]
            there = await asyncio.open_connection(host, POD_PORT)
            try:
                await asyncio.gather(_copy(reader, there[1]), _copy(there[0], writer))
            finally:
                there[1].transport.abort()
        except (OSError, asyncio.CancelledError):
            pass  # an end is gone, or the test is over
        finally:
            self._tasks.discard(task)
            writer.transport.abort()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    """Until either end closes; then the connection is over, as HTTP has no half of one."""
    while data := await source.read(1 << 16):
        sink.write(data)
        await sink.drain()
    with contextlib.suppress(OSError):
        await sink.drain()
    if not sink.transport.is_closing():
        sink.write_eof()


@dataclass
class Count:
    """The requests that were sent in one phase."""

    succeeded: int = 0
    failed: Counter[str] = field(default_factory=Counter)

    @property
    def sent(self) -> int:
        return self.succeeded + self.failed.total()


class Cut(Exception):
    """A stream that ended before its last chunk."""


class Traffic:
    """Clients that each send one request after the other, on connections that are kept.

    None retries. A request is counted in the phase in which it was sent.
    """

    def __init__(self, url: str, api_key: str = "none") -> None:
        self._url, self._api_key = f"{url}/openai/v1", api_key
        self.counts: dict[str, Count] = defaultdict(Count)
        self._kinds: dict[str, Counter[str]] = defaultdict(Counter)
        self._slow: set[str] = set()
        self._phase = ""
        self._ending = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: list[openai.AsyncOpenAI] = []
        self._began_s = time.monotonic()
        self.failures: list[str] = []

    async def __aenter__(self) -> Traffic:
        return self

    async def __aexit__(self, kind: object, *_: object) -> None:
        self._ending.set()
        if kind is not None:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=kind is not None)
        for client in self._clients:
            await client.close()

    def start(
        self,
        kind: str,
        model: str,
        *,
        keeps: bool = True,
        ready: Callable[[], Awaitable[Any]] | None = None,
    ) -> None:
        """A client that sends requests of a kind: ``chat``, ``stream`` or ``embeddings``.

        ``keeps``: whether it keeps its connection, or opens one for each request. ``ready``: what
        it waits for before each request.
        """
        limits = None if keeps else httpx.Limits(max_keepalive_connections=0)
        client = openai.AsyncOpenAI(
            base_url=self._url,
            api_key=self._api_key,
            max_retries=0,
            timeout=CLIENT_TIMEOUT_S,
            http_client=openai.DefaultAsyncHttpxClient(limits=limits) if limits else None,
        )
        self._clients.append(client)
        send = {"chat": _chat, "stream": _stream, "embeddings": _embed}[kind]
        name = f"{len(self._tasks)}: {kind} {model}{'' if keeps else ' (new connections)'}"
        if ready is not None:
            self._slow.add(name)
        task = asyncio.create_task(self._keep_on(name, client, send, model, ready), name=name)
        self._tasks.append(task)

    async def phase(self, name: str, at_least: int = 3) -> None:
        """Begin a phase; return when each client has had this many answers since."""
        self._phase = name
        if at_least:
            await self.answers(at_least)

    async def answers(self, at_least: int = 3) -> None:
        """Wait until each client has had this many more answers in this phase; slow ones, one."""
        seen = self._kinds[self._phase]
        wanted = {
            name: seen[name] + (1 if name in self._slow else at_least)
            for name in (task.get_name() for task in self._tasks)
        }
        await until(
            f"answers in the phase {self._phase!r}: {wanted}",
            lambda: all(seen[name] >= count for name, count in wanted.items()),
            180,
        )

    async def _keep_on(self, name, client, send, model, ready) -> None:
        for number in itertools.count():
            if ready is not None:
                await ready()
            if self._ending.is_set():
                return
            phase = self._phase
            sent_s = time.monotonic()
            try:
                await send(client, model, f"question {number} of {name}")
                self.counts[phase].succeeded += 1
                self._kinds[phase][name] += 1
            except (openai.OpenAIError, Cut, OSError) as error:
                reason = f"{type(error).__name__}: {error}"[:REASON_MAX_CHARS]
                self.counts[phase].failed[reason] += 1
                at = f"{sent_s - self._began_s:.1f}-{time.monotonic() - self._began_s:.1f} s"
                self.failures.append(f"{phase}: {at} {name}: {reason}")
            await asyncio.sleep(PAUSE_S)

    def table(self) -> str:
        """The counts, as they are in the docs."""
        rows = ["| phase | sent | succeeded | failed |", "|---|---|---|---|"]
        rows += [
            f"| {phase} | {count.sent} | {count.succeeded} | {count.failed.total()} |"
            for phase, count in self.counts.items()
        ]
        return "\n".join(rows)


async def _chat(client: openai.AsyncOpenAI, model: str, question: str) -> None:
    messages = [{"role": "user", "content": question}]
    answer = await client.chat.completions.create(model=model, messages=messages, max_tokens=8)
    assert answer.choices[0].message.content


async def _stream(client: openai.AsyncOpenAI, model: str, question: str) -> None:
    messages = [{"role": "user", "content": question}]
    chunks = await client.chat.completions.create(
        model=model, messages=messages, max_tokens=64, stream=True
    )
    reason = None
    async for chunk in chunks:
        reason = chunk.choices[0].finish_reason if chunk.choices else reason
    if reason is None:
        raise Cut("the stream ended before its last chunk")


async def _embed(client: openai.AsyncOpenAI, model: str, text: str) -> None:
    answer = await client.embeddings.create(model=model, input=text)
    assert answer.data[0].embedding
