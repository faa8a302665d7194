"""Simulates a Model's replicas under load in virtual time, scaled by an autoscaling rule.

Owns the queue, the replicas and the clock; :func:`run` runs one trace against one rule.
Deterministic: the same trace, rule and seed give the same result. Used by bench/autoscaling.py and
the autoscaler's tests.

Every replica serves ``target_requests`` at full speed; further requests wait in one FIFO queue (as
if the gateway always found a replica with a free slot). A new replica serves after ``startup_s``. A
removed replica accepts no more requests and completes its in-flight ones. At zero replicas, the
first request starts one, regardless of the rule.
"""

from __future__ import annotations

import heapq
import math
import random
from array import array
from collections import deque
from itertools import pairwise
from typing import Protocol

import msgspec

from kubeai.simulation.traces import Trace

TICK_S = 1.0  # how often the rule gets an observation


class Observation(msgspec.Struct, frozen=True):
    """What an autoscaler observes of one Model at one time."""

    now_s: float
    active: int  # requests in service and waiting
    ended: int  # requests that have ended so far
    ready: int  # ready replicas
    replicas: int  # ready and starting replicas


class Rule(Protocol):
    """An autoscaler for one Model; it gets an observation every tick."""

    def decide(self, observation: Observation) -> int | None:
        """The desired replicas; None if it makes no decision at this tick."""
        ...


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of the replicas."""

    target_requests: int = 20
    startup_s: float = 60.0
    service_s: float = 8.0  # mean of a lognormal distribution
    service_sigma: float = 0.6  # of its logarithm


class Tick(msgspec.Struct, frozen=True):
    """The state at one tick."""

    now_s: float
    needed: float  # offered concurrency in replicas
    replicas: int
    ready: int
    waiting: int


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """The summary of a run. A wait is the time from a request's arrival to its service."""

    replica_hours: float
    served: int  # requests
    waits_s: float  # total
    waited: int  # requests that waited more than a second
    wait_p99_s: float
    changes: int  # of the number of replicas
    reversals: int  # scale-ups after a scale-down, and vice versa
    too_many: int  # replicas in excess of the maximum needed


class Run(msgspec.Struct):
    """A run's ticks and the waits of its requests."""

    ticks: list[Tick]
    waits_s: array[float]

    def figures(self) -> Figures:
        """Summarize the run."""
        waits = sorted(self.waits_s)
        counts = [tick.replicas for tick in self.ticks]
        steps = [b - a for a, b in pairwise(counts) if a != b]
        needed = max(math.ceil(tick.needed - 0.05) for tick in self.ticks)
        return Figures(
            replica_hours=sum(counts) * TICK_S / 3600,
            served=len(waits),
            waits_s=sum(waits),
            waited=sum(wait > 1.0 for wait in waits),
            wait_p99_s=waits[math.ceil(0.99 * len(waits)) - 1] if waits else 0.0,
            changes=len(steps),
            reversals=sum((a > 0) != (b > 0) for a, b in pairwise(steps)),
            too_many=max(0, max(counts) - needed),
        )


def run(trace: Trace, rule: Rule, fleet: Fleet, seed: int = 0) -> Run:
    """Run the whole trace."""
    world = _World(trace, fleet, random.Random(seed))
    while world.now_s < trace.duration_s:
        world.advance(world.now_s + TICK_S)
        wanted = rule.decide(world.observe())
        if wanted is not None:
            world.scale(wanted)
        world.record_tick()
    return world.run


class _World:
    """The simulated state."""

    def __init__(self, trace: Trace, fleet: Fleet, rng: random.Random) -> None:
        self.now_s = 0.0
        self.run = Run([], array("d"))
        self._trace = trace
        self._fleet = fleet
        self._rng = rng
        # Location parameter of the lognormal distribution with this mean.
        self._mu = math.log(fleet.service_s) - fleet.service_sigma**2 / 2
        self._ready = math.ceil(trace.offered(0.0))  # steady state
        self._starting: deque[float] = deque()  # times at which replicas become ready, sorted
        self._ends: list[float] = []  # heap of end times of requests in service
        self._queue: deque[float] = deque()  # arrival times of waiting requests
        self._ended = 0
        self._next_s = self._arrival_s(0.0)

    def observe(self) -> Observation:
        active = len(self._ends) + len(self._queue)
        return Observation(self.now_s, active, self._ended, self._ready, self._replicas)

    def record_tick(self) -> None:
        needed = self._trace.offered(self.now_s)
        waiting = len(self._queue)
        self.run.ticks.append(Tick(self.now_s, needed, self._replicas, self._ready, waiting))

    @property
    def _replicas(self) -> int:
        return self._ready + len(self._starting)

    def scale(self, wanted: int) -> None:
        while self._replicas < wanted:
            self._starting.append(self.now_s + self._fleet.startup_s)
        while self._replicas > wanted and self._starting:
            self._starting.pop()
        self._ready = min(self._ready, max(0, wanted))

    def advance(self, until_s: float) -> None:
        """Process all events up to that time, in order."""
        while True:
            end_s = self._ends[0] if self._ends else math.inf
            ready_s = self._starting[0] if self._starting else math.inf
            now_s = min(self._next_s, end_s, ready_s)
            if now_s > until_s:
                break
            if now_s == ready_s:
                self._starting.popleft()
                self._ready += 1
            elif now_s == end_s:
                heapq.heappop(self._ends)
                self._ended += 1
                if self._trace.closed and self._clients(now_s) > self._active:
                    self._queue.append(now_s)
            else:
                self._queue.append(now_s)
                self._next_s = self._arrival_s(now_s)
            self._serve(now_s)
        self.now_s = until_s
        if self._trace.closed:
            self._queue.extend([until_s] * max(0, self._clients(until_s) - self._active))
            self._serve(until_s)

    @property
    def _active(self) -> int:
        return len(self._ends) + len(self._queue)

    def _serve(self, now_s: float) -> None:
        if self._queue and not self._replicas:
            self._starting.append(now_s + self._fleet.startup_s)
        places = self._ready * self._fleet.target_requests
        while self._queue and len(self._ends) < places:
            self.run.waits_s.append(now_s - self._queue.popleft())
            service_s = self._rng.lognormvariate(self._mu, self._fleet.service_sigma)
            heapq.heappush(self._ends, now_s + service_s)

    def _clients(self, now_s: float) -> int:
        return round(self._trace.offered(now_s) * self._fleet.target_requests)

    def _arrival_s(self, now_s: float) -> float:
        """The next arrival of an inhomogeneous Poisson process (by thinning)."""
        if self._trace.closed:
            return math.inf
        per_replica = self._fleet.target_requests / self._fleet.service_s
        most = self._trace.most * per_replica
        while now_s < self._trace.duration_s:
            now_s += self._rng.expovariate(most)
            if self._rng.random() * most < self._trace.offered(now_s) * per_replica:
                return now_s
        return math.inf
