"""Decodes objects, lists and watch events of the Kubernetes API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec

from kubeai.kube.errors import ApiError
from kubeai.kube.resources import SECRETS, Object, Resource
from kubeai.logs import get_logger

if TYPE_CHECKING:
    import aiohttp
    from typing_extensions import TypeVar

    T = TypeVar("T", default=Object)  # the type that objects are decoded as

log = get_logger(__name__)
EVENT_MAX_BYTES = 64 << 20


class ListMeta(msgspec.Struct, rename="camel"):
    """The metadata of a list."""

    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class Page(msgspec.Struct):
    """One page of a list."""

    metadata: ListMeta = msgspec.field(default_factory=ListMeta)
    items: list[msgspec.Raw] | None = None


class Event(msgspec.Struct):
    """One event of a watch."""

    type: str
    object: msgspec.Raw


class Versioned(msgspec.Struct):
    """An object's resourceVersion."""

    metadata: ListMeta


_DECODERS: dict[Any, msgspec.json.Decoder[Any]] = {}


def _decoder(type_: Any) -> msgspec.json.Decoder[Any]:
    if type_ not in _DECODERS:
        _DECODERS[type_] = msgspec.json.Decoder(type_)
    return _DECODERS[type_]


def decode(data: bytes | msgspec.Raw, type_: type[T]) -> T:
    """Decode an object; ApiError if it is not of this type."""
    try:
        decoded: T = _decoder(type_).decode(data)
        return decoded
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(0, "Undecodable", f"cannot decode the response: {error}") from error


def decode_leniently(r: Resource, raw: msgspec.Raw, type_: Any) -> Any:
    """Decode an object of a collection; log it and return None if it is not of this type."""
    try:
        return _decoder(type_).decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        start = b"" if r is SECRETS else bytes(raw)[:200]
        log.error("object skipped", resource=r.plural, error=str(error), start=start)
        return None


async def event_lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Split at newlines. Unlike StreamReader.readline, allows lines longer than the buffer."""
    parts: list[bytes] = []
    held_bytes = 0
    async for chunk in content.iter_any():
        first, *lines = chunk.split(b"\n")
        parts.append(first)
        held_bytes += len(first)
        if held_bytes > EVENT_MAX_BYTES:
            raise ApiError(0, "TooLarge", f"watch event larger than {EVENT_MAX_BYTES} bytes")
        for line in lines:
            whole = b"".join(parts)
            if whole.strip():
                yield whole
            parts, held_bytes = [line], len(line)
