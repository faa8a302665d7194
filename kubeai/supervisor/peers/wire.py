"""The wire format between KubeAI replicas: length-prefixed msgpack frames.

``GET /loads`` at ``metricsAddr`` streams a :class:`Hello`, then a :class:`Loads` whenever something
has changed and at least every ``HEARTBEAT_S``. The first Loads is complete.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kubeai import framing
from kubeai._prompt import BLOCKS_MAX
from kubeai.errors import KubeAIError

PATH = "/loads"
# Header of /metrics responses: this KubeAI replica also serves PATH. KubeAI in Go does not send it.
MARKER = "X-KubeAI-Loads"
CONTENT_TYPE = "application/vnd.kubeai.loads"
HEARTBEAT_S = 1.0
FRAME_MAX_BYTES = 8 << 20  # 1,000 Models with 10,000 endpoints take 0.6 MB
COUNT_MAX = 1 << 20  # a KubeAI replica never has more open requests
GONE = -1

TOKENS_MAX = 1 << 26
USE_MAX = 1 << 38  # of a key, within a minute
KEYS_MAX = 65_536  # per peer
PROMPTS_MAX = 4096  # in a frame

Tokens = Annotated[int, msgspec.Meta(ge=0, le=TOKENS_MAX)]
InFlight = Annotated[int, msgspec.Meta(ge=GONE, le=COUNT_MAX)]
Active = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
Ended = Annotated[int, msgspec.Meta(ge=0)]
KeyInFlight = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
Used = Annotated[int, msgspec.Meta(ge=0, le=USE_MAX)]
KeyUse = tuple[KeyInFlight, Used, Used]  # in flight; requests and tokens of the last minute
INTERVALS_MAX = 7  # the last minute, and the interval that is leaving it
# By age in intervals of 10 s, without zeros at the end.
Counts = Annotated[tuple[Used, ...], msgspec.Meta(max_length=INTERVALS_MAX)]
KeyWindow = tuple[Counts, Counts]  # requests and tokens
# The first waiting request of a Model: its priority, its start tag, and the Model's virtual time.
Tag = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
Head = tuple[Annotated[int, msgspec.Meta(ge=-1000, le=1000)], Tag, Tag]


class SentPrompt(msgspec.Struct, frozen=True, array_like=True):
    """A prompt that the sender has sent to an endpoint, for the prefix index."""

    endpoint: str
    new_tokens: Tokens  # those that the endpoint's cache was not believed to hold
    blocks: Annotated[bytes, msgspec.Meta(max_length=8 * BLOCKS_MAX)]  # hashes, 8 bytes each


class Hello(msgspec.Struct, frozen=True, tag="hello", array_like=True):
    """Identifies the sender, by the identity with which it would hold the lease.

    ``process`` differs for each of its processes. Empty: its version does not say.
    """

    identity: str
    process: str = ""


class KeyWindows(msgspec.Struct, frozen=True, array_like=True):
    """When the sender has counted the uses of keys in the same frame."""

    past_ms: Annotated[int, msgspec.Meta(ge=0, le=10_000)]  # of the sender's current interval
    counts: list[KeyWindow]  # of the frame's keys, in their order


class Loads(msgspec.Struct, frozen=True, tag="loads", array_like=True):
    """Changes since the previous frame.

    An endpoint (a pod, by name) is reported as soon as the peer routes to it, even with 0
    in-flight requests, until none of the peer's workers can send it requests: then ``GONE``.
    A Model that is gone is None.
    """

    models: dict[str, tuple[Active, Ended] | None] = {}  # (in flight or held, ended) requests
    endpoints: dict[str, InFlight] = {}
    pending: dict[str, Tokens] = {}  # prompt tokens by endpoint; of those above, 0 if missing
    # Prompts since the previous frame, the newest ones; None: the sender's version has no index.
    prompts: Annotated[list[SentPrompt], msgspec.Meta(max_length=PROMPTS_MAX)] | None = None
    keys: dict[str, KeyUse] = {}  # by name. Versions before this field ignore it
    queues: dict[str, Head] = {}  # by Model; of those above, none waits if missing
    key_windows: KeyWindows | None = None  # None: no keys, or the sender's version has none


class BadFrame(KubeAIError):
    """A peer sent an invalid frame."""


_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Hello | Loads] = msgspec.msgpack.Decoder(Hello | Loads)


def encode(frame: Hello | Loads) -> bytes:
    """A frame with its length prefix."""
    return framing.frame(_encoder.encode(frame))


def decode(body: bytes) -> Hello | Loads:
    """Decode a frame without its length prefix. BadFrame if it is invalid."""
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BadFrame(str(error)) from None
