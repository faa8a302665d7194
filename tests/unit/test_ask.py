"""The one pass over a body agrees with the two of msgspec, or leaves the verdict to them."""

import json
import os
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kubeai import _ask, openai
from kubeai.openai import BadRequest, Kind

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
    """JSON of requests: any order, duplicates, either way to escape, odd space."""
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


def agrees(kind: Kind, body: bytes) -> bool:
    """Whether the pass took the body; it must then mean what openai.parse says it does."""
    ask = _ask.read(openai.SHAPES[kind], body)
    if ask is None:
        return False
    told = openai.parse(kind, body)  # a BadRequest fails the test
    json.loads(body.decode())
    assert (ask.model, ask.name, ask.adapter) == (told.model, told.name, told.adapter)
    assert ask.stream == told.stream
    for limit in LIMITS:
        key = ask.key(limit)
        assert key is None or key == openai.hash_key(told.adapter, told, limit)
        assert openai.key_of(kind, body, ask, limit) == openai.hash_key(told.adapter, told, limit)
    if ask.adapter is not None:
        assert ask.for_adapter() == openai.replace_model(body, ask.adapter)
    return True


@given(st.sampled_from(JSON_KINDS), bodies())
@settings(max_examples=1500, deadline=None)
def test_bodies_are_understood_alike(kind, body):
    agrees(kind, body)


@given(st.sampled_from(JSON_KINDS), spoiled())
@settings(max_examples=1500, deadline=None)
@example(Kind.CHAT, b'{"model":"m"}\x00')
def test_spoiled_bodies_are_understood_alike_or_refused(kind, body):
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
def test_what_clients_send_is_read_in_one_pass(kind, fields, ensure_ascii):
    for body in (
        json.dumps({"model": "m_a", **fields}, ensure_ascii=ensure_ascii),
        json.dumps({**fields, "model": "m"}, ensure_ascii=ensure_ascii, indent=2),
    ):
        assert agrees(kind, body.encode())
        ask = _ask.read(openai.SHAPES[kind], body.encode())
        assert all(ask.key(limit) is not None for limit in LIMITS)


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
        b'{"model":"m","x":' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"model":"m"' + b"".join(b',"k%d":1' % i for i in range(1000)) + b"}",
    ],
)
def test_what_two_readers_may_read_differently_is_left_to_the_slow_way(body):
    assert _ask.read(openai.SHAPES[Kind.CHAT], body) is None


@pytest.mark.parametrize("nesting", [1, 64])
def test_nesting_is_followed(nesting):
    body = b'{"x":' + b'[{"y":' * (nesting // 2) + b"[" + b"]" + b"}]" * (nesting // 2)
    body += b',"model":"m"}'
    assert (_ask.read(openai.SHAPES[Kind.CHAT], body) is not None) == (nesting < 64)
    with_strings = b'{"x":' + b"[" * nesting + b"]" * nesting + b',"model":"m"}'
    assert agrees(Kind.CHAT, with_strings)


@pytest.mark.parametrize("piece", ["a", "\\n", "中", "\\u4e2d", 'é\\\\\\"', "🎉x"])
@pytest.mark.parametrize("size", [1, 61, 62, 63, 64, 65, 127, 128, 129, 1000])
def test_strings_of_any_length_and_place(piece, size):
    for shift in range(0, 9, 3):
        content = "y" * shift + piece * size
        body = f'{{"messages":[{{"role":"user","content":"{content}"}}],"model":"m"}}'
        assert agrees(Kind.CHAT, body.encode())


def test_members_by_the_hundred_thousand_get_the_coarse_key():
    crowd = [{"role": "user", "content": "x"}] * 60_000
    body = json.dumps({"model": "m", "messages": crowd}).encode()
    ask = _ask.read(openai.SHAPES[Kind.CHAT], body)
    assert ask.key(100) is None
    assert agrees(Kind.CHAT, body)


@pytest.mark.skipif("KUBEAI_ASAN" in os.environ, reason="the sanitizer is slow")
def test_a_body_at_the_limit_does_not_stall():
    body = b'{"model":"m","messages":[{"role":"user","content":"%s"}]}' % (b"x" * (64 << 20))
    took_s = []
    for _ in range(3):
        began = time.perf_counter()
        _ask.read(openai.SHAPES[Kind.CHAT], body).key(100)
        took_s.append(time.perf_counter() - began)
    assert min(took_s) < 0.05


def test_an_ask_that_openai_refuses_is_never_taken():
    for body in (b'{"model":"m","x":"\xc3"}', b'{"Model":"m"}'):
        with pytest.raises(BadRequest):
            openai.parse(Kind.CHAT, body)
        assert _ask.read(openai.SHAPES[Kind.CHAT], body) is None
