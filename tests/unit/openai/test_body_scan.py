"""The compiled reader accepts the bodies that the oracle accepts, with the same meaning."""

import json
import os
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from json_oracle import hash_key, parse, replace_model

from examples import some
from kubeai._load import LoadTable
from kubeai._pick import Picker
from kubeai._ring import Ring
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.request import LARGE_BYTES, body_for, prompt_of, read
from kubeai.openai.routes import Kind

JSON_KINDS = [kind for kind in Kind if kind.is_json]
LIMITS = (0, 1, 7, 100)

text = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from('aé中🎉\\"/\n\x7f')), max_size=90
)
names = st.sampled_from(
    (
        *("model", "Model", "stream", "messages", "input", "prompt", "query", "system"),
        *("instructions", "role", "content", "text", "type", "x", "", 'te"xt', "é"),
    )
)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), text
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(text, names), inner, max_size=3)
    ),
    max_leaves=6,
)
parts = st.one_of(
    text,
    st.builds(lambda t: {"type": "text", "text": t}, st.one_of(text, scalars)),
    st.builds(lambda t: {"image_url": t}, values),
    values,
)
contents = st.one_of(text, st.lists(parts, max_size=4), values)
roles = st.sampled_from(["system", "developer", "user", "user", "assistant", "tool", "User", 1])
messages = st.lists(
    st.one_of(
        st.builds(lambda r, c: {"role": r, "content": c}, roles, contents),
        st.builds(lambda r, c: {"content": c, "name": "n", "role": r}, roles, contents),
        st.builds(lambda r: {"role": r}, roles),
        values,
    ),
    max_size=10,
)
members = st.lists(
    st.one_of(
        st.tuples(st.just("model"), st.sampled_from(["m", "m_a", "m_", "_", "é_é", "", 'q"', 1])),
        st.tuples(st.sampled_from(["messages", "input"]), st.one_of(messages, contents)),
        st.tuples(st.sampled_from(["prompt", "query", "input"]), st.lists(values, max_size=3)),
        st.tuples(st.sampled_from(["system", "instructions"]), contents),
        st.tuples(st.just("stream"), values),
        st.tuples(names, values),
    ),
    min_size=1,
    max_size=6,
)


@st.composite
def bodies(draw) -> bytes:
    """JSON request bodies: any order, duplicates, both kinds of escaping, odd whitespace."""
    ascii_only = draw(st.booleans())
    space = draw(st.sampled_from(["", " ", "\r\n\t", " " * 30]))
    written = [
        f"{json.dumps(key, ensure_ascii=ascii_only)}{space}:{space}"
        + json.dumps(value, ensure_ascii=ascii_only, indent=draw(st.sampled_from([None, 1])))
        for key, value in draw(members)
    ]
    if draw(st.booleans()):
        written.insert(0, '"model":"m"')
    return f"{space}{{{space}{f'{space},{space}'.join(written)}{space}}}{space}".encode()


SPOILERS = (
    *(b"", b"\x00", b"\\", b'"', b"{", b"]", b",", b":", b"\xff", b"\xed\xa0\x80", b"\xc0\x80"),
    *(b"\\ud800", b"\\udc00", b"\\u0000", b"\xe4", b"0", b"-", b"1.e", b"\xef\xbb\xbf", b"\n"),
    *(b"\x1f", b"\x7f", b"NaN", b"\\x", b"\xf4\x90\x80\x80", b"\xed\x9f\xbf", b"\xf0\x8f\xbf\xbf"),
)


@st.composite
def spoiled(draw) -> bytes:
    """Such a body with a few bytes changed, dropped, doubled or added."""
    body = bytearray(draw(bodies()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        piece = draw(st.sampled_from(SPOILERS))
        body[at : at + draw(st.integers(0, 2))] = piece
    return bytes(body)


def _is_refused_alike(kind: Kind, body: bytes, expected: ErrorResponse) -> bool:
    with pytest.raises(ErrorResponse) as refused:
        read(kind, body)
    error = refused.value
    assert (error.status, error.param) == (expected.status, expected.param)
    if error.param is not None or "UTF-8" in expected.message:
        assert error.message == expected.message
    return True


def agrees(kind: Kind, body: bytes) -> bool:
    """Whether the body is accepted; both readers must agree on that and on its meaning."""
    try:
        expected = parse(kind, body)
    except ErrorResponse as error:
        return not _is_refused_alike(kind, body, error)
    request = read(kind, body)  # an ErrorResponse fails the test
    json.loads(body.decode())
    assert (request.kind, request.model, request.name, request.adapter, request.stream) == (
        kind, expected.model, expected.name, expected.adapter, expected.stream,
    )  # fmt: skip
    for limit in LIMITS:
        assert request.key(limit) == hash_key(expected.adapter, expected, limit)
    if request.adapter is not None:
        assert body_for(request, body) == replace_model(body, request.adapter)
    return True


@given(st.sampled_from(JSON_KINDS), bodies())
@settings(max_examples=some(300))
def test_both_parsers_read_bodies_alike(kind, body):
    agrees(kind, body)


@given(st.sampled_from(JSON_KINDS), spoiled())
@settings(max_examples=some(300))
@example(Kind.CHAT, b'{"model":"m"}\x00')
def test_both_parsers_read_corrupted_bodies_alike_or_reject_them(kind, body):
    agrees(kind, body)


PLAIN = [
    (Kind.CHAT, {"messages": [{"role": "user", "content": "x" * 300}], "temperature": 1e-3}),
    (
        Kind.CHAT,
        {
            "stream": True,
            "messages": [
                {"role": "system", "content": 'Be\n"terse" — 简单. \U0001f389' * 9},
                {"role": "developer", "content": [{"type": "text", "text": "a"}, "b"]},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "é" * 60}, {"image_url": {}}],
                },
                {"role": "assistant", "content": None, "tool_calls": [{"f": "{}"}]},
                {"role": "user", "content": "later"},
            ],
        },
    ),
    (Kind.COMPLETIONS, {"prompt": "Once\tupon"}),
    (Kind.EMBEDDINGS, {"input": ["first", "second"]}),
    (Kind.RERANK, {"query": "q", "documents": ["a"] * 50}),
    (Kind.RESPONSES, {"input": "hello", "instructions": "be kind"}),
    (
        Kind.MESSAGES,
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "system": [{"type": "text", "text": "s"}],
        },
    ),
]


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize(("kind", "fields"), PLAIN)
def test_bodies_of_real_clients_are_accepted(kind, fields, ensure_ascii):
    for body in (
        json.dumps({"model": "m_a", **fields}, ensure_ascii=ensure_ascii),
        json.dumps({**fields, "model": "m"}, ensure_ascii=ensure_ascii, indent=2),
    ):
        assert agrees(kind, body.encode())


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"model":"m"',
        b'{"model":"m"} x',
        b'{"model":"m",}',
        b'{"model":"m","model":"m"}',
        b'{"model":"m","MODEL":"m"}',
        b'{"model":"m","mod\\u0065l":"n"}',
        b'{"model":"m","x":"\xff"}',
        b'{"model":"m","x":"\xed\xa0\x80"}',
        b'{"model":"m","x":"\\ud83d"}',
        b'{"model":"m","x":"\\udc00\\ud83d"}',
        b'{"model":"m","x":"\x00"}',
        b'{"model":"m","x":NaN}',
        b'{"model":"m","x":01}',
        b'{"model":"m","x":1.}',
        b'{"model":"m","x":[1,]}',
        b'{"model":"m","x":tru}',
        b'{"model":1}',
        b'{"model":""}',
        b'\xef\xbb\xbf{"model":"m"}',
        b'{"model":"m","x":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"model":"m"' + b"".join(b',"k%d":1' % i for i in range(1000)) + b"}",
    ],
)
def test_bodies_that_parsers_may_read_differently_are_rejected(body):
    assert not agrees(Kind.CHAT, body)


@pytest.mark.parametrize("nesting", [1, 64, 512])
def test_nested_values_are_skipped_correctly(nesting):
    body = b'{"x":' + b'[{"y":' * (nesting // 2) + b"[" + b"]" + b"}]" * (nesting // 2)
    assert agrees(Kind.CHAT, body + b',"model":"m"}')
    assert agrees(Kind.CHAT, b'{"x":' + b"[" * nesting + b"]" * nesting + b',"model":"m"}')


def test_nesting_is_limited():
    def nested(depth: int) -> bytes:
        return b'{"x":' + b"[" * depth + b"]" * depth + b',"model":"m"}'

    assert read(Kind.CHAT, nested(980)).model == "m"
    with pytest.raises(ErrorResponse, match="nested too deeply"):
        read(Kind.CHAT, nested(981))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Kind.CHAT, rb'{"mod\u0065l":"m\u005fa\"","messages":[]}'),
        (Kind.CHAT, rb'{"model":"m","m\u0065ssages":[{"r\u006fle":"us\u0065r","content":"x"}]}'),
        (
            Kind.CHAT,
            rb'{"model":"m","messages":[{"\u0063ontent":[{"t\u0065xt":"x"}],"role":"user"}]}',
        ),
        (Kind.CHAT, rb'{"model":"m","messages":[{"role":"user\"","content":"x"}],"model\"":1}'),
        (Kind.CHAT, b'{"model":"m","messages":[1,{"role":"user","content":"x"}]}'),
        (Kind.CHAT, b'{"model":"m","messages":[{"role":1,"content":"x"}]}'),
        (Kind.CHAT, b'{"model":"m","messages":[{"role":"user","role":"system","content":"x"}]}'),
        (Kind.CHAT, b'{"model":"m","messages":[{"role":"user","content":"x","content":"y"}]}'),
        (Kind.CHAT, b'{"model":"m","messages":[{"role":"user","content":["a",1]}]}'),
        (Kind.CHAT, b'{"messages":[{"role":"user","content":"a"},2],"messages":"b","model":"m"}'),
        (Kind.CHAT, b'{"stream":false,"model":"m","stream":true}'),
        (Kind.MESSAGES, b'{"model":"m","messages":[{"role":"user","content":"x"}],"system":[1]}'),
        (Kind.MESSAGES, b'{"system":[1],"model":"m","messages":"x","system":"y"}'),
        (Kind.EMBEDDINGS, b'{"model":"m","input":[[ 1 , 23,456],[7]]}'),
        (Kind.EMBEDDINGS, b'{"model":"m","input":[%s"text"]}' % (b" " * 3000)),
        (Kind.EMBEDDINGS, b'{"model":"m","input":[[],1]}'),
        (Kind.EMBEDDINGS, b'{"model":"m","input":[{"a":"%s"}]}' % ("é".encode() * 3000)),
        (Kind.EMBEDDINGS, b'{"model":"m","input":[%s]}' % (b"12345," * 3000 + b"6")),
        (Kind.COMPLETIONS, b'{"model":"m","prompt":7}'),
    ],
)
def test_both_parsers_read_odd_shapes_alike(kind, body):
    assert agrees(kind, body)


@pytest.mark.parametrize("count", [8, 9, 16, 17, 1000])
def test_several_system_messages_are_accepted(count):
    said = [{"role": "system", "content": f"rule {i}"} for i in range(count)]
    assert agrees(Kind.CHAT, json.dumps({"model": "m", "messages": said}).encode())


@pytest.mark.parametrize("piece", ["m", "\\u006d"])
def test_a_long_name_is_read_from_a_small_body_only(piece):
    body = b'{"model":"%s"%%s}' % (piece * 5000).encode()
    assert agrees(Kind.CHAT, body % b"")
    with pytest.raises(ErrorResponse, match="longer than 4096 bytes") as refused:
        read(Kind.CHAT, body % (b',"x":"%s"' % (b"x" * LARGE_BYTES)))
    assert refused.value.param == "model"


def test_an_error_in_the_syntax_is_reported_first():
    for body in (b'{"model":"m","model":"m",}', b'{"Model":"m","x":"\xff"}', b'{"model":1} '):
        assert not agrees(Kind.CHAT, body)


@pytest.mark.parametrize("piece", ["a", "\\n", "中", "\\u4e2d", 'é\\\\\\"', "🎉x"])
@pytest.mark.parametrize("size", [1, 61, 62, 63, 64, 65, 127, 128, 129, 1000])
def test_strings_of_any_length_at_any_offset(piece, size):
    for shift in range(0, 9, 3):
        content = "y" * shift + piece * size
        body = f'{{"messages":[{{"role":"user","content":"{content}"}}],"model":"m"}}'
        assert agrees(Kind.CHAT, body.encode())


def test_a_body_with_100_000_members_gets_the_coarse_key():
    crowd = [{"role": "user", "content": "x"}] * 60_000
    body = json.dumps({"model": "m", "messages": crowd}).encode()
    assert agrees(Kind.CHAT, body)
    more = body.replace(b'"model"', b'"system":"s","model"').replace(b'"user"', b'"system"')
    assert agrees(Kind.MESSAGES, more)
    shifted = body.replace(b'{"role"', 'é{"role"'.encode(), 1)
    assert not agrees(Kind.CHAT, shifted)
    assert agrees(Kind.CHAT, body.replace(b'{"role"', '"é",{"role"'.encode(), 1))


@pytest.mark.skipif("KUBEAI_ASAN" in os.environ, reason="the sanitizer is slow")
def test_a_body_at_the_size_limit_is_parsed_quickly():
    body = b'{"model":"m","messages":[{"role":"user","content":"%s"}]}' % (b"x" * (64 << 20))
    took_s = []
    for _ in range(3):
        began_s = time.thread_time()
        read(Kind.CHAT, body).key(100)
        took_s.append(time.thread_time() - began_s)
    assert min(took_s) < 0.05


@pytest.mark.skipif("KUBEAI_ASAN" in os.environ, reason="the sanitizer is slow")
@pytest.mark.parametrize("end", [b"]}", b"]"])
def test_other_threads_run_while_a_large_body_is_parsed(end):
    picker = Picker(Ring(LoadTable.create(1, 1), 0, 0))
    picker.configure("PrefixHash", 100)
    size = 32 << 20
    said = b'{"role":"system","content":"%s"}' % (b"\\n" * (size // 4))
    body = b'{"model":"m_a","messages":[%s,%s%s' % (said, b"[]," * (size // 6) + b"0", end)

    def act() -> None:
        try:
            request = read(Kind.CHAT, body)
        except ErrorResponse:
            return
        prompt_of(picker, request)
        body_for(request, body)

    found = []
    for _ in range(5):
        began_s = last_s = time.perf_counter()
        longest_s = 0.0
        thread = threading.Thread(target=act)
        thread.start()
        while thread.is_alive():
            time.sleep(0)
            longest_s = max(longest_s, time.perf_counter() - last_s)
            last_s = time.perf_counter()
        found.append(longest_s / (last_s - began_s))
    assert min(found) < 0.5
