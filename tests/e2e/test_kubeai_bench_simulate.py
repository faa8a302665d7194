"""`kubeai bench simulate` as a program."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from fakes import command_line

from kubeai.simulation.results import read

COMMAND = (sys.executable, "-m", "kubeai", "bench", "simulate")
SMALL = ("--conversations=60", "--turns=4", "--engines=4", "--concurrency=20")
RUN_TIMEOUT_S = 50


def simulate(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*COMMAND, *map(str, options)), capture_output=True, text=True, timeout=RUN_TIMEOUT_S
    )


def test_each_strategy_and_concurrency_is_a_run_that_is_printed_and_written(tmp_path):
    files = ("--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    done = simulate(*SMALL[:3], "--concurrency=10,20", *files, "--csv", tmp_path / "r.csv")
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "r.json").runs
    assert [(one.setting["strategy"], one.setting["concurrency"]) for one in found] == [
        (strategy, concurrency)
        for concurrency in (10, 20)
        for strategy in ("Service", "LeastLoad", "PrefixHash", "PrefixCache")
    ]
    for one in found:
        assert one.name in done.stdout
        assert (one.summary["requests"], one.summary["failed"]) == (240, 0)
    page = (tmp_path / "r.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert all(one.name in page for one in found)
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [one.name for one in found]
    assert [float(row["ttft_ms.p95"]) for row in rows] == [
        one.summary["ttft_ms"]["p95"] for one in found
    ]


def test_the_same_options_give_the_same_results_but_for_the_date(tmp_path):
    for name in ("one", "other"):
        assert simulate(*SMALL, "--replicas=3", "--json", tmp_path / name).returncode == 0
    one, other = (read(tmp_path / name).runs for name in ("one", "other"))
    for run in (*one, *other):
        environment = run.environment
        assert environment.pop("date")
        assert "simulate" in environment.pop("command")
    assert [run.name for run in one if "replicas" in run.name] == [run.name for run in one[1:]]
    assert one == other


def test_a_trace_is_played_by_its_times_and_a_limit_on_requests_holds(tmp_path):
    trace = tmp_path / "t.jsonl"
    lines = [
        {"timestamp": 1000 * n, "input_length": 600, "output_length": 5, "hash_ids": [1, n]}
        for n in range(50)
    ]
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    done = simulate("--trace", trace, "--strategies=LeastLoad", "--num-prompts=40", "--speed=2",
                    "--json", tmp_path / "r")  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = read(tmp_path / "r").runs
    summary = found.summary
    assert summary["requests"] == 40
    assert summary["duration_s"] == pytest.approx(39 / 2, abs=1.0)
    assert summary["hit_rate"] > 0.5, "the first block is everybody's"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--strategies=Best",), "--strategies: 'Best' is not one of Service"),
        (("--preset=tpu",), "--preset: 'tpu' is not one of"),
        (("--concurrency=0",), "--concurrency: '0'"),
        (("--shape=poem",), "--shape: 'poem' is not one of"),
        (("--sharegpt=/nowhere.json",), "/nowhere.json: No such file"),
        (("--concurrency=4", "--rate=3"), "--rate: cannot be combined with --concurrency"),
        (("--requests=4",), "--requests: is called --num-prompts now"),
    ],
)
def test_a_wrong_option_is_one_line(options, words):
    code, _, err = command_line.kubeai("bench", "simulate", *options)
    assert code == 2
    assert err.startswith(f"error: {words}")
    assert err.count("\n") == 1


def test_ctrl_c_keeps_the_runs_that_are_done(tmp_path):
    """Some of the 100 runs are left when the first one is reported."""
    levels = ",".join(map(str, range(1, 101)))
    options = ("--strategies=LeastLoad", f"--concurrency={levels}", "--conversations=400")
    process = subprocess.Popen(
        (*COMMAND, *options, "--json", str(tmp_path / "r")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr.readline().startswith("LeastLoad, 1 at a time: done")
        os.killpg(process.pid, signal.SIGINT)
        table, log = process.communicate(timeout=RUN_TIMEOUT_S)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, log
    results = read(tmp_path / "r").runs
    assert 1 <= len(results) < 100
    assert f"interrupted: {len(results)} of 100 runs completed" in log
    assert "Traceback" not in log
    assert "LeastLoad" in table
    assert results[0].name == "LeastLoad, 1 at a time"


def test_ctrl_c_is_handled_by_the_first_process(tmp_path):
    """A terminal tells every process of it; whichever hears of it first, the results are kept."""
    options = ("--strategies=LeastLoad,Oracle", "--engines=100", "--conversations=200")
    process = subprocess.Popen(
        (*COMMAND, *options, "--json", str(tmp_path / "r")), stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr.readline().startswith("LeastLoad, 32 at a time: done")
        for child in children(process.pid):
            os.kill(child, signal.SIGINT)
        _, said = process.communicate(timeout=RUN_TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 0, said
    assert len(read(tmp_path / "r").runs) == 2


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
