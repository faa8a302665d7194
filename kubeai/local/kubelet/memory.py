"""Memory limits: the tree's resident memory is looked at, and who is over its limit is told.

The kernel's own limits need a delegated cgroup, which an ordinary user seldom has; polling needs
nothing. A tree that grows by gigabytes within ``POLL_INTERVAL_S`` can pass its limit for as long.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import msgspec

from kubeai.local.kubelet.process import Process, ProcessTable

POLL_INTERVAL_S = 1.0


class _Watched(msgspec.Struct, eq=False):
    process: Process
    limit_bytes: int
    over: Callable[[int, int], None]


class MemoryGuard:
    """One for a kubelet: one scan of /proc an interval for all containers that have a limit."""

    def __init__(self, poll_interval_s: float = POLL_INTERVAL_S) -> None:
        self._poll_interval_s = poll_interval_s
        self._watched: list[_Watched] = []
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def watching(
        self, process: Process, limit_bytes: int | None, over: Callable[[int, int], None]
    ) -> Iterator[None]:
        """Within it, ``over(used_bytes, limit_bytes)`` is called at each look that finds more."""
        if limit_bytes is None:
            yield
            return
        watched = _Watched(process, limit_bytes, over)
        self._watched.append(watched)
        if self._timer is None:
            self._look_later()
        try:
            yield
        finally:
            self._watched.remove(watched)

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._poll_interval_s, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._watched:
            return
        table = ProcessTable()
        for watched in self._watched:
            used_bytes = watched.process.memory_bytes(table)
            if used_bytes > watched.limit_bytes:
                watched.over(used_bytes, watched.limit_bytes)
        self._look_later()
