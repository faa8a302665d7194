"""What a run sends, where and when, and the messages between its processes.

Each worker receives the whole `Plan`; ``worker`` selects its share. Worker k of n sends every n-th
conversation, so that n workers together send exactly what one would.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kubeai.simulation.records import Gaps, Record
from kubeai.simulation.traffic import (
    Arrivals,
    Conversation,
    Shape,
    generate,
    read_sharegpt,
    read_trace,
)

FRAME_BYTES = 4  # length prefix of messages between processes
ENDLESS = 1 << 40  # conversations


class MadeUp(msgspec.Struct, frozen=True, tag="made up"):
    name: str  # of the shape, before overrides
    shape: Shape
    seed: int


class ShareGpt(msgspec.Struct, frozen=True, tag="sharegpt"):
    path: str
    messages_min: int


class Trace(msgspec.Struct, frozen=True, tag="trace"):
    path: str
    speed: float = 1.0  # 2: twice as many requests a second


class ClosedLoop(msgspec.Struct, frozen=True, tag="closed"):
    """A fixed number of concurrent conversations; the next starts when one ends."""

    concurrency: int


class OpenLoop(msgspec.Struct, frozen=True, tag="open"):
    """Conversations start at their scheduled times, regardless of completions.

    ``arrivals`` generates the start times; None uses the traffic's own.
    """

    arrivals: Arrivals | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A run. No request starts more than ``begin_until_s`` after the start (infinite: no limit)."""

    url: str
    model: str
    headers: tuple[tuple[str, str], ...] = ()
    endpoint_header: str = ""
    stream: bool = True
    more: dict[str, Any] = {}  # extra fields of each request's body
    traffic: MadeUp | ShareGpt | Trace
    load: ClosedLoop | OpenLoop
    seed: int = 0
    warm_up_s: float = 0.0
    begin_until_s: float = math.inf
    requests_max: int | None = None
    timeout_s: float = 300.0
    worker: int = 0
    workers: int = 1

    def share(self, amount: int) -> int:
        """This worker's share of an amount that is split among all workers."""
        return amount // self.workers + (self.worker < amount % self.workers)

    def conversations(self) -> Iterator[tuple[int, Conversation]]:
        """This worker's conversations with their global numbers; in an open loop, with start times.

        TrafficError if a traffic file cannot be used.
        """
        everyone = self._everyone()
        if isinstance(self.load, OpenLoop) and self.load.arrivals is not None:
            times = itertools.islice(
                self.load.arrivals.times(self.seed), self.worker, None, self.workers
            )
            for (number, one), at_s in zip(everyone, times, strict=False):
                yield number, msgspec.structs.replace(one, at_s=at_s)
        else:
            yield from everyone

    def _everyone(self) -> Iterator[tuple[int, Conversation]]:
        numbers = itertools.count(self.worker, self.workers)
        traffic = self.traffic
        if isinstance(traffic, MadeUp):
            mine = generate(traffic.shape, traffic.seed, first=self.worker, step=self.workers)
        elif isinstance(traffic, ShareGpt):
            every = read_sharegpt(Path(traffic.path), messages_min=traffic.messages_min)
            mine = iter(every[self.worker :: self.workers])
        else:
            requests = read_trace(Path(traffic.path))
            first = requests[0].timestamp  # is sent immediately
            mine = (
                one.conversation((one.timestamp - first) / 1000 / traffic.speed)
                for one in requests[self.worker :: self.workers]
            )
        return zip(numbers, mine, strict=False)


# -- between processes -----------------------------------------------------------------------------


class Ready(msgspec.Struct, tag="ready"):
    """From a worker: it has received its plan and prepared the first conversations."""


class Failed(msgspec.Struct, tag="failed"):
    """From a worker: its plan cannot be carried out."""

    why: str


class Batch(msgspec.Struct, tag="batch"):
    """From a worker, several times per second: measurements since the previous batch."""

    at_s: float  # since the start
    records: list[Record]
    gaps: Gaps
    in_flight: int
    tokens: int  # events with text since the start, including open streams
    chunks: int  # all events and non-streamed responses since the start
    cpu_s: float  # of this worker since the start, user and kernel
    kernel_s: float  # the kernel part of `cpu_s`
    beats_late_s: list[float]  # lateness of the timer that measures how busy the event loop is
    said: dict[str, str]  # by kind of error: the endpoint's message on its first occurrence
    last: bool = False
    dropped: int = 0  # in the last batch: requests in flight when the worker was stopped
    used_up: bool = False  # in the last batch: no conversations were left


class Go(msgspec.Struct, tag="go"):
    """To a worker: the start time on CLOCK_MONOTONIC, which all processes share."""

    start_s: float


class Stop(msgspec.Struct, tag="stop"):
    """To a worker: start no more requests and drop those in flight."""


Told = Ready | Failed | Batch


def frame(message: Any) -> bytes:
    """Encode a message for a pipe: a length prefix and msgpack."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(FRAME_BYTES, "big") + body


async def receive(reader: asyncio.StreamReader) -> bytes:
    """The msgpack of the next message; IncompleteReadError when the other process has exited."""
    size = int.from_bytes(await reader.readexactly(FRAME_BYTES), "big")
    return await reader.readexactly(size)
