"""The source distribution: what a build needs, and nothing else."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from release.files import environment, repack, run
from release.versions import Version

BACKEND = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def build(source: Path, version: Version, epoch: int, out: Path) -> list[Path]:
    """Let setuptools choose the files, and pack them again without the machine's traces."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shutil.copytree(source, scratch / "tree", ignore=shutil.ignore_patterns(".git"))
        env = environment(epoch, KUBEAI_VERSION=version.python)
        run((sys.executable, "-c", BACKEND, scratch), cwd=scratch / "tree", env=env)
        (made,) = scratch.glob("*.tar.gz")
        target = out / made.name
        repack(made, target, epoch)
    return [target]
