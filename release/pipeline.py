"""The order of a release: clone, build, check. `python -m release` calls it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from release import (
    charts,
    checksums,
    headers,
    image,
    inspection,
    notes,
    sbom,
    sdist,
    trial,
    versions,
    wheels,
)
from release.architectures import ARCHITECTURES, GLIBC
from release.errors import ReleaseError
from release.files import differences, run
from release.versions import Version

PARTS = ("sdist", "wheels", "sbom", "image", "charts")
TOOLS = ("setuptools", "cython", "wheel", "ziglang", "auditwheel", "cyclonedx-python-lib", "uv")
PROGRAMS = (  # that make the image's bytes
    ("go", "version"),
    ("mmdebstrap", "--version"),
    *((each.strip, "--version") for each in ARCHITECTURES.values()),
)
# Where the second build differs from the first one. None of it may reach an artefact.
OTHERWISE = {
    "TZ": "Pacific/Kiritimati",
    "LC_ALL": "C",
    "LANG": "C",
    "PYTHONHASHSEED": "4711",
}
OTHER_UMASK = 0o077


@dataclass(frozen=True)
class Plan:
    """What to build, and where."""

    version: Version
    out: Path
    parts: Sequence[str] = PARTS
    pythons: Sequence[str] = wheels.PYTHONS
    architectures: Sequence[str] = wheels.ARCHITECTURES
    key: str | None = None
    said: Callable[[str], None] = field(default=print)
    checked: bool = True

    @property
    def targets(self) -> list[wheels.Target]:
        """The wheels."""
        return wheels.targets(self.pythons, self.architectures)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Report how long a step takes."""
        begin = time.monotonic()
        yield
        self.said(f"{name}: {time.monotonic() - begin:.0f} s")


def build(repository: Path, plan: Plan) -> list[Path]:
    """Build everything in `plan`, and check it; `plan.out` is replaced. Returns the files."""
    versions.check(repository, plan.version)
    changelog = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    notes.check(changelog, plan.version, versions.latest(repository))
    epoch = versions.commit_epoch(repository)
    shutil.rmtree(plan.out, ignore_errors=True)
    plan.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="kubeai-release-") as folder:
        clone = Path(folder) / "clone"
        run(("git", "clone", "-q", "--no-local", repository, clone), cwd=Path(folder))
        head = run(("git", "rev-parse", "HEAD"), cwd=repository).strip()
        run(("git", "checkout", "-q", "--detach", head), cwd=clone)
        _build(clone, plan, epoch, head)
        for path in plan.out.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        checksums.build(plan.out, plan.key)
        if plan.checked:
            _check(clone, plan)
    return sorted(path for path in plan.out.iterdir())


def _build(clone: Path, plan: Plan, epoch: int, head: str) -> None:
    version, out = plan.version, plan.out
    notes.build(clone, version, out)
    made: list[Path] = []
    if "sdist" in plan.parts or "wheels" in plan.parts:
        with plan.step("source distribution"):
            (archive,) = sdist.build(clone, version, epoch, out)
    if "wheels" in plan.parts:
        with plan.step(f"{len(plan.targets)} wheels"):
            made = wheels.build(archive, version, epoch, out, plan.targets)
        (out / "buildinfo.json").write_text(json.dumps(info(plan, epoch, head), indent=2) + "\n")
    if "sbom" in plan.parts:
        with plan.step("SBOM"):
            sbom.build(clone, version, epoch, out, made)
    if "image" in plan.parts:
        with plan.step("image"):
            image.build(clone, str(version), epoch, out, made)
    if "charts" in plan.parts:
        with plan.step("charts"):
            charts.build(clone, str(version), epoch, out, plan.key)


def _check(clone: Path, plan: Plan) -> None:
    """Check what was built. The first failure is a ReleaseError."""
    checksums.check(plan.out)
    packages = sorted(plan.out.glob("*.whl")) + sorted(plan.out.glob("*.tar.gz"))
    if packages:
        with plan.step("check of packages"):
            run((sys.executable, "-m", "twine", "check", "--strict", *packages), cwd=plan.out)
            for archive in plan.out.glob("kubeai_gateway-*.tar.gz"):
                inspection.check_sdist(archive, clone)
    if "wheels" in plan.parts:
        for target in plan.targets:
            (wheel,) = plan.out.glob(f"*-{target.tag}.whl")
            inspection.check_wheel(wheel, clone, target)
            plan.said(f"{wheel.name}: auditwheel allows {inspection.check_tag(wheel, target)}")
            if trial.interpreter(wheel):
                with plan.step(f"{wheel.name}: installed, and a chat answered"):
                    trial.check(wheel, clone / "constraints.txt", plan.version)
            else:
                plan.said(f"{wheel.name}: not run, this machine has no such interpreter")
    if "image" in plan.parts:
        with plan.step("check of the image"):
            image.check(str(plan.version), plan.out)
    if "charts" in plan.parts:
        with plan.step("check of the charts"), tempfile.TemporaryDirectory() as folder:
            keyring = checksums.keyring(plan.key, Path(folder) / "keys.gpg") if plan.key else None
            charts.check(str(plan.version), plan.out, keyring)


def info(plan: Plan, epoch: int, head: str) -> dict[str, Any]:
    """Return what somebody needs to build the same bytes: commit, tools and headers."""
    return {
        "version": str(plan.version),
        "commit": head,
        "sourceDateEpoch": epoch,
        "python": platform.python_version(),
        "tools": {name: importlib.metadata.version(name) for name in TOOLS},
        "programs": {
            command[0]: run(command, cwd=plan.out).splitlines()[0]
            for command in (PROGRAMS if "image" in plan.parts else ())
        },
        "headers": {python: headers.release(python) for python in plan.pythons},
        "glibc": ".".join(map(str, GLIBC)),
    }


def reproduce(repository: Path, first: Path, arguments: Sequence[str]) -> list[str]:
    """Build again under other circumstances, and return the files that differ from `first`.

    The other build has its own clone, temporary folder, umask, time zone, locale and hash seed. Its
    time of day differs anyway. It is not checked: its bytes are compared with those that were.
    `arguments` are those of ``python -m release build``.
    """
    with tempfile.TemporaryDirectory(prefix="kubeai-a-build-in-another-place-") as folder:
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        out = Path(folder) / "dist"
        done = subprocess.run(
            (sys.executable, "-m", "release", "build", *arguments, "--no-check", "--out", str(out)),
            cwd=repository,
            env={**os.environ, **OTHERWISE, "TMPDIR": str(temporary)},
            umask=OTHER_UMASK,
            check=False,
        )
        if done.returncode:
            raise ReleaseError("the second build failed")
        # That signature has the time of signing in it; those of the charts have the commit's.
        return [name for name in differences(first, out) if name != checksums.SIGNATURE]
