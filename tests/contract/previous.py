"""The previous version of KubeAI: its program and its chart, from this repository's history.

It is the last release, as of `make compatibility`. While there is none, it is a commit at least
:data:`AGE_MIN` commits old, one in every :data:`EVERY`, so that it rarely changes. PREVIOUS names
another tag or commit. What is built is kept in ``~/.cache/kubeai-previous``, by commit and Python.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
from caches import made_once
from repository import REPOSITORY

from release import versions

AGE_MIN, EVERY = 20, 25
BUILD_TIMEOUT_S = 900
WHEEL = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
PROGRAM = "kubeai-previous"
SCRIPT = """#!/bin/sh
PYTHONPATH={packages} exec {python} -m kubeai "$@"
"""


def _git(*arguments: str) -> bytes:
    done = subprocess.run(("git", "-C", str(REPOSITORY), *arguments), capture_output=True)
    return done.stdout if done.returncode == 0 else b""


def commit() -> str:
    """The previous version's commit; empty if the history is too short, as in a shallow clone."""
    name = os.environ.get("PREVIOUS")
    if not name and (released := versions.latest(REPOSITORY)):
        name = f"v{released}"
    if name:
        return _git("rev-parse", f"{name}^{{commit}}").decode().strip()
    count = int(_git("rev-list", "--first-parent", "--count", "HEAD") or 0)
    back = AGE_MIN + (count - AGE_MIN) % EVERY
    listed = _git("rev-list", "--first-parent", f"--skip={back}", "--max-count=1", "HEAD")
    return listed.decode().strip()


def build() -> Path:
    """A folder with the program ``kubeai-previous`` and ``charts``; built if needed."""
    wanted = commit()
    if not wanted:
        pytest.skip("the history is too short to hold a previous version")
    key = f"{wanted[:16]}-{sys.implementation.cache_tag}"
    folder = made_once("kubeai-previous", key, partial(_make, wanted))
    program = folder / PROGRAM
    program.write_text(SCRIPT.format(packages=folder / "packages", python=sys.executable))
    program.chmod(0o755)
    return folder


def _make(wanted: str, folder: Path) -> None:
    source, made = folder / "source", folder / "wheel"
    made.mkdir()
    with tarfile.open(fileobj=io.BytesIO(_git("archive", wanted))) as archive:
        archive.extractall(source, filter="data")
    done = subprocess.run(
        (sys.executable, "-c", WHEEL, str(made)),
        cwd=source,
        capture_output=True,
        text=True,
        timeout=BUILD_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = made.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "packages")
    shutil.move(source / "charts", folder / "charts")
    shutil.rmtree(source)
    shutil.rmtree(made)
