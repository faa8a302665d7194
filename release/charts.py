"""The Helm charts as packages: charts/kubeai and charts/models, with the release's version.

Helm packages them; the archive is then written again with sorted names and one time, so that the
same charts give the same bytes. Each has a README.md with its values. If there is a key of GnuPG,
each also has a provenance file, which `helm verify` checks. Called by ``python -m release``; alone,
with the key that $GPG_KEY names::

    python -m release.charts VERSION FOLDER
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from release import checksums
from release.errors import ReleaseError
from release.files import repack, run, sha256
from release.values import comment

CHARTS = ("kubeai", "models")
REQUIRED = {"kubeai": ("--set", "image.repository=registry.example.com/kubeai")}
VALUE_MAX_CHARACTERS = 60


def build(source: Path, version: str, epoch: int, out: Path, key: str | None = None) -> list[Path]:
    """Write the packages to ``out``, and their provenance files if ``key`` names a secret key."""
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
            repack(work / package.name, package, epoch)
            written.append(package)
            if key:
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


def _run(helm: Path, *arguments: str | Path) -> None:
    with tempfile.TemporaryDirectory() as home:  # reads no settings of the user
        run((helm, *arguments), cwd=Path.cwd(), env=os.environ | {"HOME": home})


def _set_version(file: Path, version: str) -> None:
    text, count = re.subn(
        r"^(version|appVersion): .*$", rf'\1: "{version}"', file.read_text(), flags=re.MULTILINE
    )
    if count != 2:
        raise ReleaseError(f"{file}: not one version and one appVersion")
    file.write_text(text)


def _sign(package: Path, key: str, epoch: int) -> Path:
    """Write the provenance file, as `helm package --sign` does: the chart's metadata and digest.

    Helm cannot sign a package that exists already. The signature's time is ``epoch``, so that a key
    whose signatures are deterministic, such as Ed25519 or RSA, gives the same bytes.
    """
    with tarfile.open(package) as entries:
        metadata = entries.extractfile(f"{entries.getnames()[0].split('/')[0]}/Chart.yaml")
        assert metadata is not None
        text = metadata.read().decode()
    options = (
        *("--digest-algo", "SHA512", "--faked-system-time", f"{epoch}!"),
        *("--ignore-time-conflict", "--clear-sign"),
    )
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / "provenance"
        plain.write_text(f"{text}\n...\nfiles:\n  {package.name}: sha256:{sha256(package)}\n")
        return checksums.sign(plain, package.with_name(f"{package.name}.prov"), key, *options)


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
    for path in build(source, version, epoch, Path(folder), os.environ.get("GPG_KEY")):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
