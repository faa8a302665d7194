"""Reads the logs written by the shims (format: shim.Log).

A run's log is ``<restart>.log``, preceded by ``<restart>.log.1`` once it has been rotated. Blocks
are read in threads, so that a long log does not delay probes.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

import msgspec

BLOCK_BYTES = 64 << 10
FOLLOW_INTERVAL_S = 0.1
LAST_LINES_MAX, LAST_LINES_MAX_BYTES = 80, 2048  # the kubelet's limits


class LogQuery(msgspec.Struct, frozen=True):
    """The options of Kubernetes' pod logs."""

    follow: bool = False
    tail_lines: int | None = None
    since: str = ""  # a time in the log's format; earlier lines are omitted
    timestamps: bool = False
    limit_bytes: int | None = None


async def read_log(
    path: Path, query: LogQuery, alive: Callable[[], bool] = lambda: False
) -> AsyncIterator[bytes]:
    """The log's text in blocks. With ``follow``, until ``alive()`` is false and all is read."""
    reader = await asyncio.to_thread(_Reader, path, query)
    try:
        while True:
            last_look = not (query.follow and alive())
            while block := await asyncio.to_thread(reader.block):
                yield block
            if last_look or reader.full:
                return
            await asyncio.sleep(FOLLOW_INTERVAL_S)
    finally:
        reader.close()


def last_lines(path: Path) -> str:
    """The end of a log, for a termination message; empty if there is no log.

    The log may just have been rotated, so the previous file is read as well.
    """
    text = b""
    for part in (path, path.with_name(path.name + ".1")):
        text = _last_text(part) + text
        if len(text) >= LAST_LINES_MAX_BYTES:
            break
    lines = text.split(b"\n")
    text = b"\n".join(lines[-LAST_LINES_MAX - 1 :])  # the last element is not a line
    return text[-LAST_LINES_MAX_BYTES:].decode(errors="ignore")


def _last_text(path: Path) -> bytes:
    """At least LAST_LINES_MAX_BYTES of text from the end of a file, or all of it."""
    read_bytes = 4 * LAST_LINES_MAX_BYTES
    while True:
        try:
            with path.open("rb") as file:
                start = max(0, os.fstat(file.fileno()).st_size - read_bytes)
                file.seek(start)
                records = file.read().split(b"\n")
        except OSError:
            return b""
        text = b"".join(map(_content, records[1:] if start else records))
        if not start or len(text) >= LAST_LINES_MAX_BYTES:
            return text
        read_bytes *= 4  # with short or empty lines, record headers are longer than the text


def _content(record: bytes) -> bytes:
    """The text of one record; a partial one (tagged P) continues in the next."""
    parts = record.split(b" ", 3)
    if len(parts) < 4:
        return b""
    return parts[3] + (b"" if parts[2] == b"P" else b"\n")


class _Reader:
    """A position in a log that may be rotated concurrently."""

    def __init__(self, path: Path, query: LogQuery) -> None:
        self._path = path
        self._query = query
        self._left = query.limit_bytes
        self._rest = b""
        self._in_line = False  # the last record was tagged P: its line continues
        rotated = path.with_name(path.name + ".1")
        self._files: list[BinaryIO] = [
            open(p, "rb")  # noqa: SIM115 - closed by close()
            for p in (rotated, path)
            if p.exists()
        ]
        self._seek()

    @property
    def full(self) -> bool:
        """Whether ``limit_bytes`` has been reached."""
        return self._left == 0

    def close(self) -> None:
        for file in self._files:
            file.close()

    def block(self) -> bytes:
        """The next text; empty if there is none at present."""
        while not self.full:
            data = self._files[0].read(BLOCK_BYTES) if self._files else b""
            if not data:
                if self._next_file():
                    continue
                return b""
            records = (self._rest + data).split(b"\n")
            self._rest = records.pop()
            text = b"".join(map(self._text, records))
            if self._left is not None:
                text = text[: self._left]
                self._left -= len(text)
            if text:
                return text
        return b""

    def _next_file(self) -> bool:
        """Advance to the next newer file; False if this is the newest."""
        if len(self._files) > 1:
            self._files.pop(0).close()
            return True
        try:
            newest = self._path.stat()
        except FileNotFoundError:
            return False
        if self._files and newest.st_ino == os.fstat(self._files[0].fileno()).st_ino:
            return False
        self._files.append(self._path.open("rb"))
        return True

    def _text(self, record: bytes) -> bytes:
        time, _, tag, content = record.split(b" ", 3)
        start = time + b" " if self._query.timestamps and not self._in_line else b""
        self._in_line = tag == b"P"
        return start + content + (b"" if self._in_line else b"\n")

    def _seek(self) -> None:
        """Seek to the first selected line."""
        query = self._query
        if query.tail_lines is None and not query.since:
            return
        since = query.since.encode()
        begins: deque[tuple[int, int]] = deque(maxlen=query.tail_lines)
        in_line = False
        for number, file in enumerate(self._files):
            offset = 0
            for record in file:
                if not in_line and record >= since:
                    begins.append((number, offset))
                offset += len(record)
                in_line = record.split(b" ", 3)[2] == b"P"
        if not self._files:
            return
        at_end = (len(self._files) - 1, self._files[-1].tell())
        number, offset = begins[0] if begins else at_end
        for file in self._files[:number]:
            file.close()
        del self._files[:number]
        for file in self._files:
            file.seek(0)
        self._files[0].seek(offset)
