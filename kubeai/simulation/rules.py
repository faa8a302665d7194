"""Other autoscalers' rules, for comparison with ours. Pure; each handles one Model.

Both follow the autoscaler's documentation and use its defaults.
"""

from __future__ import annotations

import math
from collections import deque

from kubeai.simulation.fleet import Observation


class MovingAverage:
    """The Go version of KubeAI.

    Every interval, the desired replicas are the mean over the last ``window_s`` (zeros before the
    first sample) divided by the target, rounded up. Scales up immediately; scales down after the
    desired replicas were lower ``scale_down_delay_s / interval`` consecutive times, a count that is
    reset only when they are no longer lower.
    """

    def __init__(
        self,
        target_requests: int,
        *,
        interval_s: float = 10.0,
        window_s: float = 600.0,
        scale_down_delay_s: float = 30.0,
        average: float = 0.0,
    ) -> None:
        count = round(window_s / interval_s)
        self._target = target_requests
        self._interval_s = interval_s
        self._samples = deque([average] * count, maxlen=count)
        self._lower_needed = math.ceil(scale_down_delay_s / interval_s)
        self._lower = 0
        self._next_s = interval_s

    def decide(self, observation: Observation) -> int | None:
        """The desired replicas, at most once per interval."""
        if observation.now_s < self._next_s:
            return None
        self._next_s += self._interval_s
        self._samples.append(observation.active)
        wanted = math.ceil(sum(self._samples) / len(self._samples) / self._target)
        if wanted >= observation.replicas:
            self._lower = 0
            return wanted
        if self._lower < self._lower_needed:
            self._lower += 1
            return None
        return wanted


class Knative:
    """Knative's pod autoscaler (KPA) on concurrency.

    Every 2 s it compares the mean over 60 s (stable window) and over 6 s (panic window) with
    ``utilization`` × the target. If the panic window asks for twice the ready replicas, it enters
    panic mode until that has not been the case for a minute: the larger value applies and it does
    not scale down. One decision grows at most 1000-fold or halves. The last replica is kept for a
    minute without requests plus the grace period.
    """

    TICK_S, STABLE_S, PANIC_S, GRACE_S = 2.0, 60.0, 6.0, 30.0
    PANIC_THRESHOLD, UP_RATE_MAX, DOWN_RATE_MAX = 2.0, 1000.0, 2.0

    def __init__(self, target_requests: int, *, utilization: float = 0.7) -> None:
        self._target = target_requests * utilization
        self._samples: deque[int] = deque(maxlen=int(self.STABLE_S))  # one per second
        self._next_s = self.TICK_S
        self._panic_s: float | None = None  # when the panic threshold was last exceeded
        self._panic_most = 0
        self._idle_s: float | None = None  # since when zero replicas are desired

    def decide(self, observation: Observation) -> int | None:
        """The desired replicas, every 2 s."""
        self._samples.append(observation.active)
        if observation.now_s < self._next_s:
            return None
        self._next_s += self.TICK_S
        ready = max(1, observation.ready)
        stable = self._wanted(int(self.STABLE_S), ready)
        panic = self._wanted(int(self.PANIC_S), ready)
        wanted = self._panicked(stable, panic, ready, observation.now_s)
        return self._last_stays(wanted, observation.now_s)

    def _wanted(self, seconds: int, ready: int) -> int:
        recent = list(self._samples)[-seconds:]
        wanted = math.ceil(sum(recent) / len(recent) / self._target)
        least, most = math.floor(ready / self.DOWN_RATE_MAX), math.ceil(ready * self.UP_RATE_MAX)
        return min(max(wanted, least), most)

    def _panicked(self, stable: int, panic: int, ready: int, now_s: float) -> int:
        if panic / ready >= self.PANIC_THRESHOLD:
            self._panic_s = now_s
        elif self._panic_s is not None and now_s - self._panic_s > self.STABLE_S:
            self._panic_s, self._panic_most = None, 0
        if self._panic_s is None:
            return stable
        self._panic_most = max(self._panic_most, stable, panic)
        return self._panic_most

    def _last_stays(self, wanted: int, now_s: float) -> int:
        if wanted:
            self._idle_s = None
            return wanted
        if self._idle_s is None:
            self._idle_s = now_s
        return 0 if now_s - self._idle_s >= self.GRACE_S else 1
