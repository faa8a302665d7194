"""Random JSON, near-JSON and noise: the gateway and every JSON parser agree on its meaning.

Readers differ in which of two equal keys they take, in whether ``Model`` is ``model``, and in what
they let pass. A body that the gateway takes means the same to all of them.
"""

import json

import pytest
from fuzz.machine import CORPUS, EXAMPLES, corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_oracle import hash_key, parse

from kubeai.openai.errors import ErrorResponse
from kubeai.openai.request import SHAPES, InferenceRequest, read
from kubeai.openai.routes import Kind

STORED = corpus("bodies")
KINDS = [kind for kind in Kind if kind.is_json]
STREAMED_BY_DEFAULT = (Kind.OLLAMA_CHAT, Kind.OLLAMA_GENERATE)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8"), max_size=8),
    st.sampled_from(["m", "m_x", "model", '"model":"no"', "\\", "é\U0001f600"]),
)
KEYS = ["model", "Model", "stream", "messages", "prompt", "input", "role", "content", "text", "a"]
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)
texts = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=150),
    st.lists(
        st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=60)}), max_size=3
    ),
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts}
    ),
    max_size=4,
)
asked = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", "m_x", "é", "a/b"])},
    optional={
        "messages": messages,
        "system": texts,
        "instructions": st.text(max_size=20),
        "prompt": st.text(max_size=150) | st.lists(st.text(max_size=150), min_size=1, max_size=3),
        "input": st.text(max_size=150) | messages,
        "query": st.text(max_size=20),
        "stream": st.booleans(),
        "x": values,
    },
)


@st.composite
def members(draw: st.DrawFn) -> bytes:
    """An object with its keys as they come: twice, escaped, in another case."""
    keys = [
        *(['"model"'] * 3),
        '"Model"',
        '"mod\\u0065l"',
        '"\\u006dodel"',
        '"model\\u0000"',
        '"stream"',
        '"prompt"',
    ]
    pairs = draw(st.lists(st.tuples(st.sampled_from(keys), values), max_size=4))
    dumped = [
        f"{key}:{json.dumps(value, ensure_ascii=draw(st.booleans()))}" for key, value in pairs
    ]
    space = draw(st.sampled_from(["", " ", "\n\t", "\x0c", "\ufeff"]))
    return (space + "{" + ("," + space).join(dumped) + "}" + space).encode("utf-8", "surrogatepass")


@st.composite
def changed(draw: st.DrawFn, body: bytes) -> bytes:
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(body)))
        gone = draw(st.integers(0, 2))
        new = draw(
            st.sampled_from([b"", b'"', b"\\", b"{", b"}", b",", b":", b"\0", b"\xff", b"1"])
        )
        body = body[:at] + new + body[at + gone :]
    return body


bodies = st.one_of(
    members(),
    members().flatmap(changed),
    asked.map(lambda body: json.dumps(body).encode()).flatmap(changed),
    st.sampled_from(STORED).flatmap(changed),
    st.binary(max_size=40),
)


def judge(kind: Kind, body: bytes) -> None:
    try:
        request = read(kind, body)
    except ErrorResponse as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert refusal.status == 400
        assert "error" in json.loads(refusal.body())
        with pytest.raises(ErrorResponse):
            parse(kind, body)
        return
    expected = parse(kind, body)
    for limit in (0, 1, 100):
        assert request.key(limit) == hash_key(request.adapter, expected, limit)
    readings: list[list[tuple[str, object]]] = []

    def keep(pairs: list[tuple[str, object]]) -> dict:
        readings.append(pairs)
        return dict(pairs)

    try:
        loaded = json.loads(body, object_pairs_hook=keep)
    except (ValueError, RecursionError):
        return  # the engine will say so
    top = readings[-1]
    named = [value for key, value in top if key.lower() == "model"]
    assert named == [loaded["model"]]
    assert request.model in (loaded["model"], without_tag(kind, loaded["model"]))
    streams = kind in STREAMED_BY_DEFAULT
    asked = loaded.get("stream", streams)
    assert request.stream == (asked is not False if streams else asked is True)
    judge_replaced(body, loaded, request)


def without_tag(kind: Kind, model: str) -> str:
    """What Ollama's clients mean by ``m:latest``."""
    return model.removesuffix(":latest") if kind.is_ollama else model


def judge_replaced(body: bytes, loaded: dict, request: InferenceRequest) -> None:
    new = 'x"\\é'
    encoded = json.dumps(new, ensure_ascii=False).encode()
    replaced = request.with_model(encoded)
    assert json.loads(replaced) == loaded | {"model": new}
    at = next(
        at
        for at in range(len(replaced))
        if replaced.startswith(encoded, at)
        and body.startswith(replaced[:at])
        and body.endswith(replaced[at + len(encoded) :])
    )
    rest = len(replaced) - at - len(encoded)
    assert without_tag(request.kind, json.loads(body[at : len(body) - rest])) == request.model


FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


@pytest.mark.timeout(0)
@FUZZ
@given(st.sampled_from(KINDS), bodies)
def test_every_reader_of_a_body_that_is_taken_agrees_with_the_gateway(kind, body):
    judge(kind, body)


@pytest.mark.timeout(0)
@FUZZ
@given(st.sampled_from(KINDS), asked, st.integers(0, 200))
def test_a_key_does_not_depend_on_how_the_body_was_written(kind, ask, limit):
    conversation = SHAPES[kind].conversation
    if conversation != b"input" and not isinstance(ask.get("input", ""), str):
        ask["input"] = ["one", "two"]  # messages are no input there
    first = read(kind, json.dumps(ask).encode())
    again = json.dumps(ask, ensure_ascii=False, indent=2, separators=(" , ", " : "))
    second = read(kind, again.encode("utf-8", "surrogatepass"))
    assert first.key(limit) == second.key(limit)


@pytest.mark.parametrize("name", sorted(path.name for path in (CORPUS / "bodies").iterdir()))
def test_stored_bodies_are_agreed_on_or_refused(name):
    for kind in KINDS:
        judge(kind, (CORPUS / "bodies" / name).read_bytes())
