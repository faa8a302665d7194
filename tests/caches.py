"""Folders in the user's cache whose content takes long to make."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def made_once(cache: str, key: str, make: Callable[[Path], object]) -> Path:
    """The folder ``key`` of the cache. ``make`` fills it unless it is there.

    Programs that need it at once wait for the one that makes it.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / cache
    folder, partial = caches / key, caches / "new"
    caches.mkdir(parents=True, exist_ok=True)
    with (caches / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder
