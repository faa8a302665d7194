"""What replicas of KubeAI tell each other: frames of msgpack, each after its length.

``GET /loads`` at ``metricsAddr`` answers with a :class:`Hello`, then with a :class:`Loads` whenever
something has changed, and at least one each ``HEARTBEAT_S``. The first tells everything.
"""

from __future__ import annotations

import struct
from typing import Annotated

import msgspec

from kubeai.errors import KubeAIError

PATH = "/loads"
# On responses of /metrics: this replica also serves PATH. KubeAI in Go sends no such header.
MARKER = "X-KubeAI-Loads"
CONTENT_TYPE = "application/vnd.kubeai.loads"
HEARTBEAT_S = 1.0
FRAME_MAX_BYTES = 8 << 20  # 1,000 Models with 10,000 endpoints take 0.6 MB
COUNT_MAX = 1 << 20  # a replica does not have more requests open
GONE = -1
LENGTH = struct.Struct(">I")

InFlight = Annotated[int, msgspec.Meta(ge=GONE, le=COUNT_MAX)]
Active = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
Ended = Annotated[int, msgspec.Meta(ge=0)]


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    """Who speaks: the name by which it would hold the lease."""

    identity: str


class Loads(msgspec.Struct, frozen=True, tag="loads", array_like=True):
    """What has changed since the frame before.

    An endpoint (a pod, by name) is told of from when the replica routes to it, even with 0
    requests in flight, until none of its workers can send it anything any more: then ``GONE``.
    A Model that is gone is None.
    """

    models: dict[str, tuple[Active, Ended] | None] = {}  # requests served or held; those over
    endpoints: dict[str, InFlight] = {}


class BadFrame(KubeAIError):
    """A peer sent what is no frame."""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Hello | Loads] = msgspec.msgpack.Decoder(Hello | Loads)


def encode(frame: Hello | Loads) -> bytes:
    body = _encoder.encode(frame)
    return LENGTH.pack(len(body)) + body


def decode(body: bytes) -> Hello | Loads:
    """A frame without its length; BadFrame."""
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BadFrame(str(error)) from None
