"""Starts and kills processes; finds descendants in /proc."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time

EXEC_KILL_MAX_PASSES = 20
KILL_TIMEOUT_S = 30.0  # for processes that SIGKILL does not end (uninterruptible in a driver)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
DEFAULT_SIGNALS = (
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
)

libc = ctypes.CDLL(None, use_errno=True)


def descendants(root: int) -> list[int]:
    """Every process below ``root``, from one scan of /proc."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry[0] in "123456789":
            parent = parent_of(int(entry))
            if parent:
                children.setdefault(parent, []).append(int(entry))
    found: list[int] = []
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def parent_of(pid: int) -> int:
    """The parent of ``pid``; 0 if it is gone."""
    return _stat(pid, 1)


def _stat(pid: int, field: int) -> int:
    """A field of /proc/<pid>/stat, counted after the name; 0 if the process is gone."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        return int(os.read(fd, 1024).rpartition(b")")[2].split()[field])
    except (OSError, IndexError, ValueError):
        return 0
    finally:
        os.close(fd)


def kill_session(leader: int) -> None:
    """SIGKILL a command that is not reaped yet, with its descendants and its whole session."""
    killed: set[int] = set()
    for _ in range(EXEC_KILL_MAX_PASSES):  # processes may have forked since the last scan
        found = {leader, *descendants(leader)}
        for pid in descendants(os.getpid()):
            if _stat(pid, 3) == leader:
                found.update((pid, *descendants(pid)))
        if found <= killed:
            return
        for pid in found - killed:
            kill(pid, signal.SIGKILL)
        killed |= found


def kill(pid: int, number: int) -> None:
    """Send a signal, if the process still exists and may be signalled."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        pass  # it runs as another user (a setuid program); only that user can kill it


def spawn(
    argv: list[str], env: dict[str, str], cwd: str, stdin: int, stdout: int, stderr: int
) -> int:
    """Fork and exec in a new session; OSError if the exec or the chdir fails."""
    parent = os.getpid()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        failure = os.read(reader, 4096)
        os.close(reader)
        if not failure:
            return pid
        os.waitpid(pid, 0)
        number, _, path = failure.partition(b" ")
        raise OSError(int(number), os.strerror(int(number)), path.decode())
    place = cwd
    try:
        os.setsid()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(127)  # the shim exited before prctl took effect
        for source, target in ((stdin, 0), (stdout, 1), (stderr, 2)):
            os.dup2(source, target)
        for ignored in DEFAULT_SIGNALS:
            signal.signal(ignored, signal.SIG_DFL)
        os.chdir(cwd)
        place = argv[0]
        os.execvpe(argv[0], argv, env)
    except OSError as error:
        os.write(writer, b"%d %b" % (error.errno or 0, place.encode()))
    except BaseException:
        os.write(writer, b"%d %b" % (errno.EINVAL, place.encode()))
    os._exit(127)


def kill_all() -> int:
    """SIGKILL descendants until none is left; returns how many survived the timeout."""
    pause_s, give_up = 0.001, time.monotonic() + KILL_TIMEOUT_S
    while True:
        left = descendants(os.getpid())
        for pid in left:
            kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return 0
        if time.monotonic() > give_up:
            return len(left)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)
