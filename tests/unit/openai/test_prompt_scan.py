"""What a pick must know of a prompt, compared with an oracle that says which bytes a hash covers.

Two hashes must be equal exactly if they cover the same bytes.
"""

import itertools
import json
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from json_oracle import parse
from prompt_oracle import ENDS, FILE_TOKENS, SYSTEMS, Expected, expected, files_in

from examples import some
from kubeai._load import LoadTable
from kubeai._pick import STRATEGIES, Picker
from kubeai._prompt import BLOCKS_MAX
from kubeai._ring import Ring
from kubeai.openai.errors import BadRequest
from kubeai.openai.request import LARGE_BYTES, SHAPES, named, prompt_of, read
from kubeai.openai.routes import Kind

CONVERSATIONS = {
    Kind.CHAT: "messages",
    Kind.RESPONSES: "input",
    Kind.MESSAGES: "messages",
    Kind.OLLAMA_CHAT: "messages",
}
CACHED = [*CONVERSATIONS, Kind.COMPLETIONS, Kind.SYSTEM_ONE, Kind.OLLAMA_GENERATE]


def picker(strategy="PrefixCache", prefix_char_length=100):
    made = Picker(Ring(LoadTable.create(1, 1), 0, 0))
    made.configure(strategy, prefix_char_length)
    return made


PICKERS = {strategy: picker(strategy) for strategy in STRATEGIES}


def prompt(kind, body, strategy="PrefixCache"):
    return prompt_of(PICKERS[strategy], read(kind, body))


def hashes(kind, body):
    return [block for block, _ in prompt(kind, body).samples]


def dump(value) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def body_of(**members) -> bytes:
    """A body; a member that is bytes is written as it stands."""
    return b"{%s}" % b",".join(
        dump(name) + b":" + (value if isinstance(value, bytes) else dump(value))
        for name, value in members.items()
    )


def chat(*texts, **members) -> bytes:
    said = [
        {"role": "user" if n % 2 == 0 else "assistant", "content": text}
        for n, text in enumerate(texts)
    ]
    return body_of(**{"model": "m", **members, "messages": said})


def words(size, seed=0) -> str:
    source = random.Random(seed)
    return "".join(source.choices("abcdefghijklmnopqrstuvwxyz  \n", k=size))[:size]


def agrees(kind: Kind, body: bytes, with_files: bool = True) -> Expected:
    """Check a prompt's length and depths; returns what its hashes have to cover."""
    found = prompt(kind, body)
    wanted = expected(kind, body, with_files)
    assert [depth for _, depth in found.samples] == wanted.depths
    assert found.tokens == wanted.tokens
    depths = [depth for _, depth in found.samples]
    assert depths == sorted(depths)
    assert all(depth <= found.tokens for depth in depths)
    assert not found.has_key
    return wanted


def are_equal_where_they_cover_the_same(kind: Kind, *bodies: bytes) -> None:
    covered: dict[int, tuple[bytes, ...]] = {}
    different: set[tuple[bytes, ...]] = set()
    for body in bodies:
        for block, covers in zip(hashes(kind, body), agrees(kind, body).covers, strict=True):
            assert covered.setdefault(block, covers) == covers, "different bytes, the same hash"
            different.add(covers)
    assert len(covered) == len(different), "the same bytes, different hashes"


# -- what the hashes cover -------------------------------------------------------------------------

sizes = st.one_of(st.integers(0, 600), st.integers(0, 20_000), st.integers(0, 300_000))
systems = st.one_of(st.none(), st.integers(0, 3000))


@settings(max_examples=some(150))
@given(st.sampled_from(list(CONVERSATIONS)), sizes, st.floats(0, 1), systems, systems)
def test_samples_are_equal_as_far_as_the_bytes_are(kind, size, part, tools, system):
    text = words(size)
    shared = int(size * part)
    members: dict[str, object] = {"model": "m"}
    if tools is not None:
        members["tools"] = [{"name": words(tools)}]
    if system is not None and kind in SYSTEMS:
        members[SYSTEMS[kind]] = words(system, 1)
    are_equal_where_they_cover_the_same(
        kind,
        *(
            body_of(**members, **{CONVERSATIONS[kind]: [{"role": "user", "content": content}]})
            for content in (text, text[:shared], text[:shared] + "!" + text[shared + 1 :])
        ),
    )


@settings(max_examples=some(100))
@given(st.lists(st.integers(0, 5000), min_size=2, max_size=8))
def test_a_later_turn_has_the_samples_of_the_earlier_ones(turn_sizes):
    texts = [words(size, seed) for seed, size in enumerate(turn_sizes)]
    turns = [chat(*texts[: n + 1]) for n in range(len(texts))]
    are_equal_where_they_cover_the_same(Kind.CHAT, *turns)
    for earlier, later in itertools.pairwise(turns):
        conversation = len(earlier) - len(b'{"model":"m","messages":]}')  # the list is still open
        within = sum(end <= conversation for end in ENDS)
        assert hashes(Kind.CHAT, later)[:within] == hashes(Kind.CHAT, earlier)[:within]


@pytest.mark.parametrize("at", [0, 1, 63, 64, 65, 255])
def test_every_byte_counts(at):
    text = bytearray(b"x" * 1000)
    before = hashes(Kind.COMPLETIONS, body_of(model="m", prompt=text.decode()))
    for end in ENDS[:3]:
        changed = text.copy()
        changed[end - 256 + at - (at > 0)] ^= 1
        after = hashes(Kind.COMPLETIONS, body_of(model="m", prompt=changed.decode()))
        assert [a == b for a, b in zip(after, before, strict=True)] == [e < end for e in ENDS[:3]]


@pytest.mark.parametrize("kind", CACHED)
def test_what_stands_before_the_conversation_changes_every_hash(kind):
    shape = SHAPES[kind]
    field = (shape.conversation or shape.text).decode()
    base: dict[str, object] = {"model": "m_a", field: words(3000)}
    with_system = {} if kind not in SYSTEMS else {SYSTEMS[kind]: [{"text": "be kind"}]}
    variants = [
        base,
        {**base, "model": "n_a"},
        {**base, "model": "m_b"},
        {**base, "model": "m"},
        {**base, "tools": []},
        {**base, "tools": [{"name": "f"}]},
        {**base, "tools": [{"name": "g"}]},
    ]
    if with_system:
        variants += [
            {**base, **with_system},
            {**base, SYSTEMS[kind]: "be terse"},
            {**base, **with_system, "tools": [{"name": "f"}]},
        ]
    conversations = [set(hashes(kind, body_of(**variant))) for variant in variants]
    assert all(len(each) >= 11 for each in conversations)
    for n, one in enumerate(variants):
        for other in variants[:n]:
            both = set(hashes(kind, body_of(**one))) & set(hashes(kind, body_of(**other)))
            shared = "tools" in one and one["tools"] == other.get("tools")
            assert len(both) == shared, "only tools may be shared, before different system texts"


def test_other_members_their_order_and_the_space_between_them_change_nothing():
    said = dump([{"role": "user", "content": words(2000)}])
    system = dump(words(300, 1))
    tools = dump([{"name": "f"}])
    members = [
        (b'"model"', b'"m_a"'),
        (b'"messages"', said),
        (b'"system"', system),
        (b'"tools"', tools),
        (b'"temperature"', b"0.5"),
        (b'"user"', b'"me"'),
    ]
    found = set()
    for seed in range(20):
        source = random.Random(seed)
        source.shuffle(members)
        space = source.choice([b"", b" ", b"\n\t ", b"  "])
        inside = b",".join(
            space + key + space + b":" + space + value + space
            for key, value in members
            if source.random() < 0.5 or key not in (b'"temperature"', b'"user"')
        )
        body = space + b"{" + inside + b"}" + space
        agrees(Kind.MESSAGES, body)
        found.add(prompt(Kind.MESSAGES, body).samples)
    assert len(found) == 1


def test_space_inside_the_conversation_changes_the_hashes():
    spaced = b'[ {"role":"user","content":%s}]' % dump(words(500))
    plain = spaced.replace(b"[ {", b"[{")
    one, other = (hashes(Kind.CHAT, body_of(model="m", messages=each)) for each in (spaced, plain))
    assert not set(one) & set(other)


def test_an_escaped_model_is_the_same_model():
    said = [{"role": "user", "content": words(500)}]
    assert hashes(Kind.CHAT, body_of(model=b'"m\\u005fa"', messages=said)) == hashes(
        Kind.CHAT, body_of(model="m_a", messages=said)
    )


def test_if_a_member_occurs_twice_the_last_counts():
    first, last = (dump([{"role": "user", "content": words(900, seed)}]) for seed in range(2))
    twice = b'{"tools":[1],"messages":%s,"model":"m","messages":%s,"tools":[2]}' % (first, last)
    agrees(Kind.CHAT, twice)
    once = body_of(model="m", tools=[2], messages=last)
    assert prompt(Kind.CHAT, twice).samples == prompt(Kind.CHAT, once).samples


def test_samples_end_at_the_most_that_a_prompt_may_have():
    body = chat(words(2_000_000), tools=[1])
    wanted = agrees(Kind.CHAT, body)
    assert len(wanted.covers) == BLOCKS_MAX
    assert len(agrees(Kind.CHAT, chat(words(2_000_000))).covers) == BLOCKS_MAX == len(ENDS)


# -- lengths ---------------------------------------------------------------------------------------


@settings(max_examples=some(100))
@given(st.sampled_from(CACHED), sizes, st.booleans())
def test_a_token_is_four_bytes(kind, size, ascii_only):
    shape = SHAPES[kind]
    text = json.dumps(words(size // 2) + "é中🎉" * (size // 20), ensure_ascii=ascii_only).encode()
    body = body_of(model="m", **{(shape.conversation or shape.text).decode(): text})
    wanted = agrees(kind, body)
    assert wanted.tokens == len(text) // 4
    assert wanted.depths == [end // 4 for end in ENDS if end <= len(text)]


def data(size) -> str:
    return "data:image/png;base64," + "iVBORw0KGgo/" * (size // 12)


PARTS = {
    "chat": lambda size: {"type": "image_url", "image_url": {"url": data(size), "detail": "low"}},
    "responses": lambda size: {"type": "input_image", "image_url": data(size)},
    "anthropic": lambda size: {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": data(size)},
    },
    "tool result": lambda size: {
        "type": "tool_result",
        "tool_use_id": "t1",
        "content": [{"type": "image", "source": {"type": "base64", "data": data(size)}}],
    },
    "audio": lambda size: {
        "type": "input_audio",
        "input_audio": {"data": data(size), "format": "wav"},
    },
    "file": lambda size: {
        "type": "file",
        "file": {"filename": "a.pdf", "file_data": data(size)},
    },
    "input file": lambda size: {"type": "input_file", "filename": "a", "file_data": data(size)},
    "video": lambda size: {"type": "video_url", "video_url": {"url": data(size)}},
    "audio url": lambda size: {"type": "audio_url", "audio_url": {"url": data(size)}},
}


@pytest.mark.parametrize("part", list(PARTS))
@pytest.mark.parametrize("kind", list(CONVERSATIONS))
def test_a_file_counts_as_a_thousand_tokens_whatever_its_size(kind, part):
    tokens = []
    for size in (2_000, 100_000, 900_000):
        content = [{"type": "text", "text": "What is this?"}, PARTS[part](size)]
        said = [
            {"role": "system", "content": words(300)},
            {"role": "user", "content": content},
            {"role": "user", "content": words(700, 1)},
        ]
        body = body_of(model="m", **{CONVERSATIONS[kind]: said})
        assert len(files_in(dump(said))) == 1
        agrees(kind, body)
        tokens.append(prompt(kind, body).tokens)
    assert tokens[0] == tokens[1] == tokens[2]
    assert 1250 < tokens[0] < 1350


@settings(max_examples=some(150))
@given(
    st.lists(
        st.one_of(
            st.integers(0, 3000).map(lambda size: {"type": "text", "text": words(size)}),
            st.builds(
                lambda part, size: PARTS[part](size),
                st.sampled_from(list(PARTS)),
                st.one_of(st.integers(0, 2000), st.integers(2000, 60_000)),
            ),
        ),
        max_size=20,
    ),
    st.sampled_from([None, 1]),
)
def test_files_count_wherever_they_lie_relative_to_the_samples(content, indent):
    said = json.dumps([{"role": "user", "content": content}], indent=indent).encode()
    agrees(Kind.CHAT, body_of(model="m", messages=said))


def test_the_images_of_a_message_in_ollamas_api_count_as_one_file():
    for size in (2_000, 100_000):
        said = [{"role": "user", "content": words(700), "images": [data(size), data(size)]}]
        body = body_of(model="m", messages=said)
        agrees(Kind.OLLAMA_CHAT, body)
        assert FILE_TOKENS < prompt(Kind.OLLAMA_CHAT, body).tokens < FILE_TOKENS + 250


def test_only_the_first_sixteen_files_count_as_such():
    for count in (15, 16, 17, 20):
        said = [{"role": "user", "content": [PARTS["chat"](8000) for _ in range(count)]}]
        body = body_of(model="m", messages=said)
        agrees(Kind.CHAT, body)
        tokens = prompt(Kind.CHAT, body).tokens
        files = min(count, 16) * FILE_TOKENS
        further = max(0, count - 16) * 2000
        assert files + further <= tokens < files + further + 30 * count


def test_a_short_file_is_counted_as_text():
    url = "https://example.com/a.png"
    said = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    body = body_of(model="m", messages=said)
    agrees(Kind.CHAT, body)
    assert prompt(Kind.CHAT, body).tokens == len(dump(said)) // 4


@pytest.mark.parametrize(
    "text",
    [
        '"image_url":"' + "x" * 3000 + '"',
        '{"type":"image_url","image_url":{"url":"' + "x" * 3000 + '"}}',
        "image_url: " + "x" * 3000,
        '\\"image_url\\": \\"' + "x" * 3000,
        'image_url\\","image_url":"' + "x" * 3000,
    ],
)
def test_text_that_mentions_a_file_is_text(text):
    for part in ({"type": "text", "text": text}, {"type": "image_url", "text": text}, text):
        said = [{"role": "user", "content": [part, "image_url", text, "source", "file"]}]
        body = body_of(model="m", messages=said)
        agrees(Kind.CHAT, body, with_files=False)


def test_a_key_with_escapes_is_read_too():
    part = dump(PARTS["chat"](50_000)).replace(b'"image_url":', b'"image\\u005furl" :')
    said = b'[{"role":"user","content":[%s]}]' % part
    assert 1000 < prompt(Kind.CHAT, body_of(model="m", messages=said)).tokens < 1050


def test_files_outside_the_conversation_do_not_count():
    body = chat("hello", metadata={"file": data(50_000)})
    agrees(Kind.CHAT, body)
    assert prompt(Kind.CHAT, body).tokens < 20


def test_a_screenshot_that_a_tool_returned_counts_as_a_file():
    said = [
        {"role": "user", "content": "Open the page."},
        {
            "type": "computer_call_output",
            "call_id": "c1",
            "output": {"type": "computer_screenshot", "image_url": data(100_000)},
        },
        {
            "type": "function_call_output",
            "call_id": "c2",
            "output": [{"type": "input_image", "image_url": data(100_000)}],
        },
    ]
    for items in (said[:2], said[::2], said):
        body = body_of(model="m", input=items)
        agrees(Kind.RESPONSES, body)
        assert prompt(Kind.RESPONSES, body).tokens < FILE_TOKENS * (len(items) - 1) + 100


# -- kinds and strategies --------------------------------------------------------------------------


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


# -- large, crowded and malformed bodies -----------------------------------------------------------


@pytest.mark.parametrize("kind", list(CONVERSATIONS))
def test_large_bodies_are_read_like_small_ones(kind):
    text = words(3 << 20)
    parts = [PARTS["chat"](1 << 20), {"type": "text", "text": "?"}, PARTS["anthropic"](1 << 20)]
    said = [{"role": "user", "content": text[:900_000]}, {"role": "user", "content": parts}]
    field = CONVERSATIONS[kind]
    large = [
        body_of(model="m", **{field: said}),
        body_of(model="m", **{field: said[::-1]}),
        body_of(model="m", **{field: [{"role": "user", "content": text}]}),
        body_of(model="m", tools=[text], **{field: said[:1]}),
        body_of(model="m", other=text, **{field: said[:1]}),
    ]
    assert all(len(body) > LARGE_BYTES for body in large)
    are_equal_where_they_cover_the_same(kind, *large, body_of(model="m", **{field: said[:1]}))


@pytest.mark.parametrize("kind", list(CONVERSATIONS))
def test_a_crowded_conversation_has_samples_like_others(kind):
    crowd = [{"role": "user", "content": ["x"]}] * 60_000
    body = body_of(model="m", **{CONVERSATIONS[kind]: crowd})
    more = body_of(model="m", **{CONVERSATIONS[kind]: [*crowd, {"role": "user"}]})
    are_equal_where_they_cover_the_same(kind, body, more)
    shared = sum(a == b for a, b in zip(hashes(kind, body), hashes(kind, more), strict=True))
    assert shared == len(hashes(kind, body)) == BLOCKS_MAX


def test_a_crowded_system_text_is_left_out():
    crowd = [{"text": "x"}] * 150_000
    body = body_of(model="m", system=crowd, messages=[{"role": "user", "content": words(500)}])
    without = body_of(model="m", messages=[{"role": "user", "content": words(500)}])
    assert prompt(Kind.MESSAGES, body).samples == prompt(Kind.MESSAGES, without).samples


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
    except BadRequest:
        with pytest.raises(BadRequest):
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
