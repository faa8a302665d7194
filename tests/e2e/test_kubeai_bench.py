"""`kubeai bench` as a program, against mock engines that are programs as well."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterator
from datetime import datetime

import pytest
from benches import FAST, SLOW, SMALL, Bench, Engine, Ran, _command, engine
from fakes.command_line import kubeai


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[Engine]:
    """An engine for tests that do not count its requests."""
    process = subprocess.Popen(_command(*FAST), stderr=subprocess.PIPE, text=True)
    try:
        while "mock engine listens" not in (line := process.stderr.readline()):
            assert line, "it ended"
        yield Engine(json.loads(line)["address"], process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


async def test_a_closed_loop_of_conversations_is_measured(bench):
    async with engine(*FAST) as one:
        page = bench.folder / "page.html"
        ran = await bench.run(
            *(one.url, "--model", "m", "--conversations", "20", "--concurrency", "5", *SMALL),
            *("--name", "mine", "--html", str(page)),
        )
        assert ran.code == 0
        found, received = bench.found(), await one.received()
        assert received["total"] == 40
    summary = found["summary"]
    assert (summary["requests"], summary["failed"]) == (40, 0)
    assert found["spread"] == {"replica-1": 40}
    # What a turn carries of the turns before it is in the engine's cache.
    assert 0.2 < summary["hit_rate"] < 0.8
    for times in ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "late_ms"):
        assert summary[times]["p99"] >= summary[times]["p50"] >= 0
    assert found["name"] == "mine"
    assert found["setting"]["client"]["processes"] == 1
    cost = r"client: [\d.]+ µs of CPU per chunk \([\d.]+ in the kernel\), .*, 1 process"
    assert re.fullmatch(cost, ran.out.splitlines()[-1])
    assert "<html" in page.read_text()


async def test_an_open_loop_begins_conversations_at_their_times(bench):
    async with engine(*SLOW) as one:
        ran = await bench.run(
            *(one.url, "--conversations", "60", "--rate", "40", "--arrivals", "constant", *SMALL)
        )
    assert ran.code == 0
    found = bench.found()
    assert found["summary"]["requests"] == 120
    assert found["setting"]["model"] == "m", "the only one that there is"
    # The last one begins after 59 / 40 s, although answers take longer than the 25 ms between them.
    assert found["summary"]["duration_s"] > 59 / 40
    assert max(count for _, count in found["curves"]["in_flight"]) > 3


async def test_requests_start_at_a_rate_and_a_limit_on_those_in_flight_holds(bench):
    async with engine(*SLOW) as one:
        ran = await bench.run(
            *(one.url, "--num-prompts", "60", "--request-rate", "60", "--max-concurrency", "4"),
            *(
                "--processes",
                "2",
                "--goodput",
                "ttft:5000",
                "e2el:9s",
                "--metric-percentiles",
                "50,99.9",
            ),
            *("--percentile-metrics", "ttft,client_queue_time", *SMALL),
        )
        assert ran.code == 0
        assert (await one.received())["total"] == 60
    found = bench.found()
    summary = found["summary"]
    assert (summary["requests"], summary["failed"], summary["good_share"]) == (60, 0, 1.0)
    # A response takes 8 / 50 s, so that 4 at a time are slower than the rate.
    assert max(count for _, count in found["curves"]["in_flight"]) <= 4
    assert summary["duration_s"] > 60 / 4 * 8 / 50
    assert summary["client_queue_time_ms"]["p99.9"] > 100
    assert summary["ttft_ms"].keys() == {"mean", "p50", "p99.9"}
    assert not {"tpot_ms", "itl_ms", "e2el_ms"} & summary.keys()


async def test_a_limit_on_requests_in_flight_holds_for_conversations_too(bench, shared_engine):
    ran = await bench.run(
        *(shared_engine.url, "--conversations", "12", "--concurrency", "8"),
        *("--max-concurrency", "2", *SMALL),
    )
    assert ran.code == 0
    found = bench.found()
    assert (found["summary"]["requests"], found["summary"]["failed"]) == (24, 0)
    assert max(count for _, count in found["curves"]["in_flight"]) <= 2


async def test_all_requests_start_at_once_without_a_rate(bench):
    async with engine(*SLOW) as one:
        ran = await bench.run(one.url, "--num-prompts", "30", *SMALL)
    assert ran.code == 0
    found = bench.found()
    assert found["summary"]["requests"] == 30
    assert max(count for _, count in found["curves"]["in_flight"]) > 25


async def test_prompts_and_responses_have_the_lengths_that_the_engine_counts(bench, shared_engine):
    ran = await bench.run(
        *(shared_engine.url, "--input-len", "200", "--output-len", "20", "--num-prompts", "30"),
        *("--random-prefix-len", "100", "--random-range-ratio", "0.5"),
    )
    assert ran.code == 0
    found = bench.found()
    # The run checks each request, and warns of others.
    assert not [warning for warning in found["warnings"] if "length" in warning]
    lengths = found["setting"]["traffic"]["lengths"]
    assert (lengths["overhead"], lengths["words"]) == (7, 80)
    assert found["setting"]["body"] == {"ignore_eos": True}
    assert found["summary"]["prompt_tokens"] == pytest.approx(30 * 300, rel=0.15)
    assert found["summary"]["hit_rate"] > 0.2, "of the prefix"


async def test_results_say_what_they_were_measured_with(bench, shared_engine):
    files = {"--csv": bench.folder / "r.csv", "--html": bench.folder / "r.html"}
    ran = await bench.run(
        *(shared_engine.url, "--conversations", "2", *SMALL, "--api-key", "secret"),
        *(str(word) for pair in files.items() for word in pair),
    )
    assert ran.code == 0
    environment = bench.found()["environment"]
    assert datetime.fromisoformat(environment["date"]).tzinfo is not None
    assert environment["command"].startswith(f"kubeai bench run {shared_engine.url} ")
    assert environment["versions"]["kubeai"] == environment["versions"]["server"]
    assert environment["versions"]["python"] == platform.python_version()
    assert environment["hardware"]["cores"] >= 1
    assert environment["hardware"]["memory_bytes"] > 1 << 28
    assert environment["hardware"]["cpu"]
    for text in (*(path.read_text() for path in files.values()), bench.json.read_text()):
        assert "secret" not in text
        assert environment["date"] in text


@pytest.mark.slow
async def test_the_highest_rate_at_which_slos_hold_is_found(bench):
    """The engine computes 2,000 tokens per second: 20 prompts of 100."""
    flags = ("--prefill-tokens-per-second=2000", "--decode-tokens-per-second=0", "--max-batch=1")
    async with engine(*flags) as one:
        process = await bench.start(
            *("sweep", one.url, "--slo", "ttft:p50:400ms", "--request-rates", "5,40,80"),
            *("--input-len", "100", "--output-len", "1", "--num-prompts", "40"),
            *("--json", str(bench.json), "--html", str(bench.folder / "r.html")),
        )
        ran = await bench.ended(process)
    assert ran.code == 0
    assert "m holds TTFT p50 ≤ 400 ms and errors ≤ 1 % up to 5 requests/s. At 40 " in ran.out
    found = json.loads(bench.json.read_bytes())
    assert found["sweep"]["rates"] == {"m": [5.0, 40.0]}
    assert (found["sweep"]["held"], found["sweep"]["broke"]) == ({"m": 5.0}, {"m": 40.0})
    assert [run["summary"]["requests"] for run in found["runs"]] == [40, 40]
    assert "up to 5 requests/s" in (bench.folder / "r.html").read_text()


async def test_warm_up_requests_are_sent_but_not_counted(bench):
    async with engine(*FAST) as one:
        ran = await bench.run(
            *(one.url, "--rate", "50", "--arrivals", "constant", "--turns", "1"),
            *("--warm-up", "400ms", "--duration", "600ms"),
        )
        posts = (await one.received())["total"]
    assert ran.code == 0
    assert posts == 50
    assert bench.found()["summary"]["requests"] == 30


async def test_two_processes_send_what_one_sends(bench, shared_engine):
    arguments = ("--conversations", "21", "--concurrency", "4", *SMALL)
    summaries = []
    for processes in ("1", "2"):
        ran = await bench.run(shared_engine.url, *arguments, "--processes", processes)
        assert ran.code == 0
        summaries.append(bench.found()["summary"])
    assert bench.found()["setting"]["client"]["processes"] == 2
    for what in ("requests", "failed", "prompt_tokens", "output_tokens"):
        assert summaries[0][what] == summaries[1][what]


async def test_request_limit_is_respected(bench):
    async with engine(*FAST) as one:
        ran = await bench.run(
            *(one.url, "--concurrency", "32", "--num-prompts", "17"), *("--processes", "2"), *SMALL
        )
        assert ran.code == 0
        assert (await one.received())["total"] == 17
    assert bench.found()["summary"]["requests"] == 17


async def test_conversations_come_from_a_sharegpt_file(bench, shared_engine):
    said = [("human", "Why is the sky blue?"), ("gpt", "It scatters."), ("human", "What does?")]
    said.append(("gpt", "The air that is between you and the sun, more of it in the evening."))
    entry = {"conversations": [{"from": who, "value": text} for who, text in said]}
    file = bench.folder / "sharegpt.json"
    file.write_text(json.dumps([entry] * 6))
    ran = await bench.run(shared_engine.url, "--sharegpt", str(file))
    assert ran.code == 0
    summary = bench.found()["summary"]
    assert summary["requests"] == 12
    assert summary["output_tokens"] == 6 * (3 + 17)  # as long as the file's answers


async def test_requests_come_from_a_trace_at_its_times(bench, shared_engine):
    lines = [
        {"timestamp": 5000 + 100 * at, "input_length": 600, "output_length": 5, "hash_ids": [1, at]}
        for at in range(21)
    ]
    file = bench.folder / "trace.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    ran = await bench.run(shared_engine.url, "--trace", str(file), "--speed", "2")
    assert ran.code == 0
    summary = bench.found()["summary"]
    assert summary["requests"] == 21
    last_due_s, _ = bench.found()["curves"]["ttft_ms_over_time"][-1]
    assert last_due_s == pytest.approx(1.0)
    assert summary["hit_rate"] > 0.5, "of the block that all of them have"


async def test_embeddings_report_a_single_latency(bench, shared_engine):
    ran = await bench.run(shared_engine.url, "--shape", "embeddings", "--conversations", "10")
    assert ran.code == 0
    summary = bench.found()["summary"]
    assert (summary["requests"], summary["failed"]) == (10, 0)
    assert summary["ttft_ms"] == {}
    assert summary["e2el_ms"]["mean"] > 0
    assert summary["prompt_tokens"] > 0


async def test_non_streaming_answers_can_be_requested(bench, shared_engine):
    ran = await bench.run(shared_engine.url, "--no-stream", "--conversations", "8", *SMALL)
    assert ran.code == 0
    summary = bench.found()["summary"]
    assert (summary["requests"], summary["ttft_ms"]) == (16, {})
    assert summary["hit_rate"] > 0.2, "whole answers are history as well"
    assert summary["output_tokens"] > 16


@pytest.mark.parametrize(
    ("option", "content", "said"),
    [
        ("--sharegpt", None, "No such file"),
        ("--sharegpt", "{", "is not JSON"),
        ("--sharegpt", "[{}]", "entry 0"),
        ("--trace", '{"timestamp": 1, "input_length": 5}\n{"timestamp": "x"}\n', "line 2"),
    ],
)
def test_invalid_file_is_reported_in_one_line(bench, shared_engine, option, content, said):
    file = bench.folder / "file"
    if content is not None:
        file.write_text(content)
    ran = Ran(*kubeai("bench", "run", shared_engine.url, option, file, "--json", bench.json))
    line = ran.fails()
    assert str(file) in line
    assert said in line
    assert not bench.json.exists()


async def test_runs_are_compared(bench, shared_engine):
    for name in ("one", "two"):
        ran = await bench.run(shared_engine.url, "--conversations", "4", *SMALL, "--name", name)
        assert ran.code == 0
        bench.json.rename(bench.folder / f"{name}.json")
    files = [str(bench.folder / f"{name}.json") for name in ("one", "two")]
    page = bench.folder / "page.html"
    ran = Ran(*kubeai("bench", "compare", *files, "--html", page))
    assert ran.code == 0
    assert ran.out.splitlines()[0].split() == ["one", "two"]
    assert "<html" in page.read_text()
    line = Ran(*kubeai("bench", "compare", page)).fails()
    assert "is not a results file of kubeai bench" in line
