"""The machine's processes, from /proc: descendants, resident memory, and leftovers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from kubeai.local.kubelet.runtime.shim.processes import kill, parent_of

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class ProcessTable:
    """The process tree, from one scan of /proc."""

    def __init__(self) -> None:
        self._children: dict[int, list[int]] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                self._children.setdefault(parent_of(int(entry)), []).append(int(entry))

    def children(self, pid: int) -> list[int]:
        """The processes whose parent is ``pid``."""
        return self._children.get(pid, [])

    def below(self, pid: int) -> list[int]:
        """All descendants of ``pid``."""
        found: list[int] = []
        todo = [pid]
        while todo:
            children = self.children(todo.pop())
            found += children
            todo += children
        return found


def resident_pages(pid: int) -> tuple[int, int]:
    """(private, shared) resident pages; zeros if the process is gone."""
    try:
        fields = Path(f"/proc/{pid}/statm").read_bytes().split()
        resident, shared = int(fields[1]), int(fields[2])
    except (OSError, IndexError, ValueError):
        return 0, 0
    return resident - shared, shared


def kill_leftovers(marker: str, spare: Callable[[int], bool] = lambda pid: False) -> int:
    """Kill all processes whose environment contains ``marker`` (``NAME=value``); returns the count.

    For processes left by an earlier kubelet of the same data directory that was killed together
    with a  Only sees environments that this user can read.
    """
    wanted = marker.encode()
    killed = 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid() or spare(int(entry)):
            continue
        try:
            environment = Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue
        if wanted in environment.split(b"\0"):
            kill(int(entry), signal.SIGKILL)
            killed += 1
    return killed
