"""What engines write because the gateway asks for usage is removed, wherever the text is split.

The oracle writes the same stream twice, with the report of usage and without.
"""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeai.gateway.relay._usage_filter import without_usage

USAGE = b'{"prompt_tokens":12,"total_tokens":19,"completion_tokens":7}'
CHUNK = b'data: {"id":"1","choices":[{"index":0,"delta":{"content":"hi"}}]}\n\n'
REPORT = b'data: {"id":"1","choices":[],"usage":%b}\n\n' % USAGE
DONE = b"data: [DONE]\n\n"


def filtered(body: bytes, *cuts: int, keeps_null: bool = False) -> bytes:
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[begin:end] for begin, end in pairwise(edges)]
    return b"".join(without_usage(keeps_null, *pieces))


def everywhere(body: bytes, expected: bytes, **options: bool) -> None:
    """Check whole, byte by byte, and with a cut at each place."""
    assert filtered(body, **options) == expected
    assert filtered(body, *range(len(body)), **options) == expected
    for cut in range(len(body)):
        assert filtered(body, cut, **options) == expected


def test_the_event_with_the_usage_is_removed():
    everywhere(CHUNK + CHUNK + REPORT + DONE, CHUNK + CHUNK + DONE)


REPORTS = [
    b'data: {"usage":%b,"choices":[]}\n\n',
    b'data: {"choices": [ ] , "usage": %b, "x": null}\n\n',
    b'data:{"choices":[],"usage":%b}\n\n',
    b'data:  {"choices":[],"usage":%b}\r\n\r\n',
    b'data: {"choices":[],"usage":%b}\r\r',
    b': comment\ndata: {"choices":[],"usage":%b}\nid: 7\n\n',
]


@pytest.mark.parametrize("report", REPORTS)
def test_it_is_recognised_however_it_is_written(report):
    everywhere(CHUNK + report % USAGE + DONE, CHUNK + DONE)


NULLS = [
    (b'{"a":1,"usage":null}', b'{"a":1}'),
    (b'{"a": 1, "usage": null}', b'{"a": 1}'),
    (b'{"a":1 , "usage" : null , "b":2}', b'{"a":1  , "b":2}'),
    (b'{"usage":null,"a":1}', b'{"a":1}'),
    (b'{ "usage":null, "a":1}', b'{ "a":1}'),
    (b'{"usage":null}', b"{}"),
    (b'{"choices":[],"usage":null}', b'{"choices":[]}'),
    (b'{"choices":[{"usage":null}],"usage":null}', b'{"choices":[{"usage":null}]}'),
]


@pytest.mark.parametrize(("before", "after"), NULLS)
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_a_usage_of_null_is_removed_from_other_events(before, after, end):
    everywhere(b"data: " + before + end + DONE, b"data: " + after + end + DONE)


def test_engines_that_always_write_null_keep_it():
    null = b'data: {"choices":[{"delta":{}}],"usage":null}\n\n'
    everywhere(null + REPORT + DONE, null + DONE, keeps_null=True)


UNCHANGED = [
    b"",
    b"\n",
    b"\r\n\r\n\n",
    CHUNK,
    DONE,
    b'data: {"choices":[{"delta":{}}],"usage":%b}\n\n' % USAGE,  # the last chunk with content
    b'data: {"usage":%b}\n\n' % USAGE,
    b'data: {"choices":null,"usage":%b}\n\n' % USAGE,
    b'data: {"choices":[[]],"usage":%b}\n\n' % USAGE,
    b'data: {"choices":[],"usage":5}\n\n',
    b'data: {"choices":[],"usage":"null"}\n\n',
    b'data: {"choices":[],"x":{"usage":null}}\n\n',
    b'data: {"choices":[],"x":"\\"usage\\":null"}\n\n',
    b'data: {"choices":[{"delta":{"content":"\\",\\"usage\\":null"}}]}\n\n',
    b'data: {"choices":[{"delta":{"content":"data: {\\"choices\\":[],\\"usage\\":{}}"}}]}\n\n',
    b'data: [{"choices":[],"usage":null}]\n\n',
    b'data: {"choices":[],"usage":null\n\n',
    b'data: {"choices":[],"usage":null,}x\n\n',
    b'data: {"choices":[],"usage":nul}\n\n',
    b'data: {"a":1,"usage":\n\nnull}\n\n',
    b'data: {"usage":{\n\ndata: }}\n\n',
    b'data: {"choices":[],"usage":null\n}\n\n',
    b'data: {"choices":[],\ndata: "usage":null}\n\n',
    b'data: {"a":1,"usage":null}\ndata\n\n',
    b'event: {"choices":[],"usage":{}}\n\n',
    b': {"choices":[],"usage":{}}\n\n',
    b' data: {"choices":[],"usage":{}}\n\n',
    b'data: {"choices":[],"usage":{}}',  # the stream ends within the event
    b'data: {"choices":[],"usage":{}}\n',
    b'data: {"choices":[],"usage":{}}\r\n\r',
]


@pytest.mark.parametrize("body", UNCHANGED)
def test_everything_else_is_unchanged(body):
    if body == UNCHANGED[-1]:  # an event that CR ends, if nothing follows
        assert filtered(body) == b""
        return
    everywhere(body, body)


def test_an_event_that_is_too_long_is_passed_on_and_the_next_one_is_not_affected():
    long = b'data: {"x":"%b","usage":null}\n\n' % (b"x" * (1 << 18))
    short = b'data: {"x":1,"usage":null}\n\n'
    for size in (1000, 65536, len(long)):
        cuts = range(0, len(long), size)
        assert filtered(long + short + DONE, *cuts) == long + b'data: {"x":1}\n\n' + DONE


def test_an_event_is_passed_on_as_soon_as_it_is_complete():
    for end in (b"\n\n", b"\r\n\r\n", b"\r\r"):
        event = b"data: {}" + end
        pieces = [event, event[:4], event[4:] + event[:1], event[1:], b""]
        assert without_usage(False, *pieces) == [event, b"", event, event, b""]


FIELDS = st.sampled_from([b": ping\n", b"id: 7\n", b"event: x\n", b""])
ENDS = st.sampled_from([b"\n", b"\r\n"])
VALUES = st.sampled_from(
    [
        "",
        '"usage":null',
        'data: {"choices":[],"usage":{}}\n\n',
        "\\",
        "é",
        ',"usage":null}',
        7,
        None,
    ]
)


@st.composite
def events(draw):
    """(with the report of usage, without)"""
    end, field = draw(ENDS), draw(FIELDS)
    compact = draw(st.sampled_from([(",", ":"), (", ", ": ")]))

    def write(value: dict) -> bytes:
        return field + b"data: " + json.dumps(value, separators=compact).encode() + end + end

    kind = draw(st.sampled_from(["chunk", "null", "report", "done", "odd"]))
    delta = {"content": draw(VALUES), "usage": draw(VALUES)}
    value = {"id": draw(VALUES), "choices": [{"delta": delta}], "x": draw(VALUES)}
    if kind == "done":
        return (DONE, DONE)
    if kind == "odd":
        text = draw(st.sampled_from([b"data: {}\ndata: {}\n\n", b"\n", b"data: nonsense\n\n"]))
        return (text, text)
    if kind == "report":
        return (write({"id": 1, "choices": [], "usage": {"prompt_tokens": 1}}), b"")
    if kind == "null":
        items = list(value.items())
        at = draw(st.integers(1, len(items)))
        return (write(dict([*items[:at], ("usage", None), *items[at:]])), write(value))
    return (write(value), write(value))


@settings(max_examples=300)
@given(st.lists(events(), max_size=6), st.lists(st.integers(0, 1500), max_size=8))
def test_a_stream_is_what_it_would_be_without_usage(stream, cuts):
    body = b"".join(event for event, _ in stream)
    assert filtered(body, *cuts) == b"".join(event for _, event in stream)


PARTS = (b"\r", b"\n", b"data:", b'{"choices":[],', b'"usage":', b"null", b"{}", b"}", b"x")


@settings(max_examples=300)
@given(st.lists(st.sampled_from(PARTS)).map(b"".join), st.lists(st.integers(0, 60), max_size=6))
def test_the_result_does_not_depend_on_how_the_text_is_split(body, cuts):
    assert filtered(body, *cuts) == filtered(body)
