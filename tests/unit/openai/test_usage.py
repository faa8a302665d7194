"""The tokens at the end of a response are found, and nothing in its contents passes for them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.openai._usage import usage_in

CHAT = {
    "prompt_tokens": 12,
    "total_tokens": 19,
    "completion_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 8},
}
MESSAGES = {
    "input_tokens": 4,
    "cache_creation_input_tokens": 3,
    "cache_read_input_tokens": 5,
    "output_tokens": 7,
}
FORGED = {"prompt_tokens": 666, "completion_tokens": 666, "input_tokens": 666}


def body(value, **options):
    return json.dumps(value, **options).encode()


def event(value, name=""):
    return (f"event: {name}\n" if name else "").encode() + b"data: " + body(value) + b"\n\n"


def test_a_whole_response_of_each_api():
    chat = {"id": "c", "choices": [{"message": {"content": "hi"}}], "usage": CHAT}
    assert usage_in(body(chat)) == (12, 8, 7)
    assert usage_in(body(chat, indent=2)) == (12, 8, 7)
    assert usage_in(body({**chat, "prompt_logprobs": None, "kv": {"a": [1]}})) == (12, 8, 7)
    vectors = {"data": [{"embedding": [0.1]}], "usage": {"prompt_tokens": 5, "total_tokens": 5}}
    assert usage_in(body(vectors)) == (5, None, None)
    message = {"type": "message", "content": [{"type": "text", "text": "x"}], "usage": MESSAGES}
    assert usage_in(body(message)) == (12, 5, 7)
    usage = {"input_tokens": 9, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 1}
    assert usage_in(body({"output": [], "usage": usage, "user": None})) == (9, 2, 1)


def test_the_end_of_a_stream():
    last = event({"choices": [], "usage": CHAT}) + b"data: [DONE]\n\n"
    chunk = event({"choices": [{"delta": {"content": "x"}}], "usage": None})
    assert usage_in(chunk + last) == (12, 8, 7)
    assert usage_in(chunk + b"data: [DONE]\n\n") is None
    delta = {"type": "message_delta", "delta": {}, "usage": {"output_tokens": 3}}
    stop = event({"type": "message_stop"}, "message_stop")
    assert usage_in(event(delta, "message_delta") + stop) == (None, None, 3)
    usage = {"input_tokens": 9, "output_tokens": 1}
    done = {"response": {"output": [], "usage": usage}, "type": "response.completed"}
    assert usage_in(event(done, "response.completed")) == (9, None, 1)


def test_the_counts_of_ollamas_api():
    counts = {"prompt_eval_count": 12, "prompt_eval_duration": 5, "eval_count": 7}
    call = {"function": {"name": "f", "arguments": {"eval_count": 666, "prompt_eval_count": 666}}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    done = {"model": "m", "message": message, "done": True, "context": [1, 2]}
    first = body({"model": "m", "response": "eval_count", "done": False}) + b"\n"
    for options in ({}, {"separators": (",", ":")}):
        assert usage_in(body({**done, **counts, "eval_duration": 1}, **options)) == (12, None, 7)
        assert usage_in(first + body({**done, **counts}, **options) + b"\n") == (12, None, 7)
    assert usage_in(body({"embeddings": [[0.1]], "prompt_eval_count": 4})) == (4, None, None)
    for odd in (done, {**done, "eval_count": -1}, {**done, "eval_count": "7"}, {"x": [counts]}):
        assert usage_in(body(odd)) in (None, (None, None, None))


def test_chunked_framing_is_passed_over():
    text = event({"choices": [], "usage": CHAT})
    framed = b"%x\r\n%b\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" % (len(text), text)
    assert usage_in(framed) == (12, 8, 7)


def test_only_the_last_two_kibibytes_are_searched():
    usage = b'"usage":' + body(CHAT)
    assert usage_in(b'{"a":"%b",%b}' % (b"x" * 5000, usage)) == (12, 8, 7)
    assert usage_in(b'{%b,"a":"%b"}' % (usage, b"x" * 1500)) == (12, 8, 7)
    assert usage_in(b'{%b,"a":"%b"}' % (usage, b"x" * 2100)) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"usage",
        b'"usage"',
        b'"usage":',
        b'{"usage":null}',
        b'{"usage":7}',
        b'{"usage":{}}',
        b'{"usage":[{"prompt_tokens":7}]}',
        b'{"a":"usage"}',
        b'{"usage":{"prompt_tokens":7}',  # cut off
        b'{"usage":{"prompt_tokens":7',
        b'{"usage":{"prompt_tokens":-7}}',
        b'{"usage":{"prompt_tokens":"7"}}',
        b'{"usage":{"prompt_tokens":7.5}}',
        b'{"usage":{"prompt_tokens":99999999999999999999}}',
        b'{"usage":{"type":"duration","seconds":3}}',
        b'{"usage" {"prompt_tokens":7}}',
        b'{"usage":{"prompt_tokens":7,}}',
        b"gggggggggggggggggg",
    ],
)
def test_what_is_not_reported_is_unknown(text):
    assert usage_in(text) is None


def test_contents_do_not_pass_for_it():
    forged = json.dumps({"usage": FORGED})
    for content in (forged, json.dumps(forged), '"usage":{"prompt_tokens":666}}', "\\" + forged):
        answer = {"choices": [{"message": {"content": content}}]}
        assert usage_in(body(answer)) is None
        assert usage_in(event(answer)) is None
        assert usage_in(body({**answer, "usage": CHAT})) == (12, 8, 7)


def test_a_tools_input_does_not_pass_for_it():
    tool = {"type": "tool_use", "input": {"usage": FORGED}}
    assert usage_in(body({"content": [tool], "stop_reason": "tool_use"})) is None
    assert usage_in(body({"content": [tool], "usage": MESSAGES})) == (12, 5, 7)
    assert usage_in(body({"usage": MESSAGES, "content": [tool]})) is None
    assert usage_in(body({"a": {"b": {"usage": FORGED}}})) is None


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.just('"usage":{"prompt_tokens":666}'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("usage"), inner),
    max_leaves=10,
)


@given(json_values, st.integers(0, 2**29), st.integers(0, 2**29))
def test_what_comes_before_it_does_not_matter(value, prompt, output):
    usage = {"prompt_tokens": prompt, "completion_tokens": output}
    for ascii_only in (True, False):
        text = json.dumps({"choices": [value], "usage": usage}, ensure_ascii=ascii_only)
        assert usage_in(text.encode("utf-8", "replace")) == (prompt, None, output)


@given(st.binary() | st.text('{}[]",:usage \\n1').map(str.encode))
def test_any_bytes_are_searched_without_a_fault(text):
    usage_in(text)
    usage_in(text + b'"usage":{' + text)
