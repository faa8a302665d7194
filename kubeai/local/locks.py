"""Locks a data directory, so that two processes do not use it at the same time."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from kubeai.errors import KubeAIError


def lock_data_dir(data_dir: Path, file_name: str, user: str) -> IO[str]:
    """Create the directory and lock a file in it until the returned file is closed.

    KubeAIError if that fails or another process has the lock; ``user`` names such a process.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = (data_dir / file_name).open("w")
    except OSError as error:
        raise KubeAIError(f"--data-dir: {data_dir}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise KubeAIError(f"--data-dir: {data_dir} is in use by another {user}") from None
    return file
