"""The files of a source and how downloads are verified. Pure, apart from reading files."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from kubeai.errors import KubeAIError

Digest: TypeAlias = Literal["sha256", "git-blob", "md5"]
READ_BYTES = 4 << 20
_MIB = 1 << 20
# Common multipart sizes, which are not recorded: of the AWS CLI, boto3, rclone, gsutil, ...
_USUAL_PART_BYTES = tuple(n * _MIB for n in (5, 8, 10, 15, 16, 20, 25, 32, 50, 64, 100, 128, 256))


class LoadError(KubeAIError):
    """A load failed; the message names the URL, the folder or the variable."""


class RemoteFile(msgspec.Struct, frozen=True):
    """One file of a source. ``etag`` changes with its content."""

    path: str  # relative to the URL, with slashes
    size: int  # bytes
    etag: str
    digest: Digest | None = None  # how `etag` is computed from the content, if known


def check_paths(url: str, files: list[RemoteFile]) -> None:
    """LoadError for a path that would leave the destination folder."""
    for file in files:
        if {"", ".", ".."} & set(file.path.split("/")) or "\0" in file.path:
            raise LoadError(f"{url}: contains an invalid path: {file.path!r}")


def matches_source(file: RemoteFile, path: Path) -> bool | None:
    """Whether a file matches the source; None if the source's metadata cannot tell."""
    if path.stat().st_size != file.size:
        return False
    etag = file.etag.strip('"').lower()
    if file.digest == "md5" and "-" in etag:
        return _is_of_parts(etag, file.size, path) or None
    return None if file.digest is None else digest(file.digest, path) == etag


def digest(kind: Digest, path: Path) -> str:
    """The digest in hexadecimal."""
    match kind:
        case "sha256":
            hashed = hashlib.sha256()
        case "md5":
            hashed = hashlib.md5(usedforsecurity=False)
        case "git-blob":
            hashed = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        for block in _blocks(file):
            hashed.update(block)
    return hashed.hexdigest()


async def together(works: Iterable[Awaitable[Any]]) -> None:
    """Wait for all; the first failure cancels the others and is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def write_out(path: Path) -> None:
    """fsync a file, or a folder's entries."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_of_parts(etag: str, size: int, path: Path) -> bool:
    """Whether it is a multipart ETag (the MD5 of the parts' MD5s) for a common part size."""
    count = int(etag.rsplit("-", 1)[1])
    least = -(-size // count)
    sizes = {-(-least // _MIB) * _MIB, least, *_USUAL_PART_BYTES}
    return any(
        f"{_md5_of_parts(path, part_bytes)}-{count}" == etag
        for part_bytes in sorted(sizes)
        if part_bytes and -(-size // part_bytes) == count
    )


def _md5_of_parts(path: Path, part_bytes: int) -> str:
    whole = hashlib.md5(usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while part := _md5(_blocks(file, part_bytes)):
            whole.update(part)
    return whole.hexdigest()


def _md5(blocks: Iterator[bytes]) -> bytes:
    """The MD5 of the blocks; empty if there are none."""
    first = next(blocks, None)
    if first is None:
        return b""
    hashed = hashlib.md5(first, usedforsecurity=False)
    for block in blocks:
        hashed.update(block)
    return hashed.digest()


def _blocks(file: FileIO, limit_bytes: int | None = None) -> Iterator[bytes]:
    """Read from the current position to the end or the limit."""
    left = limit_bytes
    while block := file.read(READ_BYTES if left is None else min(READ_BYTES, left)):
        yield block
        if left is not None:
            left -= len(block)
