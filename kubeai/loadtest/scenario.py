"""What a run sends, where and when.

Each generator process receives the whole `Scenario`; ``generator`` selects its share. Generator k
of n sends every n-th conversation, so that n generators together send exactly what one would.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kubeai.simulation.trace_files import read_trace
from kubeai.simulation.traffic import Arrivals, Conversation, Shape, generate, read_sharegpt

ENDLESS = 1 << 40  # conversations


class Synthetic(msgspec.Struct, frozen=True, tag="made up"):
    """Generated conversations of a shape."""

    name: str  # of the shape, before overrides
    shape: Shape
    seed: int


class ShareGpt(msgspec.Struct, frozen=True, tag="sharegpt"):
    """Conversations from a ShareGPT file."""

    path: str
    messages_min: int


class TraceReplay(msgspec.Struct, frozen=True, tag="trace"):
    """Requests from a trace file, at its times."""

    path: str
    speed: float = 1.0  # 2: twice as many requests a second
    block_tokens: int | None = None  # per entry of `hash_ids`; None: as in the file's format
    requests_max: int | None = None


class ClosedLoop(msgspec.Struct, frozen=True, tag="closed"):
    """A fixed number of concurrent conversations; the next starts when one ends."""

    concurrency: int


class OpenLoop(msgspec.Struct, frozen=True, tag="open"):
    """Conversations start at their scheduled times, regardless of completions.

    ``arrivals`` generates the start times; None uses the traffic's own.
    """

    arrivals: Arrivals | None = None


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A run. No request starts more than ``begin_until_s`` after the start (infinite: no limit)."""

    url: str
    model: str
    headers: tuple[tuple[str, str], ...] = ()
    endpoint_header: str = ""
    stream: bool = True
    extra_body: dict[str, Any] = {}  # extra fields of each request's body
    traffic: Synthetic | ShareGpt | TraceReplay
    load: ClosedLoop | OpenLoop
    seed: int = 0
    warm_up_s: float = 0.0
    begin_until_s: float = math.inf
    requests_max: int | None = None
    timeout_s: float = 300.0
    generator: int = 0
    generators: int = 1

    def share(self, amount: int) -> int:
        """This generator's share of an amount that is split among all generators."""
        return amount // self.generators + (self.generator < amount % self.generators)

    def conversations(self) -> Iterator[tuple[int, Conversation]]:
        """This generator's conversations with their global numbers.

        In an open loop they have start times.

        TrafficError if a traffic file cannot be used.
        """
        everyone = self._everyone()
        if isinstance(self.load, OpenLoop) and self.load.arrivals is not None:
            times = itertools.islice(
                self.load.arrivals.times(self.seed), self.generator, None, self.generators
            )
            for (number, one), at_s in zip(everyone, times, strict=False):
                yield number, msgspec.structs.replace(one, at_s=at_s)
        else:
            yield from everyone

    def _everyone(self) -> Iterator[tuple[int, Conversation]]:
        numbers = itertools.count(self.generator, self.generators)
        traffic = self.traffic
        if isinstance(traffic, Synthetic):
            mine = generate(traffic.shape, traffic.seed, first=self.generator, step=self.generators)
        elif isinstance(traffic, ShareGpt):
            every = read_sharegpt(Path(traffic.path), messages_min=traffic.messages_min)
            mine = iter(every[self.generator :: self.generators])
        else:
            requests = read_trace(
                Path(traffic.path),
                block_tokens=traffic.block_tokens,
                requests_max=traffic.requests_max,
            )
            first = requests[0].timestamp  # is sent immediately
            mine = (
                one.conversation((one.timestamp - first) / 1000 / traffic.speed)
                for one in requests[self.generator :: self.generators]
            )
        return zip(numbers, mine, strict=False)
