"""Memory limits, enforced by polling the resident memory of each container's process tree.

The kernel's own limits require a delegated cgroup, which ordinary users seldom have. Between polls,
a process tree can exceed its limit for up to ``POLL_INTERVAL_S``.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import msgspec

from kubeai.local.kubelet.runtime.process import Process
from kubeai.local.kubelet.runtime.process_table import ProcessTable

POLL_INTERVAL_S = 1.0


class _Watched(msgspec.Struct, eq=False):
    process: Process
    limit_bytes: int
    over: Callable[[int, int], None]


class MemoryGuard:
    """One per kubelet: scans /proc once per interval for all containers with a limit."""

    def __init__(self, poll_interval_s: float = POLL_INTERVAL_S) -> None:
        self._poll_interval_s = poll_interval_s
        self._watched: list[_Watched] = []
        self._timer: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def watching(
        self, process: Process, limit_bytes: int | None, over: Callable[[int, int], None]
    ) -> Iterator[None]:
        """Within it, ``over(used_bytes, limit_bytes)`` is called at each poll over the limit."""
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
