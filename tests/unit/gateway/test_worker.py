"""The worker process, started as the supervisor starts it."""

import asyncio
import json
import os
import resource
import signal
import socket
import sys
from typing import Any

import pytest
from fakes.api_keys import ALICE, bearer, record
from fakes.wire import (
    CHUNKED,
    WAIT_S,
    Engine,
    Message,
    Wire,
    answer,
    chunk,
    connect,
    post,
    until,
)

from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai.api.config.system import GatewayConfig, KeysConfig
from kubeai.routing.channel import (
    STACK_SIGNAL,
    Channel,
    Delta,
    Demand,
    Drain,
    Heartbeat,
    KeyDelta,
    KeySnapshot,
    Ready,
    Up,
    WorkerSettings,
)
from kubeai.routing.publisher import Publisher
from kubeai.routing.routes import Endpoint, Route

START_MAX_S = 20  # of a process, on a busy machine


class Supervised:
    """One worker process and what its supervisor holds for it."""

    async def start(
        self,
        *,
        descriptors: tuple[int, int] | None = None,
        stderr: int = asyncio.subprocess.DEVNULL,
        **config: Any,
    ) -> "Supervised":
        """``descriptors``: the process's soft and hard limit of open files."""
        self.stderr = stderr
        self.descriptors = descriptors or resource.getrlimit(resource.RLIMIT_NOFILE)
        self.table = LoadTable.create(64, 1)
        self.index = PrefixIndex.create(64, 1024)
        self.publisher = Publisher(self.table, self.index)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.config = GatewayConfig(**config)
        await self.spawn()
        return self

    async def spawn(self) -> None:
        """Start the process or its successor."""
        self.received = []
        self.ended = asyncio.Event()
        ours, theirs = socket.socketpair()
        settings = WorkerSettings(
            column=0,
            table_fd=self.table.fd,
            index_fd=self.index.fd,
            listen_fd=self.listener.fileno(),
            channel_fd=theirs.fileno(),
            gateway=self.config,
        )
        with theirs:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "kubeai.gateway.worker",
                env={**os.environ, **settings.environment},
                pass_fds=settings.descriptors,
                stderr=self.stderr,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, self.descriptors),
            )
        self.channel = Channel(Up, self.received.append, self.ended.set)
        ours.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.create_unix_connection(lambda: self.channel, sock=ours)

    def route(self, model: str, *engines: Engine) -> Delta | None:
        endpoints = tuple(Endpoint(f"pod-{i}", e.address) for i, e in enumerate(engines))
        return self.publisher.update(model, Route(model, "VLLM", endpoints=endpoints))

    async def ready(self) -> None:
        self.channel.send(self.publisher.snapshot())
        await until(lambda: Ready(self.process.pid) in self.received, within_s=START_MAX_S)

    async def exits(self) -> int:
        async with asyncio.timeout(10):
            return await self.process.wait()

    async def close(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        self.channel.close()
        await self.ended.wait()
        self.listener.close()
        self.table.close()


async def stream_or_answer(wire: Wire, request: Message) -> None:
    if b"stream" in request.body:
        await wire.send(CHUNKED + chunk(b"1"))
        await GO_ON.wait()
        await wire.send(chunk(b"2") + b"0\r\n\r\n")
    else:
        await wire.send(answer(200, b"here"))


GO_ON: asyncio.Event


@pytest.fixture
async def engine():
    global GO_ON
    GO_ON = asyncio.Event()
    engine = await Engine(stream_or_answer).start()
    yield engine
    await engine.stop()


@pytest.fixture
async def start():
    started = []

    async def start(**config) -> Supervised:
        started.append(await Supervised().start(**config))
        return started[-1]

    yield start
    for each in started:
        await each.close()


async def test_it_serves_once_it_has_routes_and_follows_their_changes(start, engine):
    worker = await start()
    worker.route("m", engine)
    worker.route("cold")
    wire = await connect(worker.port)
    await wire.send(post())  # queued in the listener's backlog
    await worker.ready()
    assert (await wire.answer()).body == b"here"
    assert worker.table.acknowledged(0) == worker.publisher.version

    await wire.send(post(body=b'{"model":"cold"}'))
    await until(lambda: Demand("cold") in worker.received)
    assert worker.table.held(worker.publisher.row("cold")) == 1
    worker.channel.send(worker.route("cold", engine))
    assert (await wire.answer()).body == b"here"
    assert worker.table.held(worker.publisher.row("cold")) == 0

    await wire.send(b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
    assert (await wire.answer()).status == 200
    await wire.send(b"GET /openai/v1/models HTTP/1.1\r\nHost: h\r\n\r\n")
    assert json.loads((await wire.answer()).body)["object"] == "list"
    wire.close()


async def test_it_serves_once_it_has_the_keys_that_it_requires_and_follows_their_changes(
    start, engine
):
    worker = await start(keys=KeysConfig(required=True))
    worker.route("m", engine)
    wire = await connect(worker.port)
    stream = post("/openai/v1/chat/completions", b'{"model":"m","stream":true}', bearer(ALICE))
    await wire.send(stream)
    worker.channel.send(worker.publisher.snapshot())
    await until(
        lambda: worker.table.acknowledged(0) == worker.publisher.version, within_s=START_MAX_S
    )
    assert set(worker.received) <= {Heartbeat()}, "it is not ready"
    worker.channel.send(KeySnapshot(worker.publisher.version, (record("alice", ALICE),)))
    await until(lambda: Ready(worker.process.pid) in worker.received)
    assert (await wire.head()).status == 200
    version = worker.publisher.advance()
    worker.channel.send(KeyDelta(version, "alice", None))
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        async with asyncio.timeout(WAIT_S):
            await wire.reader.readuntil(b"0\r\n\r\n")
    await until(lambda: worker.table.acknowledged(0) == version)
    again = await connect(worker.port)
    await again.send(stream)
    assert (await again.answer()).status == 401
    wire.close()
    again.close()


def by_signal(worker: Supervised) -> None:
    worker.process.send_signal(signal.SIGTERM)


def by_message(worker: Supervised) -> None:
    worker.channel.send(Drain(0.1, 5))


def by_end_of_hinge(worker: Supervised) -> None:
    worker.channel.close()


@pytest.mark.parametrize("stop", [by_signal, by_message, by_end_of_hinge])
async def test_it_finishes_open_requests_then_exits(start, engine, stop):
    worker = await start(drain_accept_s=0.1)
    worker.route("m", engine)
    await worker.ready()
    wire = await connect(worker.port)
    await wire.send(post(body=b'{"model":"m","stream":true}'))
    head = await wire.head()
    idle = await connect(worker.port)
    await idle.send(post())
    assert (await idle.answer()).one("connection") is None
    stop(worker)
    assert await idle.ended() is False
    GO_ON.set()
    assert (await wire.body(head)).body == b"12"
    assert await worker.exits() == 0
    assert worker.table.active_total() == 0
    wire.close()
    idle.close()


async def test_it_aborts_requests_that_do_not_end_in_time(start, engine):
    worker = await start(drain_accept_s=0, drain_timeout_s=0.1)
    worker.route("m", engine)
    await worker.ready()
    wire = await connect(worker.port)
    await wire.send(post(body=b'{"model":"m","stream":true}'))
    await wire.head()
    by_signal(worker)
    assert await worker.exits() == 0
    assert worker.table.active_total() == 0
    wire.close()


async def test_it_can_be_stopped_before_it_has_routes(start):
    worker = await start()
    worker.channel.close()
    assert await worker.exits() == 0


async def test_sigint_is_left_to_the_supervisor(start, engine):
    worker = await start()
    worker.route("m", engine)
    await worker.ready()
    worker.process.send_signal(signal.SIGINT)
    wire = await connect(worker.port)
    for _ in range(3):
        await wire.send(post())
        assert (await wire.answer()).body == b"here"
    assert worker.process.returncode is None
    wire.close()


async def test_a_killed_workers_successor_serves_connections_made_in_between(start, engine):
    worker = await start()
    worker.route("m", engine)
    await worker.ready()
    worker.process.kill()
    await worker.exits()
    await worker.ended.wait()
    wire = await connect(worker.port)  # the supervisor still holds the socket
    await wire.send(post())
    await worker.spawn()
    await worker.ready()
    assert (await wire.answer()).body == b"here"
    wire.close()


async def test_it_explains_itself_when_started_manually():
    environment = {k: v for k, v in os.environ.items() if k != "KUBEAI_WORKER"}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kubeai.gateway.worker",
        env=environment,
        stderr=asyncio.subprocess.PIPE,
    )
    _, error = await process.communicate()
    assert process.returncode == 2
    assert b"kubeai serve" in error


async def test_it_sends_heartbeats_before_and_after_it_is_ready(start):
    worker = await start()
    await until(lambda: Heartbeat() in worker.received, within_s=START_MAX_S)
    await worker.ready()
    count = worker.received.count(Heartbeat())
    await until(lambda: worker.received.count(Heartbeat()) > count + 1)


async def test_it_writes_its_stack_when_asked_and_goes_on(start, engine):
    worker = await start(stderr=asyncio.subprocess.PIPE)
    worker.route("m", engine)
    await worker.ready()
    worker.process.send_signal(STACK_SIGNAL)
    async with asyncio.timeout(WAIT_S):
        stack = await worker.process.stderr.readuntil(b"in <module>")
    assert b"in run_worker" in stack
    wire = await connect(worker.port)
    await wire.send(post())
    assert (await wire.answer()).body == b"here"
    wire.close()


async def test_it_accepts_as_many_connections_as_its_descriptors_allow(start, engine):
    """It raises its soft limit; each client may need a second descriptor for its engine."""
    worker = await start(descriptors=(100, 300))
    worker.route("m", engine)
    await worker.ready()
    wires = [await connect(worker.port) for _ in range((300 - 128) // 2)]
    for wire in wires:
        await wire.send(post())
        assert (await wire.answer()).body == b"here"
    late = await connect(worker.port)
    refused = await late.answer()
    assert (refused.status, refused.one("retry-after")) == (503, "5")
    for wire in (*wires, late):
        wire.close()
