"""Reading requests: bodies, hash keys, the replacement of the model."""

import json
import time
import tracemalloc

import mmh3
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples import some
from kubeai.openai.errors import ErrorResponse
from kubeai.openai.request import body_for, named, read, split_model
from kubeai.openai.routes import Kind

KEYS_MAX_COUNT = 1000


def chat(body, kind=Kind.CHAT):
    return read(kind, body if isinstance(body, bytes) else json.dumps(body).encode())


def refused(body, kind=Kind.CHAT):
    with pytest.raises(ErrorResponse) as caught:
        chat(body, kind)
    assert caught.value.status == 400
    return caught.value


# -- bodies ----------------------------------------------------------------------------------------


def test_a_body_is_parsed_into_model_adapter_and_stream():
    request = chat({"model": "llama_my_lora", "stream": True, "messages": []})
    assert (request.model, request.name, request.adapter, request.stream) == (
        "llama_my_lora",
        "llama",
        "my_lora",
        True,
    )
    request = chat({"stream": False, "model": "llama"})
    assert (request.name, request.adapter, request.stream) == ("llama", None, False)
    assert split_model("m_") == ("m", "")
    assert named(Kind.TRANSCRIPTIONS, "w_a").adapter == "a"


@pytest.mark.parametrize(
    ("model", "name", "adapter"),
    [
        ("m:latest", "m", None),
        ("m", "m", None),
        ("m_a:latest", "m", "a"),
        ("m:7b", "m:7b", None),
        ("m:latest:latest", "m:latest", None),
        (":latest", ":latest", None),
        ("latest", "latest", None),
    ],
)
def test_the_tag_latest_is_no_part_of_a_name_in_ollamas_api(model, name, adapter):
    request = chat({"model": model}, Kind.OLLAMA_CHAT)
    assert (request.name, request.adapter) == (name, adapter)
    assert chat({"model": model}).model == model


@pytest.mark.parametrize(
    "body",
    [{}, {"messages": []}, {"model": None}, {"model": 5}, {"model": ""}, {"model": ["m"]},
     {"Model": "m"}, {"x": {"model": "m"}}, {"model": {"model": "m"}}],
)  # fmt: skip
def test_a_missing_or_non_string_model_is_reported(body):
    assert refused(body).param == "model"


@pytest.mark.parametrize(
    "body",
    [
        {"stop": "x"},
        {"stop": ["x", "y"]},
        {"stream": "yes"},
        {"messages": None},
        {"messages": "hello"},
        {"messages": [None]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}]},
        {"messages": [{"role": ["user"], "content": 7}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}, 3]}]},
        {"model_extra": {"model": "x"}, "deep": [[{"model": "y"}]], "MODELS": 1},
    ],
)
def test_other_fields_are_left_to_the_engine(body):
    request = chat({"model": "m", **body})
    assert request.model == "m"
    assert request.key(100) >= 0


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("empty", b""),
        ("a list", b'[{"model":"m"}]'),
        ("a string", b'"model"'),
        ("no JSON", b"model=m"),
        ("cut", b'{"model":"m"'),
        ("trailing text", b'{"model":"m"} {"model":"n"}'),
        ("trailing comma", b'{"model":"m",}'),
        ("NaN", b'{"model":"m","x":NaN}'),
        ("single quotes", b"{'model':'m'}"),
        ("comment", b'{"model":"m"/*,"model":"n"*/}'),
        ("duplicate", b'{"model":"m","model":"n"}'),
        ("duplicate, the same", b'{"model":"m","x":1,"model":"m"}'),
        ("duplicate, escaped", b'{"model":"m","m\\u006fdel":"n"}'),
        ("duplicate, other case", b'{"model":"m","Model":"n"}'),
        ("duplicate, escaped case", b'{"\\u004dODEL":"n","model":"m"}'),
        ("byte order mark", b'\xef\xbb\xbf{"model":"m"}'),
        ("UTF-16", '{"model":"m"}'.encode("utf-16")),
        ("UTF-16 without a mark", '{"model":"m"}'.encode("utf-16-le")),
        ("UTF-32", '{"model":"m"}'.encode("utf-32-be")),
        ("NUL after", b'{"model":"m"}\0'),
        ("NUL in a string", b'{"model":"m\0"}'),
        ("NUL in another string", b'{"model":"m","x":"\0"}'),
        ("NUL between", b'{"model":\0"m"}'),
        ("lone surrogate", b'{"model":"m\\ud800"}'),
        ("lone surrogate in a key", b'{"\\udc00":1,"model":"m"}'),
        ("lone surrogate elsewhere", b'{"model":"m","messages":[{"content":"\\ud800 "}]}'),
        ("invalid UTF-8 in the model", b'{"model":"m\xff"}'),
        ("invalid UTF-8 in a key", b'{"mod\xffel":"n","model":"m"}'),
        ("invalid UTF-8 elsewhere", b'{"model":"m","x":["\xe2\x28"]}'),
        ("overlong UTF-8", b'{"model":"m","\xc1\xadodel":"n"}'),
        ("surrogate in UTF-8", b'{"model":"m","x":"\xed\xa0\x80"}'),
        ("UTF-8 that swallows a quote", b'{"x":"\xf0","model":"m"}'),
        ("deep nesting", b'{"model":"m","x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        ("deep nesting, open", b'{"model":"m","x":' + b'{"a":' * 100_000),
        ("a control character", b'{"model":"m","x":"\n"}'),
        ("a bad escape", b'{"model":"m","x":"\\x41"}'),
        ("a bad number", b'{"model":"m","x":01}'),
    ],
)
def test_a_body_that_parsers_may_read_differently_is_rejected(name, body):
    assert refused(body).message


def test_an_escaped_key_equals_the_plain_key():
    assert chat(b'{"m\\u006fdel":"a\\u0062"}').model == "ab"
    assert chat(b'{"model":"a\\u0000"}').model == "a\0"


@pytest.mark.parametrize(
    ("value", "read_as"),
    [
        ('"resp_1"', "resp_1"),
        (r'"\u0072esp_1"', "resp_1"),
        ('""', None),
        ("null", None),
        ("1", None),
    ],
)
def test_a_request_for_responses_says_which_one_it_continues(value, read_as):
    body = f'{{"previous_response_id": "resp_0", "model": "m", "previous_response_id": {value}}}'
    assert chat(body.encode(), Kind.RESPONSES).previous_response_id == read_as
    assert chat(body.encode(), Kind.CHAT).previous_response_id is None
    assert chat(b'{"model": "m"}', Kind.RESPONSES).previous_response_id is None


def test_too_many_keys_are_rejected():
    many = {f"k{n}": n for n in range(KEYS_MAX_COUNT - 1)}
    assert chat({**many, "model": "m"}).model == "m"
    assert "keys" in refused({**many, "model": "m", "one more": 1}).message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["model", "messages", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)
members = st.lists(
    st.tuples(
        st.sampled_from(["model", "Model", "m\\u006fdel", "stream", "messages", "x", "mod", "é"]),
        json_values.map(json.dumps)
        | st.sampled_from(['"m"', '"m_a"', '"\\ud83d\\ude00"', '"\\udead"', "NaN", "{}", "1e999"]),
    ),
    max_size=5,
)
spaces = st.sampled_from(["", " ", "\n", "\t ", "\ufeff"])


@st.composite
def bodies(draw):
    space = draw(spaces)
    text = ",".join(f'{space}"{key}"{space}:{space}{value}' for key, value in draw(members))
    body = f"{space}{{{text}{space}}}{draw(spaces)}".encode(
        draw(st.sampled_from(["utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig"]))
    )
    if draw(st.booleans()):
        at = draw(st.integers(0, len(body)))
        cut = draw(st.integers(0, 3))
        body = body[:at] + draw(st.binary(max_size=3)) + body[at + cut :]
    return body


@settings(max_examples=some(200))
@given(bodies() | st.binary(max_size=40))
@example(b'{"model":"m","model":"n"}')
@example(b'{"model":"m"}')
def test_the_gateway_and_a_json_reader_agree_or_the_client_gets_400(body):
    for kind in (Kind.CHAT, Kind.RESPONSES):
        try:
            request = read(kind, body)
        except ErrorResponse as error:
            assert error.status == 400  # noqa: PT017
            continue
        pairs = json.loads(body, object_pairs_hook=list)
        assert [value for key, value in pairs if key.lower() == "model"] == [request.model]
        assert json.loads(body)["model"] == request.model
        replaced = request.with_model('"new \\"é\\""'.encode())
        assert json.loads(replaced) == {**json.loads(body), "model": 'new "é"'}
        assert request.key(10) == request.key(10)


# -- replacing the model ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"m_a"}', b'{"model":"a"}'),
        (b' {\n "x" : 1.0 ,\t"mod\\u0065l" : "m_\\u0061" } \n',
         b' {\n "x" : 1.0 ,\t"mod\\u0065l" : "a" } \n'),
        (b'{"x":{"model":"m_a"},"model":"m_a","y":[{"model":"m_a"}]}',
         b'{"x":{"model":"m_a"},"model":"a","y":[{"model":"m_a"}]}'),
        (b'{"x":"\\"model\\":\\"m_a\\"","\\"model":",\\"model\\":1","model":"m_a"}',
         b'{"x":"\\"model\\":\\"m_a\\"","\\"model":",\\"model\\":1","model":"a"}'),
        (b'{"\\\\":"}","a":"\\\\","model":"m_a","n":1e5}',
         b'{"\\\\":"}","a":"\\\\","model":"a","n":1e5}'),
        ('{"é😀":"ü","model":"m_a","z":"😀"}'.encode(),
         '{"é😀":"ü","model":"a","z":"😀"}'.encode()),
    ],
)  # fmt: skip
def test_replacing_the_model_changes_only_its_value(before, after):
    assert chat(before).adapter == "a"
    assert body_for(chat(before), before) == after


def test_a_request_without_a_body_has_no_model_to_replace():
    with pytest.raises(ValueError, match="no JSON body"):
        named(Kind.TRANSCRIPTIONS, "m_a").with_model(b'"a"')


# -- hash keys -------------------------------------------------------------------------------------


def key_of(body, kind=Kind.CHAT, adapter=None, n=100):
    model = "m" if adapter is None else f"m_{adapter}"
    return chat({"model": model, **body}, kind).key(n)


def conversation(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_the_hash_key_is_the_same_in_every_process_and_release():
    key = key_of(conversation(("system", "Be brief."), ("user", "Hello")), adapter="fin")
    system = mmh3.hash64(b"Be brief.", signed=False)[0]
    material = system.to_bytes(8, "little") + b"fin\0Hello"
    assert key == mmh3.hash64(material, signed=False)[0]
    assert key == 14755248009380696229


def test_a_second_turn_has_the_hash_key_of_the_first():
    first = conversation(("system", "S"), ("user", "What is a ring?"))
    second = conversation(
        ("system", "S"), ("user", "What is a ring?"), ("assistant", "A…"), ("user", "And then?")
    )
    assert key_of(first) == key_of(second)


def test_system_prompts_of_any_length_separate_tenants():
    def of(system):
        return key_of(conversation(("system", "x" * 500 + system), ("user", "hi")))

    assert of("a") != of("b")
    roles = [key_of(conversation((r, "S"), ("user", "hi"))) for r in ("system", "developer")]
    assert roles[0] == roles[1]


def test_adapters_have_their_own_hash_keys():
    body = conversation(("user", "hi"))
    assert len({key_of(body), key_of(body, adapter="a"), key_of(body, adapter="b")}) == 3


def test_only_code_points_within_the_prefix_length_count():
    def of(text, n):
        return key_of(conversation(("user", text)), n=n)

    assert of("😀😀a", 2) == of("😀😀b", 2)
    assert of("😀😀a", 3) != of("😀😀b", 3)
    assert of("", 0) == of("anything", 0)


@given(st.text(max_size=30), st.integers(0, 12), st.booleans(), st.sampled_from([0, 1000]))
def test_a_long_text_is_truncated_at_the_same_code_point_as_in_python(text, n, ascii_only, more):
    text = text.encode("utf-8", "replace").decode()
    body = {"model": "m", **conversation(("user", text + '\U0001f600\\"' * more))}
    short = {"model": "m", **conversation(("user", (text + '\U0001f600\\"' * more)[:n]))}
    long_key = chat(json.dumps(body, ensure_ascii=ascii_only).encode()).key(n)
    assert long_key == chat(short).key(n)


def test_text_parts_are_joined():
    parts = [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text", "text": "hi"}]
    assert key_of(conversation(("user", parts))) == key_of(conversation(("user", "hi")))
    assert key_of(conversation(("system", [{"type": "text", "text": "S"}]), ("user", "x"))) == (
        key_of(conversation(("system", "S"), ("user", "x")))
    )


def test_a_conversation_has_the_same_hash_key_in_every_api():
    expected = key_of(conversation(("system", "S"), ("user", "hi")))
    user = [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}]
    for kind, body in [
        (Kind.RESPONSES, {"instructions": "S", "input": "hi"}),
        (Kind.RESPONSES, {"instructions": "S", "input": user}),
        (Kind.RESPONSES, {"input": [{"role": "developer", "content": "S"}, *user]}),
        (Kind.MESSAGES, {"system": "S", "messages": user}),
        (Kind.MESSAGES, {"system": [{"type": "text", "text": "S"}], "messages": user}),
    ]:
        assert key_of(body, kind) == expected, (kind, body)


@pytest.mark.parametrize(
    ("kind", "name"), [(Kind.COMPLETIONS, "prompt"), (Kind.EMBEDDINGS, "input")]
)
def test_the_hash_key_is_taken_from_the_first_input(kind, name):
    def of(value, n=100):
        return key_of({name: value}, kind, n=n)

    assert of("hello") == of(["hello"]) == of(["hello", "other"])
    assert of("hello") != of("other")
    tokens = list(range(50_000, 50_300))
    assert of(tokens) == of([tokens, [1]]) == of([*tokens[:100], 7])
    assert of(tokens) != of([1, *tokens])
    assert of(tokens, n=1) == of([50_000], n=1)
    assert of([]) == of([[]]) == of("") == of({"odd": 1})


@given(st.text(max_size=20), st.integers(0, 30), st.booleans(), st.integers(0, 300))
def test_the_first_of_a_list_is_truncated_like_a_string(text, n, ascii_only, more):
    text = (text + '\U0001f600\\"' * more).encode("utf-8", "replace").decode()

    def of(value, indent=None):
        body = json.dumps({"model": "m", "input": value}, ensure_ascii=ascii_only, indent=indent)
        return read(Kind.EMBEDDINGS, body.encode()).key(n)

    assert of(text) == of([text, "other"]) == of([text], indent=2) == of(text[:n])


def test_the_hash_key_of_a_rerank_is_its_query():
    def of(**body):
        return key_of(body, Kind.RERANK)

    assert of(query="q", documents=["a"]) == of(query="q", documents=["b"])
    assert of(query="q", documents=["a"]) != of(query="r", documents=["a"])


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Kind.CHAT, b'{"model":"m","messages":[' + b"{}," * 5_000_000 + b"{}]}"),
        (Kind.CHAT, b'{"model":"m","messages":[{"role":"user","content":['
         + b'"",' * 5_000_000 + b'""]}]}'),
        (Kind.MESSAGES, b'{"model":"m","system":[' + b'"",' * 5_000_000 + b'""]}'),
        (Kind.EMBEDDINGS, b'{"model":"m","input":[' + b'"",' * 5_000_000 + b'""]}'),
        (Kind.COMPLETIONS, b'{"model":"m","prompt":[' + b"1," * 5_000_000 + b"1]}"),
    ],
)  # fmt: skip
def test_a_body_with_very_many_parts_uses_little_memory(kind, body):
    tracemalloc.start()
    read(kind, body).key(100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(body)


def test_a_conversation_with_very_many_parts_keeps_its_hash_key():
    turns = [("user", [{"type": "text", "text": f"part {n}"} for n in range(40_000)])]
    first, second = conversation(*turns), conversation(*turns, ("user", "more"))
    assert key_of(first) == key_of(second) != key_of(conversation(("user", "part 0")))


def test_megabytes_are_parsed_in_milliseconds():
    text = "The quick brown fox “jumps” over \\ the lazy dog.\n" * 100_000
    body = json.dumps({"messages": [{"role": "user", "content": text}], "model": "m"}).encode()
    assert len(body) > 5_000_000
    best = min(_seconds(lambda: chat(body).key(100)) for _ in range(5))
    assert best < 0.1, "5 MB must not stall a loop (a slow machine takes some 20 ms)"


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
