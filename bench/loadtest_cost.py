"""Measure the CPU that `kubeai bench` spends per chunk: 2,000 concurrent streams on one core.

    python bench/loadtest_cost.py [--streams 2000] [--chunks 400] [--json FILE]

Runs `kubeai bench run` with one process on a separate core, against a server that imitates 8
engines of 250 sequences each: it sends prepared bytes to all streams of an engine at each step, 20
steps per second. The figure is `client.cpu_us_per_chunk` of the results: all CPU time of the
generator process, including the kernel's and that for requests and connections, per event read.
Fails if that is more than 10 µs, if a request failed, or if a chunk was missed.

For comparison it reports a lower bound for any client on this machine: the kernel time of a loop
that only waits for the same streams and reads them, in the same minute and on the same core.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import resource
import select
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvloop
from pinned_proxies import process

BAR_US = 10.0
ENGINES = 8
STEP_S = 0.05
DESCRIPTORS = 20_000
TIMEOUT_S = 300
OTHERS = 3  # events of a stream without text: the role, the usage, `[DONE]`
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
NO_MODELS = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"


def framed(*events: object) -> bytes:
    """Encode events of a stream as one HTTP chunk."""
    lines = [
        one if isinstance(one, str) else json.dumps(one, separators=(",", ":")) for one in events
    ]
    body = "".join(f"data: {line}\n\n" for line in lines).encode()
    return b"%x\r\n%b\r\n" % (len(body), body)


def event(delta: dict[str, str], **more: object) -> dict[str, object]:
    """An event as vLLM writes it."""
    return {
        "id": "chatcmpl-5f0e8f8a8a5b4c4f9d6e2f4c1a7b3d90",
        "object": "chat.completion.chunk",
        "created": 1760000000,
        "model": "m",
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}],
    } | more


# -- the server ------------------------------------------------------------------------------------


class Stream(asyncio.Protocol):
    """A server connection: each request gets a stream."""

    engines: tuple[set[Stream], ...] = tuple(set() for _ in range(ENGINES))
    numbers = itertools.count()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.fd = transport.get_extra_info("socket").fileno()
        self._got = b""
        self.sent = 0

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._got.startswith(b"GET"):
            if self._got.endswith(b"\r\n\r\n"):
                self._got = b""
                self._transport.write(NO_MODELS)
            return
        head, _, body = self._got.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if length and len(body) >= int(length):
            self._got, self.sent = b"", 0
            self.engines[next(self.numbers) % ENGINES].add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        for engine in self.engines:
            engine.discard(self)


async def serve(chunks: int) -> None:
    first = HEAD + framed(event({"role": "assistant", "content": ""}))
    token = framed(event({"content": " cat"}))
    usage = {"prompt_tokens": 20, "completion_tokens": chunks, "total_tokens": 20 + chunks}
    last = framed(event({}, choices=[], usage=usage), "[DONE]") + b"0\r\n\r\n"

    async def engine(streams: set[Stream], number: int) -> None:
        due_s = time.monotonic() + STEP_S * number / ENGINES
        while True:
            for stream in list(streams):
                piece = first if not stream.sent else token if stream.sent <= chunks else last
                # Bypass the transport, which would cost as much as the measured client.
                with suppress(OSError):
                    os.write(stream.fd, piece)
                stream.sent += 1
                if piece is last:
                    streams.discard(stream)
            due_s = max(due_s + STEP_S, time.monotonic())
            await asyncio.sleep(due_s - time.monotonic())

    loop = asyncio.get_running_loop()
    server = await loop.create_server(Stream, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await asyncio.gather(*(engine(streams, n) for n, streams in enumerate(Stream.engines)))


# -- a client that only reads ----------------------------------------------------------------------


def read_bare(port: int, streams: int) -> None:
    """Print the kernel time per read, in µs."""
    poller = select.epoll()
    connections = {}
    for _ in range(streams):
        connection = socket.create_connection(("127.0.0.1", port))
        connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
        poller.register(connection.fileno(), select.EPOLLIN)
        connections[connection.fileno()] = connection
    before_s = resource.getrusage(resource.RUSAGE_SELF).ru_stime
    reads = 0
    while connections:
        for number, _ in poller.poll(maxevents=1024):
            piece = os.read(number, 1 << 16)
            reads += 1
            if not piece or piece.endswith(b"0\r\n\r\n"):
                connections.pop(number).close()
    took_s = resource.getrusage(resource.RUSAGE_SELF).ru_stime - before_s
    print(round(took_s / reads * 1e6, 2))


# -- the measurement -------------------------------------------------------------------------------


def measure(streams: int, chunks: int) -> tuple[dict[str, Any], float]:
    """The results of `kubeai bench`, and the kernel time of a bare read in µs."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("one core: the server takes its part of it", file=sys.stderr)
    command = [sys.executable, __file__, "--serve", "--chunks", str(chunks)]
    with (
        TemporaryDirectory() as folder,
        process(command, cores[0], stdout=subprocess.PIPE, text=True) as server,
    ):
        results, port = Path(folder) / "results.json", server.stdout.readline().strip()
        command = [
            *(sys.executable, "-m", "kubeai", "bench", "run"),
            *(f"http://127.0.0.1:{port}/v1", "--model", "m"),
            *("--concurrency", str(streams), "--conversations", str(streams), "--turns", "1"),
            *("--prompt-tokens", "20", "--reply-tokens", str(chunks), "--json", str(results)),
        ]
        with process(command, cores[-1], stdout=subprocess.DEVNULL) as client:
            client.wait(timeout=TIMEOUT_S)
        command = [sys.executable, __file__, "--bare", port, "--streams", str(streams)]
        with process(command, cores[-1], stdout=subprocess.PIPE, text=True) as client:
            told, _ = client.communicate(timeout=TIMEOUT_S)
        (found,) = json.loads(results.read_bytes())["runs"]
        return found, float(told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=2000)
    parser.add_argument("--chunks", type=int, default=400, help="chunks per stream")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bare", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(DESCRIPTORS, hard), hard))
    if args.serve:
        uvloop.run(serve(args.chunks))
        return 0
    if args.bare:
        read_bare(args.bare, args.streams)
        return 0
    found, bare_us = measure(args.streams, args.chunks)
    summary, client = found["summary"], found["setting"]["client"]
    most = max(count for _, count in found["curves"]["in_flight"])
    print(
        f"{most:.0f} streams at once, {client['chunks']:,} chunks in "
        f"{summary['duration_s']:.1f} s: {client['cpu_us_per_chunk']} µs of CPU a chunk "
        f"({client['kernel_us_per_chunk']} the kernel's; of a bare read {bare_us}), "
        f"{client['cpu_share']:.0%} of a core; gap p50 {summary['itl_ms']['p50']} ms, "
        f"p99 {summary['itl_ms']['p99']} ms"
    )
    if args.json:
        figures = {"streams": most, "bare_read_us": bare_us, **client}
        args.json.write_text(json.dumps(figures, indent=1))
    for warning in found["warnings"]:
        print(f"warning: {warning}")
    lost = args.streams * (args.chunks + OTHERS) - client["chunks"]
    if summary["failed"] or lost or client["cpu_us_per_chunk"] > BAR_US:
        print(f"failed: {summary['failed']} requests, {lost} chunks lost, bar {BAR_US} µs")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
