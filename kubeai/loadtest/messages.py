"""The messages between the main process and its generator processes, and their encoding.

A message is msgpack with a length prefix. `run` sends the scenario, then `Go` and perhaps `Stop`;
a generator answers `Ready` or `Failed`, then sends a `Batch` of measurements several times per
second.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from kubeai import framing
from kubeai.simulation.results import Gaps, Measurement

FRAME_MAX_BYTES = 1 << 30


class Ready(msgspec.Struct, tag="ready"):
    """From a generator: it has received its scenario and prepared the first conversations."""


class Failed(msgspec.Struct, tag="failed"):
    """From a generator: its scenario cannot be carried out."""

    why: str


class Batch(msgspec.Struct, tag="batch"):
    """From a generator, several times per second: measurements since the previous batch."""

    at_s: float  # since the start
    measurements: list[Measurement]
    gaps: Gaps
    in_flight: int
    tokens: int  # events with text since the start, including open streams
    chunks: int  # all events and non-streamed responses since the start
    cpu_s: float  # of this generator since the start, user and kernel
    kernel_s: float  # the kernel part of `cpu_s`
    beats_late_s: list[float]  # lateness of the timer that measures how busy the event loop is
    error_messages: dict[
        str, str
    ]  # by kind of error: the endpoint's message on its first occurrence
    last: bool = False
    dropped: int = 0  # in the last batch: requests in flight when the generator was stopped
    used_up: bool = False  # in the last batch: no conversations were left
    message_counts: dict[
        str, int
    ] = {}  # by message: lost, duplicates and the like, since the start


class Go(msgspec.Struct, tag="go"):
    """To a generator: the start time on CLOCK_MONOTONIC, which all processes share."""

    start_s: float


class Stop(msgspec.Struct, tag="stop"):
    """To a generator: start no more requests and drop those in flight."""


FromGenerator = Ready | Failed | Batch


def frame(message: Any) -> bytes:
    """Encode a message for a pipe: a length prefix and msgpack."""
    return framing.frame(msgspec.msgpack.encode(message))


async def receive(reader: asyncio.StreamReader) -> bytes:
    """The msgpack of the next message; IncompleteReadError when the other process has exited."""
    return await framing.read_frame(reader, FRAME_MAX_BYTES)
