"""The samples of a prompt, compared with an oracle that says which bytes a hash covers.

Two hashes must be equal exactly if they cover the same bytes.
"""

import itertools
import json
import random

import pytest
from fakes.prompts import CACHED, CONVERSATIONS, PARTS, agrees, body_of, chat, dump, prompt, words
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_oracle import ENDS, SYSTEMS

from examples import some
from kubeai._prompt import BLOCKS_MAX
from kubeai.openai.request import LARGE_BYTES, SHAPES
from kubeai.openai.routes import Kind


def hashes(kind, body):
    return [block for block, _ in prompt(kind, body).samples]


def are_equal_where_they_cover_the_same(kind: Kind, *bodies: bytes) -> None:
    covered: dict[int, tuple[bytes, ...]] = {}
    different: set[tuple[bytes, ...]] = set()
    for body in bodies:
        for block, covers in zip(hashes(kind, body), agrees(kind, body).covers, strict=True):
            assert covered.setdefault(block, covers) == covers, "different bytes, the same hash"
            different.add(covers)
    assert len(covered) == len(different), "the same bytes, different hashes"


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


@settings(max_examples=some(100))
@given(st.sampled_from(CACHED), sizes, st.booleans())
def test_a_token_is_four_bytes(kind, size, ascii_only):
    shape = SHAPES[kind]
    text = json.dumps(words(size // 2) + "é中🎉" * (size // 20), ensure_ascii=ascii_only).encode()
    body = body_of(model="m", **{(shape.conversation or shape.text).decode(): text})
    wanted = agrees(kind, body)
    assert wanted.tokens == len(text) // 4
    assert wanted.depths == [end // 4 for end in ENDS if end <= len(text)]


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
