"""The format of messages."""

import base64
import json

import pytest

from kubeai.messenger.message import (
    HEADER_MAX_CHARS,
    NULL,
    Answer,
    Malformed,
    read_request,
    write_response,
)
from kubeai.openai.routes import Kind, route_table

JSON = {"content-type": "application/json"}


def message(**fields):
    return json.dumps({"body": {"model": "m"}, **fields}).encode()


def refused(body, attributes=None):
    with pytest.raises(Malformed) as caught:
        read_request(body, attributes or {})
    answer = json.loads(write_response(caught.value.metadata, caught.value.answer))
    assert answer["status_code"] == caught.value.answer.status
    return answer


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        (None, "/v1/completions"),
        ("", "/v1/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("v1/embeddings", "/v1/embeddings"),
        ("/openai/v1/rerank", "/openai/v1/rerank"),
        ("/v1/completions?timeout=3", "/v1/completions?timeout=3"),
    ],
)
def test_the_path_is_that_of_the_request_and_completions_by_default(path, sent):
    assert read_request(message(path=path), {}).path == sent


def test_every_route_with_a_json_body_can_be_asked_for_by_message():
    for path, kind in route_table.items():
        body = message(path=path, body={"model": "m", "stream": False})
        if kind.is_json:
            assert read_request(body, {}).path == path
        else:
            assert refused(body)["status_code"] == 400
    assert route_table["/openai/v1/audio/transcriptions"] is Kind.TRANSCRIPTIONS


def test_the_body_is_sent_byte_for_byte():
    body = b'{ "model":"m",  "n": 12345678901234567890123, "x": 1.10, "x": "\\u00e9" }'
    request = read_request(b'{"body": ' + body + b', "metadata": 1}', {})
    assert request.body == body


@pytest.mark.parametrize(
    "metadata",
    [
        b'{"z":1,"a":{"b":12345678901234567890123,"c":1.10}}',
        b'[1, "two", null]',
        b'"text \\u00e9"',
        b"9007199254740993",
        b"null",
    ],
)
def test_metadata_comes_back_as_it_was(metadata):
    request = read_request(b'{"metadata":' + metadata + b',"body":{"model":"m"}}', {})
    response = write_response(request.metadata, Answer(200, JSON, b'{"ok": true}'))
    assert response == b'{"metadata":' + metadata + b',"status_code":200,"body":{"ok": true}}'


def test_missing_metadata_is_null():
    response = write_response(read_request(message(), {}).metadata, Answer(200, JSON, b"1"))
    assert json.loads(response)["metadata"] is None


@pytest.mark.parametrize(
    "body", [b"", b"hello", b"[]", b"null", b'{"body":{}', b'{"a":1}x', b"\xff", b"[" * 100_000]
)
def test_a_message_that_is_no_json_object_gets_an_answer_that_says_so(body):
    answer = refused(body)
    assert (answer["status_code"], answer["metadata"]) == (400, None)
    assert answer["body"]["error"]["type"] == "invalid_request_error"
    assert "must be a JSON object" in answer["body"]["error"]["message"]


def test_deep_nesting_is_reported_as_such():
    answer = refused(b'{"x":' + b"[" * 2_000_000)  # more than the stack holds
    assert answer["body"]["error"]["message"].endswith(": nested too deeply")


@pytest.mark.parametrize(
    "rest",
    [
        b'"path":3,"body":{}',
        b'"path":"/v1/nope","body":{}',
        b'"path":"/v1/completions"',
        b'"body":{"prompt":"\\ud83d"}',
        b'"body":{"prompt":"\xff"}',
    ],
)
def test_a_malformed_message_is_answered_with_its_metadata(rest):
    answer = refused(b'{"metadata":{"job":[1,2]},' + rest + b"}")
    assert answer["metadata"] == {"job": [1, 2]}
    assert answer["status_code"] in (400, 404)


def test_metadata_that_is_not_utf8_is_not_passed_on():
    answer = refused(b'{"metadata":"\xff","body":{}}')
    assert (answer["status_code"], answer["metadata"]) == (400, None)


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("/v1/nope", 404, "not an inference route"),
        ("/v1/completions/", 404, "not an inference route"),
        ("/v1/completions x", 404, "not an inference route"),
        ("/v1/completions?a=b c\r\nX: y", 404, "not an inference route"),
        ("http://elsewhere/v1/completions", 404, "not an inference route"),
        ("/v1/models", 400, "not for POST"),
        ("/v1/realtime", 400, "not for POST"),
        ("/v1/responses/resp_1", 400, "not for POST"),
        ("/v1/responses/resp_1/cancel", 400, "not for inference"),
        ("/v1/audio/transcriptions", 400, "takes a form"),
    ],
)
def test_other_paths_are_refused_with_the_reason(path, status, reason):
    answer = refused(message(path=path))
    assert answer["status_code"] == status
    assert reason in answer["body"]["error"]["message"]


def test_errors_have_the_format_of_the_api_that_was_asked_for():
    asked = {"model": "m", "stream": True}
    assert refused(message(path="/v1/messages", body=asked))["body"]["type"] == "error"
    assert isinstance(refused(message(path="/api/chat", body=asked))["body"]["error"], str)


def test_streams_are_refused_and_ollama_must_be_asked_for_none():
    assert "stream" in refused(message(body={"stream": True}))["body"]["error"]["message"]
    assert read_request(message(body={"stream": False}), {})
    assert "stream" in refused(message(path="/api/generate"))["body"]["error"]
    assert read_request(message(path="/api/generate", body={"stream": False}), {})
    assert read_request(message(path="/api/embed"), {})


def test_a_body_that_is_no_object_is_left_to_the_gateway():
    assert read_request(message(body="text"), {}).body == b'"text"'


def test_selectors_and_trace_context_become_headers():
    attributes = {"X-Label-Selector": "tier=batch", "traceparent": "00-1-2-01", "Other": "x"}
    headers = read_request(message(), attributes).headers
    assert headers == {"x-label-selector": "tier=batch", "traceparent": "00-1-2-01"}


@pytest.mark.parametrize("value", ["a\r\nb: c", "é", "x" * (HEADER_MAX_CHARS + 1)])
def test_an_attribute_that_is_no_header_is_refused(value):
    answer = refused(message(metadata=5), {"x-label-selector": value})
    assert (answer["status_code"], answer["metadata"]) == (400, 5)


def test_text_becomes_a_string_and_says_what_it_was():
    response = write_response(NULL, Answer(502, {"content-type": "text/plain"}, b"no \xc3\xa9"))
    assert json.loads(response) == {
        "metadata": None,
        "status_code": 502,
        "body": "no é",
        "content_type": "text/plain",
    }


def test_binary_bodies_are_in_base64():
    audio = bytes(range(256))
    response = json.loads(write_response(NULL, Answer(200, {"content-type": "audio/mpeg"}, audio)))
    assert base64.b64decode(response["body"]) == audio
    assert (response["encoding"], response["content_type"]) == ("base64", "audio/mpeg")


@pytest.mark.parametrize("body", [b'{"a": NaN}', b'{"a":1}\n{"a":2}', b'{"a":1', b"", b"data: {}"])
def test_every_response_is_valid_json(body):
    response = write_response(NULL, Answer(200, JSON, body))
    assert json.loads(response)["body"] == body.decode()


def test_json_with_invalid_utf8_is_binary():
    response = json.loads(write_response(NULL, Answer(200, JSON, b'{"a":"\xff"}')))
    assert response["encoding"] == "base64"
