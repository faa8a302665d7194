"""Supervises one container: a small process between the kubelet and the container's main process.

Owns the container's processes (all descendants, including daemons, as their subreaper), its private
view of the file system, and its log. Promises: when the main process ends, the kubelet requests it,
or the kubelet exits (EOF on the control socket), every descendant is killed before this process
exits. If this process itself is SIGKILLed, the kernel kills the main process (PR_SET_PDEATHSIG),
and the kubelet inherits and kills the others.

Started by process.py with ``python -I -S`` and the descriptors of two sockets. Its start is part of
a model's cold start, so it imports little, and nothing of kubeai. Messages on the control socket
are marshalled in both directions (both ends are the same interpreter), each preceded by its length
in 4 bytes, network order. Before each "exec" the kubelet passes the command's stdin, stdout and
stderr over the second socket, so that command output does not go through this process:

to the shim     ("start", {argv, env, cwd, log, log_max_bytes, mounts, root, namespace})
                ("signal", number) · ("kill",) · ("exec", id, argv, env) · ("exec-kill", id)
from the shim   ("started", pid) | ("failed", reason, message), once
                ("exec", id, wait status or -1, why it was not started)
                ("exited", wait status, ns since the epoch, survivors), last
"""

from __future__ import annotations

import ctypes
import errno
import marshal
import os
import select
import signal
import socket
import sys
import time
from typing import Any

LOG_LINE_MAX_BYTES = 16 << 10  # longer lines are written in parts, tagged P, as in CRI
EXEC_STREAMS = 3
EXEC_KILL_MAX_PASSES = 20
KILL_TIMEOUT_S = 30.0  # for processes that SIGKILL does not end (uninterruptible in a driver)
DRAIN_MAX_READS = 64  # per pipe, for data left after all its writers have exited
MIRROR_MAX_ENTRIES = 5000

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC = 0x1, 0x20, 0x1000, 0x4000
MS_UNBINDABLE, MS_PRIVATE, MS_RELATIME = 1 << 17, 1 << 18, 1 << 21
MNT_DETACH = 2
# Flags that a read-only remount must repeat: statvfs's f_flag (left) and mount's (right).
KEPT_FLAGS = ((2, 2), (4, 4), (8, 8), (1024, 1024), (2048, 2048), (4096, MS_RELATIME))
DEFAULT_SIGNALS = (
    signal.SIGPIPE,
    signal.SIGXFSZ,
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
)

libc = ctypes.CDLL(None, use_errno=True)


class ContainerError(Exception):
    """The container cannot be started; ``reason`` becomes the reason in its status."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Log:
    """A container's log in CRI format: ``<time> stdout|stderr F|P <line>``.

    At ``max_bytes`` the file is renamed to ``<name>.1``, replacing an older one, so a log takes at
    most twice that.
    """

    def __init__(self, path: str, max_bytes: int) -> None:
        directory, self._name = os.path.split(path)
        # By descriptor, because the private mounts may hide the directory's path.
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._max_bytes = max_bytes
        self._rest = {b"stdout": b"", b"stderr": b""}
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._name, flags, 0o600, dir_fd=self._directory)
        self._size = os.fstat(self._file).st_size

    def write(self, stream: bytes, data: bytes) -> None:
        """Append output; an incomplete line is kept until its newline or the maximum length."""
        lines = (self._rest[stream] + data).split(b"\n")
        rest = lines.pop()
        now = _timestamp()
        records: list[bytes] = []
        for line in lines:
            rest_of_line = self._cut(records, now, stream, line)
            records.append(b"%b %b F %b\n" % (now, stream, rest_of_line))
        self._rest[stream] = self._cut(records, now, stream, rest)
        self._append(records)

    def finish(self) -> None:
        """Write incomplete lines."""
        now = _timestamp()
        for stream, rest in self._rest.items():
            if rest:
                self._append([b"%b %b F %b\n" % (now, stream, rest)])
                self._rest[stream] = b""

    @staticmethod
    def _cut(records: list[bytes], now: bytes, stream: bytes, line: bytes) -> bytes:
        while len(line) > LOG_LINE_MAX_BYTES:
            records.append(b"%b %b P %b\n" % (now, stream, line[:LOG_LINE_MAX_BYTES]))
            line = line[LOG_LINE_MAX_BYTES:]
        return line

    def _append(self, records: list[bytes]) -> None:
        block: list[bytes] = []
        size = self._size
        for record in records:
            if size and size + len(record) > self._max_bytes:
                self._write(block)
                self._rotate()
                block, size = [], 0
            block.append(record)
            size += len(record)
        self._write(block)

    def _write(self, block: list[bytes]) -> None:
        try:  # noqa: SIM105 - contextlib would be one more import at each start
            self._size += os.write(self._file, b"".join(block))
        except OSError:
            pass  # a full disk loses log lines, not the engine

    def _rotate(self) -> None:
        os.close(self._file)
        os.rename(
            self._name, self._name + ".1", src_dir_fd=self._directory, dst_dir_fd=self._directory
        )
        self._open()


def _timestamp() -> bytes:
    second, nanosecond = divmod(time.time_ns(), 1_000_000_000)
    return b"%b.%09dZ" % (
        time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode(),
        nanosecond,
    )


# -- processes -----------------------------------------------------------------------------------


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


class Shim:
    """The event loop over the control socket, the pipes and SIGCHLD."""

    def __init__(self, control: int, handover: int) -> None:
        self._control = control
        self._handover = socket.socket(fileno=handover)
        self._handover.setblocking(False)
        self._received = b""
        self._main = 0
        self._exited: tuple[int, int] | None = None
        self._log: Log | None = None
        self._env: dict[str, str] = {}
        self._cwd = "/"
        self._streams: dict[int, bytes] = {}
        self._execs: dict[int, int] = {}  # a command's pid → the kubelet's id for it
        self._null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._wakeup = self._signals()

    def _signals(self) -> int:
        reader, writer = os.pipe()
        for fd in (reader, writer):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # only the kubelet decides
        self._poll.register(reader, select.POLLIN)
        return reader

    def run(self) -> None:
        while self._exited is None:
            for fd, _ in self._poll.poll():
                if fd == self._control:
                    self._receive()
                elif fd == self._wakeup:
                    _read(fd)
                    self._reap()
                elif fd in self._streams:
                    self._copy(fd)
        status, finished_ns = self._exited
        survivors = kill_all()
        self._drain()
        self._send(("exited", status, finished_ns, survivors))

    # -- the kubelet -----------------------------------------------------------------------------

    def _receive(self) -> None:
        data = _read(self._control)
        if not data:
            kill_all()
            self._drain()
            os._exit(0)
        self._received += data
        while len(self._received) >= 4:
            size = int.from_bytes(self._received[:4], "big")
            if len(self._received) < 4 + size:
                return
            message = marshal.loads(self._received[4 : 4 + size])
            self._received = self._received[4 + size :]
            self._obey(message)

    def _obey(self, message: tuple[Any, ...]) -> None:
        kind, *rest = message
        if kind == "start":
            self._start(rest[0])
        elif kind == "signal":
            if self._main and self._exited is None:
                kill(self._main, rest[0])
        elif kind == "kill":
            for pid in descendants(os.getpid()):
                kill(pid, signal.SIGKILL)
        elif kind == "exec":
            self._exec(*rest)
        elif kind == "exec-kill":
            for pid, id in self._execs.items():
                if id == rest[0]:
                    kill_session(pid)

    def _send(self, message: tuple[Any, ...]) -> None:
        data = marshal.dumps(message)
        data = len(data).to_bytes(4, "big") + data
        try:
            while data:
                data = data[os.write(self._control, data) :]
        except OSError:
            pass  # the kubelet is gone; the next read reports EOF

    def _start(self, spec: dict[str, Any]) -> None:
        try:
            self._log = Log(spec["log"], spec["log_max_bytes"])
            if spec["mounts"]:
                realise_mounts(spec["mounts"], spec["root"], spec["namespace"])
            self._env, self._cwd = spec["env"], spec["cwd"]
            out, err = os.pipe(), os.pipe()
            self._main = spawn(spec["argv"], self._env, self._cwd, self._null, out[1], err[1])
        except ContainerError as error:
            self._fail(error.reason, str(error))
        except OSError as error:
            self._fail("StartError", f"{error.filename}: {error.strerror}")
        for (reader, writer), stream in ((out, b"stdout"), (err, b"stderr")):
            os.close(writer)
            self._streams[reader] = stream
            self._poll.register(reader, select.POLLIN)
        self._send(("started", self._main))

    def _fail(self, reason: str, message: str) -> None:
        self._send(("failed", reason, message))
        sys.exit(0)

    # -- children and their output ---------------------------------------------------------------

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid == self._main:
                self._exited = (status, time.time_ns())
            id = self._execs.pop(pid, None)
            if id is not None:
                self._send(("exec", id, status, ""))

    def _copy(self, fd: int) -> None:
        data = _read(fd)
        if data:
            assert self._log is not None
            self._log.write(self._streams[fd], data)
        else:
            self._poll.unregister(fd)
            os.close(fd)
            del self._streams[fd]

    def _exec(self, id: int, argv: list[str], env: dict[str, str]) -> None:
        """Run a command alongside the main process: of a probe, a hook or a user."""
        streams: list[int] = []
        try:
            _, streams, _, _ = socket.recv_fds(self._handover, 1, EXEC_STREAMS)
            for fd in streams:
                os.set_inheritable(fd, False)
            if len(streams) < EXEC_STREAMS:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), argv[0])
            pid = spawn(argv, env, self._cwd, *streams)
        except OSError as error:
            self._send(("exec", id, -1, f"{error.filename}: {error.strerror}"))
        else:
            self._execs[pid] = id
        finally:
            for fd in streams:
                os.close(fd)

    def _drain(self) -> None:
        if self._log is None:
            return
        for fd, stream in self._streams.items():
            os.set_blocking(fd, False)
            for _ in range(DRAIN_MAX_READS):
                data = _read(fd)
                if not data:
                    break
                self._log.write(stream, data)
        self._log.finish()


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 1 << 16)
    except OSError:  # EAGAIN, or a reset, which is treated like EOF
        return b""


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


# -- mounts --------------------------------------------------------------------------------------


def realise_mounts(mounts: list[tuple[str, str, bool]], root: str, namespace: str) -> None:
    """Mount each ``source`` at its ``path``, some read-only, for this process and its children.

    In a private mount namespace, a new root is assembled on a tmpfs at ``root``: every entry of /
    is bind-mounted into it, the volumes are bind-mounted over that, then it becomes /. A mount
    point that the machine lacks is created in a mirror of its parent directory (a tmpfs with each
    entry bind-mounted), so that nothing is created on the machine itself.

    ``namespace``: "auto" (a mount namespace as root, else also a user namespace), "user" (always
    also a user namespace), "none" (no namespaces: only mounts that change nothing are possible).
    """
    wanted = []
    for source, path, read_only in mounts:
        real = os.path.realpath(path)
        if os.path.realpath(source) != real or read_only:
            wanted.append((source, real, read_only))
    if not wanted:
        return
    try:
        _unshare(namespace)
        _Root(root).realise(sorted(wanted, key=lambda mount: mount[1].count("/")))
    except OSError as error:
        where = ", ".join(path for _, path, _ in wanted)
        raise ContainerError(
            "MountError",
            f"cannot mount {where} without root: {error.filename or 'unshare'}: {error.strerror} "
            "(this kernel must allow unprivileged user namespaces, or run as root)",
        ) from None


def _unshare(namespace: str) -> None:
    if namespace == "none":
        raise OSError(errno.EPERM, "namespaces are disabled", "unshare")
    if namespace == "auto" and libc.unshare(CLONE_NEWNS) == 0:
        return
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        raise _os_error("unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{uid} {uid} 1"),
        ("gid_map", f"{gid} {gid} 1"),
    ):
        fd = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)


class _Root:
    """The new root, assembled at ``at``."""

    def __init__(self, at: str) -> None:
        self._at = at
        self._mirrored: set[str] = set()

    def realise(self, mounts: list[tuple[str, str, bool]]) -> None:
        _mount("none", "/", "", MS_REC | MS_PRIVATE)
        os.makedirs(self._at, mode=0o700, exist_ok=True)
        self._mirror("/")
        # Binding an ancestor of the new root must not bind the new root into itself.
        _mount("none", self._at, "", MS_UNBINDABLE)
        paths = [path for _, path, _ in mounts]
        outer = [m for m in mounts if not any(m[1].startswith(p + "/") for p in paths)]
        for source, path, _ in outer:
            self._make_point(source, path)
        for source, path, read_only in mounts:
            target = self._at + path
            if (source, path, read_only) not in outer:
                _point(source, target)  # inside another volume, as in container runtimes
            _mount(source, target, "", MS_BIND | MS_REC)
            if read_only:
                flags = os.statvfs(target).f_flag
                kept = sum(flag for bit, flag in KEPT_FLAGS if flags & bit)
                _mount("none", target, "", MS_BIND | MS_REMOUNT | MS_RDONLY | kept)
        self._enter()

    def _make_point(self, source: str, path: str) -> None:
        at = ""
        for part in path.strip("/").split("/"):
            parent, at = at or "/", f"{at}/{part}"
            if os.path.lexists(self._at + at):
                continue
            if parent not in self._mirrored:
                self._mirror(parent)
            _point(source if at == path else "/", self._at + at)
            self._mirrored.add(at)

    def _mirror(self, directory: str) -> None:
        """Cover ``directory`` with a writable tmpfs that contains the same entries."""
        target = self._at if directory == "/" else self._at + directory
        entries = list(os.scandir(directory))
        if len(entries) > MIRROR_MAX_ENTRIES:
            raise OSError(
                errno.E2BIG, f"has more than {MIRROR_MAX_ENTRIES} entries to mirror", directory
            )
        _mount("tmpfs", target, "tmpfs", 0)
        os.chmod(target, os.stat(directory).st_mode & 0o7777)
        self._mirrored.add(directory)
        for entry in entries:
            shown = os.path.join(target, entry.name)
            if entry.is_symlink():
                os.symlink(os.readlink(entry.path), shown)
                continue
            try:
                _point(entry.path, shown)
                _mount(entry.path, shown, "", MS_BIND | MS_REC)
            except OSError:
                pass  # gone or not permitted: left empty

    def _enter(self) -> None:
        os.chdir(self._at)
        if libc.pivot_root(b".", b".") == 0:
            if libc.umount2(b".", MNT_DETACH):
                raise _os_error("/")
        else:
            os.chroot(".")  # the root is an initial RAM disk, which cannot be pivoted
        os.chdir("/")


def _point(source: str, target: str) -> None:
    """An empty file or directory to bind ``source`` over."""
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    elif not os.path.lexists(target):
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, None):
        raise _os_error(target)


def _os_error(path: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), path)


def main() -> None:
    control, handover = int(sys.argv[1]), int(sys.argv[2])
    for fd in (control, handover):
        os.set_inheritable(fd, False)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    Shim(control, handover).run()


if __name__ == "__main__":
    main()
