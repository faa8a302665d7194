"""A container's private view of the file system: its volumes, mounted in a new root."""

from __future__ import annotations

import ctypes
import errno
import os

from kubeai.local.kubelet.runtime.shim.processes import libc

MIRROR_MAX_ENTRIES = 5000

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC = 0x1, 0x20, 0x1000, 0x4000
MS_UNBINDABLE, MS_PRIVATE, MS_RELATIME = 1 << 17, 1 << 18, 1 << 21
MNT_DETACH = 2
# Flags that a read-only remount must repeat: statvfs's f_flag (left) and mount's (right).
KEPT_FLAGS = ((2, 2), (4, 4), (8, 8), (1024, 1024), (2048, 2048), (4096, MS_RELATIME))


class MountError(Exception):
    """The mounts cannot be made. Its name becomes the reason in the container's status."""


def mount_volumes(mounts: list[tuple[str, str, bool]], root: str, namespace: str) -> None:
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
        _Root(root).assemble(sorted(wanted, key=lambda mount: mount[1].count("/")))
    except OSError as error:
        where = ", ".join(path for _, path, _ in wanted)
        raise MountError(
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

    def assemble(self, mounts: list[tuple[str, str, bool]]) -> None:
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
