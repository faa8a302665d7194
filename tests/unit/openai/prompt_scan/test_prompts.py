"""Which requests have a prompt, what each strategy computes of it, and malformed bodies."""

import pytest
from fakes.prompts import CACHED, PARTS, PICKERS, body_of, chat, data, dump, picker, prompt, words
from hypothesis import example, given, settings
from hypothesis import strategies as st
from json_oracle import parse
from prompt_oracle import FILE_TOKENS, expected

from examples import some
from kubeai._pick import STRATEGIES
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.request import SHAPES, named, prompt_of, read
from kubeai.openai.routes import Kind


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prompts_that_no_engine_caches_have_a_length_only(strategy):
    for kind, members in (
        (Kind.EMBEDDINGS, {"input": [words(9000), words(9000, 1)]}),
        (Kind.RERANK, {"query": "q", "documents": [words(9000)] * 3}),
        (Kind.SCORE, {"queries": ["q"], "documents": [words(9000)] * 3}),
        (Kind.EMBED_V2, {"texts": [words(9000)]}),
        (Kind.SPEECH, {"input": words(900)}),
        (Kind.OLLAMA_EMBED, {"input": words(900)}),
    ):
        body = body_of(model="m", **members)
        found = prompt(kind, body, strategy)
        assert (found.tokens, found.samples) == (len(body) // 4, ())
        assert found.has_key == (strategy == "PrefixHash")
        if found.has_key:
            assert found.key == read(kind, body).key(100)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_upload_has_an_empty_prompt(strategy):
    found = prompt_of(PICKERS[strategy], named(Kind.TRANSCRIPTIONS, "m_a"))
    assert (found.tokens, found.samples, found.has_key, found.streams) == (0, (), False, False)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_prompt_without_the_text_that_is_hashed_has_no_key(strategy):
    body = body_of(model="m", text_1="q", text_2=[words(9000)])
    found = prompt(Kind.SCORE, body, strategy)
    assert (found.tokens, found.samples, found.has_key) == (len(body) // 4, (), False)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "kind", [Kind.TOKENIZE, Kind.DETOKENIZE, Kind.COUNT_TOKENS, Kind.IMAGES, Kind.IMAGE_EDITS]
)
def test_a_request_for_which_no_prompt_is_computed_has_an_empty_prompt(kind, strategy):
    found = prompt(kind, chat(words(9000), prompt=words(9000), input=words(9000)), strategy)
    assert (found.tokens, found.samples, found.has_key, found.streams) == (0, (), False, False)


@pytest.mark.parametrize("kind", CACHED)
def test_each_strategy_computes_what_it_uses(kind):
    shape = SHAPES[kind]
    field = (shape.conversation or shape.text).decode()
    for content in (words(9000), [{"role": "user", "content": [PARTS["chat"](9000)]}]):
        body = body_of(model="m_a", **{field: content})
        least, hashed, cached = (prompt(kind, body, strategy) for strategy in STRATEGIES)
        assert least.samples == ()
        assert hashed.samples == cached.samples != ()
        assert [each.has_key for each in (least, hashed, cached)] == [False, True, False]
        assert least.tokens == hashed.tokens == cached.tokens
        for limit in (0, 7, 100, 5000):
            by_limit = prompt_of(picker("PrefixHash", limit), read(kind, body))
            assert by_limit.key == read(kind, body).key(limit)


def test_a_prompt_knows_whether_its_response_is_streamed():
    for value, streams in ((b"true", True), (b"false", False), (b"null", False), (b"1", False)):
        assert prompt(Kind.CHAT, chat("hello", stream=value)).streams is streams
    assert not prompt(Kind.CHAT, chat("hello")).streams


@pytest.mark.parametrize("kind", [Kind.OLLAMA_CHAT, Kind.OLLAMA_GENERATE])
def test_ollamas_responses_are_streamed_unless_the_body_says_otherwise(kind):
    for value, streams in ((b"true", True), (b"false", False), (b"null", True)):
        assert prompt(kind, body_of(model="m", stream=value)).streams is streams
    assert prompt(kind, body_of(model="m")).streams
    assert not prompt(Kind.OLLAMA_EMBED, body_of(model="m")).streams


@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize(
    "conversation",
    [
        *(b"null", b"true", b"0", b'""', b"[]", b"{}", b"[[]]", b"[null]", b"[[[{}]],1]", b"-1e9"),
        *(
            b'{"role":"user"}',
            b'[{"role":["user"],"content":{}}]',
            b'[{"content":{"image_url":1}}]',
        ),
        *(b'[{"role":1,"content":[{"image_url":', b'[{"role":"user"', b"[1,]", b'"', b"[\xff]"),
        b'[{"content":[{"image_url":"%s"}],"role":"user","role":"system"},7]' % (b"x" * 2000),
        b'[{"content":[["source",{"source":[["%s"]]}]]}]' % (b"x" * 2000),
        b'[{"content":["x"],"":{"file":{"file":"%s"}}}]' % (b"\\\\" * 2000),
        b"[%s]" % b",".join([b'{"role":"user","content":[1,"\\ud83c\\udf89"]}'] * 99),
    ],
)
def test_an_odd_conversation_has_a_prompt_if_it_is_accepted(kind, conversation):
    for field in ("messages", "input", "prompt", "query", "system", "instructions", "tools"):
        for rest in (b"}", b',"messages":[{"role":"user","content":[]}],"input":"x"}'):
            accepted_alike(kind, b'{"model":"m","%s":%s%s' % (field.encode(), conversation, rest))
    accepted_alike(kind, b'{"model":"m"}')


def accepted_alike(kind: Kind, body: bytes) -> None:
    """Prompts change nothing about which bodies are accepted, and exist for all of those."""
    try:
        parsed = parse(kind, body)
    except ErrorResponse:
        with pytest.raises(ErrorResponse):
            read(kind, body)
        return
    request = read(kind, body)
    assert request.model == parsed.model
    for made in PICKERS.values():
        found = prompt_of(made, request)
        depths = [depth for _, depth in found.samples]
        assert depths == sorted(depths)
        assert all(depth <= found.tokens for depth in depths)
        assert found.tokens <= len(body) // 4 + FILE_TOKENS * 16
        if kind in CACHED and made is not PICKERS["LeastLoad"]:
            assert len(found.samples) == len(expected(kind, body, with_files=False).covers)


names = st.sampled_from(
    (
        *("model", "messages", "input", "prompt", "tools", "system", "instructions", "stream"),
        *("role", "content", "text", "image_url", "source", "file", "output", "x", "", 'a"b'),
    )
)
values = st.recursive(
    st.one_of(
        st.none(),
        st.integers(),
        st.sampled_from(["user", "system", "image_url", "m_a", '"image_url":', "é\n"]),
        st.integers(0, 3000).map(words),
        st.just(data(3000)),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)
SPOILERS = [
    b"",
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"\\",
    b"\x00",
    b"\xff",
    b"\xc3\xa9",
    b" ",
]


@settings(max_examples=some(300))
@given(
    st.sampled_from(list(SHAPES)),
    st.lists(st.tuples(names, values), max_size=6),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 2), st.sampled_from(SPOILERS)), max_size=2),
)
@example(Kind.CHAT, [("messages", [{"content": [{"image_url": data(3000)}]}])], [])
def test_malformed_bodies_are_accepted_or_rejected_as_before(kind, members, spoilers):
    body = bytearray(b'{"model":"m"')
    for name, value in members:
        body += b"," + dump(name) + b":" + dump(value)
    body += b"}"
    for part, dropped, piece in spoilers:
        at = int(part * len(body))
        body[at : at + dropped] = piece
    accepted_alike(kind, bytes(body))
