"""Decoding what the Go CDK publishes. The messages were encoded by Go 1.26's encoding/gob."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeai.brokers.nats import gob

REQUEST = bytes.fromhex(
    "0d7f040102ff8000010c010c000019ff80000112726571756573745f6d6573736167655f69640131"
    "1e0a001b7b2270617468223a20222f76312f636f6d706c6574696f6e73227d"
)
UNICODE_AND_EMPTY = bytes.fromhex(
    "0d7f040102ff8000010c010c000012ff800002036b657902c3a905656d70747900030a0000"
)
LONG = bytes.fromhex("0d7f040102ff8000010c010c000008ff800001016b0176fe01310a00fe012c") + b"x" * 300


@pytest.mark.parametrize(
    ("message", "attributes", "body"),
    [
        (REQUEST, {"request_message_id": "1"}, b'{"path": "/v1/completions"}'),
        (UNICODE_AND_EMPTY, {"key": "é", "empty": ""}, b""),
        (LONG, {"k": "v"}, b"x" * 300),
    ],
)
def test_message_of_go_is_decoded(message, attributes, body):
    assert gob.decode(message) == (attributes, body)


@given(st.dictionaries(st.text(), st.integers() | st.text()) | st.lists(st.text()) | st.integers())
def test_json_is_not_taken_for_a_message_of_go(value):
    for indent in (None, 1):
        assert gob.decode(json.dumps(value, indent=indent).encode()) is None


@given(st.binary())
def test_other_bytes_are_not_taken_for_a_message_of_go(data):
    assert gob.decode(data) is None


@given(st.integers(0, len(REQUEST) - 1))
def test_truncated_message_is_not_decoded(length):
    assert gob.decode(REQUEST[:length]) is None
    assert gob.decode(REQUEST + b"x") is None
