"""The source distribution of `kubeai-gateway`, and the wheel that is built from it."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from checkouts import check_out, tracked

import kubeai

pytestmark = [pytest.mark.package, pytest.mark.timeout(600)]
BACKEND = "import sys; from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
BUILT = (".c", ".so", ".html")


def build(kind: str, source: Path, target: Path) -> Path:
    command = (sys.executable, "-c", BACKEND.format(kind), str(target))
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """Unpacked; made of a clean checkout."""
    checkout, target, unpacked = (
        tmp_path_factory.mktemp(name) for name in ("tree", "made", "sdist")
    )
    check_out(checkout)
    with tarfile.open(build("sdist", checkout, target)) as archive:
        archive.extractall(unpacked, filter="data")
    (folder,) = unpacked.iterdir()
    return folder


def test_the_source_package_holds_all_sources_and_nothing_that_was_built(sdist):
    held = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert set(tracked("kubeai")) <= held
    assert {"README.md", "LICENSE", "pyproject.toml", "setup.py"} <= held
    assert not [name for name in held if name.endswith(BUILT) and "/static/" not in name]


def test_a_wheel_of_it_has_the_compiled_core_and_the_types_and_starts(sdist, tmp_path):
    wheel = build("wheel", sdist, tmp_path / "made")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert "kubeai/py.typed" in names
    cores = [path.removesuffix(".pyx") for path in tracked("kubeai") if path.endswith(".pyx")]
    for core in cores:
        assert any(name.startswith(f"{core}.cpython") for name in names), core
        assert f"{core}.pyi" in names
    static = [path for path in tracked("kubeai") if "/console/static/" in path]
    assert "kubeai/supervisor/console/static/index.html" in static
    assert set(static) <= set(names), "the console's files are in the package"
    assert not [name for name in names if name.endswith(".c")]
    code = (
        "import kubeai.cli, kubeai.gateway.worker, sys; print(kubeai.__file__); kubeai.cli.main()"
    )
    done = subprocess.run(
        (sys.executable, "-c", code, "--version"),
        cwd=tmp_path / "installed",
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == [
        *(str(tmp_path / "installed/kubeai/__init__.py"), kubeai.__version__)
    ]
