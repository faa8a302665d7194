"""Streams are read the same regardless of how they are split and which server sent them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.loadtest.sse import LINE_MAX_BYTES, Reader

TEXTS = ["mock", " cat", ' "content":"x', "\n\ndata: [DONE]\n\n", " é\u2028 ", "\\", '"']
TEXTED = list(enumerate(TEXTS))
USAGE = {
    "prompt_tokens": 90,
    "completion_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 64},
}


def chunk(delta: dict, **more: Any) -> dict:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    return {"id": "c", "object": "chat.completion.chunk", "choices": [choice], **more}


def stream(*events: object, line_end: str = "\n", separators=(",", ":"), field="data: ") -> bytes:
    lines = [json.dumps(one, ensure_ascii=False, separators=separators) for one in events]
    return "".join(f"{field}{line}{line_end * 2}" for line in [*lines, "[DONE]"]).encode()


def answer(texts: list[str]) -> list[dict]:
    return [
        chunk({"role": "assistant", "content": ""}),
        *(chunk({"content": text}) for text in texts),
        chunk({"content": ""}) | {"usage": None},
        {"id": "c", "choices": [], "usage": USAGE},
    ]


def cut(said: bytes) -> list[bytes]:
    """One piece per event, as most servers send it."""
    return [event + b"\n\n" for event in said.split(b"\n\n") if event]


def read(*pieces: bytes, keep: bool = True) -> Reader:
    """Read with a clock that returns the piece's number."""
    number = 0
    reader = Reader(keep=keep, clock=lambda: float(number))
    for number, piece in enumerate(pieces):  # noqa: B007
        reader.feed(piece)
    reader.close()
    return reader


def check_whole(reader: Reader, texts: list[str]) -> None:
    assert (reader.done, reader.problem) == (True, "")
    assert len(reader.times_s) == len(texts)
    assert reader.text == "".join(texts)
    assert reader.usage.prompt_tokens == 90
    assert reader.usage.completion_tokens == 11
    assert reader.usage.cached_tokens == 64


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("field", ["data: ", "data:"])
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["tight", "with-spaces"])
def test_a_stream_is_read_the_same_wherever_it_is_split(line_end, field, separators):
    said = stream(*answer(TEXTS), line_end=line_end, separators=separators, field=field)
    check_whole(read(said), TEXTS)
    check_whole(read(*(bytes([byte]) for byte in said)), TEXTS)
    for at in range(1, len(said)):
        check_whole(read(said[:at], said[at:]), TEXTS)


@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=12),
    st.lists(st.integers(0, 4000), max_size=12),
    st.sampled_from(["\n", "\r\n"]),
)
def test_any_text_is_read_in_any_pieces(texts, cuts, line_end):
    said = stream(*answer(texts), line_end=line_end)
    places = sorted({min(cut, len(said)) for cut in cuts} | {0, len(said)})
    check_whole(read(*(said[a:b] for a, b in itertools.pairwise(places))), texts)


def test_each_event_has_the_arrival_time_of_its_piece():
    events = cut(stream(*answer(TEXTS)))
    assert read(*events).times_s == [float(at) for at in range(1, 1 + len(TEXTS))]
    two = read(events[0], b"".join(events[1:4]), *events[4:])
    assert two.times_s[:4] == [1.0, 1.0, 1.0, 2.0]


def test_events_without_text_count_as_events_but_not_as_tokens():
    reader = read(stream(*answer([])), b": a comment\n\nevent: ping\n\n")
    assert reader.times_s == []
    assert reader.others == 4  # the role, the end, the usage, [DONE]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_counts_as_tokens_but_not_as_text(name):
    reader = read(stream(chunk({name: "Hm"}), chunk({name: ""}), chunk({"content": "Yes"})))
    assert len(reader.times_s) == 2
    assert reader.text == "Yes"


def test_tool_calls_count_as_tokens():
    call = {"index": 0, "function": {"arguments": '{"content":"x"}'}}
    assert len(read(stream(chunk({"tool_calls": [call]}))).times_s) == 1


def test_usage_may_be_sent_with_the_text():
    """Cumulatively with each event, or with the last."""
    growing = [chunk({"content": t}, usage=USAGE | {"completion_tokens": 5 + n}) for n, t in TEXTED]
    check_whole(read(*cut(stream(*growing))), TEXTS)
    last = chunk({"content": TEXTS[-1]}, usage=USAGE)
    check_whole(read(*cut(stream(*answer(TEXTS)[:-3], last))), TEXTS)


def test_missing_usage_is_none():
    assert read(stream(chunk({"content": "a"}))).usage is None


def test_a_truncated_stream_is_not_done():
    said = stream(*answer(TEXTS))
    assert not read(said[: -len(b"data: [DONE]\n\n")]).done
    assert read(said.rstrip()).done, "the last line needs no line end"


def test_an_error_event_is_the_streams_problem():
    failure = {"error": {"message": "out of memory", "code": 500}}
    reader = read(stream(chunk({"content": "a"}), failure))
    assert "out of memory" in reader.problem


@pytest.mark.parametrize("data", [b"data: {\n\n", b'data: {"choices": 5}\n\n', b"data: \xff\n\n"])
def test_an_unreadable_event_is_a_problem(data):
    assert "invalid event" in read(data).problem


def test_an_endless_line_is_a_problem():
    assert "MiB" in read(b"data: ", b"x" * (LINE_MAX_BYTES + 1)).problem


def test_text_is_not_kept_unless_requested():
    assert read(stream(*answer(TEXTS)), keep=False).text == ""
