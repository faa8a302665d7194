"""Detects whether the load generator itself was the bottleneck, which makes results unreliable.

Two signals: each process's CPU use per second (a ramp saturates it only at the end), and lateness:
of requests after their due time, and of a periodic timer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from kubeai.loadtest.messages import Batch

CPU_SHARE_MAX = 0.85
# Tolerated share of busy seconds: opening many connections can fill one.
BUSY_WINDOWS_MAX = 0.1
LATE_P99_MAX_S = 0.05
WINDOW_S = 1.0


class Window(NamedTuple):
    """One process's CPU use over about one second."""

    at_s: float  # its end
    cpu_share: float  # of one core


class GeneratorUsage(msgspec.Struct):
    """One generator's resource use, collected from its batches."""

    windows: list[Window] = []
    beats_late_s: list[tuple[float, float]] = []  # when, how late
    cpu_s: float = 0.0
    kernel_s: float = 0.0  # part of `cpu_s`
    wall_s: float = 0.0
    chunks: int = 0
    _at_s: float = 0.0
    _had_s: float = 0.0

    def note(self, batch: Batch) -> None:
        """Add a batch of the generator."""
        at_s, cpu_s = batch.at_s, batch.cpu_s
        self.cpu_s, self.kernel_s, self.wall_s = cpu_s, batch.kernel_s, at_s
        self.chunks = batch.chunks
        self.beats_late_s += [(at_s, late) for late in batch.beats_late_s]
        if (wall_s := at_s - self._at_s) >= WINDOW_S:
            self.windows.append(Window(at_s, (cpu_s - self._had_s) / wall_s))
            self._at_s, self._had_s = at_s, cpu_s


def cost(generators: Sequence[GeneratorUsage]) -> dict[str, float | int | None]:
    """For ``setting["client"]``: CPU time per chunk, and the busiest process's share of a core."""
    chunks = sum(one.chunks for one in generators)
    cpu_s = sum(one.cpu_s for one in generators)
    kernel_s = sum(one.kernel_s for one in generators)
    shares = [one.cpu_s / one.wall_s for one in generators if one.wall_s > 0]
    return {
        "cpu_us_per_chunk": round(cpu_s / chunks * 1e6, 2) if chunks else None,
        "kernel_us_per_chunk": round(kernel_s / chunks * 1e6, 2) if chunks else None,
        "cpu_share": round(max(shares, default=0.0), 3),
        "processes": len(generators),
        "chunks": chunks,
    }


def warnings(
    generators: Sequence[GeneratorUsage], sent_late_s: Sequence[float], *, warm_up_s: float = 0.0
) -> list[str]:
    """Warnings about a load generator that was too slow.

    ``sent_late_s``: for each request, how long after its due time it was sent.
    """
    found = []
    for number, one in enumerate(generators):
        windows = [window for window in one.windows if window.at_s > warm_up_s]
        busy = [window for window in windows if window.cpu_share > CPU_SHARE_MAX]
        if len(busy) > BUSY_WINDOWS_MAX * len(windows):
            found.append(
                f"process {number} used over {CPU_SHARE_MAX:.0%} of a core in {len(busy)} of "
                f"{len(windows)} seconds: results are unreliable, increase --processes"
            )
    beats = [late for one in generators for at_s, late in one.beats_late_s if at_s > warm_up_s]
    for what, late_s in (("requests were sent", sent_late_s), ("timers ran", beats)):
        if late_s and (p99_s := _p99(late_s)) > LATE_P99_MAX_S:
            found.append(
                f"{what} {p99_s * 1e3:.0f} ms late (p99): results are unreliable, "
                "increase --processes or use a less busy machine"
            )
    return found


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]
