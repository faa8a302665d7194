"""Request measurements and their summaries, for real and simulated runs.

A :class:`Measurement` describes one request, with times in seconds since the run's start.
:class:`Results` describe a run; ``kubeai bench`` writes and compares them as JSON.
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

FORMAT = 1
QUANTILES = (0.5, 0.9, 0.99)
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

    @property
    def ttft_s(self) -> float:
        """Time to first token since the request was due, which includes delays in the client."""
        return self.first_s - self.due_s

    @property
    def took_s(self) -> float:
        """End-to-end time since the request was due."""
        return self.ended_s - self.due_s

    @property
    def token_s(self) -> float:
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

    def figures_ms(self) -> dict[str, float]:
        """Mean and quantiles in milliseconds; empty if there are no gaps."""
        total = sum(self.counts.values())
        if not total:
            return {}
        return {"mean": round(self.total_s / total * 1e3, 2)} | {
            _name(quantile): round(self._quantile(quantile * total) * 1e3, 2)
            for quantile in QUANTILES
        }

    def _quantile(self, rank: float) -> float:
        seen = 0
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            if seen >= rank:
                break
        return float(GAP_FLOOR_S * GAP_STEP ** (bucket + 0.5))


class Objective(msgspec.Struct, frozen=True):
    """The limits for a request to count as good; 0 means no limit."""

    ttft_s: float = 0.0
    token_s: float = 0.0
    took_s: float = 0.0

    def met(self, measurement: Measurement) -> bool:
        """Whether the request succeeded within the limits."""
        pairs = (
            (measurement.ttft_s, self.ttft_s),
            (measurement.token_s, self.token_s),
            (measurement.took_s, self.took_s),
        )
        return not measurement.error and not any(most and took > most for took, most in pairs)


class Results(msgspec.Struct, kw_only=True):
    """A run: its parameters (``setting``), ``summary`` and curves to plot.

    ``warnings``: what makes the results unreliable, such as a load generator that was too slow.
    """

    format: int = FORMAT
    name: str
    setting: dict[str, Any]
    summary: dict[str, Any]
    curves: dict[str, list[list[float]]]
    spread: dict[str, int]  # requests per endpoint, if known
    errors: dict[str, int]
    warnings: list[str] = []


def summarize(
    name: str,
    setting: dict[str, Any],
    measurements: Sequence[Measurement],
    gaps: Gaps,
    *,
    warm_up_s: float = 0.0,
    objective: Objective | None = None,
    warnings: Iterable[str] = (),
) -> Results:
    """Summarise the measurements, without requests that were due during the warm-up."""
    kept = [measurement for measurement in measurements if measurement.due_s >= warm_up_s]
    good = [measurement for measurement in kept if not measurement.error]
    return Results(
        name=name,
        setting=setting,
        summary=_summary(kept, good, gaps, objective or Objective()),
        curves={
            "ttft_ms": _distribution([r.ttft_s for r in good]),
            "took_ms": _distribution([r.took_s for r in good]),
            "in_flight": _in_flight(measurements),
            "ttft_ms_over_time": _over_time(good),
        },
        spread=dict(sorted(Counter(r.endpoint for r in kept if r.endpoint).items())),
        errors=dict(Counter(r.error for r in kept if r.error).most_common()),
        warnings=list(warnings),
    )


def _summary(
    kept: list[Measurement], good: list[Measurement], gaps: Gaps, objective: Objective
) -> dict[str, Any]:
    ended = [measurement.ended_s for measurement in kept if not math.isnan(measurement.ended_s)]
    duration_s = max(ended, default=0.0) - min((r.due_s for r in kept), default=0.0)

    def per_s(amount: int) -> float:
        return round(amount / duration_s, 3) if duration_s > 0 else 0.0

    output = sum(measurement.output_tokens for measurement in good)
    prompts = sum(max(0, measurement.prompt_tokens) for measurement in good)
    reported = [
        measurement
        for measurement in good
        if measurement.cached_tokens >= 0 and measurement.prompt_tokens > 0
    ]
    return {
        "requests": len(kept),
        "failed": len(kept) - len(good),
        "duration_s": round(duration_s, 3),
        "requests_per_s": per_s(len(good)),
        "good_requests_per_s": per_s(sum(objective.met(measurement) for measurement in good)),
        "prompt_tokens": prompts,
        "output_tokens": output,
        "output_tokens_per_s": per_s(output),
        "tokens_per_s": per_s(output + prompts),
        "hit_rate": round(
            sum(r.cached_tokens for r in reported) / sum(r.prompt_tokens for r in reported), 4
        )
        if reported
        else None,
        "ttft_ms": _figures_ms([r.ttft_s for r in good]),
        # Measured from sending, as by clients that ignore their own delays.
        "ttft_sent_ms": _figures_ms([r.first_s - r.sent_s for r in good]),
        "token_ms": _figures_ms([r.token_s for r in good]),
        "gap_ms": gaps.figures_ms(),
        "took_ms": _figures_ms([r.took_s for r in good]),
        "late_ms": _figures_ms([r.sent_s - r.due_s for r in kept]),
        "spread": _unevenness(kept),
        "busiest_requests": _busiest(kept),
    }


def _figures_ms(values_s: Iterable[float]) -> dict[str, float]:
    known = sorted(value for value in values_s if not math.isnan(value))
    if not known:
        return {}
    return {"mean": round(statistics.fmean(known) * 1e3, 2)} | {
        _name(q): round(known[min(len(known) - 1, int(q * len(known)))] * 1e3, 2) for q in QUANTILES
    }


def _name(quantile: float) -> str:
    return f"p{quantile * 100:g}"


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


def write(found: Results, path: Path) -> None:
    """Write results as JSON, creating the folder if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")


def read(path: Path) -> Results:
    """Read results; ResultsError if the file is missing or invalid."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Results)
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ResultsError(f"{path}: is not a results file of kubeai bench: {error}") from None
    if found.format != FORMAT:
        raise ResultsError(f"{path}: has format {found.format}, this version reads {FORMAT}")
    return found
