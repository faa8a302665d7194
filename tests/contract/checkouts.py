"""What a clean clone of the working tree would hold."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from repository import REPOSITORY


def tracked(*within: str) -> list[str]:
    """The files that git tracks, or would; by their paths in the repository."""
    command = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *within)
    files = subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=True).stdout
    return files.decode().split("\0")[:-1]


def check_out(target: Path) -> None:
    for name in tracked():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, target / name)
