"""Writes a container's log in CRI format."""

from __future__ import annotations

import os
import time

LOG_LINE_MAX_BYTES = 16 << 10  # longer lines are written in parts, tagged P, as in CRI


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
        self._incomplete = {b"stdout": b"", b"stderr": b""}
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._file = os.open(self._name, flags, 0o600, dir_fd=self._directory)
        self._size = os.fstat(self._file).st_size

    def write(self, stream: bytes, data: bytes) -> None:
        """Append output; an incomplete line is kept until its newline or the maximum length."""
        lines = (self._incomplete[stream] + data).split(b"\n")
        rest = lines.pop()
        now = _timestamp()
        records: list[bytes] = []
        for line in lines:
            rest_of_line = self._cut(records, now, stream, line)
            records.append(b"%b %b F %b\n" % (now, stream, rest_of_line))
        self._incomplete[stream] = self._cut(records, now, stream, rest)
        self._append(records)

    def finish(self) -> None:
        """Write incomplete lines."""
        now = _timestamp()
        for stream, rest in self._incomplete.items():
            if rest:
                self._append([b"%b %b F %b\n" % (now, stream, rest)])
                self._incomplete[stream] = b""

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
