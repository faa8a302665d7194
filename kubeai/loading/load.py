"""One load, from listing to the final rename, and its progress output."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from kubeai.errors import install_hint
from kubeai.loading.files import LoadError, RemoteFile, check_paths
from kubeai.loading.staging import Staging, staged

PROGRESS_INTERVAL_S = 5.0
BAR_INTERVAL_S = 0.5
PARALLEL = 8
SCHEMES = ("hf", "s3", "gs", "oss")


class Source(Protocol):
    """A source of files."""

    async def list_files(self) -> list[RemoteFile]:
        """All files; LoadError if there are none or access is denied."""
        ...

    async def fetch(self, files: list[RemoteFile], staging: Staging) -> None:
        """Download and verify these files into ``staging.files``, keeping what is already there."""
        ...


async def load(url: str, destination: Path, *, parallel: int = PARALLEL) -> None:
    """Make the folder ``destination`` contain exactly the files of ``url``.

    Prints progress to stderr. LoadError on failure; downloaded data is kept, so that the next call
    resumes. While it runs, ``destination`` is unchanged.
    """
    url = url.rstrip("/")
    if url.partition("://")[0] not in SCHEMES:
        raise LoadError(f"{url!r}: must be an hf://, s3://, gs:// or oss:// URL")
    # One thread per part in flight, and as many for other blocking calls.
    threads = ThreadPoolExecutor(max_workers=2 * parallel)
    asyncio.get_running_loop().set_default_executor(threads)
    with staged(url, destination) as staging:
        source = _source(url, parallel, staging)
        files = await source.list_files()
        check_paths(url, files)
        size = sum(file.size for file in files)
        if staging.is_in_place(files):
            _print(f"{destination} already contains {url}: {len(files)} files, {size / 1e9:.2f} GB")
            staging.remove()
            return
        staging.prepare(files)
        began_s = time.monotonic()
        async with _progress(staging, size):
            await source.fetch(files, staging)
        staging.finish(files)
        took_s = time.monotonic() - began_s
        _print(
            f"{destination} now contains {url}: {len(files)} files, {size / 1e9:.2f} GB "
            f"in {took_s:.1f} s"
        )


def _source(url: str, parallel: int, staging: Staging) -> Source:
    try:
        if url.startswith("hf://"):
            if not os.access(os.path.expanduser("~"), os.W_OK):
                # A container's user may have no writable home; huggingface_hub needs one, and
                # reads HF_HOME when it is imported.
                os.environ.setdefault("HF_HOME", str(staging.folder / "hub"))
            from kubeai.loading.hub import Repository

            return Repository(url, parallel)
        from kubeai.loading.buckets import Bucket

        return Bucket(url, parallel)
    except ImportError as error:
        raise LoadError(f"{url}: {error.name} is not installed: {install_hint('load')}") from error


@contextlib.asynccontextmanager
async def _progress(staging: Staging, size: int) -> AsyncIterator[None]:
    show = _show_bar if _on_terminal() else _print_progress
    task = asyncio.create_task(show(staging, size))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"


async def _show_bar(staging: Staging, size: int) -> None:
    """Show a bar on the terminal, which disappears at the end."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        held = await asyncio.to_thread(staging.held_bytes)
        bar = progress.add_task("", total=size, completed=held)
        while True:
            await asyncio.sleep(BAR_INTERVAL_S)
            held = await asyncio.to_thread(staging.held_bytes)
            progress.update(bar, completed=min(size, held))


async def _print_progress(staging: Staging, size: int) -> None:
    began_s, had = time.monotonic(), await asyncio.to_thread(staging.held_bytes)
    if had:
        _print(f"resuming with {had / 1e9:.2f} GB from an earlier attempt")
    while True:
        await asyncio.sleep(PROGRESS_INTERVAL_S)
        held = min(size, await asyncio.to_thread(staging.held_bytes))
        per_s = (held - had) / (time.monotonic() - began_s)
        left = f", {(size - held) / per_s:.0f} s left" if per_s > 0 else ""
        _print(f"{held / 1e9:.2f} of {size / 1e9:.2f} GB, {per_s / 1e6:.0f} MB/s{left}")


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
