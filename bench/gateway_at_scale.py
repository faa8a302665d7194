"""Compare a KubeAI worker with an nginx worker: connections, latency, streams, two workers.

    python bench/gateway_at_scale.py [--quick] [--only latency] [--json FILE]

Uses the proxies, mock engines and cores of ``gateway_vs_nginx.py``. Parts:

- ``connections``: CPU per chat request with 1 to 1,024 connections in a closed loop;
- ``latency``: p50 and p99 at one open-loop rate, half of KubeAI's maximum throughput (measured
  first, with 128 connections in a closed loop). Requests are due at fixed times, regardless of
  earlier responses, and latency is measured from the due time. The load generator and its engines
  are ``open_loop.c`` (needs gcc): a load generator in Python was itself late by more than the
  latency it measured. Runs are in pairs, nginx first in every other pair; the ratio is the median
  over the pairs. Both proxies run with SCHED_FIFO where permitted, since otherwise the machine's
  other work (memory reclaim, one millisecond several times per second) determines the p99 of both;
- ``streams``: memory of the proxy's worker per stream, with 9,500 open streams that have each
  delivered their first chunk, and the time until none is counted after the clients disconnect;
- ``workers``: CPU per request of two workers relative to one, with 256 connections, on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryDirectory

import uvloop
from closed_loop import ANSWERS, ENGINES, SCENARIOS, STREAM_CHUNK, STREAM_HEAD, WHOLE, make_requests
from gateway_vs_nginx import measure
from pinned_proxies import Kubeai, find_nginx, free_port, kubeai, nginx, process, wait_until

CHAT = SCENARIOS[0]
PARTS = ("connections", "latency", "streams", "workers")
DESCRIPTORS = 20_000
SATURATION_CONNECTIONS = 256
LATENCY_CONNECTIONS = 128


@dataclass(frozen=True)
class Effort:
    rounds: int
    seconds: float
    pairs: int
    latency_s: float
    connections: tuple[int, ...]
    streams: int


FULL = Effort(3, 2.0, 20, 1.5, (1, 8, 32, 128, 256, 512, 1024), 9500)
QUICK = Effort(1, 0.7, 2, 1.0, (1, 256, 1024), 2000)


# -- open-loop load --------------------------------------------------------------------------------


@contextmanager
def open_loop(core: int, folder: Path) -> Iterator[tuple[int, Popen[str]]]:
    """Run open_loop.c on a separate core; yields its engines' port and its process."""
    program, frames = folder / "open_loop", folder / "frames"
    source = Path(__file__).with_name("open_loop.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-o", program, source], check=True)
    port = free_port()
    with frames.open("wb") as file:
        for frame in (WHOLE, *make_requests(CHAT, 0)):
            file.write(struct.pack("=I", len(frame)) + frame)
    command = [str(program), str(port), str(LATENCY_CONNECTIONS), str(frames)]
    with process(command, core, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        if child.stdout.readline() != "ready\n":
            raise SystemExit("the open-loop load did not start")
        yield port, child


def run_open_loop(child: Popen[str], port: int, rate: float, seconds: float) -> dict[str, float]:
    """Run once against a proxy; a rate of 0 measures its maximum throughput."""
    child.stdin.write(f"{port} {rate} {seconds}\n")
    child.stdin.flush()
    result = child.stdout.readline()
    if not result:
        raise SystemExit("the open-loop load failed")
    return json.loads(result)


# -- open streams ----------------------------------------------------------------------------------


class Endless(asyncio.Protocol):
    """An engine that sends only the first chunk of each stream."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._got = b""

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._got.endswith(b"}"):
            self._got = b""
            self._transport.write(STREAM_HEAD + STREAM_CHUNK)


class Listener(asyncio.Protocol):
    def __init__(self, request: bytes, first: asyncio.Queue[Listener]) -> None:
        self._request = request
        self._first = first
        self._got = b""

    def connection_made(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._got += data
        if self._got.endswith(STREAM_CHUNK):
            self._got = b""
            self._first.put_nowait(self)
        elif not self._got.startswith(b"HTTP/1.1 200"[: len(self._got)]):
            raise SystemExit(f"not a stream: {self._got[:400]!r}")

    def connection_lost(self, error: Exception | None) -> None:
        if self._got:
            raise SystemExit(f"a stream was closed unexpectedly: {self._got[:400]!r}")


async def run_endless(port: int) -> None:
    loop = asyncio.get_running_loop()
    for host in ENGINES:
        await loop.create_server(Endless, host, port, backlog=4096)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def run_listeners(port: int, count: int) -> None:
    """Open the streams, print "open", and close them at the end of stdin."""
    loop = asyncio.get_running_loop()
    requests = make_requests(SCENARIOS[1], port)
    first: asyncio.Queue[Listener] = asyncio.Queue()
    streams = []
    for i in range(count):
        await loop.create_connection(
            lambda i=i: Listener(requests[i % len(requests)], first), "127.0.0.1", port
        )
        if i - len(streams) > 200:
            streams.append(await first.get())
    while len(streams) < count:
        try:
            streams.append(await asyncio.wait_for(first.get(), 20))
        except TimeoutError:
            raise SystemExit(f"only {len(streams)} of {count} streams started") from None
    print("open", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    for stream in streams:
        stream.transport.close()
    await asyncio.sleep(0.2)
    print("closed", flush=True)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# -- the parts -------------------------------------------------------------------------------------


class Bench:
    """The processes that all parts use: engines, nginx, and a supervisor with one worker."""

    def __init__(self, effort: Effort, cores: tuple[int, int], stack: ExitStack) -> None:
        self.effort = effort
        self.proxy_core, self.load_core = cores
        self._stack = stack
        self.engines = {answer: free_port() for answer in ANSWERS}
        self._child("gateway_vs_nginx.py", "--engines", json.dumps(self.engines))
        self.nginx_pids, nginx_ports = stack.enter_context(nginx(self.proxy_core, self.engines))
        self.ours = self._kubeai()
        self.proxies = {
            "nginx": (self.nginx_pids, nginx_ports),
            "kubeai": (self.ours.pids, self.ours.ports),
        }

    def _kubeai(self, workers: int = 1) -> Kubeai:
        return self._stack.enter_context(kubeai(self.proxy_core, self.engines, workers=workers))

    def _child(self, *arguments: str) -> None:
        path = Path(__file__).with_name(arguments[0])
        command = [sys.executable, str(path), *arguments[1:]]
        child = self._stack.enter_context(
            process(command, self.load_core, stdout=subprocess.PIPE, text=True)
        )
        if child.stdout.readline() != "ready\n":
            raise SystemExit("the mock engines did not start")

    def _cpu(self, pids: list[int], port: int, connections: int) -> dict[str, float]:
        run = measure(CHAT, pids, port, self.load_core, connections, self.effort.seconds)
        return {"us": run.us, "rate": run.rate}

    def connections(self) -> dict:
        table = {}
        for count in self.effort.connections:
            runs: dict[str, list[dict[str, float]]] = {"nginx": [], "kubeai": []}
            for turn in range(self.effort.rounds):
                for name in sorted(runs, reverse=turn % 2 == 0):
                    pids, ports = self.proxies[name]
                    runs[name].append(self._cpu(pids, ports["whole"], count))
            table[count] = {
                f"{name}_{key}": statistics.median(run[key] for run in made)
                for name, made in runs.items()
                for key in ("us", "rate")
            } | {"ratio": median_ratio(runs["kubeai"], runs["nginx"], "us")}
            print(f"connections {count:5}: {line(table[count])}", flush=True)
        return table

    def latency(self) -> dict:
        runs: dict[str, list[dict[str, float]]] = {"nginx": [], "kubeai": []}
        effort = self.effort
        with (
            TemporaryDirectory() as folder,
            open_loop(self.load_core, Path(folder)) as (engines, load),
            nginx(self.proxy_core, dict.fromkeys(ANSWERS, engines)) as (nginx_pids, nginx_ports),
            kubeai(self.proxy_core, dict.fromkeys(ANSWERS, engines)) as ours,
        ):
            ports = {"nginx": nginx_ports["whole"], "kubeai": ours.ports["whole"]}
            most = {
                n: run_open_loop(load, p, 0, effort.latency_s)["rate"] for n, p in ports.items()
            }
            rate = most["kubeai"] / 2
            for pid in nginx_pids + ours.pids:
                put_first(pid)
            for turn in range(effort.pairs):
                for name in sorted(runs, reverse=turn % 2 == 0):
                    runs[name].append(run_open_loop(load, ports[name], rate, effort.latency_s))
        result = {"saturation": most["kubeai"], "nginx_saturation": most["nginx"], "rate": rate}
        result["pairs"] = effort.pairs
        for key in ("p50_us", "p99_us", "late_p99_us"):
            for name, made in runs.items():
                result[f"{name}_{key}"] = statistics.median(run[key] for run in made)
        for key in ("p50", "p99"):
            result[f"{key}_ratio"] = median_ratio(runs["kubeai"], runs["nginx"], f"{key}_us")
        for name, made in runs.items():  # the other three quarters include the machine's stalls
            calm = statistics.quantiles((run["p99_us"] for run in made), n=4, method="inclusive")[0]
            result[f"{name}_calm_p99_us"] = calm
        result["runs"] = runs
        print(f"latency at {rate:.0f} per second: {line(result)}", flush=True)
        return result

    def streams(self) -> dict:
        port = free_port()
        self._child("gateway_at_scale.py", "--endless", str(port))
        endless = dict.fromkeys(ANSWERS, port)
        result: dict[str, object] = {"streams": self.effort.streams}
        with nginx(self.proxy_core, endless) as (pids, ports):
            grown, _ = self._open_streams(pids[-1], ports["burst"], lambda: True)
            result["nginx_bytes"] = grown
        with kubeai(self.proxy_core, endless) as ours:
            counted = lambda: ours.counts().get("active burst", 0)  # noqa: E731
            grown, seconds = self._open_streams(
                ours.pids[-1],
                ours.ports["burst"],
                lambda: counted() == self.effort.streams,
                lambda: not ours.counts(),
            )
        result |= {"kubeai_bytes": grown, "counted": self.effort.streams, "to_zero_s": seconds}
        print(f"streams: {line(result)}", flush=True)
        return result

    def _open_streams(self, pid, port, all_open, all_gone=lambda: True) -> tuple[float, float]:
        before = resident_bytes(pid)
        command = [sys.executable, __file__, "--listeners", f"{port} {self.effort.streams}"]
        with process(
            command, self.load_core, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as load:
            if load.stdout.readline() != "open\n":
                raise SystemExit("not all streams could be opened")
            if not all_open():
                raise SystemExit("not every open stream is counted")
            grown = resident_bytes(pid) - before
            load.stdin.close()
            began_s = time.monotonic()
            if load.stdout.readline() != "closed\n":
                raise SystemExit("the streams did not close")
            wait_until(all_gone, "streams are still counted")
            return grown / self.effort.streams, time.monotonic() - began_s

    def workers(self) -> dict:
        two = self._kubeai(workers=2)
        fleets = {"one": self.ours, "two": two}
        runs: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
        for turn in range(self.effort.rounds):
            for name in sorted(runs, reverse=turn % 2 == 0):
                fleet = fleets[name]
                port = fleet.ports["whole"]
                runs[name].append(self._cpu(fleet.pids, port, SATURATION_CONNECTIONS))
        result = {f"{n}_us": statistics.median(r["us"] for r in made) for n, made in runs.items()}
        result["ratio"] = median_ratio(runs["two"], runs["one"], "us")
        print(f"workers: {line(result)}", flush=True)
        return result


def put_first(pid: int) -> None:
    """Give a process real-time priority over all others; requires root."""
    with suppress(PermissionError):
        os.sched_setscheduler(pid, os.SCHED_FIFO, os.sched_param(1))


def median_ratio(ours: list[dict], theirs: list[dict], key: str) -> float:
    """The median of each pair's ratio: disturbances longer than a run affect both of a pair."""
    return statistics.median(o[key] / t[key] for o, t in zip(ours, theirs, strict=True))


def line(result: dict) -> str:
    return ", ".join(f"{k} {v:.4g}" for k, v in result.items() if isinstance(v, int | float))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="run a one-minute sample of all parts")
    parser.add_argument("--only", action="append", choices=PARTS)
    parser.add_argument(
        "--cores",
        type=int,
        nargs=2,
        default=(0, 1),
        help="CPU cores of the proxies and of the load",
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--endless", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--listeners", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if options.endless:
        uvloop.run(run_endless(options.endless))
        return 0
    if options.listeners:
        uvloop.run(run_listeners(*map(int, options.listeners.split())))
        return 0
    if find_nginx() is None:
        print("nginx is not installed: nothing to compare with (Debian: apt install nginx-light)")
        return 0
    if not set(options.cores) <= os.sched_getaffinity(0):
        print(f"cores {options.cores}: not both are this process's (--cores)")
        return 2
    results = {}
    if options.only and options.json and options.json.exists():
        results = json.loads(options.json.read_text())  # keep the results of other parts
    with ExitStack() as stack:
        bench = Bench(QUICK if options.quick else FULL, tuple(options.cores), stack)
        for part in PARTS:
            if not options.only or part in options.only:
                results[part] = getattr(bench, part)()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
