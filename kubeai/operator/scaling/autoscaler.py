"""Computes each Model's desired number of replicas from its active requests. Pure.

Owns the averages and the scale-down delay. Time and samples are passed in: every replica of KubeAI
calls :meth:`Autoscaler.observe` about once a second and :meth:`Autoscaler.step` once per interval.
The leader applies what `step` returns; the others only keep the same history.

The desired number of replicas follows from two averages. The larger one counts, within minReplicas
and maxReplicas:

- long: the mean of the active requests (in flight and held, of the model and its adapters) over
  the time window, divided by ``targetRequests``, rounded up;
- short: the same over one interval, using the lowest of the last ``SHORT_INTERVALS``. It scales up
  only if it exceeds the current replicas by more than a tolerance.

Scaling up is immediate. Scaling down goes to the largest number wanted during
``scaleDownDelaySeconds`` (for the short average: at least ``HOLD`` of the time window), and only
once that delay has passed since the replicas last grew or were overloaded.

When more requests are active than the ready replicas should have, requests queue. Their number then
shows how long the overload has lasted rather than how many replicas are missing, so an estimate
replaces it: see :meth:`_Track._load`. docs/explain/autoscaling.md explains how
the constants were found.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

AVERAGE_DIGITS = 3
SHORT_INTERVALS = 2
TOLERANCE = 0.05  # fraction of the current replicas …
TOLERANCE_MIN = 0.25  # … but at least this fraction of one replica
# Fraction of a replica that must be spare by the long average before one is removed; less under a
# steady load.
SLACK = 0.1
HOLD = 0.2  # fraction of the time window
DRAIN_S = 120.0  # target time for working off a backlog
GROWTH_MAX = 2.0  # times the ready replicas' capacity, if the queue may not be a backlog
EARLY_S = 5.0  # an overload younger than this is taken at face value
SERVICE_S = 10.0  # assumed service time while no request has ended


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One Model at one moment."""

    active: int  # requests in flight or held, in all replicas of KubeAI
    ended: int  # requests that have ended so far; a decrease means that a peer is gone
    ready: int  # replicas that serve
    replicas: int  # spec.replicas
    target_requests: int
    min_replicas: int
    max_replicas: int | None
    scale_down_delay_s: float
    complete: bool = True  # False: a peer's numbers are missing, so these are lower bounds

    @property
    def capacity(self) -> int:
        """The most active requests that the ready replicas should have."""
        return self.ready * self.target_requests


class Decision(msgspec.Struct, frozen=True):
    """What one step of the autoscaler concludes for a Model."""

    average: float  # active requests over the window, rounded to AVERAGE_DIGITS
    replicas: int  # what spec.replicas should be


class _Period(msgspec.Struct):
    """Measurements between two steps."""

    end_s: float = 0.0
    load: float = 0.0  # sum over the samples
    samples: int = 0
    served_s: float = 0.0  # requests × seconds
    ended: int = 0  # requests
    grown: int = 0  # change in active requests over the period
    mean: float = 0.0  # mean load, set once the period has ended


class _Averages(NamedTuple):
    """Averages of the active requests."""

    long: float
    spread: float  # standard deviation of the periods' means in the window
    short: float


class _Most:
    """The maximum of the values within a sliding window."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, int]] = deque()

    def add(self, value: int, now_s: float, while_s: float) -> int:
        self._values.append((now_s, value))
        # A value holds until the next one, so the last one before the window still counts.
        while len(self._values) > 1 and self._values[1][0] <= now_s - while_s:
            self._values.popleft()
        return max(value for _, value in self._values)


class _Track:
    """One Model's history."""

    def __init__(self, sample: Sample, now_s: float) -> None:
        self.restored: float | None = None  # the average before our first sample
        self.periods: deque[_Period] = deque()
        self.long_most = _Most()
        self.short_most = _Most()
        self.busy_s = now_s  # when the replicas last grew or were overloaded; or were first seen
        self.replicas = sample.replicas
        self._period = _Period()
        self._last = sample  # the last complete one
        self._last_s = now_s
        self._last_load = 0.0
        self._over_s = now_s  # when the ready replicas were last not overloaded
        self._demand = float(sample.active)  # see `_load`

    def observe(self, sample: Sample, now_s: float) -> None:
        if sample.replicas > self.replicas or sample.active > sample.capacity:
            self.busy_s = now_s
        self.replicas = sample.replicas
        if sample.complete:
            self._last_load = self._count(sample, now_s)
            self._last, self._last_s = sample, now_s
        # An incomplete sample is no evidence that the load has dropped.
        self._period.load += max(self._last_load, 0 if sample.complete else sample.active)
        self._period.samples += 1

    def _count(self, sample: Sample, now_s: float) -> float:
        """Add what ended and was served since the last complete sample. Returns the load now."""
        last, passed_s = self._last, now_s - self._last_s
        ended, grown = sample.ended - last.ended, sample.active - last.active
        known = ended >= 0 and passed_s > 0
        if known:
            self._period.ended += ended
            self._period.grown += grown
            self._period.served_s += passed_s * min(last.active, last.capacity)
        if sample.active <= sample.capacity:
            self._over_s, self._demand = now_s, sample.active
            return sample.active
        service_s = self._service_s()
        if now_s - self._over_s <= max(service_s, EARLY_S):
            self._demand = sample.active
        elif known:
            stay = math.exp(-passed_s / service_s)
            came = max(0, ended + grown) / passed_s
            demand = self._demand * stay + came * service_s * (1 - stay)
            still = grown**2 <= ended  # random arrivals alone would have changed it more
            self._demand = max(demand, self._demand) if still else demand
        return self._load(sample, service_s)

    def _service_s(self) -> float:
        """Mean service time of a request, by Little's law over the whole window.

        One request served in ``SERVICE_S`` is added as a prior. It only matters while few ended.
        """
        periods = (*self.periods, self._period)
        served_s = sum(period.served_s for period in periods)
        return (served_s + SERVICE_S) / (sum(period.ended for period in periods) + 1)

    def _load(self, sample: Sample, service_s: float) -> float:
        """During an overload: how many requests would be active with enough replicas.

        ``_demand`` is the number of requests that would be in flight now if each had been served on
        arrival, for ``service_s``. While the overload is younger than that, it equals the active
        requests, because none of them would have ended yet. While the number of active requests is
        constant it does not fall, because clients may only send a new request after each response.

        The remaining requests are a backlog, which adds the load that works it off in ``DRAIN_S``.
        The result is at least the ready replicas' capacity, since all of it is in use. If the
        number of active requests neither grows nor shrinks, they may be clients that wait for their
        turn before they send again: then it is at least ``GROWTH_MAX`` times the capacity. It never
        exceeds the active requests.
        """
        backlog = max(0.0, sample.active - self._demand)
        load = self._demand + backlog * min(1.0, service_s / DRAIN_S)
        least = sample.capacity * (GROWTH_MAX if self._flat() else 1.0)
        return min(sample.active, max(load, least))

    def _flat(self) -> bool:
        """Whether the active requests changed less than random arrivals would change them."""
        recent = (*list(self.periods)[-1:], self._period)
        grown = sum(period.grown for period in recent)
        return grown**2 <= sum(period.ended for period in recent)

    def averages(self, now_s: float, window_s: float, periods_max: int) -> _Averages:
        """End the current period and return the averages."""
        self._period.end_s, self._period.mean = now_s, self._period.load / self._period.samples
        self.periods.append(self._period)
        self._period = _Period()
        while self.periods[0].end_s <= now_s - window_s:
            self.periods.popleft()
        means = [period.mean for period in self.periods]
        short = min(means[-SHORT_INTERVALS:]) if len(means) >= SHORT_INTERVALS else 0.0
        if self.restored is not None:
            means += [self.restored] * (periods_max - len(means))
        mean = math.fsum(means) / len(means)
        # Not statistics.pstdev: its exact fractions took two thirds of a decision's time.
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in means) / len(means))
        return _Averages(mean, deviation, short)


class Autoscaler:
    """One KubeAI replica's history of all Models' loads. Times are seconds of a monotonic clock."""

    def __init__(self, interval_s: float, window_s: float) -> None:
        self._window_s = window_s
        self._periods_max = max(1, round(window_s / interval_s))
        self._tracks: dict[str, _Track] = {}

    def restore(self, averages: Mapping[str, float]) -> None:
        """Use the previous leader's averages for the time before our own first samples.

        Applies only to Models that have already been observed, so call `observe` first.
        """
        for model, track in self._tracks.items():
            track.restored = averages.get(model)

    def shrunk(self, model: str, replicas: int) -> None:
        """Note that a scale-down was applied, so that a larger number later counts as growth."""
        if (track := self._tracks.get(model)) is not None:
            track.replicas = replicas

    def forget(self, model: str) -> None:
        """Drop a Model's history: it was scaled down for another reason than its load."""
        self._tracks.pop(model, None)

    def observe(self, samples: Mapping[str, Sample], now_s: float) -> None:
        """Record a sample of every Model. Models without a sample are forgotten."""
        for gone in self._tracks.keys() - samples.keys():
            del self._tracks[gone]
        for model, sample in samples.items():
            track = self._tracks.get(model)
            if track is None:
                track = self._tracks[model] = _Track(sample, now_s)
            track.observe(sample, now_s)

    def step(self, samples: Mapping[str, Sample], now_s: float) -> dict[str, Decision]:
        """Record the last samples of an interval, and decide."""
        self.observe(samples, now_s)
        return {
            model: self._decide(self._tracks[model], sample, now_s)
            for model, sample in samples.items()
        }

    def _decide(self, track: _Track, sample: Sample, now_s: float) -> Decision:
        averages = track.averages(now_s, self._window_s, self._periods_max)
        long, spread, short = (value / sample.target_requests for value in averages)
        quick = _up(short - TOLERANCE_MIN)
        if short <= sample.replicas + max(TOLERANCE_MIN, TOLERANCE * sample.replicas):
            quick = min(quick, sample.replicas)
        spared = _up(long + min(SLACK, spread)) if long else 0
        delay_s = sample.scale_down_delay_s
        kept = max(
            track.long_most.add(spared, now_s, delay_s),
            track.short_most.add(quick, now_s, max(delay_s, HOLD * self._window_s)),
        )
        replicas = _bounded(sample.replicas, sample)
        wanted = _bounded(max(_up(long), quick), sample)
        if wanted > replicas:
            replicas = wanted
        elif sample.complete and now_s - track.busy_s >= delay_s:
            replicas = min(replicas, _bounded(kept, sample))
        return Decision(round(averages.long, AVERAGE_DIGITS), replicas)


def _up(replicas: float) -> int:
    """Round up, with a small tolerance so that 3.0000000001 (a rounding error) stays 3."""
    return max(0, math.ceil(replicas - 1e-9))


def _bounded(replicas: int, sample: Sample) -> int:
    replicas = max(replicas, sample.min_replicas)
    return replicas if sample.max_replicas is None else min(replicas, sample.max_replicas)
