"""How many replicas each Model should have, from how many requests were active. Pure.

Owns the averages and the patience of scaling down. Time and samples are handed in: the operator
calls :meth:`Autoscaler.step` every interval while it leads and applies what it returns.

The rule: the mean of the active requests (served and held, of the model and its adapters) over
the time window, divided by ``targetRequests``, rounded up, within minReplicas and maxReplicas. Up
at once; down to the most that was wanted during the last ``scaleDownDelaySeconds``, and not
before that delay has passed since the replicas last grew.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import msgspec

AVERAGE_DIGITS = 3


class Sample(msgspec.Struct, frozen=True):
    """One Model at one moment."""

    active: int  # requests served or held
    replicas: int  # spec.replicas
    target_requests: int
    min_replicas: int
    max_replicas: int | None
    scale_down_delay_s: float


class Decision(msgspec.Struct, frozen=True):
    average: float  # active requests over the window, rounded to AVERAGE_DIGITS
    replicas: int  # what spec.replicas should be


class _Track(msgspec.Struct):
    samples: deque[tuple[float, float]]  # (time, active requests)
    wanted: deque[tuple[float, int]]  # (time, replicas by the average), as far back as needed
    replicas: int
    grown_s: float  # when the replicas last grew, or were first seen


class Autoscaler:
    """One leader's memory of the load of every Model. Times are seconds of any steady clock."""

    def __init__(self, interval_s: float, window_s: float) -> None:
        self._interval_s = interval_s
        self._window_s = window_s
        self._tracks: dict[str, _Track] = {}

    def restore(self, averages: Mapping[str, float], now_s: float) -> None:
        """Begin as if each average had held for the whole window (a predecessor wrote it down)."""
        self._tracks.clear()
        count = max(1, round(self._window_s / self._interval_s))
        for model, average in averages.items():
            times = [now_s - self._interval_s * i for i in range(count, 0, -1)]
            samples = deque((time_s, average) for time_s in times)
            self._tracks[model] = _Track(samples, deque(), -1, now_s)

    def step(self, samples: Mapping[str, Sample], now_s: float) -> dict[str, Decision]:
        """Take one sample of every Model; models that are not among them are forgotten."""
        for gone in self._tracks.keys() - samples.keys():
            del self._tracks[gone]
        return {model: self._decide(model, sample, now_s) for model, sample in samples.items()}

    def shrunk(self, model: str, replicas: int) -> None:
        """A decision to have fewer was carried out: more than that has grown since."""
        if (track := self._tracks.get(model)) is not None:
            track.replicas = replicas

    def _decide(self, model: str, sample: Sample, now_s: float) -> Decision:
        track = self._tracks.get(model)
        if track is None:
            track = _Track(deque(), deque(), sample.replicas, now_s)
            self._tracks[model] = track
        if sample.replicas > track.replicas:
            track.grown_s = now_s
        track.replicas = sample.replicas

        track.samples.append((now_s, sample.active))
        while track.samples[0][0] <= now_s - self._window_s:
            track.samples.popleft()
        average = sum(value for _, value in track.samples) / len(track.samples)
        # a hair less, so that 3.0000000001 (a sum of fractions that were restored) stays 3
        wanted = _bounded(math.ceil(average / sample.target_requests - 1e-9), sample)

        track.wanted.append((now_s, wanted))
        # What was wanted holds until the next step, so the last one before the delay still counts.
        since_s = now_s - sample.scale_down_delay_s
        while len(track.wanted) > 1 and track.wanted[1][0] <= since_s:
            track.wanted.popleft()
        return Decision(round(average, AVERAGE_DIGITS), self._settle(track, sample, wanted, now_s))

    def _settle(self, track: _Track, sample: Sample, wanted: int, now_s: float) -> int:
        within = _bounded(sample.replicas, sample)
        if wanted >= within:
            return wanted
        if now_s - track.grown_s < sample.scale_down_delay_s:
            return within
        return min(within, max(count for _, count in track.wanted))


def _bounded(replicas: int, sample: Sample) -> int:
    replicas = max(replicas, sample.min_replicas)
    return replicas if sample.max_replicas is None else min(replicas, sample.max_replicas)
