"""`kubeai bench` as a program when something fails: its options, engines, its processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from benches import FAST, RUN_TIMEOUT_S, SLOW, SMALL, Bench, Engine, Ran, _command, engine
from fakes.command_line import kubeai


@contextlib.asynccontextmanager
async def engine_process(*flags: str) -> AsyncIterator[Engine]:
    """An engine that can be killed, or whose clients are."""
    process = await asyncio.create_subprocess_exec(
        *_command(*flags), stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(RUN_TIMEOUT_S):
            while "mock engine listens" not in (line := (await process.stderr.readline()).decode()):
                assert line, "it ended"
        yield Engine(json.loads(line)["address"], process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


def test_unreachable_endpoint_is_reported_in_one_line():
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        line = Ran(*kubeai("bench", "run", url, "--model", "m")).fails()
    assert line == f"error: {url}: Connection refused"


async def test_unknown_model_is_reported_in_one_line(bench):
    async with engine(*FAST, "--served-model-name", "a", "b") as one:
        line = (await bench.run(one.url, "--model", "x")).fails()
        assert line == f"error: {one.url}: has no model 'x', but a, b"
        line = (await bench.run(one.url)).fails()
        assert line == f"error: {one.url}: has several models: set --model to one of a, b"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "5", "--concurrency", "3"], "--rate: cannot be combined with --concurrency"),
        (["--arrivals", "ramp"], "--arrivals: requires --request-rate or --rate"),
        (["--rate", "5", "--arrivals", "ramp"], "--until-rate: a ramp requires"),
        (["--shape", "round"], "--shape: 'round' is not one of chat,"),
        (["--duration", "5"], "--duration: '5' has no unit"),
        (["--header", "x"], "--header: 'x' is not 'Name: value'"),
        (["--body", "[1]"], "--body: '[1]' is not a JSON object"),
        (["--trace", "t", "--turns", "3"], "--turns: cannot be combined with --trace"),
        (["--html", "/proc/x/y"], "--html: /proc/x: "),
        (["--slo-ttft", "1s"], "--slo-ttft: is called --goodput ttft:<duration> now"),
        (["--concurrency", "1,2"], "--concurrency: a list is only for simulate"),
        (["--duration", "5s", "--request-rate", "inf"], "--duration: requires a finite"),
    ],
)
def test_an_invalid_option_is_reported_in_one_line(arguments, said):
    ran = Ran(*kubeai("bench", "run", "http://127.0.0.1:9/v1", *arguments))
    assert said in ran.fails()


async def test_ctrl_c_keeps_what_was_measured(bench):
    async with engine_process(*SLOW) as one:
        process = await bench.start(
            *("run", one.url, "--duration", "60s", "--concurrency", "6", *SMALL),
            *("--json", str(bench.json), "--processes", "2"),
        )
        await one.has_received(20)
        workers = children(process.pid)
        assert len(workers) == 2
        process.send_signal(signal.SIGINT)
        ran = await bench.ended(process)
    assert ran.code == 130
    assert "Traceback" not in ran.said
    found = bench.found()
    assert found["summary"]["requests"] >= 10
    assert found["summary"]["failed"] == 0
    assert found["warnings"][0].startswith("interrupted after ")
    assert "interrupted after " in ran.out
    assert not [pid for pid in workers if is_alive(pid)]


@pytest.mark.slow
async def test_killed_engine_counts_as_errors_and_other_results_are_kept(bench):
    async with engine_process(*SLOW) as one:
        process = await bench.start(
            *("run", one.url, "--duration", "5s", "--concurrency", "4", *SMALL),
            *("--json", str(bench.json)),
        )
        await one.has_received(12)
        one.process.kill()
        ran = await bench.ended(process)
    assert ran.code == 0
    found = bench.found()
    assert found["summary"]["requests"] - found["summary"]["failed"] >= 4
    assert found["errors"]["connection: Connection refused"] >= 4
    assert found["errors"].keys() <= {
        *("cut", "connection: lost", "connection: Connection refused"),
        "connection: Connection reset by peer",
    }


async def test_killed_load_process_is_reported_and_other_results_are_kept(bench):
    async with engine_process(*SLOW) as one:
        process = await bench.start(
            *("run", one.url, "--duration", "5s", "--concurrency", "4", *SMALL),
            *("--json", str(bench.json), "--processes", "2"),
        )
        await one.has_received(12)
        os.kill(children(process.pid)[1], signal.SIGKILL)
        ran = await bench.ended(process)
    assert ran.code == 1
    assert re.search(r"^error: process [01] exited \(signal 9\)$", ran.said, re.M)
    found = bench.found()
    assert found["summary"]["requests"] > 8
    assert any("exited (signal 9)" in warning for warning in found["warnings"])


async def test_failures_are_counted_by_kind_with_the_first_message(bench):
    async with engine(*FAST, "--fail-every", "5") as one:
        ran = await bench.run(one.url, "--conversations", "20", "--turns", "1")
    assert ran.code == 0
    found = bench.found()
    assert found["errors"] == {"status 500": 4}
    assert re.search(r"^status 500: first message: \{.*error", ran.out, re.M)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
