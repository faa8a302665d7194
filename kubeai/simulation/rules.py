"""Other autoscalers' rules, to compare ours with. Pure; each looks at one Model.

Both are written from what they are documented to do, with the defaults that they come with.
"""

from __future__ import annotations

import math
from collections import deque

from kubeai.simulation.fleet import Observation


class MovingAverage:
    """KubeAI as it was before this project.

    Every interval the mean of the last ``window_s`` (zeros before the first sample), divided by
    the target, rounded up. Up at once; down once less was wanted ``scale_down_delay_s / interval``
    times one after the other, a count that only begins anew when less is wanted no more.
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

    def see(self, seen: Observation) -> int | None:
        if seen.now_s < self._next_s:
            return None
        self._next_s += self._interval_s
        self._samples.append(seen.active)
        wanted = math.ceil(sum(self._samples) / len(self._samples) / self._target)
        if wanted >= seen.replicas:
            self._lower = 0
            return wanted
        if self._lower < self._lower_needed:
            self._lower += 1
            return None
        return wanted


class Knative:
    """Knative's pod autoscaler (KPA) on concurrency.

    Every 2 s it compares the mean over a minute (stable) and over 6 s (panic) with the target, of
    which it wants only ``utilization`` used. When the short one asks for twice the ready replicas
    it panics: until that has not been so for a minute, the larger of the two counts, and nothing
    goes down. At most it grows 1000-fold and halves at a time. The last replica stays for the
    grace period after a minute without a request.
    """

    TICK_S, STABLE_S, PANIC_S, GRACE_S = 2.0, 60.0, 6.0, 30.0
    PANIC_THRESHOLD, UP_RATE_MAX, DOWN_RATE_MAX = 2.0, 1000.0, 2.0

    def __init__(self, target_requests: int, *, utilization: float = 0.7) -> None:
        self._target = target_requests * utilization
        self._samples: deque[int] = deque(maxlen=int(self.STABLE_S))  # one a second
        self._next_s = self.TICK_S
        self._panic_s: float | None = None  # when it last had reason to
        self._panic_most = 0
        self._idle_s: float | None = None  # since when nothing is wanted

    def see(self, seen: Observation) -> int | None:
        self._samples.append(seen.active)
        if seen.now_s < self._next_s:
            return None
        self._next_s += self.TICK_S
        ready = max(1, seen.ready)
        stable = self._wanted(int(self.STABLE_S), ready)
        panic = self._wanted(int(self.PANIC_S), ready)
        wanted = self._panicked(stable, panic, ready, seen.now_s)
        return self._last_stays(wanted, seen.now_s)

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
