"""Trace files: their formats, limits and errors, and the prompts generated from hash IDs."""

from __future__ import annotations

import gzip
import itertools
import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kubeai.simulation import json_lines, text
from kubeai.simulation.trace_files import TraceEntry, read_trace
from kubeai.simulation.traffic import Conversation, TrafficError, Turn

TOKEN = text.TOKEN_BYTES


def write(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return path


def mooncake(at: float, tokens: int, *hash_ids: int, **more: Any) -> dict[str, Any]:
    lengths = {"input_length": tokens, "output_length": 5}
    return {"timestamp": at, **lengths, "hash_ids": list(hash_ids), **more}


def bailian(at: float, chat: int, parent: int, tokens: int, *hash_ids: int) -> dict[str, Any]:
    turn = {"chat_id": chat, "parent_chat_id": parent, "type": "text", "turn": 1}
    return {**turn, **mooncake(at, tokens, *hash_ids)}


def prompt(entry: TraceEntry) -> str:
    (turn,) = entry.conversation(0.0).turns
    return turn.text


def prompts(path: Path, **options: Any) -> list[str]:
    return [prompt(entry) for entry in read_trace(path, **options)]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(TrafficError) as caught:
        read_trace(path, **options)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{path}: ")


# -- formats ---------------------------------------------------------------------------------------


def test_requests_are_ordered_by_time_and_become_one_user_message(tmp_path):
    file = write(tmp_path / "t", mooncake(2000, 700, 1, 2), mooncake(500.5, 600, 1, 3))
    early, late = read_trace(file)
    assert [early.timestamp, late.timestamp] == [500.5, 2000.0]
    one = early.conversation(7.5)
    assert one == Conversation((Turn(one.turns[0].text, 5),), (), 7.5)
    assert [len(prompt(entry)) for entry in (early, late)] == [600 * TOKEN, 700 * TOKEN]


def test_mooncakes_times_are_milliseconds_and_bailians_are_seconds(tmp_path):
    (entry,) = read_trace(write(tmp_path / "m", mooncake(61.114, 20)))
    assert (entry.timestamp, entry.block_tokens) == (61.114, 512)
    (entry,) = read_trace(write(tmp_path / "b", bailian(61.114, 1, -1, 20)))
    assert (entry.timestamp, entry.block_tokens) == (pytest.approx(61_114), 16)


def test_the_names_that_dynamo_reads_mean_the_same(tmp_path):
    lengths = {"input_tokens": 600, "output_tokens": 5, "hash_ids": [1, 2]}
    ours = read_trace(write(tmp_path / "m", mooncake(9, 600, 1, 2)))
    assert read_trace(write(tmp_path / "d", {"created_time": 9, **lengths})) == ours
    more = {"session_id": "a", "delay_ms": 4, "priority": 1}
    assert read_trace(write(tmp_path / "s", mooncake(9, 600, 1, 2, **more))) == ours


def test_requests_with_text_keep_it(tmp_path):
    parts = [{"type": "text", "text": "u"}, {"type": "image_url"}, {"type": "text", "text": "v"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
    file = write(
        tmp_path / "t",
        {"timestamp": 1, "messages": messages, "max_tokens": 7, "output_length": 6},
        {"timestamp": 2, "messages": messages, "output_length": 8},
        mooncake(3, 600, 1, 2, text_input="t"),
    )
    assert [entry.conversation(0.5) for entry in read_trace(file)] == [
        Conversation((Turn("uv", 7),), (("system", "s"),), 0.5),
        Conversation((Turn("uv", 8),), (("system", "s"),), 0.5),
        Conversation((Turn("t", 5),), (), 0.5),
    ]


def test_only_the_first_requests_are_returned_with_the_same_text(tmp_path):
    file = write(tmp_path / "t", mooncake(3, 9), mooncake(1, 9), mooncake(2, 9))
    assert read_trace(file, requests_max=2) == read_trace(file)[:2]
    assert len(read_trace(file, requests_max=9)) == 3


# -- prompts ---------------------------------------------------------------------------------------


def entry(tokens: int, ids: list[int], block_tokens: int, unique: int = 1) -> TraceEntry:
    return TraceEntry(0.0, tokens, 0, array("Q", ids), block_tokens, unique)


@given(
    block=st.integers(1, 600),
    one=st.lists(st.integers(0, 79), min_size=1, max_size=6),
    other=st.lists(st.integers(0, 79), min_size=1, max_size=6),
    last=st.integers(0, 10_000),
)
@example(block=1, one=[1, 2], other=[1, 3], last=0)
@example(block=16, one=[1, 2], other=[1, 3], last=9)
@example(block=512, one=[1, 2], other=[1, 2, 3], last=100)
def test_prompts_begin_alike_exactly_as_far_as_their_hash_ids(block, one, other, last):
    """The last block may be partial. IDs below 80 differ even in blocks of one token."""
    short, long = sorted((one, other), key=len)
    sizes = [(len(ids) - 1) * block + last % block + 1 for ids in (short, long)]
    found = [
        prompt(entry(size, ids, block)) for size, ids in zip(sizes, (short, long), strict=True)
    ]
    assert [len(text) for text in found] == [size * TOKEN for size in sizes]
    alike = sum(
        1
        for _ in itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(short, long, strict=False)
        )
    )
    shared = min(alike * block, sizes[0]) * TOKEN
    assert found[0][:shared] == found[1][:shared]
    if alike < len(short):
        assert found[0][shared : shared + TOKEN] != found[1][shared : shared + TOKEN]


@given(st.sets(st.integers(0, (1 << 64) - 1), min_size=2, max_size=30))
def test_all_64_bit_ids_have_different_texts_in_a_bailian_block(ids):
    found = {prompt(entry(16, [number], 16)) for number in ids}
    assert len(found) == len(ids)
    assert prompt(entry(16, [], 16)) not in found


def test_a_partial_block_is_the_beginning_of_the_whole_one():
    whole = prompt(entry(512, [7], 512))
    for tokens in (1, 11, 12, 511):
        assert prompt(entry(tokens, [7], 512)) == whole[: tokens * TOKEN]


def test_tokens_after_the_last_hash_id_are_unique_and_repeat_nothing(tmp_path):
    file = write(tmp_path / "t", mooncake(1, 1500, 1), mooncake(2, 1500, 1), mooncake(3, 1500))
    first, second, third = prompts(file)
    block = 512 * TOKEN
    assert first[:block] == second[:block] != third[:block]
    blocks = {text[at : at + block] for text in (first, second, third) for at in (block, 2 * block)}
    assert len(blocks) == 6
    assert first[:block] not in blocks


def test_the_same_file_has_the_same_text_wherever_it_is(tmp_path):
    (tmp_path / "other").mkdir()
    lines = (mooncake(1, 1500, 1), mooncake(2, 40))
    assert prompts(write(tmp_path / "a", *lines)) == prompts(
        write(tmp_path / "other" / "b", *lines)
    )


def test_the_length_of_blocks_can_be_given(tmp_path):
    file = write(tmp_path / "t", mooncake(1, 70, 1, 2, 3), mooncake(2, 80, 1, 2, 4))
    first, second = prompts(file, block_tokens=32)
    assert first[: 64 * TOKEN] == second[: 64 * TOKEN]
    assert first[64 * TOKEN :] != second[64 * TOKEN : 70 * TOKEN]
    assert "--trace-block-tokens" in refusal(file)


def test_a_turn_extends_the_text_of_its_parent(tmp_path):
    first, second, third = prompts(
        write(
            tmp_path / "t",
            bailian(1, 10, -1, 40, 1, 2, 3),
            bailian(2, 11, 10, 60, 1, 2, 3, 4),
            bailian(3, 12, 11, 70, 1, 2, 3, 5, 6),  # its parent's last block was partial
        )
    )
    assert second.startswith(first)
    assert third[: 48 * TOKEN] == second[: 48 * TOKEN]
    assert not third.startswith(second)


def test_a_turn_extends_the_text_of_a_parent_whose_hash_ids_end_early(tmp_path):
    """Writers that hash only whole blocks leave out the partial one."""
    lines = (
        bailian(1, 10, -1, 40, 1, 2),
        bailian(2, 11, 10, 60, 1, 2, 3),
        bailian(3, 12, 11, 75, 1, 2, 3, 4),
        bailian(4, 13, 10, 60, 1, 2, 9),  # another answer to the first
        bailian(5, 14, 77, 60, 1, 2),  # its parent is not in the file
    )
    for order in (lines, lines[::-1]):
        first, second, third, other, orphan = prompts(write(tmp_path / "t", *order))
        assert second.startswith(first)
        assert third.startswith(second)
        shared = 32 * TOKEN
        for one in (other, orphan):
            assert one[:shared] == first[:shared]
            assert not one.startswith(first)


def test_a_turn_whose_hash_ids_end_within_its_parents_prompt_extends_it_too(tmp_path):
    lines = (bailian(1, 10, -1, 40, 1), bailian(2, 11, 10, 60, 1), bailian(3, 12, 10, 60, 1))
    first, second, other = prompts(write(tmp_path / "t", *lines))
    assert second.startswith(first)
    assert not other.startswith(second[: 59 * TOKEN])


# -- files -----------------------------------------------------------------------------------------


def test_gzip_is_recognized_by_its_content(tmp_path):
    plain = write(tmp_path / "plain.gz", mooncake(1, 600, 1, 2))
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(packed) == read_trace(plain)


def test_a_truncated_or_damaged_gzip_file_is_refused(tmp_path):
    data = gzip.compress(b"\n".join(json.dumps(mooncake(1, n + 1)).encode() for n in range(500)))
    file = tmp_path / "t.gz"
    for end in (2, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:end])
        assert "the gzip data is truncated" in refusal(file)
    file.write_bytes(data[:-8] + b"x" * 8)
    assert "invalid gzip data: CRC check failed" in refusal(file)
    file.write_bytes(data[:10] + b"\xff" * 50)
    assert "invalid gzip data" in refusal(file)


def test_the_decompressed_size_is_limited(tmp_path, monkeypatch):
    file = tmp_path / "t.gz"
    line = json.dumps(mooncake(1, 600, 1, 2)).encode() + b"\n"
    file.write_bytes(gzip.compress(line * 100))
    monkeypatch.setattr(json_lines, "FILE_MAX_BYTES", len(line) * 100)
    assert len(read_trace(file)) == 100
    monkeypatch.setattr(json_lines, "FILE_MAX_BYTES", len(line) * 50)
    assert refusal(file).startswith("line 51: the file exceeds ")
    monkeypatch.setattr(json_lines, "LINE_MAX_BYTES", len(line) - 1)
    assert refusal(file).startswith("line 1: is longer than ")


# -- what cannot be decided -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"timestamp": 1}, "has neither messages nor text_input nor an input_length"),
        ({"timestamp": 1, "input_length": 0}, "has neither"),
        ({"timestamp": 1, "payload": {}}, "has neither"),
        ({"input_length": 4}, "timestamp: is missing; add it, in milliseconds"),
        ({"input_length": 4, "delay": 3}, "timestamp: is missing; requests that start a delay"),
        ({"chat_id": 1, "parent_chat_id": -1, "input_length": 4}, "add it, in seconds"),
        ({"timestamp": "x"}, r"`float \| null`, got `str` - at `\$.timestamp`"),
        ({"timestamp": -1, "input_length": 4}, r">= 0.* at `\$.timestamp`"),
        (mooncake(1.7e9, 4), "timestamp: must be in milliseconds, but .* Unix time in seconds"),
        (mooncake(1.7e15, 4), "timestamp: must be in milliseconds, but .* a smaller unit"),
        (bailian(1.7e12, 1, -1, 4), "timestamp: must be in seconds, but .* a smaller unit"),
        ({"timestamp": 1, "chat_id": 1, "input_length": 4}, "parent_chat_id: is missing; cannot"),
        ({"timestamp": 1, "parent_chat_id": -1, "input_length": 4}, "chat_id: is missing; cannot"),
        ({**bailian(1, 1, -1, 4), "session_id": "a"}, "session_id: is not a field of Bailian's"),
        (mooncake(1, 4, created_time=1), "created_time: means the same as timestamp"),
        (mooncake(1, 4, input_tokens=4), "input_tokens: means the same as input_length"),
        (mooncake(1, 10**8), r"<= 10000000 - at `\$.input_length`"),
        (mooncake(1, 600, 1, 2, 3), "hash_ids: has 3 blocks, but 600 tokens are 2 of 512 tokens"),
        (mooncake(1, 600, -1), "hash_ids: must be 0 to 18446744073709551615"),
        (mooncake(1, 600, 1 << 64), "hash_ids: must be 0 to 18446744073709551615"),
        ({"timestamp": 1, "text_input": "a", "messages": []}, "text_input: cannot be combined"),
        (
            {"timestamp": 1, "messages": [], "message_mode": "delta"},
            "message_mode: prompts without",
        ),
        (mooncake(1, 4, context_mode="deltas_with_responses"), "context_mode: prompts without"),
        (
            {"schema": "dynamo.agentic_mooncake"},
            "schema: 'dynamo.agentic_mooncake' is not supported",
        ),
    ],
)
def test_a_line_that_cannot_be_used_is_refused_with_its_field(tmp_path, line, words):
    good = (
        bailian(0, 9, -1, 4) if "chat_id" in line and "parent_chat_id" in line else mooncake(0, 4)
    )
    with pytest.raises(TrafficError, match=f"t: line 2: .*{words}"):
        read_trace(write(tmp_path / "t", good, line))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        (b"", "is empty"),
        (b'{"timestamp": 1, "input_length": 4}\nx', "line 2: JSON is malformed"),
        (b"[]", "line 1: Expected `object`, got `array`"),
        (b'{"timestamp": 1, "messages": [{"role": "\xff"}]}', "line 1: 'utf-8' codec"),
        (b'{"messages": [{"a": ' + b"[" * 100_000, "line 1: nested too deeply"),
        (b"version https://git-lfs.github.com/spec/v1\n", "line 1: is a Git LFS pointer"),
    ],
)
def test_a_file_that_is_not_a_trace_is_refused(tmp_path, content, words):
    file = tmp_path / "t"
    if content is not None:
        file.write_bytes(content)
    assert refusal(file).startswith(words)


def test_a_file_with_two_units_of_time_is_refused(tmp_path):
    file = write(tmp_path / "t", mooncake(0, 4), mooncake(1, 4), bailian(2, 1, -1, 4))
    assert refusal(file) == (
        "line 3: timestamp: is in seconds as in Bailian's traces, but that of line 1 is in "
        "milliseconds as in Mooncake's: split the file by format"
    )


def test_an_id_without_a_text_of_its_own_is_refused(tmp_path):
    file = write(tmp_path / "t", mooncake(1, 4, 6399, 6400))
    assert refusal(file, block_tokens=2).startswith("line 1: hash_ids: must be 0 to 6399 with")
