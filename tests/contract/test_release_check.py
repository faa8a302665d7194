"""`python -m release check`: two builds of a commit must have the same bytes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkouts import check_out

pytestmark = [pytest.mark.package, pytest.mark.timeout(300)]
VERSION = "1000.0.0"
# Appended to a module of the release: the notes get a line that each build has its own of.
TIME = """
_build = build


def build(source, version, out):
    import time

    (made,) = _build(source, version, out)
    made.write_text(f"{made.read_text()}{time.time_ns()}\\n")
    return [made]
"""


def git(folder: Path, *arguments: str) -> None:
    own = (
        "-c",
        "user.name=Test",
        "-c",
        "user.email=test@example.com",
        "-c",
        "commit.gpgsign=false",
    )
    subprocess.run(("git", *own, *arguments), cwd=folder, check=True, capture_output=True)


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "-q", "-m", "Change")


def release(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "release", *arguments)
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """A repository of this tree, whose changelog has a section for the version."""
    folder = tmp_path_factory.mktemp("repository")
    check_out(folder)
    changelog = folder / "CHANGELOG.md"
    section = f"## Unreleased\n\n## {VERSION} - 2026-01-01\n\n### Added\n\n- All.\n"
    changelog.write_text(changelog.read_text().replace("## Unreleased\n", section, 1))
    git(folder, "init", "-q")
    commit(folder)
    return folder


def test_a_commit_is_built_twice_and_checked_once(repository):
    done = release(repository, "check", VERSION, "--parts", "sdist")
    assert done.returncode == 0, done.stderr
    assert "both builds have the same bytes" in done.stdout
    steps = re.findall(r"^(.+): \d+ s$", done.stdout, re.M)
    # The bytes of the second build are compared with those that were checked.
    assert steps == ["source distribution", "check of packages", "source distribution"]
    made = {path.name for path in (repository / "dist" / VERSION).iterdir()}
    assert made == {f"kubeai_gateway-{VERSION}.tar.gz", "RELEASE_NOTES.md", "SHA256SUMS"}


def test_files_that_differ_are_named(repository):
    with (repository / "release/notes.py").open("a") as module:
        module.write(TIME)
    commit(repository)
    done = release(repository, "check", VERSION, "--parts", "sdist")
    assert done.returncode == 1
    assert done.stderr == ("release: the second build differs in: RELEASE_NOTES.md, SHA256SUMS\n")


def test_uncommitted_changes_are_refused(repository):
    (repository / "new.txt").write_text("")
    try:
        done = release(repository, "check", VERSION, "--parts", "sdist")
    finally:
        (repository / "new.txt").unlink()
    assert done.returncode == 1
    assert "?? new.txt" in done.stderr
