"""Reads the lines of a file, which gzip may have compressed, within limits."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from kubeai.simulation.traffic import TrafficError

FILE_MAX_BYTES = 4 << 30  # decompressed
LINE_MAX_BYTES = 64 << 20
GZIP_MAGIC = b"\x1f\x8b"


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers. TrafficError if the file cannot be read."""
    number = size = 0
    try:
        with path.open("rb") as file:
            packed = file.peek(2)[:2] == GZIP_MAGIC
            lines = io.BufferedReader(gzip.GzipFile(fileobj=file)) if packed else file
            while line := lines.readline(LINE_MAX_BYTES + 1):
                number += 1
                size += len(line)
                if len(line) > LINE_MAX_BYTES:
                    limit = f"{LINE_MAX_BYTES:,} bytes (LINE_MAX_BYTES)"
                    raise TrafficError(f"{path}: line {number}: is longer than {limit}")
                if size > FILE_MAX_BYTES:
                    limit = f"{FILE_MAX_BYTES:,} decompressed bytes (FILE_MAX_BYTES)"
                    raise TrafficError(f"{path}: line {number}: the file exceeds {limit}")
                yield number, line
    except EOFError:
        raise TrafficError(
            f"{path}: line {number + 1}: the gzip data is truncated: copy the file again"
        ) from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise TrafficError(f"{path}: line {number + 1}: invalid gzip data: {error}") from None
    except OSError as error:
        raise TrafficError(f"{path}: {error.strerror}") from None
