"""The kubelet's child processes: shims, helper programs, and orphans that it inherits.

The kubelet is a subreaper: if a shim is killed, its container's processes become children of the
kubelet. Children that this module does not know are such orphans; :func:`kill_orphans` ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time

from kubeai.local.kubelet.runtime.process_table import ProcessTable
from kubeai.local.kubelet.runtime.shim.processes import kill
from kubeai.logs import get_logger
from kubeai.processes import set_subreaper

log = get_logger(__name__)

ORPHAN_KILL_TIMEOUT_S = 5.0
HELPER_TIMEOUT_S = 10.0

# Children that are not orphans: shims and the programs started by run_helper.
_known: set[int] = set()
_is_subreaper = False


def become_subreaper() -> None:
    """Inherit, and kill, the orphans of killed shims.

    Only for a process all of whose other children are known to this module.
    """
    global _is_subreaper
    set_subreaper(True)
    _is_subreaper = True


def add_child(pid: int) -> None:
    """Mark a new child as known. Call `wait_for_exit` to reap it."""
    _known.add(pid)


async def wait_for_exit(pid: int) -> None:
    """Wait for a child process and reap it."""
    loop = asyncio.get_running_loop()
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        _known.discard(pid)
        return
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    _reap(pid)
    _known.discard(pid)


def _reap(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


async def kill_orphans() -> None:
    """Kill the processes inherited from a dead shim, with their descendants.

    Does nothing before :func:`become_subreaper`: other children may not be known then.
    """
    if not _is_subreaper:
        return
    give_up = time.monotonic() + ORPHAN_KILL_TIMEOUT_S
    while time.monotonic() < give_up:
        table = ProcessTable()
        orphans = [pid for pid in table.children(os.getpid()) if pid not in _known]
        if not orphans:
            return
        for pid in orphans:
            for descendant in (pid, *table.below(pid)):
                kill(descendant, signal.SIGKILL)
        for pid in orphans:
            _reap(pid)
        await asyncio.sleep(0.005)
    log.error("failed to kill orphans", pids=orphans)


async def run_helper(
    argv: list[str], timeout_s: float = HELPER_TIMEOUT_S, *, with_stderr: bool = False
) -> tuple[int, str]:
    """Run a short program; its exit code (-1: could not be run, or timeout) and its output."""
    try:
        # Started on this thread, so that kill_orphans never sees it before it is known.
        popen = subprocess.Popen(  # noqa: ASYNC220
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if with_stderr else subprocess.DEVNULL,
            cwd="/",
        )
    except OSError:
        return -1, ""
    _known.add(popen.pid)
    try:
        output, _ = await asyncio.to_thread(popen.communicate, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return -1, ""
    finally:
        if popen.returncode is None:
            popen.kill()
            await asyncio.to_thread(popen.communicate)
        _known.discard(popen.pid)
    return popen.returncode, output.decode(errors="replace")
