"""How long the gateway takes to find a stored response among many endpoints.

    python bench/stored_responses.py [--endpoints 1000] [--lookups 20]

A child process serves all endpoints: one port on many loopback addresses, each of which answers
that it has no such response, but for the last one. Prints the median time of a request for a stored
response whose endpoint is not known yet, and of the next request for it.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fakes.world import World

FOUND = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
MISSING = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


class Engine(asyncio.Protocol):
    """One connection to an endpoint; ``owner`` is the address of the one that has everything."""

    def __init__(self, owner: str) -> None:
        self._owner = owner

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._has_it = transport.get_extra_info("sockname")[0] == self._owner

    def data_received(self, data: bytes) -> None:
        self._transport.write(FOUND if self._has_it else MISSING)


def address(number: int) -> str:
    """The loopback address of an endpoint."""
    return f"127.1.{number // 250}.{number % 250 + 1}"


def serve(owner: str, ready: Connection) -> None:
    """The child process."""

    async def run() -> None:
        listener = socket.create_server(("0.0.0.0", 0), backlog=4096)
        loop = asyncio.get_running_loop()
        await loop.create_server(lambda: Engine(owner), sock=listener)
        ready.send(listener.getsockname()[1])
        await asyncio.Event().wait()

    uvloop.run(run())


async def measure(endpoints: int, lookups: int, port: int) -> tuple[list[float], list[float]]:
    """Seconds of each first and each second request for a response."""
    world = await World.start(rows=endpoints + 1)
    world.route("m", {f"pod-{n}": f"{address(n)}:{port}" for n in range(endpoints)})
    client = await world.client()
    first, second = [], []
    for n in range(lookups):
        for times in (first, second):
            began = time.perf_counter()
            await client.send(b"GET /v1/responses/resp_%d HTTP/1.1\r\nHost: h\r\n\r\n" % n)
            answer = await client.answer()
            times.append(time.perf_counter() - began)
            if answer.status != 200:
                raise SystemExit(f"status {answer.status}: {answer.body!r}")
    await world.close()
    return first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--endpoints", type=int, default=1000)
    parser.add_argument("--lookups", type=int, default=20)
    options = parser.parse_args()
    there, here = multiprocessing.Pipe()
    owner = address(options.endpoints - 1)
    engines = multiprocessing.Process(target=serve, args=(owner, here), daemon=True)
    engines.start()
    port = there.recv()
    for name, times in zip(
        ("first", "next"),
        uvloop.run(measure(options.endpoints, options.lookups, port)),
        strict=True,
    ):
        print(
            f"{name} request: {statistics.median(times) * 1000:.1f} ms (worst {max(times):.3f} s)"
        )
    engines.kill()


if __name__ == "__main__":
    main()
