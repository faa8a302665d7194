"""The charts as a release packages them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helms import IMAGE, Helm
from repository import REPOSITORY

from release import charts

pytestmark = [pytest.mark.image, pytest.mark.timeout(240)]
VERSION = "1.2.3"
EPOCH = 1767323045
KUBERNETES = ("1.27.0", "1.30.0", "1.33.0", "1.36.0")


@pytest.fixture
def key(monkeypatch) -> Iterator[str]:
    """A key of GnuPG that exists for one test. Its agent's socket needs a short path."""
    if None in map(shutil.which, ("gpg", "go")):
        pytest.skip("needs GnuPG and Go")
    home = Path(tempfile.mkdtemp(prefix="kubeai-gpg-", dir="/tmp"))
    monkeypatch.setenv("GNUPGHOME", str(home))
    name = "release@example.com"
    _gpg("--quick-generate-key", "--passphrase", "", name, "rsa3072", "sign")
    yield name
    subprocess.run(["gpgconf", "--kill", "gpg-agent"], check=False)
    shutil.rmtree(home, ignore_errors=True)  # the agent removes its sockets as well


def _gpg(*arguments: str) -> bytes:
    return subprocess.run(["gpg", "--batch", "--quiet", *arguments], stdout=-1, check=True).stdout


def build(folder: Path, key: str | None = None) -> Path:
    folder.mkdir()
    charts.build(REPOSITORY, VERSION, EPOCH, folder, key)
    return folder


def member(package: Path, name: str) -> str:
    with tarfile.open(package) as archive:
        content = archive.extractfile(name)
        assert content is not None
        return content.read().decode()


def test_two_builds_are_the_same_bytes_whatever_the_surroundings(tmp_path, monkeypatch):
    if shutil.which("go") is None:
        pytest.skip("needs Go")
    one = build(tmp_path / "one")
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    mask = os.umask(0o077)
    try:
        other = build(tmp_path / "other")
    finally:
        os.umask(mask)
    names = sorted(path.name for path in one.iterdir())
    assert names == [f"kubeai-{VERSION}.tgz", f"models-{VERSION}.tgz"]
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_signed_packages_verify_and_changed_ones_do_not(tmp_path, key):
    out = build(tmp_path / "out", key)
    keyring = tmp_path / "keys.gpg"
    keyring.write_bytes(_gpg("--export", key))
    charts.check(VERSION, out, keyring)
    package = out / f"models-{VERSION}.tgz"
    package.write_bytes(package.read_bytes() + b"\0")
    with pytest.raises(charts.ReleaseError, match="verify"):
        charts.check(VERSION, out, keyring)


def test_packages_have_the_versions_a_readme_and_render_for_all_versions_of_kubernetes(tmp_path):
    helm = Helm(tmp_path)
    out = build(tmp_path / "out")
    for chart in charts.CHARTS:
        package = out / f"{chart}-{VERSION}.tgz"
        metadata = yaml.safe_load(member(package, f"{chart}/Chart.yaml"))
        assert (metadata["version"], metadata["appVersion"]) == (VERSION, VERSION)
        assert "| `" in member(package, f"{chart}/README.md")
    kubeai = str(out / f"kubeai-{VERSION}.tgz")
    digest = f"sha256:{'0' * 64}"
    for version in KUBERNETES:
        rendered = helm("template", "kubeai", kubeai, *IMAGE, f"--kube-version={version}")
        assert f"image: registry.example.com/kubeai:{VERSION}\n" in rendered
    pinned = helm("template", "kubeai", kubeai, *IMAGE, "--set", f"image.digest={digest}")
    assert f"image: registry.example.com/kubeai@{digest}\n" in pinned
    assert f"kubeai:{VERSION}" not in pinned
    helm("template", "models", str(out / f"models-{VERSION}.tgz"))


def test_readme_lists_each_commented_value_with_its_default():
    text = "# Number of pods.\nreplicas: 1\n\n# Where.\nimage:\n"
    text += '  tag: ""  # optional\n  # - an: example\n  list: []\n'
    assert list(charts.parameters(text)) == [
        ("replicas", "1", "Number of pods."),
        ("image", "", "Where."),
        ("image.tag", '""', "optional"),
    ]
