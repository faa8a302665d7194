"""`kubeai bench replay` as a program, with logs that the gateway wrote."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.wire import Message, Wire, answer, post
from fakes.world import World

from kubeai.gateway.access_log import AccessLog, Observers
from kubeai.loadtest import replay
from kubeai.loadtest.arguments import OptionError
from kubeai.loadtest.replay import Replay
from kubeai.loadtest.reports.output import Outputs
from kubeai.simulation.results import read

COMMAND = (sys.executable, "-m", "kubeai", "bench", "replay")
CHAT = "/openai/v1/chat/completions"
STRATEGIES = ["Service", "LeastLoad", "PrefixHash 125 % x20", "PrefixCache"]
TIMEOUT_S = 100


def run(*options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*COMMAND, *map(str, options)), capture_output=True, text=True, timeout=TIMEOUT_S
    )


def chat(talk: int, turns: int) -> bytes:
    """A conversation of this many turns, each of about 300 bytes."""
    messages = [
        {"role": "user", "content": f"talk {talk} turn {turn} " + "word " * 55}
        for turn in range(turns)
    ]
    return json.dumps({"model": "m", "stream": True, "messages": messages}).encode()


async def recorded(path: Path, *, prompts: bool = True) -> None:
    """Write the access log of 24 chats and a failure to a file."""

    async def script(wire: Wire, request: Message) -> None:
        await wire.send(answer(500 if b"fail" in request.body else 200, b"x" * 2000))

    with path.open("wb") as file:
        log = AccessLog(1.0, file.write)
        world = await World.start(
            observers=Observers(log, None), access_log_prompts=prompts, retries=0
        )
        engines = {name: await world.engine(script) for name in ("pod-1", "pod-2")}
        world.route("m", engines)
        wire = await world.client()
        for turns in range(1, 5):
            for talk in range(6):
                await wire.send(post(CHAT, chat(talk, turns)))
                assert (await wire.answer()).status == 200
        await wire.send(post(CHAT, chat(0, 1).replace(b"word", b"fail")))
        await wire.answer()
        await world.close()
        log.close()


async def test_a_log_of_the_gateway_is_replayed_with_each_strategy_beside_what_was_measured(
    tmp_path,
):
    log = tmp_path / "access.log"
    await recorded(log)
    page = tmp_path / "r.html"
    done = await asyncio.to_thread(run, log, "--json", tmp_path / "r.json", "--html", page)
    assert done.returncode == 0, done.stderr
    *simulated, measured = read(tmp_path / "r.json").runs
    assert [one.name for one in simulated] == STRATEGIES
    for one in simulated:
        assert (one.summary["requests"], one.summary["failed"]) == (24, 0)
        assert one.setting["engines"] == 2
        assert one.summary["busiest_requests"] >= 12
        assert one.summary["ttft_ms"]["p99"] > 0
        assert one.name in done.stdout
    # Each turn repeats the earlier ones, so that an engine that served them has their samples.
    assert simulated[3].summary["hit_rate"] > 0.3
    assert measured.name == "measured"
    assert measured.summary["requests"] == 24
    assert measured.summary["ttft_ms"]["mean"] > 0
    assert sum(measured.spread.values()) == 24
    assert set(measured.spread) == {"pod-1", "pod-2"}
    assert "! measured: skipped 1 lines: 1 with status 500" in done.stdout
    assert "requests on the busiest endpoint" in done.stdout
    assert "measured" in page.read_text()


async def test_a_log_without_hashes_is_an_error_that_says_how_to_enable_them(tmp_path):
    log = tmp_path / "access.log"
    await recorded(log, prompts=False)
    done = await asyncio.to_thread(run, log)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {log}: has no hashes of prompts: set gateway.accessLogPrompts to true and record "
        "the log again\n"
    )


def test_a_trace_is_replayed_without_a_measured_column(tmp_path):
    trace = tmp_path / "t.jsonl"
    lines = [
        {"timestamp": 100 * n, "input_length": 1200, "output_length": 5, "hash_ids": [n % 4, 9, n]}
        for n in range(40)
    ]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("--engines=3", "--num-prompts=30", "--prefix-char-length=2100")
    done = run(trace, *options, "--json", tmp_path / "r.json")
    assert done.returncode == 0, done.stderr
    found = read(tmp_path / "r.json").runs
    assert [one.name for one in found] == STRATEGIES
    assert [one.summary["requests"] for one in found] == [30] * 4


@pytest.mark.parametrize("text", ["hello\n", '{"a": 1}\n', '{"time": 1, \n'])
def test_a_file_that_is_neither_is_an_error_with_its_path_and_line(tmp_path, text):
    path = tmp_path / "file"
    path.write_text(text)
    done = run(path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: line 1: is neither of an access log of KubeAI")
    assert done.stderr.count("\n") == 1


def made(path: Path, **fields: object) -> Replay:
    return Replay(path=path, preset="tiny-cpu", strategies="LeastLoad", **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": "m"}, "--model: is only for an access log"),
        ({"output_tokens": 5}, "--output-len: is only for an access log"),
        ({"speed": 0.0}, "--speed: must be more than 0"),
    ],
)
def test_options_that_do_not_fit_a_trace_are_refused(tmp_path, fields, words):
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 5, "output_length": 1}\n')
    with pytest.raises(OptionError, match=words):
        replay.run(made(path, **fields), Outputs())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"block_tokens": 16}, "--trace-block-tokens: is only for a trace"),
        (
            {"engine_and_ring": {"prefix_char_length": 9}},
            "--prefix-char-length: is only for a trace",
        ),
    ],
)
async def test_options_that_do_not_fit_a_log_are_refused(tmp_path, fields, words):
    path = tmp_path / "access.log"
    await recorded(path)
    with pytest.raises(OptionError, match=words):
        replay.run(made(path, **fields), Outputs())
