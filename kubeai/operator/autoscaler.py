"""How many replicas each Model should have, from how many requests were active. Pure.

Owns the averages and the patience of scaling down. Time and samples are handed in: every replica
of KubeAI calls :meth:`Autoscaler.observe` each second or so and :meth:`Autoscaler.step` each
interval; the one that leads applies what `step` returns, the others remember the same.

Two averages say how many replicas are wanted; the larger counts, within minReplicas and
maxReplicas:

- long: the mean of the active requests (served and held, of the model and its adapters) over the
  time window, divided by ``targetRequests``, rounded up;
- short: the same over an interval, of the last ``SHORT_INTERVALS`` the lowest. It asks for more
  only where it exceeds what there is by more than a tolerance.

Up at once. Down to the most that was wanted during ``scaleDownDelaySeconds`` (by the short average:
at least ``HOLD`` of the time window), and not before that delay has passed since the replicas last
grew or had too much to do.

When more requests are active than the ready replicas should have, they queue, and their number
says how long that has been so rather than how many replicas are missing. An estimate stands in for
it then: see :meth:`_Track._load`. docs/autoscaling.md tells how the constants were found.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

AVERAGE_DIGITS = 3
SHORT_INTERVALS = 2
TOLERANCE = 0.05  # of the replicas that there are …
TOLERANCE_MIN = 0.25  # … and at least so much of a replica
# Of a replica, that the long average must leave free before one goes; less if the load is steady.
SLACK = 0.1
HOLD = 0.2  # of the time window
DRAIN_S = 120.0  # in which a backlog should be worked off
GROWTH_MAX = 2.0  # times what the ready replicas should have, where it may be no backlog
EARLY_S = 5.0  # an overload that is younger is taken as it stands
SERVICE_S = 10.0  # for which a request may be served while nothing is known


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One Model at one moment."""

    active: int  # requests served or held, over all replicas of KubeAI
    ended: int  # requests that have ended so far; less than before: a peer is gone
    ready: int  # replicas that serve
    replicas: int  # spec.replicas
    target_requests: int
    min_replicas: int
    max_replicas: int | None
    scale_down_delay_s: float
    complete: bool = True  # False: a peer was not heard, so there is at least so much

    @property
    def capacity(self) -> int:
        """Requests that the ready replicas should have at most."""
        return self.ready * self.target_requests


class Decision(msgspec.Struct, frozen=True):
    average: float  # active requests over the window, rounded to AVERAGE_DIGITS
    replicas: int  # what spec.replicas should be


class _Period(msgspec.Struct):
    """What was seen from one step to the next."""

    end_s: float = 0.0
    load: float = 0.0  # sum over the samples
    samples: int = 0
    served_s: float = 0.0  # requests × seconds
    ended: int = 0  # requests
    grown: int = 0  # active requests, from its begin to its end
    mean: float = 0.0  # load, once it has ended


class _Averages(NamedTuple):
    """Of active requests."""

    long: float
    spread: float  # standard deviation of the periods' means in the window
    short: float


class _Most:
    """The largest of the values of a while back."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, int]] = deque()

    def add(self, value: int, now_s: float, while_s: float) -> int:
        self._values.append((now_s, value))
        # A value holds until the next one, so the last one before the while still counts.
        while len(self._values) > 1 and self._values[1][0] <= now_s - while_s:
            self._values.popleft()
        return max(value for _, value in self._values)


class _Track:
    """One Model's past."""

    def __init__(self, sample: Sample, now_s: float) -> None:
        self.restored: float | None = None  # the average before our first sample
        self.periods: deque[_Period] = deque()
        self.long_most = _Most()
        self.short_most = _Most()
        self.busy_s = now_s  # when the replicas last grew or had too much; or were first seen
        self.replicas = sample.replicas
        self._period = _Period()
        self._last = sample  # the last complete one
        self._last_s = now_s
        self._last_load = 0.0
        self._over_s = now_s  # when the ready replicas last had no more than they should
        self._demand = float(sample.active)  # see `_load`

    def observe(self, sample: Sample, now_s: float) -> None:
        if sample.replicas > self.replicas or sample.active > sample.capacity:
            self.busy_s = now_s
        self.replicas = sample.replicas
        if sample.complete:
            self._last_load = self._count(sample, now_s)
            self._last, self._last_s = sample, now_s
        # An incomplete one is no evidence of less than there was.
        self._period.load += max(self._last_load, 0 if sample.complete else sample.active)
        self._period.samples += 1

    def _count(self, sample: Sample, now_s: float) -> float:
        """Add what ended and was served since the last complete sample; the load now."""
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
            still = grown**2 <= ended  # by chance alone, it would have moved more
            self._demand = max(demand, self._demand) if still else demand
        return self._load(sample, service_s)

    def _service_s(self) -> float:
        """How long a request is served: Little's law over the whole window.

        One that was served in ``SERVICE_S`` is added, which only tells as long as there are few.
        """
        periods = (*self.periods, self._period)
        served_s = sum(period.served_s for period in periods)
        return (served_s + SERVICE_S) / (sum(period.ended for period in periods) + 1)

    def _load(self, sample: Sample, service_s: float) -> float:
        """How many would be active with replicas enough, while there are too few of them.

        ``_demand`` is how many would be served now if each that came had been served at once, for
        ``service_s``. It is what is active while an overload is younger than that, for then none
        of them would have ended; and while what is active stands still it does not fall, for then
        clients may come again only because they were answered.

        The others are a backlog, which is allowed the places that work it off in ``DRAIN_S``. But
        as long as there is one, the ready replicas have all to do that they can, and where it
        neither grows nor shrinks it may be clients that wait for their turn before they ask again:
        then up to ``GROWTH_MAX`` times as many.
        """
        backlog = max(0.0, sample.active - self._demand)
        load = self._demand + backlog * min(1.0, service_s / DRAIN_S)
        least = sample.capacity * (GROWTH_MAX if self._flat() else 1.0)
        return min(sample.active, max(load, least))

    def _flat(self) -> bool:
        """Whether the active requests moved less than chance moves those that come."""
        recent = (*list(self.periods)[-1:], self._period)
        grown = sum(period.grown for period in recent)
        return grown**2 <= sum(period.ended for period in recent)

    def averages(self, now_s: float, window_s: float, periods_max: int) -> _Averages:
        """End the period."""
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
        # Not statistics.pstdev: exact in fractions, it was two thirds of a decision's time.
        deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in means) / len(means))
        return _Averages(mean, deviation, short)


class Autoscaler:
    """What one replica of KubeAI remembers of every Model's load. Seconds of any steady clock."""

    def __init__(self, interval_s: float, window_s: float) -> None:
        self._window_s = window_s
        self._periods_max = max(1, round(window_s / interval_s))
        self._tracks: dict[str, _Track] = {}

    def restore(self, averages: Mapping[str, float]) -> None:
        """What a predecessor wrote down stands in for the time before our own first samples.

        For Models that were observed already; so observe first.
        """
        for model, track in self._tracks.items():
            track.restored = averages.get(model)

    def shrunk(self, model: str, replicas: int) -> None:
        """A decision to have fewer was carried out: more than that has grown since."""
        if (track := self._tracks.get(model)) is not None:
            track.replicas = replicas

    def observe(self, samples: Mapping[str, Sample], now_s: float) -> None:
        """Take a sample of every Model; Models that are not among them are forgotten."""
        for gone in self._tracks.keys() - samples.keys():
            del self._tracks[gone]
        for model, sample in samples.items():
            track = self._tracks.get(model)
            if track is None:
                track = self._tracks[model] = _Track(sample, now_s)
            track.observe(sample, now_s)

    def step(self, samples: Mapping[str, Sample], now_s: float) -> dict[str, Decision]:
        """Take the last samples of an interval, and decide."""
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
    """Rounded up; a hair less, so that 3.0000000001 (a sum of fractions) stays 3."""
    return max(0, math.ceil(replicas - 1e-9))


def _bounded(replicas: int, sample: Sample) -> int:
    replicas = max(replicas, sample.min_replicas)
    return replicas if sample.max_replicas is None else min(replicas, sample.max_replicas)
