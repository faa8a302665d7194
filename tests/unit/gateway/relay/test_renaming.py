"""The model's name in a response: only it is replaced, wherever the text is split.

The oracle writes the same document twice, with the engine's name and with the client's.
"""

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeai.gateway.relay._renaming import rename

OLD, NEW = "lora", "m_lora"


def renamed(body: bytes, *cuts: int, events: bool = False, single: bool = True) -> bytes:
    edges = [0, *sorted(min(cut, len(body)) for cut in cuts), len(body)]
    pieces = [body[begin:end] for begin, end in pairwise(edges)]
    old, new = json.dumps(OLD).encode(), json.dumps(NEW).encode()
    return rename(old, new, events, single and not events, *pieces)


def everywhere(body: bytes, expected: bytes, **options: bool) -> None:
    """Check whole, byte by byte, and with a cut at each place."""
    assert renamed(body, **options) == expected
    assert renamed(body, *range(len(body)), **options) == expected
    for cut in range(len(body)):
        assert renamed(body, cut, **options) == expected


CHANGED = [
    (b'{"model":"lora"}', b'{"model":"m_lora"}'),
    (b'{"id":1,\n  "model" :\t"lora" , "x":[]}', b'{"id":1,\n  "model" :\t"m_lora" , "x":[]}'),
    (b'{"choices":[{"model":"lora"}],"model":"lora"}', None),
    (b'{"a":{"b":{"c":[[{}]]}},"model":"lora"}', None),
    (b'{"a":"\\"","b":"\\\\","model":"lora"}', None),
]


@pytest.mark.parametrize(("body", "expected"), CHANGED)
def test_the_top_level_model_of_json_is_replaced(body, expected):
    if expected is None:
        at = body.rindex(b'"lora"')
        expected = body[:at] + b'"m_lora"' + body[at + 6 :]
    everywhere(body, expected)


UNCHANGED = [
    b"",
    b"lora",
    b'"lora"',
    b'["model","lora"]',
    b'[{"model":"lora"}]',
    b'{"model":"lora2"}',
    b'{"model":"lor"}',
    b'{"model":"LORA"}',
    b'{"model":"lora\\""}',
    b'{"model":null,"x":"lora"}',
    b'{"model":["lora"]}',
    b'{"model":{"model":"lora"}}',
    b'{"models":"lora","Model":"lora","mode":"lora"}',
    b'{"x":"model","y":"lora"}',
    b'{"x":"\\"model\\":\\"lora\\""}',
    b'{"x":"{\\"model\\":\\"lora\\"}","y":"model"}',
    b'{"message":{"model":"lora"},"response":{"model":"lora"}}',
    b'{"x":{"model":"lora"}}',
    b'}}{"model":',
    b'{"model":"lora',
    b'{"model":"lo',
]


@pytest.mark.parametrize("body", UNCHANGED)
def test_everything_else_in_json_is_unchanged(body):
    everywhere(body, body)


def test_only_the_first_model_of_json_is_replaced():
    everywhere(b'{"model":"lora","model":"lora"}', b'{"model":"m_lora","model":"lora"}')


def test_each_line_of_newline_delimited_json_is_renamed():
    body = b'{"model":"lora","done":false}\n{"x":[1],"model":"lora"}\r\n'
    everywhere(body, body.replace(b'"lora"', b'"m_lora"'), single=False)


EVENTS = [
    # chat and completions
    b'data: {"id":"1","model":"lora","choices":[]}\n\ndata: [DONE]\n\n',
    b'data:{"model":"lora"}\r\n\r\ndata: {"model":"lora"}\r\rdata: {"model":"lora"}\n\n',
    # Responses
    b'event: response.created\ndata: {"response":{"id":"r","model":"lora"},"type":"x"}\n\n',
    # Messages
    b'event: message_start\ndata: {"type":"x","message":{"content":[],"model":"lora"}}\n\n',
    b': comment\n\nid: 7\ndata: {"model":"lora"}\n\n',
    b'data: {"usage":{"a":[{}]},\ndata: "model":"lora"}\n\n',
]


@pytest.mark.parametrize("body", EVENTS)
def test_the_model_in_events_is_replaced(body):
    everywhere(body, body.replace(b'"lora"', b'"m_lora"'), events=True)


UNCHANGED_EVENTS = [
    b'event: {"model":"lora"}\n\n',
    b': {"model":"lora"}\n\n',
    b'data2: {"model":"lora"}\n\n',
    b' data: {"model":"lora"}\n\n',
    b'data\n\ndata: x {"x":{"model":"lora"}}\n\n',
    b'data: {"choices":[{"delta":{"content":"\\"model\\":\\"lora\\""}}]}\n\n',
    b'data: {"choices":[{"message":{"model":"lora"}}]}\n\n',
    b'data: {"x":{"response":{"model":"lora"}}}\n\n',
    b'data: {"response":{"x":{"model":"lora"},"models":"lora"}}\n\n',
    b'data: {"response":[{"model":"lora"}],"message":"lora"}\n\n',
    b'data: {"x":"\ndata: model":"lora"}\n\n',  # a line may not end in a string
    b'data: {"model":"lo\n\n',
    b'data: {"model":"lora',
]


@pytest.mark.parametrize("body", UNCHANGED_EVENTS)
def test_everything_else_in_events_is_unchanged(body):
    everywhere(body, body, events=True)


@pytest.mark.parametrize("broken", [b'{"a":[[{"x', b'{"model":"lo', b"}}]]", b'{"x":"y'])
def test_a_malformed_event_does_not_affect_the_next(broken):
    body = b"data: " + broken + b'\n\ndata: {"model":"lora"}\n\n'
    expected = b"data: " + broken + b'\n\ndata: {"model":"m_lora"}\n\n'
    everywhere(body, expected, events=True)


NAMES = st.sampled_from(["model", "response", "message", "m", "x", 'a"b', "mod\\el", ""])
TEXTS = st.sampled_from(
    [OLD, "lora2", "lor", '"model":"lora"', "\\", '\\"', "é☃", "data: {", "model"]
)
VALUES = st.recursive(
    st.one_of(TEXTS, st.integers(), st.none(), st.booleans(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)
DOCUMENTS = st.one_of(st.dictionaries(NAMES, VALUES, max_size=5), VALUES)
LAYOUTS = st.sampled_from([{"separators": (",", ":")}, {}, {"separators": (" , ", " :\t")}])
CUTS = st.lists(st.integers(0, 400), max_size=8)


def with_new_name(document: object, is_event: bool) -> object:
    """The oracle: the document that a client should get."""
    if not isinstance(document, dict):
        return document
    result = dict(document)
    if result.get("model") == OLD:
        result["model"] = NEW
    for key in ("response", "message") if is_event else ():
        if isinstance(result.get(key), dict):
            result[key] = with_new_name(result[key], False)
    return result


@settings(max_examples=300)
@given(document=DOCUMENTS, layout=LAYOUTS, cuts=CUTS, ascii=st.booleans())
def test_json_is_renamed_like_the_document(document, layout, cuts, ascii):
    body = json.dumps(document, ensure_ascii=ascii, **layout).encode()
    expected = json.dumps(with_new_name(document, False), ensure_ascii=ascii, **layout).encode()
    assert renamed(body, *cuts) == expected


FIELDS = st.sampled_from(["", "event: x\n", ': {"model":"lora"}\n', "id: 1\r\n", "data2: x\n"])


@settings(max_examples=300)
@given(
    events=st.lists(st.tuples(FIELDS, DOCUMENTS, LAYOUTS), max_size=4),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=CUTS,
)
def test_events_are_renamed_like_their_documents(events, end, cuts):
    def body(is_new: bool) -> bytes:
        parts = []
        for field, document, layout in events:
            shown = with_new_name(document, True) if is_new else document
            parts.append(f"{field}data: {json.dumps(shown, **layout)}{end}{end}")
        return "".join(parts).encode()

    assert renamed(body(False), *cuts, events=True) == body(True)


@settings(max_examples=300)
@given(
    body=st.lists(
        st.sampled_from(['"model"', ":", '"lora"', *'{}[],\\"\n', "data:"]), max_size=30
    ).map(lambda parts: "".join(parts).encode()),
    cuts=CUTS,
    events=st.booleans(),
)
def test_any_text_is_renamed_alike_wherever_it_is_split(body, cuts, events):
    whole = renamed(body, events=events)
    assert renamed(body, *cuts, events=events) == whole
    assert whole.replace(b'"m_lora"', b'"lora"') == body


def test_a_long_string_is_passed_on_piece_by_piece():
    body = b'{"x":"' + b"y" * 100_000 + b'","model":"lora"}'
    assert renamed(body, *range(0, len(body), 1000)) == body.replace(b'"lora"', b'"m_lora"')
