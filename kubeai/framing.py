"""Length-prefixed frames on a stream: 4 bytes, big-endian, then the body.

Used between the supervisor and its workers, between KubeAI replicas, between the processes of
``kubeai bench``, and by the process kubelet. A receiver names the longest frame that it accepts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Protocol

_LENGTH = struct.Struct(">I")


class FrameTooLong(Exception):
    """The peer announced a frame that is longer than the receiver accepts."""


class _Reader(Protocol):
    async def readexactly(self, n: int) -> bytes: ...


def frame(body: bytes) -> bytes:
    """The body with its length prefix."""
    return _LENGTH.pack(len(body)) + body


async def read_frame(reader: _Reader, max_bytes: int) -> bytes:
    """The body of the next frame.

    FrameTooLong if it is longer than ``max_bytes``; IncompleteReadError at the end of the stream.
    """
    (size,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if size > max_bytes:
        raise FrameTooLong(f"frame of {size} bytes; at most {max_bytes} are accepted")
    return await reader.readexactly(size)


def take_frames(buffer: bytearray, max_bytes: int) -> Iterator[bytes]:
    """Remove the complete frames from the beginning of a buffer and yield their bodies.

    FrameTooLong if one is longer than ``max_bytes``.
    """
    start = 0
    try:
        while len(buffer) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(buffer, start)
            if size > max_bytes:
                raise FrameTooLong(f"frame of {size} bytes; at most {max_bytes} are accepted")
            end = start + _LENGTH.size + size
            if len(buffer) < end:
                break
            body = bytes(buffer[start + _LENGTH.size : end])
            start = end
            yield body
    finally:
        del buffer[:start]
