"""Reading an access log for a replay, and the engine's blocks that are derived from it."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from kubeai._load import LoadTable
from kubeai._pick import Picker
from kubeai._prompt import BLOCKS_MAX
from kubeai._ring import Ring
from kubeai.openai.request import prompt_of, read
from kubeai.openai.routes import Kind
from kubeai.simulation import results
from kubeai.simulation.access_logs import (
    OUTPUT_MAX_TOKENS,
    AccessLog,
    is_access_log,
    read_access_log,
)
from kubeai.simulation.cluster import SimulationRun, simulate
from kubeai.simulation.sessions import make_session
from kubeai.simulation.setting import Setting
from kubeai.simulation.traffic import Conversation, Shape, TrafficError, Turn, generate

BLOCK = 16
CHAT = "/openai/v1/chat/completions"


def prompt(*blocks: int, tokens: int = 300, **fields: object) -> dict:
    made = {
        "tokens": tokens,
        "stream": True,
        "key": "00000000000000aa",
        "blocks": [f"{block:016x}" for block in blocks],
        "depths": [64 * at for at in range(1, len(blocks) + 1)],
    }
    return made | fields


def line(second: float = 0.0, **fields: object) -> dict:
    made = {
        "time": f"2026-11-29T13:00:{second:06.3f}+00:00",
        "request_id": "r",
        "client": "10.0.0.1",
        "method": "POST",
        "path": CHAT,
        "status": 200,
        "end": "whole",
        "duration_s": 2.0,
        "request_bytes": 1200,
        "answer_bytes": 800 + 10 * 234,
        "first_byte_s": 0.25,
        "model": "m",
        "endpoint": "pod-1",
        "prompt": prompt(1, 2),
    }
    return {name: value for name, value in (made | fields).items() if value is not None}


@pytest.fixture
def written(tmp_path):
    def write(*lines: object) -> Path:
        path = tmp_path / "access.log"
        texts = (each if isinstance(each, str) else json.dumps(each) for each in lines)
        path.write_text("".join(f"{text}\n" for text in texts))
        return path

    return write


def opened(path: Path, model: str | None) -> AccessLog:
    assert is_access_log(path)
    return read_access_log(path, model)


def refusal(path: Path, model: str | None = None) -> str:
    with pytest.raises(TrafficError) as caught:
        opened(path, model)
    prefix, found = f"{path}: ", str(caught.value)
    assert found.startswith(prefix)
    return found.removeprefix(prefix)


# -- requests --------------------------------------------------------------------------------------


def test_requests_are_ordered_by_time_and_start_at_zero(written):
    log = read_access_log(written(line(3, endpoint="pod-2"), line(1.5), line(1)))
    assert [one.at_s for one in log.requests] == [0.0, 0.5, 2.0]
    assert (log.model, log.endpoints) == ("m", 2)
    assert not log.warnings


def test_a_request_has_what_was_logged_of_its_prompt(written):
    (one,) = read_access_log(written(line())).requests
    assert (one.tokens, one.key, one.streams) == (300, 0xAA, True)
    assert (list(one.blocks), list(one.depths)) == ([1, 2], [64, 128])


def test_the_picker_gets_exactly_the_logged_samples(written):
    (one,) = read_access_log(written(line(prompt=prompt(2**64 - 1, 7, stream=False)))).requests
    sent = make_session(0, one, Setting()).next_request().request.prompt
    assert sent.samples == ((2**64 - 1, 64), (7, 128))
    assert (sent.tokens, sent.key, sent.has_key, sent.streams) == (300, 0xAA, True, False)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({}, 10),
        ({"path": "/openai/v1/messages?beta=true", "answer_bytes": 800 + 10 * 125}, 10),
        ({"prompt": prompt(1, stream=False), "answer_bytes": 850 + 40}, 10),
        ({"answer_bytes": 10}, 1),
        ({"answer_bytes": 1 << 50}, OUTPUT_MAX_TOKENS),
        ({"path": "/openai/v1/embeddings", "prompt": prompt(stream=False)}, 0),
    ],
)
def test_the_output_is_estimated_from_the_size_of_the_response(written, fields, tokens):
    (one,) = read_access_log(written(line(**fields))).requests
    assert one.output_tokens == tokens


def test_measurements_have_the_time_to_the_first_byte_of_streams_only(written):
    path = written(line(), line(1, prompt=prompt(1, stream=False)))
    found = [one.measurement(n) for n, one in enumerate(read_access_log(path).requests)]
    summary = results.summarize("measured", {}, found, results.Gaps()).summary
    assert summary["ttft_ms"]["mean"] == 250
    assert summary["e2el_ms"]["mean"] == 2000
    assert summary["busiest_requests"] == 2
    assert summary["hit_rate"] is None


# -- blocks ----------------------------------------------------------------------------------------

steps = some.lists(some.integers(1, 120), max_size=12)
depths = steps.map(lambda found: list(itertools.accumulate(found)))


@given(depths, some.integers(0, 12), some.integers(1, 400), some.integers(1, 400))
def test_prompts_share_the_blocks_before_their_last_common_sample_and_no_others(
    tmp_path_factory, ends, common, more, other_more
):
    path = tmp_path_factory.getbasetemp() / "blocks.log"
    common = min(common, len(ends))
    ones = [n + 1 for n in range(len(ends))]
    others = [n + 1 if n < common else 1000 + n for n in range(len(ends))]
    last = ends[-1] if ends else 0
    path.write_text(
        "\n".join(
            json.dumps(line(prompt=prompt(*found, depths=ends, tokens=last + extra)))
            for found, extra in ((ones, more), (others, other_more))
        )
    )
    one, other = read_access_log(path).requests
    found, others = one.block_hashes(0, BLOCK), other.block_hashes(1, BLOCK)
    assert len(found) == (one.tokens + one.output_tokens) // BLOCK
    shared = (ends[common - 1] if common else 0) // BLOCK
    assert found[:shared] == others[:shared]
    assert not set(found[shared:]) & set(others[shared:])
    assert len(set(found)) == len(found)


def test_a_repeated_prompt_hits_the_cache_up_to_its_last_sample(written):
    path = written(line(0), line(30), line(40, prompt=prompt(1, 5)))
    setting = Setting(engines=1, strategy="LeastLoad")
    run = simulate(setting, read_access_log(path).requests)
    assert [one.cached_tokens for one in run.measurements] == [0, 128, 64]
    assert [one.due_s for one in run.measurements] == [0, 30, 40]
    assert [one.output_tokens for one in run.measurements] == [10, 10, 10]


@pytest.mark.parametrize("strategy", ["PrefixHash", "PrefixCache"])
def test_requests_of_a_conversation_meet_on_one_engine(written, strategy):
    lines = [
        line(at, prompt=prompt(talk + 1, key=f"{talk * 0x9E3779B97F4A7C15 % 2**64:016x}"))
        for at, talk in itertools.product(range(0, 60, 20), range(8))
    ]
    run = simulate(Setting(engines=4, strategy=strategy), read_access_log(written(*lines)).requests)
    assert sum(one.cached_tokens for one in run.measurements) == 8 * 2 * 64


@pytest.mark.parametrize("strategy", ["LeastLoad", "PrefixHash", "PrefixCache"])
def test_a_replay_finds_nearly_as_much_in_caches_as_a_simulation_of_the_text(tmp_path, strategy):
    """What it misses: the end of each common beginning, and replies that become history."""
    talks = sorted(
        (one for number in range(80) for one in turns_of(number)), key=lambda one: one.at_s
    )
    path = tmp_path / "access.log"
    path.write_text("".join(json.dumps(logged(one)) + "\n" for one in talks))
    setting = Setting(engines=4, strategy=strategy)
    of_text, of_log = (
        summarized(simulate(setting, traffic))
        for traffic in (talks, read_access_log(path).requests)
    )
    assert of_log["requests"] == of_text["requests"] == 80 * 6
    assert of_log["output_tokens"] == of_text["output_tokens"]
    assert 0.3 < of_text["hit_rate"] < 0.95
    assert of_text["hit_rate"] - 0.09 < of_log["hit_rate"] < of_text["hit_rate"] + 0.01


def turns_of(number: int) -> Iterator[Conversation]:
    """The turns of a conversation, as requests at fixed times."""
    shape = Shape(conversations=80, turns=6, system_tokens=400, systems=3, replies=True)
    talk = next(iter(generate(shape, 1, first=number)))
    for turn, last in enumerate(talk.turns):
        *history, _ = talk.prompt(turn, [""] * turn)
        sent = Turn(last.text, reply_tokens=100)
        yield Conversation((sent,), tuple(history), at_s=number * 0.7 + turn * 9)


def logged(one: Conversation) -> dict:
    """The request in an access log, with its prompt as the gateway reads it."""
    messages = [{"role": role, "content": content} for role, content in one.prompt(0, ())]
    body = json.dumps({"model": "m", "stream": True, "messages": messages}).encode()
    supervisor = LoadTable.create(2, 1)
    table = LoadTable.attach(supervisor.fd, 0)
    picker = Picker(Ring(table, 0, supervisor.open_row(0), replication=1, mean_load_factor=125))
    picker.configure("LeastLoad", 100)
    found = prompt_of(picker, read(Kind.CHAT, body), complete=True)
    table.close()
    supervisor.close()
    hashes = [block for block, _ in found.samples]
    depths = [depth for _, depth in found.samples]
    made = prompt(*hashes, tokens=found.tokens, depths=depths, key=f"{found.key:016x}")
    time = datetime.fromtimestamp(1.8e9 + one.at_s, UTC).isoformat()
    return line(time=time, answer_bytes=800 + 100 * 234, prompt=made)


def summarized(run: SimulationRun) -> dict:
    return results.summarize("", {}, run.measurements, run.gaps).summary


# -- what is skipped -------------------------------------------------------------------------------


def test_lines_that_cannot_be_replayed_are_counted_by_reason(written):
    path = written(
        {"event": "endpoint ejected", "level": "warning", "timestamp": "2026-11-29T13:00:00Z"},
        "",
        line(),
        line(status=503),
        line(status=0, end="left"),
        line(end="left"),
        line(end="broken"),
        line(model="n"),
        line(model="m_adapter"),
        line(prompt=None),
        line(path="/openai/v1/models", model=None, prompt=None),
        line(path="/openai/v1/audio/transcriptions", prompt=None),
        line(dropped=4),
    )
    log = read_access_log(path, "m")
    assert len(log.requests) == 3
    assert log.skipped == {
        "without hashes of the prompt": 2,
        "of KubeAI's other logs": 1,
        "with status 503": 1,
        "with status 0": 1,
        "whose client disconnected": 1,
        "that the engine cut short": 1,
        "of other models": 1,
        "of other paths than inference": 1,
    }
    skipped, lacks = log.warnings
    assert skipped.startswith("skipped 9 lines: 2 without hashes of the prompt, ")
    assert lacks == "the log lacks 4 requests that could not be written"


def test_a_log_of_several_models_needs_a_choice(written):
    path = written(line(model="a"), line(model="b"), line(model="b"))
    assert refusal(path) == "has requests of 2 models: choose one with --model: b (2), a (1)"
    assert len(read_access_log(path, "b").requests) == 2
    assert refusal(path, "c") == "has no request to replay, only lines 3 of other models"


# -- errors ----------------------------------------------------------------------------------------


def test_a_log_without_hashes_says_how_to_enable_them(written):
    assert refusal(written(line(prompt=None))) == (
        "has no hashes of prompts: set gateway.accessLogPrompts to true and record the log again"
    )


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ('{"time": "2026-', "is neither of an access log of KubeAI nor of a trace: "),
        ("10.0.0.1 - - GET /", "is neither of an access log of KubeAI nor of a trace: "),
        ("[1]", "is neither of an access log of KubeAI nor of a trace: "),
        (line(time="yesterday"), "time: 'yesterday' is not a time"),
        (line(duration_s=-1), "`$.duration_s`"),
        (line(prompt={"tokens": 1}), "missing required field `blocks` - at `$.prompt`"),
        (line(prompt=prompt(1, key="xyz")), "`$.prompt.key`"),
        (line(prompt=prompt(2**64)), "`$.prompt.blocks[0]`"),
        (line(prompt=prompt(1, depths=[])), "prompt: has 1 blocks, but 0 depths"),
        (line(prompt=prompt(1, 2, depths=[9, 8])), "prompt.depths: are not in order"),
        (line(prompt=prompt(*range(BLOCKS_MAX + 1))), "`$.prompt.blocks`"),
        ('{"a":' * 2000, "is neither"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(written, broken, words):
    found = refusal(written(line(), broken))
    assert found.startswith("line 2: ")
    assert words in found
    assert "\n" not in found


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "is empty"),
        ([""], "has no requests"),
        (["hello"], "line 1: is neither of an access log of KubeAI nor of a trace: "),
        ([{"a": 1}], "line 1: is neither of an access log of KubeAI nor of a trace"),
        ([{"event": "x", "level": "info"}, {"a": 1}], "line 2: is neither"),
    ],
)
def test_a_file_that_is_neither_log_nor_trace_is_refused(written, lines, words):
    assert refusal(written(*lines)).startswith(words)


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(tmp_path / "none") == "No such file or directory"


def test_a_trace_is_told_from_a_log(written):
    message = {"event": "x", "level": "info", "timestamp": "2026-11-29T13:00:00Z"}
    assert is_access_log(written(message, line()))
    assert not is_access_log(written({"timestamp": 0, "input_length": 5, "output_length": 1}))


def test_a_log_may_be_compressed(tmp_path):
    path = tmp_path / "access.log.gz"
    path.write_bytes(gzip.compress(json.dumps(line()).encode()))
    assert is_access_log(path)
    assert len(read_access_log(path).requests) == 1
