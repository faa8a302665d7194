"""The version of a release: Semantic Versioning, and agreement with git's tags."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from release.errors import ReleaseError
from release.files import run

# Semantic Versioning, with the pre-releases that Python packages have as well.
PATTERN = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(?:-(alpha|beta|rc)\.(0|[1-9]\d*))?")
STAGES = {"alpha": "a", "beta": "b", "rc": "rc"}
FINAL = ("zzz", 0)  # after every stage


@dataclass(frozen=True)
class Version:
    """A version such as 1.2.3 or 1.2.3-rc.1."""

    major: int
    minor: int
    patch: int
    stage: str | None = None
    number: int = 0

    def __str__(self) -> str:
        core = f"{self.major}.{self.minor}.{self.patch}"
        return f"{core}-{self.stage}.{self.number}" if self.stage else core

    @property
    def python(self) -> str:
        """The version as Python packages write it: 1.2.3rc1."""
        core = f"{self.major}.{self.minor}.{self.patch}"
        return f"{core}{STAGES[self.stage]}{self.number}" if self.stage else core

    @property
    def order(self) -> tuple[int, int, int, tuple[str, int]]:
        """The sort key: a pre-release comes before its release."""
        stage = (self.stage, self.number) if self.stage else FINAL
        return self.major, self.minor, self.patch, stage

    def may_break(self, before: Version) -> bool:
        """Whether a step from `before` allows incompatible changes."""
        if before.major == 0:
            return (self.major, self.minor) > (0, before.minor)
        return self.major > before.major


def parse(text: str) -> Version:
    """Parse a version without a leading v. Anything else is a ReleaseError."""
    match = PATTERN.fullmatch(text)
    if not match:
        raise ReleaseError(
            f"VERSION={text} is not a version: use X.Y.Z, or X.Y.Z-rc.N (also alpha, beta)"
        )
    major, minor, patch, stage, number = match.groups()
    return Version(int(major), int(minor), int(patch), stage, int(number or 0))


def tags(repository: Path, *arguments: str) -> list[Version]:
    """Return the versions of git tags, oldest version first. Other tags are ignored."""
    names = run(("git", "tag", "--list", "v*", *arguments), cwd=repository).split()
    found = [parse(name[1:]) for name in names if PATTERN.fullmatch(name[1:])]
    return sorted(found, key=lambda each: each.order)


def latest(repository: Path) -> Version | None:
    """Return the newest version that HEAD contains and that is not tagged on HEAD itself."""
    here = set(tags(repository, "--points-at", "HEAD"))
    before = [each for each in tags(repository, "--merged", "HEAD") if each not in here]
    return before[-1] if before else None


def check(repository: Path, version: Version) -> None:
    """Refuse a dirty tree, and a version that contradicts the tags."""
    if dirty := run(("git", "status", "--porcelain"), cwd=repository).splitlines():
        raise ReleaseError(
            "the working tree differs from HEAD; commit or stash first:\n" + "\n".join(dirty)
        )
    here = tags(repository, "--points-at", "HEAD")
    if here and version not in here:
        raise ReleaseError(f"HEAD is tagged v{here[-1]}, but VERSION={version}")
    if version in tags(repository) and version not in here:
        raise ReleaseError(f"the tag v{version} is on another commit; check it out, or count up")
    before = latest(repository)
    if before and before.order >= version.order:
        raise ReleaseError(f"VERSION={version} does not follow v{before}, which HEAD contains")


def commit_epoch(repository: Path) -> int:
    """Return the committer time of HEAD in seconds, which all artefacts have as their date."""
    return int(run(("git", "log", "-1", "--format=%ct"), cwd=repository))
