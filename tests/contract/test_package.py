"""The source distribution of `kubeai-gateway`, and the wheels that are built from it.

They are built as in a release. pip builds a wheel for the image; see test_image.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from checkouts import check_out, tracked
from repository import REPOSITORY

import kubeai
from release import files, inspection, trial, versions, wheels
from release import sdist as release_sdist
from release.errors import ReleaseError

pytestmark = [pytest.mark.package, pytest.mark.timeout(600)]
BUILT = (".c", ".so", ".html")
VERSION = versions.parse("1.2.3")
EPOCH = 1_700_000_000
HERE = wheels.Target(f"{sys.version_info[0]}.{sys.version_info[1]}", os.uname().machine)


def build_sdist(source: Path, target: Path) -> Path:
    command = (sys.executable, "-c", release_sdist.BACKEND, str(target))
    env = os.environ | {"KUBEAI_VERSION": kubeai.__version__}
    done = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """As pip builds it, unpacked; made of a clean checkout."""
    checkout, target, unpacked = (
        tmp_path_factory.mktemp(name) for name in ("tree", "made", "sdist")
    )
    check_out(checkout)
    files.unpack(build_sdist(checkout, target), unpacked)
    (folder,) = unpacked.iterdir()
    return folder


def test_the_source_package_holds_all_sources_and_nothing_that_was_built(sdist):
    held = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert set(tracked("kubeai")) <= held
    assert {"README.md", "LICENSE", "pyproject.toml", "setup.py"} <= held
    assert not [name for name in held if name.endswith(BUILT) and "/static/" not in name]


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    tree = tmp_path_factory.mktemp("clean")
    check_out(tree)
    return tree


@pytest.fixture(scope="module")
def released(clean, tmp_path_factory) -> Path:
    """The source distribution and the wheel for this interpreter, as in a release."""
    out = tmp_path_factory.mktemp("released")
    (archive,) = release_sdist.build(clean, VERSION, EPOCH, out)
    wheels.build(archive, VERSION, EPOCH, out, [HERE])
    return out


def test_a_second_build_elsewhere_has_the_same_bytes(released, clean, tmp_path, monkeypatch):
    """With another umask, time zone, locale and folder, from a tree with other modes and times."""
    tree, out = tmp_path / "another-place", tmp_path / "out"
    before = os.umask(0o077)
    try:
        check_out(tree)
        out.mkdir()
        for path in tree.rglob("*.py"):
            path.chmod(0o600)
            os.utime(path, (1, 1))
        monkeypatch.setenv("TZ", "Pacific/Kiritimati")
        monkeypatch.setenv("LC_ALL", "C")
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        (archive,) = release_sdist.build(tree, VERSION, EPOCH, out)
        wheels.build(archive, VERSION, EPOCH, out, [HERE])
    finally:
        os.umask(before)
    assert files.differences(released, out) == []


def test_the_released_packages_hold_what_they_must_and_nothing_else(released, clean):
    (wheel,), (archive,) = released.glob("*.whl"), released.glob("*.tar.gz")
    inspection.check_wheel(wheel, clean, HERE)
    inspection.check_sdist(archive, clean)
    assert re.fullmatch(rf"manylinux_2_\d+_{HERE.architecture}", inspection.check_tag(wheel, HERE))


def test_the_released_wheel_serves_a_chat_in_a_fresh_environment(released):
    (wheel,) = released.glob("*.whl")
    if trial.interpreter(wheel) is None:
        pytest.skip(f"needs python{HERE.python} on PATH")
    trial.check(wheel, REPOSITORY / "constraints.txt", VERSION)


def test_a_wheel_that_lost_a_module_or_gained_a_file_is_refused(released, clean, tmp_path):
    (wheel,) = released.glob("*.whl")
    for lost, gained in (("kubeai/_ring" + HERE.suffix, None), (None, "kubeai/secret.txt")):
        changed = tmp_path / wheel.name
        with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(changed, "w") as new:
            for name in old.namelist():
                if name != lost:
                    new.writestr(name, old.read(name))
            if gained:
                new.writestr(gained, "")
        with pytest.raises(ReleaseError, match=re.escape(str(lost or gained))):
            inspection.check_wheel(changed, clean, HERE)


def test_a_module_for_another_machine_is_refused(released):
    (wheel,) = released.glob("*.whl")
    name = "kubeai/_ring" + HERE.suffix
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(name)
    inspection.check_module(data, name, HERE)
    (other,) = {*wheels.ARCHITECTURES} - {HERE.architecture}
    with pytest.raises(ReleaseError, match=f"not for {other}"):
        inspection.check_module(data, name, wheels.Target(HERE.python, other))
