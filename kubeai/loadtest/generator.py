"""A process that generates a share of the load: ``python -m kubeai.loadtest.generator``.

Started by `run`. It reads a scenario and then the start time from stdin and writes measurements to
stdout, every 0.25 s so that little is lost if it is killed. It exits at the end of stdin, which
means that the parent process has exited.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
from typing import cast

import msgspec
import uvloop
from typing_extensions import override

from kubeai.brokers.urls import open_broker
from kubeai.errors import KubeAIError
from kubeai.loadtest.client import Address, Client
from kubeai.loadtest.executor import Executor
from kubeai.loadtest.message_client import MessageClient
from kubeai.loadtest.messages import Failed, FromGenerator, Go, Ready, Stop, frame, receive
from kubeai.loadtest.scenario import ClosedLoop, RequestLoop, Scenario

BATCH_INTERVAL_S = 0.25
SPARE_FILES = 64  # in addition to one connection per conversation
FILES_MAX = 1 << 17
# Thousands of conversations are live and none forms a cycle: collect rarely.
GC_THRESHOLD = 50_000


class Outbox(asyncio.Protocol):
    """Messages to the parent process."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._closed = asyncio.Event()

    @classmethod
    async def open(cls, fd: int) -> Outbox:
        """Open the pipe with this file descriptor."""
        pipe = os.fdopen(fd, "wb", buffering=0)
        _, outbox = await asyncio.get_running_loop().connect_write_pipe(cls, pipe)
        return outbox

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()

    def send(self, message: FromGenerator) -> None:
        """Send a message; never blocks."""
        assert self._transport is not None
        self._transport.write(frame(message))

    async def close(self) -> None:
        """Flush and close."""
        assert self._transport is not None
        self._transport.close()
        await self._closed.wait()


async def _generate(out_fd: int) -> None:
    inbox = asyncio.StreamReader(limit=1 << 20)
    loop = asyncio.get_running_loop()
    stdin = os.fdopen(0, "rb", buffering=0, closefd=False)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(inbox), stdin)
    outbox = await Outbox.open(out_fd)
    with contextlib.suppress(asyncio.IncompleteReadError):
        scenario = msgspec.msgpack.decode(await receive(inbox), type=Scenario)
        try:
            client = await _connect(scenario)
            executor = Executor(scenario, client)
            executor.prepare()
        except KubeAIError as error:
            outbox.send(Failed(str(error)))
        else:
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_THRESHOLD)
            outbox.send(Ready())
            await _execute(executor, inbox, outbox)
            await _close(client)
    await outbox.close()


async def _connect(scenario: Scenario) -> Client | MessageClient:
    """A client of the endpoint or the broker; KubeAIError if it cannot be reached."""
    if scenario.via is not None:
        by_message = MessageClient(
            open_broker(scenario.via.requests_url, "--via"),
            open_broker(scenario.via.responses_url, "--via-responses"),
            timeout_s=scenario.timeout_s,
            run=os.urandom(8).hex(),
        )
        await by_message.open()
        return by_message
    _raise_file_limit(scenario)
    client = Client(
        Address(scenario.url),
        scenario.headers,
        timeout_s=scenario.timeout_s,
        endpoint_header=scenario.endpoint_header,
    )
    await client.resolve()
    return client


async def _close(client: Client | MessageClient) -> None:
    if isinstance(client, MessageClient):
        await client.close()
    else:
        client.close()


async def _execute(executor: Executor, inbox: asyncio.StreamReader, outbox: Outbox) -> None:
    """Run from `Go` until the load ends, `Stop` arrives or the parent exits."""
    message = msgspec.msgpack.decode(await receive(inbox), type=Go | Stop)
    if not isinstance(message, Go):
        return
    running = asyncio.create_task(executor.run(message.start_s))
    stopped = asyncio.create_task(receive(inbox))
    try:
        while not (running.done() or stopped.done()):
            await asyncio.wait(
                (running, stopped),
                timeout=BATCH_INTERVAL_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            outbox.send(executor.take())
        if running.done():
            running.result()
    finally:
        running.cancel()
        stopped.cancel()
        await asyncio.gather(running, stopped, return_exceptions=True)
    outbox.send(executor.take(last=True))


def _raise_file_limit(scenario: Scenario) -> None:
    """Raise the open-file limit for the connections; KubeAIError if it cannot be high enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES_MAX if hard == resource.RLIM_INFINITY else hard
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    option, connections = _connections(scenario)
    wanted = scenario.share(connections) + SPARE_FILES
    if wanted > most:
        raise KubeAIError(f"{option}: needs {wanted} open files, the limit is {most} (ulimit -n)")


def _connections(scenario: Scenario) -> tuple[str, int]:
    """How many connections the load is known to need, and the option that says so."""
    load, known = scenario.load, []
    if scenario.in_flight_max is not None:
        known.append((scenario.in_flight_max, "--max-concurrency"))
    if isinstance(load, ClosedLoop):
        known.append((load.concurrency, "--concurrency"))
    elif isinstance(load, RequestLoop) and load.arrivals is None and scenario.requests_max:
        known.append((scenario.requests_max, "--num-prompts"))
    count, option = min(known, default=(0, ""))
    return option, count


def main() -> None:
    """Run the generator; stdout carries only messages."""
    # Keep stray prints out of the message stream: stdout is redirected to stderr.
    out_fd = os.dup(1)
    os.dup2(2, 1)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_generate(out_fd))


if __name__ == "__main__":
    main()
