"""Decodes messages that the Go CDK publishes to NATS with metadata but without ``natsv2``.

It encodes such a message as two values of Go's encoding/gob: a ``map[string]string``, which is
preceded by the definition of its type, and a byte slice. (https://pkg.go.dev/encoding/gob)
"""

from __future__ import annotations

_BYTES = 5  # the number of the type []byte


def decode(data: bytes) -> tuple[dict[str, str], bytes] | None:
    """The metadata and the body of a message; None if it is not encoded like this."""
    try:
        definition, rest = _message(data)
        if _signed(definition)[0] >= 0:
            return None  # JSON, for example
        first, rest = _message(rest)
        second, rest = _message(rest)
        return None if rest else (_map_of(first), _bytes_of(second))
    except (IndexError, UnicodeDecodeError, ValueError):
        return None


def _map_of(message: bytes) -> dict[str, str]:
    """The map in a message: the number of its type, a zero, the count, keys and values."""
    kind, rest = _signed(message)
    if kind <= _BYTES or rest[0] != 0:
        raise ValueError
    count, rest = _unsigned(rest[1:])
    found: dict[str, str] = {}
    for _ in range(count):
        key, rest = _text(rest)
        value, rest = _text(rest)
        found[key.decode()] = value.decode()
    if rest:
        raise ValueError
    return found


def _bytes_of(message: bytes) -> bytes:
    kind, rest = _signed(message)
    if kind != _BYTES or rest[0] != 0:
        raise ValueError
    body, rest = _text(rest[1:])
    if rest:
        raise ValueError
    return body


def _message(data: bytes) -> tuple[bytes, bytes]:
    """The first message, which follows its length, and the rest."""
    return _text(data)


def _text(data: bytes) -> tuple[bytes, bytes]:
    length, rest = _unsigned(data)
    if length > len(rest):
        raise ValueError
    return rest[:length], rest[length:]


def _unsigned(data: bytes) -> tuple[int, bytes]:
    """A byte below 128, or 256 minus the number of bytes that follow, big-endian."""
    if data[0] < 128:
        return data[0], data[1:]
    size = 256 - data[0]
    if size > 8 or size >= len(data):
        raise ValueError
    return int.from_bytes(data[1 : 1 + size]), data[1 + size :]


def _signed(data: bytes) -> tuple[int, bytes]:
    """The lowest bit is the sign: it complements the others."""
    number, rest = _unsigned(data)
    return (~(number >> 1) if number & 1 else number >> 1), rest
