"""Throughput and CPU of requests by message, beside the same requests over HTTP.

    BROKERS=$(tests/brokers/build.sh) python bench/messages.py [--requests 2000] [--json FILE]
    python bench/messages.py --only sqs jetstream --quick

One `kubeai local` with two mock engines that take no time. `kubeai bench` sends the same chats, not
streamed, in a closed loop: over HTTP, and by message through each broker that is installed. CPU is
from /proc, of the processes of KubeAI that have a part in it: the supervisor, the worker and the
messenger; not that of the broker, the engines and the load generator, which run on the same cores.
Runs alternate, and the figures are medians. Messages are confirmed twice (the request by the
broker to the load generator, the response to KubeAI), and some servers write each to disk.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from chaos.under_test import BROKERS, BrokerUnderTest
from harness import Local, model, until

HTTP = "HTTP"
CONCURRENCY = 32
FAST = ("--prefill-tokens-per-second=0", "--decode-tokens-per-second=0")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
RUN_MAX_S = 300.0


class Run(NamedTuple):
    """One run: requests per second, latencies, and the CPU of KubeAI per request."""

    per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: dict[str, float]  # by process


def cpu_s(pids: list[int]) -> float:
    """User and system time of processes, in seconds."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(each[11]) + int(each[12]) for each in fields) / TICKS_PER_S


def processes(local: Local) -> dict[str, list[int]]:
    """The processes of KubeAI that have a part in requests."""
    assert local.process is not None
    messengers = [
        pid for pid, command in local.processes().items() if "kubeai.messenger" in command
    ]
    return {
        "supervisor": [local.process.pid],
        "worker": local.workers(),
        "messenger": messengers,
    }


async def measure(
    local: Local, target: list[str], requests: int, environment: dict[str, str]
) -> Run:
    """Send the requests to a target and wait for the responses."""
    before = {name: cpu_s(pids) for name, pids in processes(local).items()}
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        bench = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kubeai", "bench", "run", *target, "--model", "m"),
            *("--num-prompts", str(requests), "--max-concurrency", str(CONCURRENCY)),
            *("--no-stream", "--turns", "1", "--reply-tokens", "16", "--json", file.name),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env=os.environ | environment,
        )
        async with asyncio.timeout(RUN_MAX_S):
            status = await bench.wait()
        if status:
            raise SystemExit(f"kubeai bench run {' '.join(target)} failed")
        (run,) = json.load(file)["runs"]
    after = {name: cpu_s(pids) for name, pids in processes(local).items()}
    summary = run["summary"]
    if summary["failed"] or summary.get("lost") or summary.get("duplicates"):
        raise SystemExit(f"{' '.join(target)}: {summary}")
    each = {name: (after[name] - before[name]) / requests * 1e6 for name in before}
    e2el = summary["e2el_ms"]
    return Run(summary["requests_per_s"], e2el["p50"], e2el["p99"], each)


@contextmanager
def brokers(names: list[str], folder: Path) -> Iterator[dict[str, BrokerUnderTest]]:
    """Those that are installed, started."""
    found: dict[str, BrokerUnderTest] = {}
    try:
        for name in names:
            try:
                found[name] = BROKERS[name](folder / name)
            except pytest.skip.Exception as skipped:
                print(f"{name}: {skipped}", file=sys.stderr)
                continue
            found[name].server.start()
        yield found
    finally:
        for under in found.values():
            under.end()


async def run(names: list[str], requests: int, rounds: int, folder: Path) -> dict[str, Any]:
    with brokers(names, folder) as found:
        for under in found.values():
            await under.create_topics()
        targets = {HTTP: None, **found}
        runs: dict[str, list[Run]] = {name: [] for name in targets}
        for _ in range(rounds):
            for name, under in targets.items():
                runs[name].append(await one(under, requests, folder))
                print(f"{name}: {runs[name][-1]}", file=sys.stderr, flush=True)
    return {
        name: {
            "requests_per_s": statistics.median(each.per_s for each in of_name),
            "p50_ms": statistics.median(each.p50_ms for each in of_name),
            "p99_ms": statistics.median(each.p99_ms for each in of_name),
            "cpu_us": {
                process: statistics.median(each.cpu_us[process] for each in of_name)
                for process in of_name[0].cpu_us
            },
            "runs": len(of_name),
            "requests": requests,
        }
        for name, of_name in runs.items()
    }


async def one(under: BrokerUnderTest | None, requests: int, folder: Path) -> Run:
    """One run, with a KubeAI of its own."""
    streams = []
    environment: dict[str, str] = {}
    if under is not None:
        environment = under.server.environment
        streams.append(
            {
                "requestsURL": under.requests,
                "responsesURL": under.responses_topic,
                "maxHandlers": CONCURRENCY,
            }
        )
    engines = model("m", args=FAST, minReplicas=2, maxReplicas=2)
    with tempfile.TemporaryDirectory(dir=folder) as data:
        config = {"messaging": {"streams": streams}}
        local = Local(Path(data), engines, config=config, env=environment)
        await local.start()
        try:
            target = [local.endpoint]
            if under is not None:
                await until("the messenger runs", lambda: processes(local)["messenger"])
                target = ["--via", under.requests_topic, "--via-responses", under.responses]
            await measure(local, target, 2 * CONCURRENCY, environment)  # warm-up
            return await measure(local, target, requests, environment)
        finally:
            await local.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(BROKERS), default=list(BROKERS))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few requests, one round")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    requests, rounds = (200, 1) if given.quick else (given.requests, given.rounds)
    with tempfile.TemporaryDirectory(prefix="kubeai-bench-") as folder:
        found = asyncio.run(run(given.only, requests, rounds, Path(folder)))
    for name, each in found.items():
        cpu = ", ".join(f"{process} {us:.0f}" for process, us in each["cpu_us"].items())
        print(
            f"{name:>10}: {each['requests_per_s']:7.0f}/s, p50 {each['p50_ms']:.1f} ms, "
            f"p99 {each['p99_ms']:.1f} ms, CPU per request {sum(each['cpu_us'].values()):.0f} µs "
            f"({cpu})"
        )
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
