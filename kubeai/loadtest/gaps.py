"""Times between tokens into the buckets of `records.Gaps`, a stream at a time.

`Gaps.add` takes a logarithm a gap, 1 µs; here the buckets' bounds are searched in C, 0.3 µs.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from functools import partial

from kubeai.simulation.records import GAP_FLOOR_S, GAP_STEP, Gaps

BUCKETS = 1400  # up to 90 days; what is longer falls into the last
_BOUNDS_S = [GAP_FLOOR_S * GAP_STEP**bucket for bucket in range(1, BUCKETS)]
_bucket = partial(bisect_right, _BOUNDS_S)


class GapCounts:
    """Gaps of streams, until they are taken."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._total_s = 0.0

    def add(self, times_s: Sequence[float]) -> None:
        """``times_s``: when each token of a stream came, in order."""
        if len(times_s) > 1:
            self._counts.update(map(_bucket, map(operator.sub, times_s[1:], times_s)))
            self._total_s += times_s[-1] - times_s[0]

    def take(self) -> Gaps:
        taken = Gaps(dict(self._counts), self._total_s)
        self.__init__()  # type: ignore[misc]
        return taken
