"""KubeAI's image as an OCI layout, for amd64 and arm64, without a container engine.

release/rootfs.py makes the layers' files; regctl, a Go program, writes the layout. All times are 0
but the image's own, so the same wheels and Debian packages give the same bytes. Called by
``python -m release``; alone, with KubeAI's wheels for the image's Python in FOLDER::

    python -m release.image VERSION FOLDER
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import stat
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

from release import rootfs, sbom
from release.architectures import ARCHITECTURES, Architecture
from release.errors import ReleaseError
from release.files import run, unpack
from release.oci import Layout

REGCTL = "github.com/regclient/regclient/cmd/regctl@v0.11.7"
TITLE = "KubeAI"
DESCRIPTION = "Inference gateway and model operator for Kubernetes"
ENVIRONMENT = {
    # The user has no home directory; some libraries fail if HOME is not set.
    "HOME": "/nonexistent",
    "PATH": "/opt/kubeai/bin:/usr/local/bin",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}
ENTRYPOINT = ["/opt/kubeai/bin/kubeai"]
COMMAND = ["serve"]
PORTS = (8000, 8080, 8081)
SHELLS = ("sh", "bash", "dash", "busybox", "apt-get", "dpkg", "perl")


def build(source: Path, version: str, epoch: int, out: Path, wheels: Sequence[Path]) -> list[Path]:
    """Write the layout as a tar to ``out``, for each architecture of the wheels."""
    del source  # the constraints are beside this file
    chosen = dict(_wheels(wheels))
    if not chosen:
        raise ReleaseError(f"the image needs a wheel for CPython {rootfs.PYTHON}; build one")
    written = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        archives = rootfs.download([ARCHITECTURES[oci] for oci in chosen], work)
        layout = Writer(work / "layout", version, epoch, build_regctl(work))
        for oci, wheel in sorted(chosen.items()):
            folder = work / oci
            layers = rootfs.build(archives, wheel.resolve(), ARCHITECTURES[oci], folder)
            layout.add(oci, layers)
            rootfs.merge(layers, folder / "root")
            written.append(sbom.write_image(folder / "root", version, epoch, out, oci))
            shutil.rmtree(folder)
        layout.finish(sorted(chosen))
        target = packed(version, out)
        archive_folder(layout.folder, target, epoch)
    return [target, *written]


def packed(version: str, out: Path) -> Path:
    """Where the release in ``out`` has the layout, as a tar."""
    return out / f"kubeai-{version}-image.tar"


def unpacked(version: str, out: Path, folder: Path) -> Layout:
    """The layout of the release in ``out``, unpacked to ``folder``."""
    unpack(packed(version, out), folder)
    return Layout(folder)


def check(version: str, out: Path) -> None:
    """Check digests, tags and settings, that there is no shell, and that all libraries are there.

    The last two for architectures that this machine cannot run, too.
    """
    with tempfile.TemporaryDirectory() as name:
        layout = unpacked(version, out, Path(name) / "layout")
        if layout.tag != version:
            raise ReleaseError(f"image: tagged {layout.tag}, not {version}")
        for oci in layout.architectures:
            root = Path(name) / oci
            layout.unpack(oci, root)
            if layout.config(oci)["config"]["User"] != rootfs.USER:
                raise ReleaseError(f"image: the user is not {rootfs.USER}")
            if shells := [each for each in SHELLS if (root / "usr/bin" / each).exists()]:
                raise ReleaseError(f"image: contains {', '.join(shells)}")
            _check_libraries(root, ARCHITECTURES[oci])


def _check_libraries(root: Path, architecture: Architecture) -> None:
    """Check that programs and libraries are of the architecture, and have what they link to."""
    there = {path.name for path in root.rglob("*.so*")}
    for path in [root / f"usr/bin/python{rootfs.PYTHON}", *sorted(root.rglob("*.so*"))]:
        if path.is_symlink() or path.is_dir():
            continue
        with path.open("rb") as file:
            binary = ELFFile(file)
            if binary["e_machine"] != architecture.elf:
                raise ReleaseError(f"image: {path.name} is not for {architecture.machine}")
            dynamic = binary.get_section_by_name(".dynamic")
            if not isinstance(dynamic, DynamicSection):
                continue
            for tag in dynamic.iter_tags("DT_NEEDED"):
                needed = str(getattr(tag, "needed", ""))
                if needed not in there:
                    raise ReleaseError(f"image: {path.name} needs {needed}")


def _wheels(wheels: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    tag = f"-cp{rootfs.PYTHON.replace('.', '')}-"
    for wheel in wheels:
        for each in ARCHITECTURES.values():
            if tag in wheel.name and wheel.stem.endswith(f"_{each.machine}"):
                yield each.oci, wheel


def build_regctl(folder: Path) -> Path:
    """Build regctl with Go, which takes a second if Go has built it before."""
    env = os.environ | {"GOBIN": str(folder), "GOFLAGS": "-mod=mod"}
    run(("go", "install", REGCTL), cwd=folder, env=env)
    return folder / "regctl"


class Writer:
    """Writes an OCI layout to a folder."""

    def __init__(self, folder: Path, version: str, epoch: int, program: Path) -> None:
        self.folder = folder
        self._version = version
        self._created = datetime.datetime.fromtimestamp(epoch, datetime.UTC).strftime(
            "%Y-%m-%dT%H:%M:%SZ"
        )
        self._program = program

    def add(self, oci: str, layers: Sequence[Path]) -> None:
        """Add the image of one architecture, tagged by it."""
        image = self._reference(oci)
        self._run(
            "image", "create", image, "--platform", f"linux/{oci}", "--created", self._created
        )
        options = [f"--env={name}={value}" for name, value in ENVIRONMENT.items()]
        options += [f"--expose-add={port}/tcp" for port in PORTS]
        options += [f"--label={key}={value}" for key, value in self._annotations().items()]
        options += [f"--annotation={key}={value}" for key, value in self._annotations().items()]
        for layer in layers:
            archive = layer.with_suffix(".tar")
            archive_folder(layer, archive, 0)
            self._run("image", "mod", image, "--replace", "--layer-add", f"tar={archive}")
            archive.unlink()
        self._run(
            *("image", "mod", image, "--replace", "--user", rootfs.USER, *options),
            *("--config-entrypoint", json.dumps(ENTRYPOINT), "--config-cmd", json.dumps(COMMAND)),
            *("--config-time", f"set={self._created}"),
        )

    def finish(self, architectures: Sequence[str]) -> None:
        """Make one index of the images, tagged with the version, and remove everything else."""
        references = [f"--ref={self._reference(oci)}" for oci in architectures]
        notes = [f"--annotation={key}={value}" for key, value in self._annotations().items()]
        self._run("index", "create", self._reference(self._version), *references, *notes)
        for oci in architectures:
            self._run("tag", "delete", self._reference(oci))
        index = self.folder / "index.json"
        content = json.loads(index.read_text())
        for manifest in content["manifests"]:  # regctl notes when it tagged the image
            manifest["annotations"].pop("org.opencontainers.image.created", None)
        index.write_text(json.dumps(content, separators=(",", ":")))

    def _annotations(self) -> dict[str, str]:
        return {
            "org.opencontainers.image.created": self._created,
            "org.opencontainers.image.description": DESCRIPTION,
            "org.opencontainers.image.licenses": "Apache-2.0",
            "org.opencontainers.image.title": TITLE,
            "org.opencontainers.image.version": self._version,
        }

    def _reference(self, tag: str) -> str:
        return f"ocidir://{self.folder}:{tag}"

    def _run(self, *arguments: str) -> None:
        env = os.environ | {"HOME": str(self.folder.parent)}  # reads no settings of the user
        run((self._program, *arguments), cwd=self.folder.parent, env=env)


def archive_folder(folder: Path, archive: Path, epoch: int) -> None:
    """A tar whose bytes depend on names, modes and contents only."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = epoch
        # Not those of this process's umask.
        if not entry.mode & stat.S_ISVTX:
            entry.mode = 0o755 if entry.isdir() or entry.mode & 0o100 else 0o644
        return entry

    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as out:
        for path in sorted(folder.rglob("*")):
            out.add(path, str(path.relative_to(folder)), recursive=False, filter=plain)


def main(version: str, folder: str) -> None:
    """Build the image from the wheels in ``folder``, into it."""
    out = Path(folder)
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "0"))
    for path in build(rootfs.REPOSITORY, version, epoch, out, sorted(out.glob("*.whl"))):
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
