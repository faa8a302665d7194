"""The staging folder of a load, which replaces the destination with a single rename.

For ``/models/m`` it is ``/models/.m.kubeai-load``; it holds a lock, the state of partial files, and
the files. A volume's root cannot be renamed: there the staging folder is inside the destination,
and the files are moved one by one when all are complete. In both cases `MARK`, which records what
was loaded, appears last: a folder without it is considered incomplete.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kubeai.loading.files import LoadError, RemoteFile, write_out
from kubeai.podspec.cache import staging_directory

MARK = ".kubeai-load.json"
HUB_FOLDER = ".cache/huggingface"  # huggingface_hub's metadata next to the files
SPARE_BYTES = 64 << 20  # free space to leave on the file system


class _Mark(msgspec.Struct):
    url: str
    files: list[RemoteFile]


class Staging:
    """One load's staging folder; created by :func:`staged`."""

    def __init__(self, url: str, destination: Path, folder: Path) -> None:
        self.folder = folder
        self.files = folder / "files"
        self.parts = folder / "parts"  # the state of partial files
        self._url, self._destination = url, destination
        self._inside = folder.parent == destination

    def is_in_place(self, files: list[RemoteFile]) -> bool:
        """Whether the destination already contains exactly these files."""
        mark = _read_mark(self._destination)
        return mark == _Mark(self._url, files) and all(
            _size(self._destination / file.path) == file.size for file in files
        )

    def prepare(self, files: list[RemoteFile]) -> None:
        """Keep what is still valid from an earlier attempt; LoadError if space is insufficient."""
        before = _read_mark(self.folder)
        known = set(before.files) if before and before.url == self._url else set()
        if not set(files) & known:
            self._drop()
        self.files.mkdir(exist_ok=True)
        self.parts.mkdir(exist_ok=True)
        wanted = {file.path: file for file in files}
        for path in [path for path in self.files.rglob("*") if path.is_file()]:
            name = path.relative_to(self.files).as_posix()
            if not name.startswith(HUB_FOLDER) and wanted.get(name) not in known:
                path.unlink()
        _write_mark(self.folder, _Mark(self._url, files))
        self._check_space(files)

    def held_bytes(self) -> int:
        """Bytes on disk, including partial files."""
        held = 0
        for directory, _, names in os.walk(self.files):
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    held += os.stat(os.path.join(directory, name)).st_blocks * 512
        return held

    def finish(self, files: list[RemoteFile]) -> None:
        """Replace the destination with the files."""
        shutil.rmtree(self.files / HUB_FOLDER, ignore_errors=True)
        with contextlib.suppress(OSError):  # missing, or contains files of the source
            (self.files / HUB_FOLDER).parent.rmdir()
        mark = _Mark(self._url, files)
        if self._inside:
            (self._destination / MARK).unlink(missing_ok=True)
            for entry in sorted(self.files.iterdir()):
                _replace(entry, self._destination / entry.name)
            _write_mark(self._destination, mark)
            self.remove()
            return
        _write_mark(self.files, mark)
        for directory, _, _ in os.walk(self.files):
            write_out(Path(directory))
        _replace(self.files, self._destination)
        write_out(self._destination.parent)
        self.remove()

    def _check_space(self, files: list[RemoteFile]) -> None:
        needed = sum(file.size for file in files) - self.held_bytes()
        free = shutil.disk_usage(self.folder).free
        if needed + SPARE_BYTES > free:
            raise LoadError(
                f"{self._destination}: not enough space: needs {needed / 1e9:.2f} GB more, "
                f"{free / 1e9:.2f} GB are free"
            )

    def _drop(self) -> None:
        for folder in (self.files, self.parts):
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        """Delete the staging folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def staged(url: str, destination: Path) -> Iterator[Staging]:
    """Lock the staging folder of ``destination``; LoadError if it is locked, or on disk errors."""
    destination = destination.absolute()
    try:
        folder = _staging_folder(destination)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LoadError(
                    f"{destination}: another load into this folder is running"
                ) from None
            yield Staging(url, destination, folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise LoadError(f"{destination}: no space left on device") from error
        where = error.filename or destination
        raise LoadError(f"{where}: {error.strerror or error}") from error


def _staging_folder(destination: Path) -> Path:
    if destination.exists() and not destination.is_dir():
        raise LoadError(f"{destination}: is not a folder")
    if destination.is_dir() and (
        _is_mount(destination) or not os.access(destination.parent, os.W_OK)
    ):
        return destination / ".kubeai-load"
    return Path(staging_directory(str(destination)))


def _is_mount(destination: Path) -> bool:
    """Whether it is a mount point. Unlike os.path.ismount, recognises bind mounts."""
    with contextlib.suppress(OSError):
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        escaped = str(destination).replace("\\", "\\134").replace(" ", "\\040")
        return any(line.split(" ")[4] == escaped for line in mounts)
    return os.path.ismount(destination)


def _replace(source: Path, destination: Path) -> None:
    """Rename, even onto a non-empty folder."""
    if destination.is_dir() and not destination.is_symlink():
        old = destination.parent / f".{destination.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        destination.rename(old)
        source.rename(destination)
        shutil.rmtree(old, ignore_errors=True)
    else:
        source.replace(destination)


def _read_mark(folder: Path) -> _Mark | None:
    try:
        return msgspec.json.decode((folder / MARK).read_bytes(), type=_Mark)
    except (OSError, msgspec.MsgspecError):
        return None


def _write_mark(folder: Path, mark: _Mark) -> None:
    new = folder / f"{MARK}.new"
    new.write_bytes(msgspec.json.encode(mark))
    write_out(new)
    new.replace(folder / MARK)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
