"""What a run sends, to whom and when; and what its processes tell each other about it.

All of it is values: a `Plan` goes to each worker whole, ``worker`` says which share is its own.
Every n-th conversation is a worker's, so that n workers send what one would.
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

FRAME_BYTES = 4  # of a message's length between processes
ENDLESS = 1 << 40  # conversations


class MadeUp(msgspec.Struct, frozen=True, tag="made up"):
    name: str  # of the shape, before anything in it was changed
    shape: Shape
    seed: int


class ShareGpt(msgspec.Struct, frozen=True, tag="sharegpt"):
    path: str
    messages_min: int


class Trace(msgspec.Struct, frozen=True, tag="trace"):
    path: str
    speed: float = 1.0  # 2: twice as many requests a second


class ClosedLoop(msgspec.Struct, frozen=True, tag="closed"):
    """So many conversations at a time: the next begins when one ends."""

    concurrency: int


class OpenLoop(msgspec.Struct, frozen=True, tag="open"):
    """Conversations begin at their times, whether or not others have ended.

    ``arrivals``: their times; None: the traffic's own.
    """

    arrivals: Arrivals | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A run. ``begin_until_s``, since the start: nothing begins later. Infinite: no such limit."""

    url: str
    model: str
    headers: tuple[tuple[str, str], ...] = ()
    endpoint_header: str = ""
    stream: bool = True
    more: dict[str, Any] = {}  # fields of each request's body, beside those that make it
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
        """What this worker has of an amount that all have together."""
        return amount // self.workers + (self.worker < amount % self.workers)

    def conversations(self) -> Iterator[tuple[int, Conversation]]:
        """This worker's, numbered as they are among all; in an open loop each has its time.

        TrafficError when they come from a file that cannot be used.
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
            first = requests[0].timestamp  # it is sent at once
            mine = (
                one.conversation((one.timestamp - first) / 1000 / traffic.speed)
                for one in requests[self.worker :: self.workers]
            )
        return zip(numbers, mine, strict=False)


# -- between processes -----------------------------------------------------------------------------


class Ready(msgspec.Struct, tag="ready"):
    """From a worker: it has its plan, and conversations made beforehand."""


class Failed(msgspec.Struct, tag="failed"):
    """From a worker: its plan cannot be carried out."""

    why: str


class Batch(msgspec.Struct, tag="batch"):
    """From a worker, a few times a second: what was measured since the last one."""

    at_s: float  # since the start
    records: list[Record]
    gaps: Gaps
    in_flight: int
    tokens: int  # events with text, those of open streams as well; since the start, as is
    chunks: int  # all events, and answers that came whole
    cpu_s: float  # of this worker, kernel and user; since the start
    kernel_s: float  # the kernel's part of it
    beats_late_s: list[float]  # of the timer that says how busy the event loop is
    said: dict[str, str]  # by kind of error, what the endpoint said when it came first
    last: bool = False
    dropped: int = 0  # with the last: requests that were under way when it was stopped
    used_up: bool = False  # with the last: no conversation was left


class Go(msgspec.Struct, tag="go"):
    """To a worker: the start, by CLOCK_MONOTONIC, which all processes share."""

    start_s: float


class Stop(msgspec.Struct, tag="stop"):
    """To a worker: begin nothing, drop what is under way."""


Told = Ready | Failed | Batch


def frame(message: Any) -> bytes:
    """A message as it goes through a pipe: its length, and msgpack."""
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(FRAME_BYTES, "big") + body


async def receive(reader: asyncio.StreamReader) -> bytes:
    """The msgpack of the next message; IncompleteReadError when the other process has gone."""
    size = int.from_bytes(await reader.readexactly(FRAME_BYTES), "big")
    return await reader.readexactly(size)
