"""What the console shows of requests: the last ones, and rates and percentiles by Model.

:class:`Traffic` reads the workers' journals when someone looks, and keeps bounded sums. Rates are
over the last ``RATES_WINDOW_S`` seconds, or less if older requests are no longer in the journals:
each rate says its window. Times to the first token are those of streamed responses.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from kubeai._journal import Entry, Journal
from kubeai._load import LoadTable
from kubeai.routing.routes import Route

RATES_WINDOW_S = 60
TTFT_WINDOW_S = 300
SAMPLES_MAX = 1000  # times to the first token, per Model; cached tokens, per endpoint
REQUESTS_MAX = 200
NAMES_MAX = 50_000

_WHY = {
    "cached": "no replica was believed to have more of the prompt in its cache",
    "away": "another replica had more of the prompt in its cache, but was too busy",
    "new": "no replica had any of the prompt in its cache",
    "least": "it had the least work",
    "hashed": "the hash of its prompt's beginning maps to it",
    "bounded": "the replica that the hash of its prompt's beginning maps to was too busy",
}


class Rates(msgspec.Struct, frozen=True):
    """A Model's mean rates over the last ``window_s`` seconds.

    ``output_tokens_per_s`` None: the engines reported no numbers of output tokens.
    """

    window_s: float = RATES_WINDOW_S
    requests_per_s: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float | None = 0.0


class TimesToFirstToken(msgspec.Struct, frozen=True):
    """Percentiles of a Model's streamed responses in the last ``window_s`` seconds."""

    window_s: float = TTFT_WINDOW_S
    count: int = 0
    p50: float | None = None
    p99: float | None = None


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request that has ended. Never its contents."""

    id: str
    time_s: float  # when its head was complete, Unix time
    model: str | None  # None: deleted long ago
    endpoint: str | None  # of the last attempt
    status: int
    end: str  # "whole", "left", "broken"
    ttft_s: float | None  # of a streamed response
    duration_s: float
    waited_s: float  # for a replica
    prompt_tokens: int | None  # as the engine reports, else as estimated
    cached_tokens: int | None  # as the engine reports
    output_tokens: int | None  # as the engine reports
    retries: int
    pick: str | None
    why: str


class RowNames:
    """Which Model or endpoint a row of the load table belongs to or belonged to, by generation."""

    def __init__(self, table: LoadTable) -> None:
        self._table = table
        self._names: dict[tuple[int, int], str] = {}

    def note(self, route: Route) -> None:
        """A route was published."""
        self._names[route.row, route.generation] = route.model
        for endpoint in route.endpoints:
            self._names[endpoint.row, endpoint.generation] = endpoint.name
        if len(self._names) > NAMES_MAX:
            self._forget()

    def find(self, row: int, generation: int) -> str | None:
        """The name; None if it is unknown or long ago."""
        return self._names.get((row, generation))

    def _forget(self) -> None:
        """Drop the older half of those whose rows have been reused."""
        past = [key for key in self._names if self._table.generation(key[0]) != key[1]]
        for key in past[: len(past) // 2 + 1]:
            del self._names[key]


class _Second(msgspec.Struct):
    """Sums over one second."""

    second: int
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    reported: int = 0  # requests whose output tokens are known


class _Cached(NamedTuple):
    """One request's prompt tokens at an endpoint. ``cached`` None: the engine did not say."""

    ended_s: float
    prompt: int
    cached: int | None


class _Model:
    """The sums of one Model. Times are of CLOCK_MONOTONIC."""

    def __init__(self) -> None:
        self.seconds: deque[_Second] = deque()
        self.first_tokens: deque[tuple[float, float]] = deque(maxlen=SAMPLES_MAX)
        self.cached: dict[str, deque[_Cached]] = {}
        self.last_s = 0.0

    def add(self, entry: Entry, endpoint: str | None) -> None:
        ended_s = entry.began_s + entry.duration_s
        self.last_s = max(self.last_s, ended_s)
        second = self._second(int(ended_s))
        second.requests += 1
        second.prompt_tokens += _prompt_tokens(entry)
        second.output_tokens += entry.output_tokens or 0
        second.reported += entry.output_tokens is not None
        if entry.streamed and entry.first_s is not None:
            self.first_tokens.append((ended_s, entry.first_s))
        if endpoint is not None and entry.prompt_tokens is not None:
            samples = self.cached.setdefault(endpoint, deque(maxlen=SAMPLES_MAX))
            samples.append(_Cached(ended_s, entry.prompt_tokens, entry.cached_tokens))

    def _second(self, number: int) -> _Second:
        # The journals of several workers are read one after the other.
        for second in reversed(self.seconds):
            if second.second == number:
                return second
            if second.second < number:
                break
        self.seconds.append(_Second(number))
        return self.seconds[-1]

    def forget(self, now_s: float) -> None:
        """Drop what no window contains any more."""
        self.seconds = deque(s for s in self.seconds if s.second > now_s - RATES_WINDOW_S - 1)
        while self.first_tokens and self.first_tokens[0][0] < now_s - TTFT_WINDOW_S:
            self.first_tokens.popleft()
        for samples in self.cached.values():
            while samples and samples[0].ended_s < now_s - TTFT_WINDOW_S:
                samples.popleft()
        self.cached = {endpoint: samples for endpoint, samples in self.cached.items() if samples}


class Traffic:
    """See the module. ``clock``: CLOCK_MONOTONIC, as in the journals; ``unix_clock``: Unix time."""

    def __init__(
        self,
        journal: Journal,
        table: LoadTable,
        clock: Callable[[], float] = time.monotonic,
        unix_clock: Callable[[], float] = time.time,
    ) -> None:
        self.names = RowNames(table)
        self.count = 0  # requests read so far
        self._journal = journal
        self._clock = clock
        self._unix_clock = unix_clock
        self._read = [0] * journal.columns
        self._whole_since_s = [-math.inf] * journal.columns  # no request since then was missed
        self._newest: deque[Request] = deque(maxlen=REQUESTS_MAX)
        self._models: dict[str, _Model] = {}

    def read(self) -> None:
        """Take in the requests that have ended since the last call."""
        now_s = self._clock()
        entries = sorted(self._entries(), key=lambda entry: entry.began_s + entry.duration_s)
        unix_s = self._unix_clock() - now_s
        for entry in entries:
            model = self.names.find(entry.model_row, entry.model_generation)
            endpoint = self.names.find(entry.row, entry.generation)
            if model is not None:
                self._models.setdefault(model, _Model()).add(entry, endpoint)
            self._newest.append(request_of(entry, model, endpoint, unix_s))
        self.count += len(entries)
        for sums in self._models.values():
            sums.forget(now_s)
        self._models = {
            name: sums for name, sums in self._models.items() if sums.last_s > now_s - TTFT_WINDOW_S
        }

    def _entries(self) -> Iterator[Entry]:
        for column, read in enumerate(self._read):
            entries, self._read[column], missed = self._journal.read(column, read)
            if missed and entries:
                self._whole_since_s[column] = entries[0].began_s + entries[0].duration_s
            yield from entries

    def newest(self, since: int) -> list[Request]:
        """The last requests, except for the first ``since`` that were ever read; newest first."""
        n = min(len(self._newest), self.count - since)
        return [self._newest[-1 - at] for at in range(n)]

    def rates(self, model: str) -> Rates:
        """A Model's rates."""
        sums, now_s = self._models.get(model), self._clock()
        window_s = max(1.0, min(RATES_WINDOW_S, now_s - max(self._whole_since_s)))
        if sums is None:
            return Rates(round(window_s, 1))
        seconds = [second for second in sums.seconds if second.second >= int(now_s - window_s)]
        output = sum(second.output_tokens for second in seconds) / window_s
        is_known = not seconds or any(second.reported for second in seconds)
        return Rates(
            round(window_s, 1),
            sum(second.requests for second in seconds) / window_s,
            sum(second.prompt_tokens for second in seconds) / window_s,
            output if is_known else None,
        )

    def times_to_first_token(self, model: str) -> TimesToFirstToken:
        """A Model's times to the first token."""
        sums = self._models.get(model)
        times = sorted(first_s for _, first_s in sums.first_tokens) if sums is not None else []
        if not times:
            return TimesToFirstToken()
        return TimesToFirstToken(
            TTFT_WINDOW_S, len(times), _percentile(times, 0.5), _percentile(times, 0.99)
        )

    def cached_share(self, model: str, endpoint: str) -> float | None:
        """The share of an endpoint's prompt tokens that its engine reports as cached.

        None if it reported none in the last minutes. An engine may leave out a 0.
        """
        sums = self._models.get(model)
        samples = () if sums is None else sums.cached.get(endpoint, ())
        prompt = sum(sample.prompt for sample in samples)
        if not prompt or all(sample.cached is None for sample in samples):
            return None
        return sum(sample.cached or 0 for sample in samples) / prompt


def _prompt_tokens(entry: Entry) -> int:
    return entry.estimated_tokens if entry.prompt_tokens is None else entry.prompt_tokens


def _percentile(values: list[float], share: float) -> float:
    """By nearest rank, of sorted values."""
    return values[max(0, math.ceil(share * len(values)) - 1)]


def request_of(entry: Entry, model: str | None, endpoint: str | None, unix_s: float) -> Request:
    """What is shown of an entry. ``unix_s``: Unix time minus CLOCK_MONOTONIC."""
    return Request(
        id=entry.id,
        time_s=entry.began_s + unix_s,
        model=model,
        endpoint=endpoint,
        status=entry.status,
        end=entry.end,
        ttft_s=entry.first_s if entry.streamed else None,
        duration_s=entry.duration_s,
        waited_s=entry.waited_s,
        prompt_tokens=_prompt_tokens(entry) or None,
        cached_tokens=entry.cached_tokens,
        output_tokens=entry.output_tokens,
        retries=entry.retries,
        pick=None if entry.pick == "least" else entry.pick,
        why=_why(entry),
    )


def _why(entry: Entry) -> str:
    """Why the request went to its endpoint, for people."""
    if entry.pick is None:
        return "no replica was picked"
    why = _WHY[entry.pick]
    if entry.estimated_tokens and (entry.pick == "cached" or entry.expected_tokens):
        share = f"{entry.expected_tokens:,} of {entry.estimated_tokens:,}"
        cached = f"about {share} prompt tokens were believed to be in its cache"
        why = cached if entry.pick == "cached" else f"{why}; {cached}"
    if entry.retries:
        why += f"; {entry.retries} earlier attempt{'s' * (entry.retries > 1)} failed"
    if entry.waited_s:
        why += f"; the request had waited {entry.waited_s:.1f} s for a replica"
    return why
