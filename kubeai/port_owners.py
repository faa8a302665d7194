"""Who listens on a TCP port of this machine, for error messages and `kubeai doctor`.

Read from ``/proc``: ``/proc/net/tcp`` and ``tcp6`` have each socket's inode and owner, and
``/proc/<pid>/fd`` the processes that have it open. The descriptors of other users' processes are
only readable for root; for these, the user is named instead of the process. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

_LISTEN = "0A"  # TCP_LISTEN, include/net/tcp_states.h


def port_owner(port: int, proc: Path = Path("/proc")) -> str:
    """Describe what listens on a port, like "nginx (process 812)"; empty if it is not known."""
    for inode, uid in _listeners(port, proc):
        for process in _processes_with(f"socket:[{inode}]", proc):
            return f"{_name(process)} (process {process.name})"
        return f"a process of the user {_user(uid)}"
    return ""


def _listeners(port: int, proc: Path) -> Iterator[tuple[str, int]]:
    """The inode and the owner's user ID of each socket that listens on a port."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            for line in (proc / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                listens = fields[3] == _LISTEN
                if listens and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9], int(fields[7])


def _processes_with(link: str, proc: Path) -> Iterator[Path]:
    for process in sorted(proc.glob("[0-9]*"), key=lambda path: int(path.name)):
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                if os.readlink(descriptor) == link:
                    yield process
                    break


def _name(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "comm").read_text(errors="replace").strip()
    return "a program"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
