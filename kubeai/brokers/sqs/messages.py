"""How a message is written in SQS, which takes text and a few attributes with restricted names.

The encoding is that of the Go CDK (gocloud.dev/pubsub/awssnssqs), so that clients may use either:

- A body that SQS does not take as text is in base64, and marked by the attribute ``base64encoded``.
- In the name of an attribute, each character that SQS does not allow is ``__0x<hex>__``.
- The value of an attribute is percent-encoded.
- A message without attributes may be an envelope of SNS, which has delivered it: a JSON object with
  the body and the attributes.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import msgspec

BASE64 = "base64encoded"
# Characters that SQS refuses in a body, after a decoding that allows no surrogates.
_REFUSED = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
# What is escaped in a name. An underscore that begins what looks like an escape is escaped as well.
_ESCAPED = re.compile(r"[^A-Za-z0-9_.-]|^\.|(?<=\.)\.|_(?=_0x)")
_ESCAPE = re.compile(r"__0x([0-9A-Fa-f]{1,6})__")
_FIFO_ID = re.compile("[!-~]{1,128}")
_VALUE_SAFE = "$&+=:@~"  # unescaped in a path, and so in Go's url.PathEscape


class _Value(msgspec.Struct):
    Value: str = ""


class _Envelope(msgspec.Struct):
    """A notification of SNS. Other fields are ignored."""

    Type: str
    MessageId: str
    TopicArn: str
    Timestamp: str
    Message: str
    MessageAttributes: dict[str, _Value] = {}


_envelopes = msgspec.json.Decoder(_Envelope)


def encode(body: bytes, attributes: Mapping[str, str]) -> tuple[str, dict[str, dict[str, str]]]:
    """The text of a message, and its MessageAttributes.

    An attribute with an empty value is omitted, because SQS has no empty values.
    """
    encoded = {
        _ESCAPED.sub(_escape, name): _attribute(quote(value, safe=_VALUE_SAFE))
        for name, value in attributes.items()
        if value
    }
    try:
        text = body.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or _REFUSED.search(text):
        text = base64.b64encode(body).decode()
        encoded[BASE64] = _attribute("true")
    return text, encoded


def size_bytes(text: str, attributes: Mapping[str, Mapping[str, str]]) -> int:
    """The size of an encoded message, as SQS counts it."""
    return len(text.encode()) + sum(
        len(name) + len(value["DataType"]) + len(value["StringValue"])
        for name, value in attributes.items()
    )


def fifo_id(request_id: str) -> str:
    """A request's id, or a digest of it if SQS does not take it as a group or deduplication id."""
    if _FIFO_ID.fullmatch(request_id):
        return request_id
    return hashlib.sha256(request_id.encode()).hexdigest()


def decode(message: Mapping[str, Any], raw: bool, topic_arn: str) -> tuple[bytes, dict[str, str]]:
    """The body and the attributes of a message of ReceiveMessage.

    ``raw``: never take a message for an envelope. ``topic_arn``: the only topic of which envelopes
    are opened; empty: of any.
    """
    text: str = message.get("Body", "")
    encoded: dict[str, str] = {
        name: value.get("StringValue", "")
        for name, value in message.get("MessageAttributes", {}).items()
    }
    if not raw and not encoded and (envelope := _envelope(text, topic_arn)):
        text = envelope.Message
        encoded = {name: value.Value for name, value in envelope.MessageAttributes.items()}
    body = text.encode()
    if encoded.pop(BASE64, None) is not None:
        try:
            body = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            body = text.encode()
    return body, {_ESCAPE.sub(_unescape, name): _value(value) for name, value in encoded.items()}


def _attribute(value: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": value}


def _escape(match: re.Match[str]) -> str:
    return f"__{ord(match[0]):#x}__"


def _unescape(match: re.Match[str]) -> str:
    code = int(match[1], 16)
    is_character = code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF
    return chr(code) if is_character else match[0]


def _value(encoded: str) -> str:
    """Percent-decoded, as Go does it: a text that is not percent-encoded stays as it is."""
    if re.search("%(?![0-9A-Fa-f]{2})", encoded):
        return encoded
    return unquote_to_bytes(encoded).decode(errors="replace")


def _envelope(text: str, topic_arn: str) -> _Envelope | None:
    if '"TopicArn"' not in text:
        return None
    try:
        envelope = _envelopes.decode(text)
    except msgspec.MsgspecError:
        return None
    claimed = envelope.MessageId and envelope.Timestamp and envelope.TopicArn
    if envelope.Type != "Notification" or not claimed:
        return None
    return envelope if topic_arn in ("", envelope.TopicArn) else None
