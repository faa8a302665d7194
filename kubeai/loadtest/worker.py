"""A process that generates a share of the load: ``python -m kubeai.loadtest.worker``.

Started by `run`. It reads a plan and then the start time from stdin and writes measurements to
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

from kubeai.errors import KubeAIError
from kubeai.loadtest.client import Address, Client
from kubeai.loadtest.drive import Driver
from kubeai.loadtest.plan import (
    ClosedLoop,
    Failed,
    Go,
    Plan,
    Ready,
    Stop,
    Told,
    frame,
    receive,
)

BATCH_INTERVAL_S = 0.25
SPARE_FILES = 64  # in addition to one connection per conversation
FILES_MAX = 1 << 17
# Thousands of conversations are live and none forms a cycle: collect rarely.
GC_THRESHOLD = 50_000


class Out(asyncio.Protocol):
    """Messages to the parent process."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._closed = asyncio.Event()

    @classmethod
    async def to(cls, fd: int) -> Out:
        made = os.fdopen(fd, "wb", buffering=0)
        _, out = await asyncio.get_running_loop().connect_write_pipe(cls, made)
        return out

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed.set()

    def tell(self, message: Told) -> None:
        assert self._transport is not None
        self._transport.write(frame(message))

    async def close(self) -> None:
        """Flush and close."""
        assert self._transport is not None
        self._transport.close()
        await self._closed.wait()


async def _work(out_fd: int) -> None:
    orders = asyncio.StreamReader(limit=1 << 20)
    loop = asyncio.get_running_loop()
    stdin = os.fdopen(0, "rb", buffering=0, closefd=False)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), stdin)
    out = await Out.to(out_fd)
    with contextlib.suppress(asyncio.IncompleteReadError):
        plan = msgspec.msgpack.decode(await receive(orders), type=Plan)
        try:
            _allow_files(plan)
            client = Client(
                Address(plan.url),
                plan.headers,
                timeout_s=plan.timeout_s,
                endpoint_header=plan.endpoint_header,
            )
            await client.find()
            driver = Driver(plan, client)
            driver.prepare()
        except KubeAIError as error:
            out.tell(Failed(str(error)))
        else:
            gc.collect()
            gc.freeze()
            gc.set_threshold(GC_THRESHOLD)
            out.tell(Ready())
            await _drive(driver, orders, out)
            client.close()
    await out.close()


async def _drive(driver: Driver, orders: asyncio.StreamReader, out: Out) -> None:
    """Run from `Go` until the load ends, `Stop` arrives or the parent exits."""
    order = msgspec.msgpack.decode(await receive(orders), type=Go | Stop)
    if not isinstance(order, Go):
        return
    running = asyncio.create_task(driver.run(order.start_s))
    stopped = asyncio.create_task(receive(orders))
    try:
        while not (running.done() or stopped.done()):
            await asyncio.wait(
                (running, stopped),
                timeout=BATCH_INTERVAL_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            out.tell(driver.take())
        if running.done():
            running.result()
    finally:
        running.cancel()
        stopped.cancel()
        await asyncio.gather(running, stopped, return_exceptions=True)
    out.tell(driver.take(last=True))


def _allow_files(plan: Plan) -> None:
    """Raise the open-file limit for the connections; KubeAIError if it cannot be high enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = FILES_MAX if hard == resource.RLIM_INFINITY else hard
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if isinstance(plan.load, ClosedLoop):
        wanted = plan.share(plan.load.concurrency) + SPARE_FILES
        if wanted > most:
            raise KubeAIError(
                f"--concurrency: needs {wanted} open files, the limit is {most} (ulimit -n)"
            )


def main() -> None:
    # Keep stray prints out of the message stream: stdout becomes stderr.
    out_fd = os.dup(1)
    os.dup2(2, 1)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_work(out_fd))


if __name__ == "__main__":
    main()
