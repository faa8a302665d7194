"""One load, from listing to the last rename, and what it says on the way."""

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

from kubeai.distribution import install_hint
from kubeai.loading.files import LoadError, RemoteFile, check_paths
from kubeai.loading.staging import Staging, staged

PROGRESS_INTERVAL_S = 5.0
PARALLEL = 8
SCHEMES = ("hf", "s3", "gs", "oss")


class Source(Protocol):
    """Where files come from."""

    async def listed(self) -> list[RemoteFile]:
        """Every file; LoadError when there is none, or none may be seen."""
        ...

    async def fetch(self, files: list[RemoteFile], staging: Staging) -> None:
        """Bring these files into ``staging.files``, checked; what is there of them stays."""
        ...


async def load(url: str, target: Path, *, parallel: int = PARALLEL) -> None:
    """Make the folder ``target`` hold what ``url`` holds, and nothing else.

    Says on stderr how far it is. LoadError when it cannot; what has come is kept, so that the next
    call goes on from there. While it runs, ``target`` is as it was before.
    """
    url = url.rstrip("/")
    if url.partition("://")[0] not in SCHEMES:
        raise LoadError(f"{url!r}: must be a URL of hf://, s3://, gs:// or oss://")
    # Each part has a thread while it comes, and some are for what else blocks.
    threads = ThreadPoolExecutor(max_workers=2 * parallel)
    asyncio.get_running_loop().set_default_executor(threads)
    with staged(url, target) as staging:
        source = _source(url, parallel, staging)
        files = await source.listed()
        check_paths(url, files)
        size = sum(file.size for file in files)
        if staging.is_in_place(files):
            _say(f"{target} is {url} already: {len(files)} files, {size / 1e9:.2f} GB")
            staging.remove()
            return
        staging.prepare(files)
        began_s = time.monotonic()
        async with _progress(staging, size):
            await source.fetch(files, staging)
        staging.finish(files)
        took_s = time.monotonic() - began_s
        _say(f"{target} is {url}: {len(files)} files, {size / 1e9:.2f} GB in {took_s:.1f} s")


def _source(url: str, parallel: int, staging: Staging) -> Source:
    try:
        if url.startswith("hf://"):
            if not os.access(os.path.expanduser("~"), os.W_OK):
                # A container's user has no home, or a read-only one: the hub's client needs some
                # place, and reads where it is as it is imported.
                os.environ.setdefault("HF_HOME", str(staging.folder / "hub"))
            from kubeai.loading.hub import Repository

            return Repository(url, parallel)
        from kubeai.loading.buckets import Bucket

        return Bucket(url, parallel)
    except ImportError as error:
        raise LoadError(f"{url}: {error.name} is missing: {install_hint('load')}") from error


@contextlib.asynccontextmanager
async def _progress(staging: Staging, size: int) -> AsyncIterator[None]:
    task = asyncio.create_task(_tell(staging, size))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _tell(staging: Staging, size: int) -> None:
    began_s, had = time.monotonic(), await asyncio.to_thread(staging.held_bytes)
    if had:
        _say(f"{had / 1e9:.2f} GB are there from an earlier try")
    while True:
        await asyncio.sleep(PROGRESS_INTERVAL_S)
        held = min(size, await asyncio.to_thread(staging.held_bytes))
        per_s = (held - had) / (time.monotonic() - began_s)
        left = f", {(size - held) / per_s:.0f} s left" if per_s > 0 else ""
        _say(f"{held / 1e9:.2f} of {size / 1e9:.2f} GB, {per_s / 1e6:.0f} MB/s{left}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
