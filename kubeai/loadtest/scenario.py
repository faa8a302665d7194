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
from kubeai.simulation.traffic import (
    Arrivals,
    Conversation,
    RandomLengths,
    Shape,
    generate,
    generate_exact,
    read_sharegpt,
)

ENDLESS = 1 << 40  # conversations


class Synthetic(msgspec.Struct, frozen=True, tag="made up"):
    """Generated conversations of a shape."""

    name: str  # of the shape, before overrides
    shape: Shape
    seed: int


class Exact(msgspec.Struct, frozen=True, tag="random lengths"):
    """Independent requests with lengths in tokens."""

    lengths: RandomLengths
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


class RequestLoop(msgspec.Struct, frozen=True, tag="requests"):
    """Requests start at their scheduled times, like those of vLLM's benchmark.

    Each is the next turn of the conversation that has waited longest for it, or the first turn of
    another conversation. ``arrivals``: None starts all requests at once.
    """

    arrivals: Arrivals | None = None


Traffic = Synthetic | Exact | ShareGpt | TraceReplay
Load = ClosedLoop | OpenLoop | RequestLoop


class MessageStream(msgspec.Struct, frozen=True):
    """Where requests are published as messages, and where their responses are received."""

    requests_url: str  # of a topic
    responses_url: str  # of a subscription


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """A run. No request starts more than ``begin_until_s`` after the start (infinite: no limit).

    ``in_flight_max`` limits the requests in flight, whatever the load.
    """

    url: str  # with ``via``: only to query the endpoint about the model; "" if unknown
    model: str
    via: MessageStream | None = None
    headers: tuple[tuple[str, str], ...] = ()
    endpoint_header: str = ""
    stream: bool = True
    extra_body: dict[str, Any] = {}  # extra fields of each request's body
    traffic: Traffic
    load: Load
    in_flight_max: int | None = None
    seed: int = 0
    warm_up_s: float = 0.0
    begin_until_s: float = math.inf
    requests_max: int | None = None
    timeout_s: float = 300.0
    generator: int = 0
    generators: int = 1

    @property
    def embeds(self) -> bool:
        """Whether the requests are for embeddings."""
        traffic = self.traffic
        if isinstance(traffic, Synthetic):
            return traffic.shape.kind == "embeddings"
        return isinstance(traffic, Exact) and traffic.lengths.kind == "embeddings"

    def share(self, amount: int) -> int:
        """This generator's share of an amount that is split among all generators."""
        return amount // self.generators + (self.generator < amount % self.generators)

    def request_times(self) -> Iterator[float]:
        """The start times of this generator's requests, for a `RequestLoop`.

        With a limit on requests, the times are scaled as described in `Arrivals.times`.
        """
        assert isinstance(self.load, RequestLoop)
        if self.load.arrivals is None:
            times: Iterator[float] = itertools.repeat(0.0)
            if self.requests_max is not None:
                times = itertools.islice(times, self.requests_max)
        else:
            times = self.load.arrivals.times(self.seed, self.requests_max)
        return itertools.islice(times, self.generator, None, self.generators)

    def conversations(self) -> Iterator[tuple[int, Conversation]]:
        """This generator's conversations with their global numbers.

        In an open loop they have start times.

        TrafficError if a traffic file cannot be used.
        """
        everyone = self._everyone()
        if isinstance(self.load, OpenLoop) and self.load.arrivals is None:
            yield from everyone
            return
        times: Iterator[float | None] = itertools.repeat(None)  # ignores those of a trace
        if isinstance(self.load, OpenLoop) and self.load.arrivals is not None:
            times = itertools.islice(
                self.load.arrivals.times(self.seed), self.generator, None, self.generators
            )
        for (number, one), at_s in zip(everyone, times, strict=False):
            yield number, msgspec.structs.replace(one, at_s=at_s)

    def _everyone(self) -> Iterator[tuple[int, Conversation]]:
        numbers = itertools.count(self.generator, self.generators)
        traffic = self.traffic
        if isinstance(traffic, Synthetic):
            mine = generate(traffic.shape, traffic.seed, first=self.generator, step=self.generators)
        elif isinstance(traffic, Exact):
            mine = generate_exact(
                traffic.lengths, traffic.seed, first=self.generator, step=self.generators
            )
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
