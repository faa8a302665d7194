"""Progress of a run: one updating line on a terminal, otherwise a new line every 5 seconds."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from types import TracebackType
from typing import Any

from kubeai.loadtest.messages import Batch

PLAIN_INTERVAL_S = 5.0
RECENT_S = 5.0


class Progress:
    """Pass the generators' batches to `note` and call `show` periodically. A context manager."""

    def __init__(self) -> None:
        self._done = self._failed = 0
        self._latest: dict[int, Batch] = {}
        self._recent: deque[tuple[float, float]] = (
            deque()
        )  # when it was reported, time to first token
        self._tokens: deque[tuple[float, int]] = deque([(0.0, 0)])  # time, total tokens by then
        self._shown_s = 0.0
        self._status: Any = None
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True, highlight=False).status("starting")

    def __enter__(self) -> Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._status is not None:
            self._status.stop()

    def note(self, generator: int, batch: Batch) -> None:
        """Add a batch of a generator."""
        self._latest[generator] = batch
        self._done += len(batch.measurements)
        for measurement in batch.measurements:
            if measurement.error:
                self._failed += 1
            elif not math.isnan(measurement.first_s):
                self._recent.append((batch.at_s, measurement.ttft_s))

    def gone(self, generator: int) -> None:
        """This generator has exited: its in-flight requests are lost."""
        if (latest := self._latest.get(generator)) is not None:
            latest.in_flight = 0

    def line(self, now_s: float) -> str:
        """Counts for the whole run; rates and latencies for the last `RECENT_S` seconds."""
        tokens = sum(batch.tokens for batch in self._latest.values())
        self._tokens.append((now_s, tokens))
        while len(self._tokens) > 2 and self._tokens[1][0] <= now_s - RECENT_S:
            self._tokens.popleft()
        while self._recent and self._recent[0][0] < now_s - RECENT_S:
            self._recent.popleft()
        then_s, had = self._tokens[0]
        per_s = (tokens - had) / (now_s - then_s) if now_s > then_s else 0.0
        in_flight = sum(batch.in_flight for batch in self._latest.values())
        parts = [
            f"{max(0.0, now_s):.0f} s",
            f"{self._done:,} done",
            f"{self._failed:,} failed",
            f"{in_flight:,} in flight",
            f"{per_s:,.0f} tokens/s",
        ]
        if self._recent:
            median_s = statistics.median(ttft_s for _, ttft_s in self._recent)
            parts.append(f"first token after {median_s * 1e3:,.0f} ms")
        return ", ".join(parts)

    def show(self, now_s: float) -> None:
        """Update the line on a terminal, or print one if it is time."""
        if self._status is not None:
            self._status.update(self.line(now_s))
        elif now_s - self._shown_s >= PLAIN_INTERVAL_S:
            self._shown_s = now_s
            print(self.line(now_s), file=sys.stderr, flush=True)
