"""The encoding of messages in SQS, which has to be the Go CDK's."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.brokers.sqs.messages import decode, encode, fifo_id, size_bytes

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
# Names that contain what an escape looks like.
NAMES = st.one_of(TEXTS, st.text(alphabet="_0x2f./é🙂", min_size=1, max_size=20))
ARN = "arn:aws:sns:us-east-1:123456789012:topic"


def attribute(value: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": value}


def envelope(**fields: object) -> str:
    return json.dumps(
        {
            "Type": "Notification",
            "MessageId": "1",
            "TopicArn": ARN,
            "Timestamp": "2026-01-01T00:00:00.000Z",
            "Message": '{"path": "/v1/completions"}',
            "MessageAttributes": {"a__0x2f__b": {"Type": "String", "Value": "c%20d"}},
            **fields,
        }
    )


@given(st.binary(min_size=1, max_size=50), st.dictionaries(NAMES, TEXTS, max_size=4))
def test_any_body_and_attributes_survive(body, attributes):
    attributes.pop("base64encoded", None)
    text, encoded = encode(body, attributes)
    assert decode({"Body": text, "MessageAttributes": encoded}, False, "") == (body, attributes)


@given(st.binary(min_size=1, max_size=50), st.dictionaries(NAMES, TEXTS, max_size=4))
def test_encoded_message_has_only_characters_that_sqs_takes(body, attributes):
    text, encoded = encode(body, attributes)
    for character in text:
        code = ord(character)
        assert (
            character in "\t\n\r"
            or 0x20 <= code <= 0xD7FF
            or 0xE000 <= code <= 0xFFFD
            or (code >= 0x10000)
        )
    for name in encoded:
        assert all(c.isascii() and (c.isalnum() or c in "_-.") for c in name)
        assert not name.startswith(".")
        assert ".." not in name


# What gocloud.dev/pubsub/awssnssqs v0.49 writes.
@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("request_message_id", "request_message_id"),
        ("a-b.c", "a-b.c"),
        (".a..b", "__0x2e__a.__0x2e__b"),
        ("a/b é", "a__0x2f__b__0x20____0xe9__"),
    ],
)
def test_names_are_escaped_as_by_the_go_cdk(name, encoded):
    assert list(encode(b"{}", {name: "x"})[1]) == [encoded]


def test_values_are_escaped_as_by_the_go_cdk():
    assert encode(b"{}", {"a": "b/c d:é=+"})[1]["a"]["StringValue"] == "b%2Fc%20d:%C3%A9=+"


def test_text_is_sent_as_it_is():
    assert encode('{"é": "🙂\\u0000"}'.encode(), {}) == ('{"é": "🙂\\u0000"}', {})


@pytest.mark.parametrize("body", [b"\xff\xfe", b"a\0b", "a\uffffb".encode()])
def test_what_sqs_does_not_take_as_text_is_base64(body):
    text, encoded = encode(body, {})
    assert text.isascii()
    assert encoded == {"base64encoded": attribute("true")}


def test_empty_values_are_omitted():
    assert encode(b"{}", {"a": "", "b": "c"})[1] == {"b": attribute("c")}


def test_body_that_is_marked_as_base64_and_is_not_stays_as_it_is():
    message = {"Body": "{}!", "MessageAttributes": {"base64encoded": attribute("true")}}
    assert decode(message, False, "") == (b"{}!", {})


def test_value_that_is_not_percent_encoded_stays_as_it_is():
    message = {
        "Body": "{}",
        "MessageAttributes": {"a": attribute("100%"), "b": {"BinaryValue": b""}},
    }
    assert decode(message, False, "") == (b"{}", {"a": "100%", "b": ""})


def test_surrogates_are_not_made_from_escapes():
    message = {"Body": "{}", "MessageAttributes": {"__0xd800__": attribute("a")}}
    assert decode(message, False, "") == (b"{}", {"__0xd800__": "a"})


def test_envelope_of_sns_is_opened():
    body, attributes = decode({"Body": envelope()}, False, "")
    assert body == b'{"path": "/v1/completions"}'
    assert attributes == {"a/b": "c d"}
    assert decode({"Body": envelope()}, False, ARN)[0] == body


@pytest.mark.parametrize(
    "text",
    [
        envelope(Type="SubscriptionConfirmation"),
        envelope(MessageId=""),
        envelope(Timestamp=""),
        envelope(TopicArn=""),
        envelope(Message=None),
        '{"TopicArn": "a", "path": "/v1/completions"}',
        '"TopicArn"',
    ],
)
def test_what_is_not_an_envelope_is_not_opened(text):
    assert decode({"Body": text}, False, "") == (text.encode(), {})


def test_envelope_is_not_opened_if_it_must_not_be():
    text = envelope()
    assert decode({"Body": text}, True, "")[0] == text.encode()
    assert decode({"Body": text}, False, ARN + "2")[0] == text.encode()
    message = {"Body": text, "MessageAttributes": {"a": attribute("b")}}
    assert decode(message, False, "") == (text.encode(), {"a": "b"})


def test_size_counts_the_body_and_the_attributes():
    assert size_bytes("é", {"ab": attribute("c")}) == 2 + 2 + len("String") + 1


def test_id_that_a_fifo_queue_does_not_take_is_a_digest():
    assert fifo_id("topic/1/2") == "topic/1/2"
    refused = ["a" * 129, "a b", "é", "b" * 129]  # Kafka's topics, message ids of RabbitMQ
    digests = [fifo_id(request_id) for request_id in refused]
    assert len(set(digests)) == 4
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in digests)
