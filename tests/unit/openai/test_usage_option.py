"""A stream's request asks for its usage, unless its client does; the rest of it is unchanged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.openai._usage_option import asking_for_usage
from kubeai.openai.request import SHAPES, body_for, json_string, read
from kubeai.openai.routes import Kind

OPTION = b'"stream_options":{"include_usage":true}'


def asked(body: bytes, kind: Kind = Kind.CHAT) -> bytes | None:
    return asking_for_usage(read(kind, body), body)


@pytest.mark.parametrize("kind", [Kind.CHAT, Kind.COMPLETIONS])
def test_a_stream_is_asked_for_its_usage(kind):
    body = b' { "model":"m", "stream": true }\n'
    assert asked(body, kind) == b' {%b, "model":"m", "stream": true }\n' % OPTION


def test_other_apis_report_their_usage_anyway():
    for kind in set(SHAPES) - {Kind.CHAT, Kind.COMPLETIONS}:
        assert asked(b'{"model":"m","stream":true}', kind) is None


@pytest.mark.parametrize(
    "stream",
    # An engine that reads strings as false rejects ``stream_options`` beside them.
    ["false", "null", "0", "0.0", "-0", '""', "[]", "{}", '"False"', '"f"', '"no"', '"off"', '"0"'],
)
def test_a_request_that_does_not_stream_is_unchanged(stream):
    assert asked(b'{"model":"m","stream":%b}' % stream.encode()) is None
    assert asked(b'{"model":"m"}') is None


@pytest.mark.parametrize("stream", ["1", "0.5", '"true"', '"on"', '"ON"', '"1"', '"Y"'])
def test_a_stream_that_only_some_engines_recognise_is_asked(stream):
    assert OPTION in asked(b'{"model":"m","stream":%b}' % stream.encode())


@pytest.mark.parametrize("usage", ["true", "1", '"true"'])
def test_a_client_that_asks_itself_gets_what_it_asked_for(usage):
    options = b'{"continuous_usage_stats":true,"include_usage":%b}' % usage.encode()
    assert asked(b'{"model":"m","stream":true,"stream_options":%b}' % options) is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("null", '{"include_usage":true}'),
        ("5", '{"include_usage":true}'),
        ('["include_usage"]', '{"include_usage":true}'),
        ("{}", '{"include_usage":true}'),
        ("{ }", '{"include_usage":true }'),
        ('{"include_usage":false}', '{"include_usage":true}'),
        ('{"include_usage": null , "x":1}', '{"include_usage": true , "x":1}'),
        ('{"include_usage":0}', '{"include_usage":true}'),
        ('{"x":{"include_usage":true}}', '{"include_usage":true,"x":{"include_usage":true}}'),
        (
            '{"continuous_usage_stats":true}',
            '{"include_usage":true,"continuous_usage_stats":false}',
        ),
        (
            '{"continuous_usage_stats":true,"include_usage":false}',
            '{"continuous_usage_stats":false,"include_usage":true}',
        ),
        (
            '{"include_usage":false,"continuous_usage_stats":1}',
            '{"include_usage":true,"continuous_usage_stats":false}',
        ),
        (
            '{"include_usage":true,"include_usage":false}',
            '{"include_usage":true,"include_usage":true}',
        ),
        ('{"include_usage":false,"include_usage":true}', None),
        ('{"include\\u005fusage":false}', '{"include\\u005fusage":true}'),
    ],
)
def test_the_clients_other_options_are_kept(options, expected):
    template = '{"stream":true,"stream_options":%s,"model":"m"}'
    got = asked((template % options).encode())
    assert got == (None if expected is None else (template % expected).encode())


def test_with_the_model_replaced_both_changes_are_made():
    for order in (
        b'{"model":"m_longer-adapter","stream":true,"stream_options":{"include_usage":false}}',
        b'{"stream_options":{"include_usage":false},"stream":true,"model":"m_longer-adapter"}',
        b'{"stream":true,"model":"m_longer-adapter"}',
    ):
        request = read(Kind.CHAT, order)
        for model in ("a", "a-much-longer-name-than-that-of-the-request"):
            payload = request.with_model(json_string(model))
            got = json.loads(asking_for_usage(request, payload))
            options = {"include_usage": True}
            assert got == {"model": model, "stream": True, "stream_options": options}
        assert json.loads(body_for(request, order))["model"] == "longer-adapter"


def test_a_large_body_is_asked_like_a_small_one():
    body = b'{"x":"%b","model":"m","stream":true}' % (b"x" * (3 << 20))
    assert asked(body) == b"{%b,%b" % (OPTION, body[1:])


SCALARS = st.none() | st.booleans() | st.integers(0, 3) | st.text(max_size=3)
NAMES = st.text(max_size=3)
JSON_VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=4,
)
OPTIONS = st.dictionaries(
    st.sampled_from(["include_usage", "continuous_usage_stats", "x"]), JSON_VALUES, max_size=3
)


def may_be_true(value: object) -> bool:
    if isinstance(value, str):
        return value[:1] in tuple("tTyY1") or value[:2].lower() == "on"
    return bool(value) and not isinstance(value, list | dict)


def oracle(body: dict) -> dict | None:
    """The body that is sent; None: the client's."""
    if not may_be_true(body.get("stream")):
        return None
    options = body.get("stream_options")
    if not isinstance(options, dict):
        return body | {"stream_options": {"include_usage": True}}
    if may_be_true(options.get("include_usage")):
        return None
    more = {"include_usage": True}
    if "continuous_usage_stats" in options:
        more["continuous_usage_stats"] = False
    return body | {"stream_options": options | more}


@given(
    st.fixed_dictionaries(
        {"model": st.sampled_from(["m", "model-with-name"])},
        optional={"stream": JSON_VALUES, "stream_options": JSON_VALUES | OPTIONS, "y": JSON_VALUES},
    ),
    st.randoms(),
    st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}]),
    st.sampled_from([None, "x", "another-and-longer-name"]),
)
def test_what_is_sent_is_what_an_oracle_says(body, random, options, model):
    members = list(body.items())
    random.shuffle(members)
    text = json.dumps(dict(members), **options).encode()
    request = read(Kind.CHAT, text)
    payload = text if model is None else request.with_model(json_string(model))
    got = asking_for_usage(request, payload)
    expected = oracle(body)
    if expected is not None and model is not None:
        expected["model"] = model
    assert (None if got is None else json.loads(got)) == expected
