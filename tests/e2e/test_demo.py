"""`kubeai bench demo` at a small size: a real `kubeai local`, and mock engines as processes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import until

from kubeai.loadtest import demo
from kubeai.simulation.results import read

TIMEOUT_S = 100
COMMAND = (sys.executable, "-m", "kubeai", "bench", "demo", "--engines=2")


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 10)
def test_the_same_conversations_are_sent_to_each_strategy_and_a_page_is_written(tmp_path):
    files = tmp_path / "r.json", tmp_path / "r.html"
    done = subprocess.run(
        (*COMMAND, "--duration=4s", "--json", str(files[0]), "--html", str(files[1])),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"Report: {files[1]}"
    assert "has the lowest mean TTFT" in done.stdout or "about the same" in done.stdout
    runs = read(files[0]).runs
    assert [run.name for run in runs] == ["Service", "LeastLoad", "PrefixHash", "PrefixCache"]
    for run in runs:
        assert (run.summary["requests"], run.summary["failed"]) == (6 * 5, 0)
        assert run.summary["prompt_tokens"] == runs[0].summary["prompt_tokens"]
        assert len(run.spread) == 2, "both engines"
    assert len({name for run in runs for name in run.spread}) == 8, "each has its own"
    assert runs[3].summary["hit_rate"] > runs[0].summary["hit_rate"]
    assert 'class="verdict"' in files[1].read_text()


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 10)
async def test_ctrl_c_stops_everything_that_was_started(tmp_path):
    process = await asyncio.create_subprocess_exec(
        *COMMAND,
        cwd=tmp_path,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not (line := await process.stderr.readline()).startswith(b"Service:"):
                assert line, "it has ended"
            process.send_signal(signal.SIGINT)
            await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 130
    await until("nothing runs", lambda: not processes_in(tmp_path))
    assert list(tmp_path.iterdir()) == []


def processes_in(folder: Path) -> list[str]:
    """The command lines of the processes that have this folder in theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


def test_all_models_have_the_same_engines_and_their_own_strategy():
    found = demo.manifests(demo.Demo(engines=3))
    assert [
        (one["metadata"]["name"], one["spec"]["loadBalancing"]["strategy"]) for one in found
    ] == [
        ("service", "LeastLoad"),
        ("least-load", "LeastLoad"),
        ("prefix-hash", "PrefixHash"),
        ("prefix-cache", "PrefixCache"),
    ]
    for one in found:
        assert one["spec"]["args"] == list(demo.ENGINE)
        assert (one["spec"]["minReplicas"], one["spec"]["maxReplicas"]) == (3, 3)


async def test_a_service_sends_each_connection_to_a_random_engine_and_both_ways():
    async def echo(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{number}: ".encode() + await reader.readline())
        writer.close()

    async def serve(number: int) -> asyncio.Server:
        return await asyncio.start_server(lambda r, w: echo(number, r, w), "127.0.0.1", 0)

    servers = [await serve(number) for number in range(3)]
    addresses = ["{}:{}".format(*server.sockets[0].getsockname()) for server in servers]
    answers = []
    async with asyncio.timeout(20), demo.service(addresses, random.Random(1)) as url:
        port = int(url.rpartition(":")[2].partition("/")[0])
        for _ in range(60):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"hello\n")
            answers.append((await reader.read()).decode())
            writer.close()
    for server in servers:
        server.close()
    counts = [answers.count(f"{number}: hello\n") for number in range(3)]
    assert sum(counts) == 60
    assert min(counts) >= 10
