"""Request measurements and their summaries, for real and simulated runs.

A :class:`Measurement` describes one request, with times in seconds since the run's start.
:class:`Results` describe a run; ``kubeai bench`` writes and compares them as JSON. Metrics have the
names of vLLM's ``vllm bench serve``: TTFT, TPOT, ITL and E2EL.
"""

from __future__ import annotations

import math
import operator
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kubeai.errors import KubeAIError

FORMAT = 2
# Metrics whose mean and percentiles are in a summary, as ``<name>_ms``.
METRICS = {
    "ttft": "TTFT (time to first token)",
    "tpot": "TPOT (time per output token)",
    "itl": "ITL (inter-token latency)",
    "e2el": "E2EL (end-to-end latency)",
    "client_queue_time": "Client queue time",
}
DEFAULT_METRICS = ("ttft", "tpot", "itl", "e2el")
DEFAULT_PERCENTILES = (50.0, 90.0, 95.0, 99.0)
# Histogram buckets for gaps are 2 % wide and range from 10 µs to 90 days.
GAP_FLOOR_S = 1e-5
GAP_STEP = 1.02
GAP_BUCKETS = 1400
GAP_BOUNDS_S = [GAP_FLOOR_S * GAP_STEP**bound for bound in range(1, GAP_BUCKETS)] + [math.inf]
CURVE_POINTS = 200


class ResultsError(KubeAIError):
    """A file does not contain valid results."""


class Measurement(msgspec.Struct, array_like=True):
    """One request. Times of events that did not happen are NaN; unreported counts are -1."""

    conversation: int
    turn: int
    due_s: float  # when it should have been sent; `sent_s` is later if the client was late
    sent_s: float
    first_s: float = math.nan  # its first token
    ended_s: float = math.nan
    prompt_tokens: int = -1
    cached_tokens: int = -1  # of the prompt, found in a cache
    output_tokens: int = 0
    endpoint: str = ""  # the endpoint that responded, if known
    error: str = ""  # the kind of failure: "status 503", "cut", "timeout", …
    queued_s: float = 0.0  # how long the limit on requests in flight delayed it, before `due_s`

    @property
    def ttft_s(self) -> float:
        """Time to first token since the request was due, which includes delays in the client."""
        return self.first_s - self.due_s

    @property
    def e2el_s(self) -> float:
        """End-to-end time since the request was due."""
        return self.ended_s - self.due_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token after the first; NaN if there is only one."""
        later_tokens = self.output_tokens - 1
        return (self.ended_s - self.first_s) / later_tokens if later_tokens > 0 else math.nan


class Gaps(msgspec.Struct):
    """A histogram of the times between tokens, over all streams, with 2 % wide buckets."""

    counts: dict[int, int] = {}
    total_s: float = 0.0

    def add(self, gap_s: float, times: int = 1) -> None:
        """Count a gap, ``times`` times."""
        bucket = bisect_right(GAP_BOUNDS_S, gap_s)
        self.counts[bucket] = self.counts.get(bucket, 0) + times
        self.total_s += gap_s * times

    def add_stream(self, times_s: Sequence[float]) -> None:
        """``times_s``: the arrival times of a stream's tokens, in order."""
        gaps_s = sorted(map(operator.sub, times_s[1:], times_s))
        begin = 0
        while begin < len(gaps_s):  # sorting is faster than a search per gap
            bucket = bisect_right(GAP_BOUNDS_S, gaps_s[begin])
            end = bisect_left(gaps_s, GAP_BOUNDS_S[bucket], begin)
            self.counts[bucket] = self.counts.get(bucket, 0) + end - begin
            begin = end
        if gaps_s:
            self.total_s += times_s[-1] - times_s[0]

    def merge(self, other: Gaps) -> None:
        """Add another histogram to this one."""
        for bucket, count in other.counts.items():
            self.counts[bucket] = self.counts.get(bucket, 0) + count
        self.total_s += other.total_s

    def figures_ms(self, percentiles: Sequence[float] = DEFAULT_PERCENTILES) -> dict[str, float]:
        """Mean and percentiles in milliseconds; empty if there are no gaps."""
        total = sum(self.counts.values())
        if not total:
            return {}
        return {"mean": round(self.total_s / total * 1e3, 2)} | {
            percentile_name(each): round(self._quantile(each / 100 * total) * 1e3, 2)
            for each in percentiles
        }

    def _quantile(self, rank: float) -> float:
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                break
        return float(GAP_FLOOR_S * GAP_STEP ** (bucket + 0.5))


class Objective(msgspec.Struct, frozen=True):
    """The limits for a request to count towards goodput, in seconds; 0 means no limit."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0
    e2el_s: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.ttft_s or self.tpot_s or self.e2el_s)

    def met(self, measurement: Measurement) -> bool:
        """Whether the request succeeded within the limits. A metric that it lacks is met."""
        pairs = (
            (measurement.ttft_s, self.ttft_s),
            (measurement.tpot_s, self.tpot_s),
            (measurement.e2el_s, self.e2el_s),
        )
        return not measurement.error and not any(most and took > most for took, most in pairs)


class Selection(msgspec.Struct, frozen=True):
    """The metrics of a summary, which are keys of `METRICS`, and their percentiles."""

    metrics: tuple[str, ...] = DEFAULT_METRICS
    percentiles: tuple[float, ...] = DEFAULT_PERCENTILES


class Results(msgspec.Struct, kw_only=True):
    """A run: its parameters (``setting``), ``summary`` and curves to plot.

    ``warnings``: what makes the results unreliable, such as a load generator that was too slow.
    ``environment``: date, command, versions and hardware.
    """

    name: str
    setting: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, list[list[float]]]
    spread: dict[str, int]  # requests per endpoint, if known
    errors: dict[str, int]
    warnings: list[str] = []
    environment: dict[str, Any] = {}


class Limit(msgspec.Struct, frozen=True):
    """A service level objective of a run: ``ttft:p99:500ms``, or ``goodput:99``.

    ``metric`` is a key of `METRICS`, with a ``figure`` ("mean" or "p99") of at most ``most`` ms;
    or it is "goodput", with at least ``least`` percent of requests, or "errors", with at most
    ``most`` percent.
    """

    metric: str
    figure: str = ""
    most: float | None = None
    least: float | None = None

    @property
    def name(self) -> str:
        """The limit in words: "TTFT p99 ≤ 500 ms"."""
        if self.metric == "goodput":
            return f"goodput ≥ {self.least:g} %"
        if self.metric == "errors":
            return f"errors ≤ {self.most:g} %"
        return f"{self.label} ≤ {self.most:g} ms"

    @property
    def label(self) -> str:
        """What is limited: "TTFT p99"."""
        return f"{self.metric.upper()} {self.figure}" if self.figure else self.metric

    def value(self, summary: dict[str, Any]) -> float | None:
        """The limited figure, in the limit's unit; None if the run has no such figure."""
        requests = summary.get("requests") or 0
        if self.metric == "goodput":
            share = summary.get("good_share")
            return None if share is None else float(share * 100)
        if self.metric == "errors":
            return float(summary["failed"] / requests * 100) if requests else None
        found = summary.get(f"{self.metric}_ms", {}).get(self.figure)
        return None if found is None else float(found)

    def met(self, summary: dict[str, Any]) -> bool:
        """Whether the run keeps the limit; a run without the figure does not."""
        value = self.value(summary)
        if value is None:
            return False
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )


class Sweep(msgspec.Struct, kw_only=True):
    """What a sweep over request rates found: for each target, the highest rate that holds."""

    limits: list[Limit]
    rates: dict[str, list[float]]  # target → the rate of each of its runs, in requests per second
    runs: dict[str, list[int]]  # target → the position of each of its runs in the file
    held: dict[str, float | None]  # target → the highest rate that holds; None: not even the lowest
    broke: dict[str, float | None]  # target → the lowest rate that does not hold; None: none tried


class ResultsFile(msgspec.Struct, kw_only=True):
    """What ``--json`` writes: one or more runs, and the findings of a sweep."""

    format: int = FORMAT
    sweep: Sweep | None = None
    runs: list[Results]


def summarize(
    name: str,
    setting: dict[str, Any],
    measurements: Sequence[Measurement],
    gaps: Gaps,
    *,
    warm_up_s: float = 0.0,
    objective: Objective | None = None,
    selection: Selection | None = None,
    warnings: Iterable[str] = (),
) -> Results:
    """Summarise the measurements, without requests that were due during the warm-up."""
    kept = [measurement for measurement in measurements if measurement.due_s >= warm_up_s]
    good = [measurement for measurement in kept if not measurement.error]
    return Results(
        name=name,
        setting=setting,
        summary=_summary(kept, good, gaps, objective or Objective(), selection or Selection()),
        curves={
            "ttft_ms": _distribution([r.ttft_s for r in good]),
            "e2el_ms": _distribution([r.e2el_s for r in good]),
            "in_flight": _in_flight(measurements),
            "ttft_ms_over_time": _over_time(good),
        },
        spread=dict(sorted(Counter(r.endpoint for r in kept if r.endpoint).items())),
        errors=dict(Counter(r.error for r in kept if r.error).most_common()),
        warnings=list(warnings),
    )


def _summary(
    kept: list[Measurement],
    good: list[Measurement],
    gaps: Gaps,
    objective: Objective,
    selection: Selection,
) -> dict[str, Any]:
    ended = [measurement.ended_s for measurement in kept if not math.isnan(measurement.ended_s)]
    duration_s = max(ended, default=0.0) - min((r.due_s for r in kept), default=0.0)

    def per_s(amount: int) -> float:
        return round(amount / duration_s, 3) if duration_s > 0 else 0.0

    def figures_ms(values_s: Iterable[float]) -> dict[str, float]:
        return _figures_ms(values_s, selection.percentiles)

    output = sum(measurement.output_tokens for measurement in good)
    prompts = sum(max(0, measurement.prompt_tokens) for measurement in good)
    within = sum(objective.met(measurement) for measurement in good)
    metrics = {
        "ttft": lambda: figures_ms(r.ttft_s for r in good),
        "tpot": lambda: figures_ms(r.tpot_s for r in good),
        "itl": lambda: gaps.figures_ms(selection.percentiles),
        "e2el": lambda: figures_ms(r.e2el_s for r in good),
        "client_queue_time": lambda: figures_ms(r.queued_s for r in good),
    }
    return {
        "requests": len(kept),
        "failed": len(kept) - len(good),
        "duration_s": round(duration_s, 3),
        "requests_per_s": per_s(len(good)),
        "good_requests_per_s": per_s(within) if objective else None,
        "good_share": round(within / len(kept), 4) if objective and kept else None,
        "prompt_tokens": prompts,
        "output_tokens": output,
        "output_tokens_per_s": per_s(output),
        "tokens_per_s": per_s(output + prompts),
        "hit_rate": _hit_rate(good),
        **{f"{name}_ms": metrics[name]() for name in METRICS if name in selection.metrics},
        # Measured from sending, as by clients that ignore their own delays.
        "ttft_sent_ms": figures_ms(r.first_s - r.sent_s for r in good),
        "late_ms": figures_ms(r.sent_s - r.due_s for r in kept),
        "spread": _unevenness(kept),
        "busiest_requests": _busiest(kept),
    }


def _hit_rate(good: list[Measurement]) -> float | None:
    """The share of prompt tokens found in a cache, over the requests that report it."""
    reported = [r for r in good if r.cached_tokens >= 0 and r.prompt_tokens > 0]
    if not reported:
        return None
    cached = sum(r.cached_tokens for r in reported)
    return round(cached / sum(r.prompt_tokens for r in reported), 4)


def _figures_ms(values_s: Iterable[float], percentiles: Sequence[float]) -> dict[str, float]:
    """The mean and percentiles; a percentile is a measured value (nearest rank)."""
    known = sorted(value for value in values_s if not math.isnan(value))
    if not known:
        return {}
    last = len(known) - 1
    return {"mean": round(statistics.fmean(known) * 1e3, 2)} | {
        percentile_name(p): round(known[min(last, int(p / 100 * len(known)))] * 1e3, 2)
        for p in percentiles
    }


def percentile_name(percentile: float) -> str:
    """The key of a percentile in a summary, such as "p99" or "p99.9"."""
    return f"p{percentile:g}"


def _busiest(measurements: list[Measurement]) -> int | None:
    """The number of requests on the busiest endpoint."""
    counts = Counter(measurement.endpoint for measurement in measurements if measurement.endpoint)
    return max(counts.values(), default=None)


def _unevenness(measurements: list[Measurement]) -> float | None:
    """The busiest endpoint's requests relative to the mean per endpoint."""
    counts = Counter(measurement.endpoint for measurement in measurements if measurement.endpoint)
    return round(max(counts.values()) * len(counts) / counts.total(), 3) if counts else None


def _distribution(values_s: list[float]) -> list[list[float]]:
    """Points (milliseconds, share of requests with at most this latency)."""
    known = sorted(value for value in values_s if not math.isnan(value))
    count = len(known)
    ranks = sorted({round(at * (count - 1) / CURVE_POINTS) for at in range(CURVE_POINTS + 1)})
    return [[round(known[r] * 1e3, 3), round((r + 1) / count, 5)] for r in ranks] if known else []


def _in_flight(measurements: Sequence[Measurement]) -> list[list[float]]:
    """Points (seconds, in-flight requests)."""
    changes = sorted(
        [(r.sent_s, 1) for r in measurements]
        + [(r.ended_s, -1) for r in measurements if r.ended_s >= 0]
    )
    if not changes:
        return []
    step = changes[-1][0] / CURVE_POINTS or 1.0
    points: list[list[float]] = []
    level, index = 0, 0
    for at in range(CURVE_POINTS + 1):
        while index < len(changes) and changes[index][0] <= at * step:
            level += changes[index][1]
            index += 1
        points.append([round(at * step, 3), level])
    return points


def _over_time(good: list[Measurement]) -> list[list[float]]:
    """Points (seconds, mean time to first token of the requests due around then)."""
    known = sorted((r.due_s, r.ttft_s) for r in good if not math.isnan(r.ttft_s))
    size = -(-len(known) // CURVE_POINTS)
    parts = [known[at : at + size] for at in range(0, len(known), size)] if known else []
    return [
        [round(part[0][0], 3), round(statistics.fmean(ttft for _, ttft in part) * 1e3, 3)]
        for part in parts
    ]


def write(found: ResultsFile, path: Path) -> None:
    """Write results as JSON, creating the folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


class _Format(msgspec.Struct):
    format: int


def read(path: Path) -> ResultsFile:
    """Read results; ResultsError if the file is missing or invalid."""
    try:
        content = path.read_bytes()
        number = msgspec.json.decode(content, type=_Format).format
        if number != FORMAT:
            raise ResultsError(
                f"{path}: has format {number}, this version reads {FORMAT}: run the benchmark again"
            )
        return msgspec.json.decode(content, type=ResultsFile)
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ResultsError(f"{path}: is not a results file of kubeai bench: {error}") from None
