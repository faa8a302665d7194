"""The Helm charts as packages: charts/kubeai and charts/models, with the release's version.

Helm packages them; the archive is then written again with sorted names and one time, so that the
same charts give the same bytes. Each has a README.md with its values. If $GPG_KEY names a
key of GnuPG, each also has a provenance file, which `helm verify` checks. Called by
``python -m release``; alone::

    python -m release.charts VERSION FOLDER
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from release.errors import ReleaseError
from release.files import run
from release.values import comment

CHARTS = ("kubeai", "models")
REQUIRED = {"kubeai": ("--set", "image.repository=registry.example.com/kubeai")}
VALUE_MAX_CHARACTERS = 60


def build(source: Path, version: str, epoch: int, out: Path) -> list[Path]:
    """Write the packages to ``out``, and their provenance files if there is a key."""
    written = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        helm = helm_program(source)
        for chart in CHARTS:
            folder = work / chart
            shutil.copytree(source / "charts" / chart, folder)
            _set_version(folder / "Chart.yaml", version)
            (folder / "README.md").write_text(readme(folder))
            _run(helm, "package", folder, "--destination", work)
            package = out / f"{chart}-{version}.tgz"
            _normalise(work / package.name, package, epoch)
            written.append(package)
            if key := os.environ.get("GPG_KEY"):
                written.append(_sign(package, key, epoch))
    return written


def check(version: str, out: Path, keyring: Path | None = None) -> None:
    """Lint the packages, and verify those that are signed with ``keyring``'s keys."""
    helm = helm_program(Path(__file__).resolve().parent.parent)
    for chart in CHARTS:
        package = out / f"{chart}-{version}.tgz"
        _run(helm, "lint", "--strict", package, *REQUIRED.get(chart, ()))
        if keyring is not None:
            _run(helm, "verify", package, "--keyring", keyring)


def helm_program(source: Path) -> Path:
    """Return the Helm of tests/cluster/helm. Go builds it once, and keeps it in its cache."""
    command = ("go", "tool", "-n", "helm")
    return Path(run(command, cwd=source / "tests/cluster/helm").strip())


def _run(helm: Path, *arguments: object) -> None:
    with tempfile.TemporaryDirectory() as home:  # reads no settings of the user
        env = os.environ | {"HOME": home}
        done = subprocess.run([helm, *map(str, arguments)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise ReleaseError(f"helm {arguments[0]}: {done.stdout}{done.stderr}")


def _set_version(file: Path, version: str) -> None:
    text, count = re.subn(
        r"^(version|appVersion): .*$", rf'\1: "{version}"', file.read_text(), flags=re.MULTILINE
    )
    if count != 2:
        raise ReleaseError(f"{file}: not one version and one appVersion")
    file.write_text(text)


def _normalise(package: Path, target: Path, epoch: int) -> None:
    """Copy a package with its entries sorted, owned by nobody, and of one time."""
    plain = io.BytesIO()
    with (
        tarfile.open(package) as given,
        tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as out,
    ):
        for entry in sorted(given.getmembers(), key=lambda each: each.name):
            clean = tarfile.TarInfo(entry.name)
            clean.size, clean.mode, clean.mtime = entry.size, 0o644, epoch
            out.addfile(clean, given.extractfile(entry))
    target.write_bytes(gzip.compress(plain.getvalue(), mtime=epoch))


def _sign(package: Path, key: str, epoch: int) -> Path:
    """Write the provenance file, as `helm package --sign` does: the chart's metadata and digest.

    Helm cannot sign a package that exists already. The signature's time is ``epoch``, so that a key
    whose signatures are deterministic, such as Ed25519 or RSA, gives the same bytes.
    """
    with tarfile.open(package) as entries:
        metadata = entries.extractfile(f"{entries.getnames()[0].split('/')[0]}/Chart.yaml")
        assert metadata is not None
        text = metadata.read().decode()
    digest = hashlib.sha256(package.read_bytes()).hexdigest()
    signed = subprocess.run(
        [
            *("gpg", "--batch", "--yes", "--local-user", key, "--digest-algo", "SHA512"),
            *("--faked-system-time", f"{epoch}!", "--ignore-time-conflict", "--clear-sign"),
        ],
        input=f"{text}\n...\nfiles:\n  {package.name}: sha256:{digest}\n".encode(),
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    provenance = package.with_name(f"{package.name}.prov")
    provenance.write_bytes(signed)
    return provenance


# -- a chart's README ----------------------------------------------------------------------------


def readme(folder: Path) -> str:
    """The chart's name, how to install it, and its values with their defaults."""
    chart = yaml.safe_load((folder / "Chart.yaml").read_text())
    values = (folder / "values.yaml").read_text()
    rows = "\n".join(
        f"| `{path}` | {_cell(default)} | {text} |" for path, default, text in parameters(values)
    )
    return (
        f"# {chart['name']}\n\n{chart['description']}\n\n"
        f"    helm install {chart['name']} {chart['name']}-{chart['version']}.tgz\n\n"
        f"`helm show values {chart['name']}-{chart['version']}.tgz` prints the values with their "
        f"comments.\n\n## Values\n\n| value | default | description |\n|---|---|---|\n{rows}\n"
    )


def _cell(default: str) -> str:
    return f"`{default}`" if default else ""


def parameters(text: str) -> Iterator[tuple[str, str, str]]:
    """Each key that has a comment: its path, its default (empty for sections), the comment."""
    node = yaml.compose(text)
    assert isinstance(node, yaml.MappingNode)
    return _parameters(text, text.splitlines(), node, "")


def _parameters(
    text: str, lines: Sequence[str], section: yaml.MappingNode, parent: str
) -> Iterator[tuple[str, str, str]]:
    for key, value in section.value:
        path = f"{parent}{key.value}"
        nested = isinstance(value, yaml.CollectionNode) and not value.flow_style
        if words := comment(lines, key.start_mark.line):
            default = "" if nested else text[value.start_mark.index : value.end_mark.index]
            if len(default) > VALUE_MAX_CHARACTERS or "\n" in default:
                default = "…"
            yield path, default, words.replace("|", "\\|")
        if nested and isinstance(value, yaml.MappingNode):
            yield from _parameters(text, lines, value, f"{path}.")


def main(version: str, folder: str) -> None:
    """Package the charts of this checkout into ``folder``."""
    source = Path(__file__).resolve().parent.parent
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    for path in build(source, version, epoch, Path(folder)):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
