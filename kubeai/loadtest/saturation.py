"""Whether this program was the bottleneck: figures that its own slowness has touched are doubtful.

Two signs: how much of its core a process used, second by second (a ramp saturates it only at its
end), and how late it was: requests against when they were due, and a timer against its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from kubeai.loadtest.plan import Batch

CPU_SHARE_MAX = 0.85
# One full second is no more than a burst of new connections.
BUSY_WINDOWS_MAX = 0.1
LATE_P99_MAX_S = 0.05
WINDOW_S = 1.0


class Window(NamedTuple):
    """About a second of one process."""

    at_s: float  # its end
    cpu_share: float  # of one core


class Usage(msgspec.Struct):
    """What one worker needed, collected from what it tells."""

    windows: list[Window] = []
    beats_late_s: list[tuple[float, float]] = []  # when, how late
    cpu_s: float = 0.0
    kernel_s: float = 0.0  # of that
    wall_s: float = 0.0
    chunks: int = 0
    _at_s: float = 0.0
    _had_s: float = 0.0

    def note(self, batch: Batch) -> None:
        at_s, cpu_s = batch.at_s, batch.cpu_s
        self.cpu_s, self.kernel_s, self.wall_s = cpu_s, batch.kernel_s, at_s
        self.chunks = batch.chunks
        self.beats_late_s += [(at_s, late) for late in batch.beats_late_s]
        if (wall_s := at_s - self._at_s) >= WINDOW_S:
            self.windows.append(Window(at_s, (cpu_s - self._had_s) / wall_s))
            self._at_s, self._had_s = at_s, cpu_s


def cost(workers: Sequence[Usage]) -> dict[str, float | int | None]:
    """For ``setting["client"]``: CPU a chunk, kernel included; the busiest's share of a core."""
    chunks = sum(one.chunks for one in workers)
    cpu_s = sum(one.cpu_s for one in workers)
    kernel_s = sum(one.kernel_s for one in workers)
    shares = [one.cpu_s / one.wall_s for one in workers if one.wall_s > 0]
    return {
        "cpu_us_per_chunk": round(cpu_s / chunks * 1e6, 2) if chunks else None,
        "kernel_us_per_chunk": round(kernel_s / chunks * 1e6, 2) if chunks else None,
        "cpu_share": round(max(shares, default=0.0), 3),
        "processes": len(workers),
        "chunks": chunks,
    }


def warnings(
    workers: Sequence[Usage], sent_late_s: Sequence[float], *, warm_up_s: float = 0.0
) -> list[str]:
    """What to say of a client that was too slow; nothing of one that was not.

    ``sent_late_s``: of each request, by how much it was sent after it was due.
    """
    found = []
    for number, one in enumerate(workers):
        windows = [window for window in one.windows if window.at_s > warm_up_s]
        busy = [window for window in windows if window.cpu_share > CPU_SHARE_MAX]
        if len(busy) > BUSY_WINDOWS_MAX * len(windows):
            found.append(
                f"process {number} used over {CPU_SHARE_MAX:.0%} of a core in {len(busy)} of "
                f"{len(windows)} seconds: figures are doubtful, give it more --processes"
            )
    beats = [late for one in workers for at_s, late in one.beats_late_s if at_s > warm_up_s]
    for what, late_s in (("requests were sent", sent_late_s), ("timers ran", beats)):
        if late_s and (p99_s := _p99(late_s)) > LATE_P99_MAX_S:
            found.append(
                f"{what} {p99_s * 1e3:.0f} ms late (p99): figures are doubtful, "
                "give it more --processes, or a machine that does less"
            )
    return found


def _p99(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]
