"""Processes and files of a release: the same environment and the same bytes on every machine."""

from __future__ import annotations

import gzip
import hashlib
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from release.errors import ReleaseError

UMASK = 0o022
ERROR_LINES = 40


def environment(epoch: int, **more: str) -> dict[str, str]:
    """Return the environment of a build: without what differs between users and machines."""
    kept = ("PATH", "HOME", "TMPDIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    prefixes = ("PIP_", "UV_", "GO", "KUBEBUILDER_", "GNUPG")
    return {
        **{name: value for name, value in os.environ.items() if name in kept},
        **{name: value for name, value in os.environ.items() if name.startswith(prefixes)},
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SOURCE_DATE_EPOCH": str(epoch),
        **more,
    }


def run(command: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    """Run a command and return its stdout. A failure is a ReleaseError with the last lines."""
    done = subprocess.run(
        [str(each) for each in command],
        cwd=cwd,
        env=env,
        umask=UMASK,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-ERROR_LINES:])
        raise ReleaseError(f"{' '.join(map(str, command))} failed in {cwd}:\n{last}")
    return done.stdout


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive that this package, or a tool that it runs, has made."""
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")


def write_tar_gz(source: Path, target: Path, prefix: str, epoch: int) -> None:
    """Pack the files below `source` under the folder `prefix`.

    The bytes depend only on names, contents and executable bits: entries are sorted and belong to
    root, and all times are `epoch`.
    """
    with (
        target.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=epoch) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in sorted(source.rglob("*"), key=lambda each: each.relative_to(source).parts):
            if path.is_symlink() or not path.is_file():
                continue
            entry = tarfile.TarInfo(f"{prefix}/{path.relative_to(source).as_posix()}")
            entry.size = path.stat().st_size
            entry.mtime = epoch
            entry.mode = 0o755 if path.stat().st_mode & 0o100 else 0o644
            with path.open("rb") as file:
                archive.addfile(entry, file)


def repack(archive: Path, target: Path, epoch: int) -> None:
    """Pack an archive of one folder again, without the traces of the machine that made it."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(archive, Path(folder))
        (root,) = Path(folder).iterdir()
        write_tar_gz(root, target, root.name, epoch)


def hashes(folder: Path) -> dict[str, str]:
    """Map the relative paths of the files below a folder to their SHA-256."""
    return {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in folder.rglob("*")
        if path.is_file()
    }


def unequal(left: Mapping[str, str], right: Mapping[str, str]) -> list[str]:
    """Return the names whose values differ, or that only one of two mappings has."""
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


def differences(one: Path, other: Path) -> list[str]:
    """Return the relative paths of files that differ, or that only one of two folders has."""
    return unequal(hashes(one), hashes(other))
