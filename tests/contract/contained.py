"""Run a program in a root file system as a container runtime does, without an engine.

As process 1 of its own (or, with ``share_processes``, not), as a user without capabilities, its
root read-only, without what this machine's environment holds. It needs nothing in the root: no
shell. The network is the machine's. Needs root. As a program::

    python contained.py '{"root": "/image", "user": "65532:65532", "command": ["kubeai"], …}'
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLONE_NEWNS, CLONE_NEWPID = 0x00020000, 0x20000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x1, 0x20, 0x1000, 0x4000, 1 << 18
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
SIGKILL, CAPABILITIES = 9, 41
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # an engine's, without one
libc = ctypes.CDLL(None, use_errno=True)


def command(
    root: Path,
    words: Sequence[str],
    *,
    user: str,
    env: Mapping[str, str],
    mounts: Mapping[str, Path],
    directory: str = "/",
    share_processes: bool = False,
    mounts_from: str = "",
) -> list[str]:
    """The command that runs ``words``; ``mounts``: folders, writable, by where they appear.

    ``mounts_from``: a folder; what the command finds mounted from below it is mounted in the root,
    too, and belongs to the user's group, as with a pod's fsGroup.
    """
    wanted = {
        "root": str(root),
        "command": list(words),
        "user": user,
        "env": dict(env),
        "mounts": {place: str(folder) for place, folder in mounts.items()},
        "directory": directory,
        "share_processes": share_processes,
        "mounts_from": mounts_from,
    }
    return [sys.executable, "-IS", __file__, json.dumps(wanted)]


def main(wanted: dict[str, Any]) -> int:
    """Become the program, or wait for it where it is process 1 of its own; its exit status."""
    share = wanted["share_processes"]
    _check(libc.unshare(CLONE_NEWNS | (0 if share else CLONE_NEWPID)), "unshare")
    if not share and (child := os.fork()):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    root = wanted["root"]
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    _mount(root, root, "", MS_BIND | MS_REC)
    for place in ("/proc", "/dev"):
        Path(root + place).mkdir(exist_ok=True)
    if share:
        _mount("/proc", f"{root}/proc", "", MS_BIND | MS_REC)
    else:
        _mount("proc", f"{root}/proc", "proc", 0)
    _mount("/dev", f"{root}/dev", "", MS_BIND | MS_REC)
    mounts = wanted["mounts"]
    if wanted["mounts_from"]:
        mounts = {place: place for place in _mounted(wanted["mounts_from"])}
        for place in mounts:
            read_only = os.statvfs(place).f_flag & os.ST_RDONLY
            if read_only:
                _mount("none", place, "", MS_BIND | MS_REMOUNT)
            _give(Path(place), int(wanted["user"].partition(":")[2]))
            if read_only:
                _mount("none", place, "", MS_BIND | MS_REMOUNT | MS_RDONLY)
    targets = {_inside(root, place): folder for place, folder in mounts.items()}
    for target in targets:
        Path(target).mkdir(parents=True, exist_ok=True)
    _mount("none", root, "", MS_BIND | MS_REMOUNT | MS_RDONLY)
    for target, folder in targets.items():
        _mount(folder, target, "", MS_BIND | MS_REC)
    os.chroot(root)
    os.chdir(wanted["directory"])
    _drop(*map(int, wanted["user"].split(":")))
    program, *_ = words = wanted["command"]
    env = {"PATH": PATH} | wanted["env"]
    found = shutil.which(program, path=env["PATH"])
    if found is not None:
        os.execve(found, words, env)
    print(f"{program}: not in the image", file=sys.stderr)
    return 127


def _mounted(folder: str) -> list[str]:
    """Where something below a folder is mounted; outer mounts first."""
    tail = "/".join(Path(folder).parts[-2:])  # its file system's mount point is not in the lines
    lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted({fields[4] for fields in lines if f"/{tail}/" in f"{fields[3]}/"})


def _give(path: Path, group: int) -> None:
    for each in (path, *path.rglob("*")):
        if not each.is_symlink():
            mode = each.stat().st_mode
            os.chown(each, -1, group)
            each.chmod(mode | (0o2070 if each.is_dir() else (mode & 0o600) >> 3))


def _inside(root: str, place: str) -> str:
    """Where a path of the root is on this machine; links (/var/run) are the root's own."""
    real = root
    for part in place.strip("/").split("/"):
        real = f"{real}/{part}"
        if os.path.islink(real):
            to = os.readlink(real)
            real = _inside(root, to if to.startswith("/") else f"{_parent(root, real)}/{to}")
    return real


def _parent(root: str, path: str) -> str:
    return path.removeprefix(root).rpartition("/")[0]


def _drop(user: int, group: int) -> None:
    for number in range(CAPABILITIES):
        libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)  # which also empties the other sets of capabilities, unless it is root
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _mount(source: str, target: str, kind: str, flags: int) -> None:
    _check(libc.mount(source.encode(), target.encode(), kind.encode(), flags, None), target)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


if __name__ == "__main__":
    raise SystemExit(main(json.loads(sys.argv[1])))
