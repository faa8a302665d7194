"""Checks of built packages without running them: contents, tags, symbols of compiled modules."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection
from elftools.elf.sections import SymbolTableSection

from release.architectures import ARCHITECTURES, GLIBC
from release.errors import ReleaseError
from release.files import run
from release.wheels import Target

MACHINES = {each.machine: each.elf for each in ARCHITECTURES.values()}
LIBRARIES = {  # of glibc, which every Linux has that the tag names
    *("libc.so.6", "libm.so.6", "libpthread.so.0", "librt.so.1", "libdl.so.2"),
    *("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"),
}
EXPECTED = ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE")
SDIST_FILES = ("LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg")


def sources(tree: Path) -> set[str]:
    """Return the files of the package in a source tree, relative to it."""
    return {
        path.relative_to(tree).as_posix()
        for path in (tree / "kubeai").rglob("*")
        if path.is_file() and path.suffix not in (".c", ".so", ".pyc")
    }


def expected_in_wheel(tree: Path, target: Target) -> set[str]:
    """Return the files that a wheel must have, without its metadata."""
    files = sources(tree)
    compiled = {
        str(PurePosixPath(each).with_suffix("")) + target.suffix
        for each in files
        if each.endswith(".pyx")
    }
    return {each for each in files if not each.endswith(".pyx")} | compiled


def check_wheel(wheel: Path, tree: Path, target: Target) -> None:
    """Refuse a wheel with a missing or unexpected file, or a module that its tag forbids."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = next(each for each in names if each.endswith(".dist-info/WHEEL")).split("/")[0]
        contents = {each for each in names if not each.startswith(f"{info}/")}
        _same(contents, expected_in_wheel(tree, target), wheel.name)
        _same({f"{info}/{each}" for each in EXPECTED} - names, set(), f"{wheel.name}: metadata")
        recorded = {
            row[0] for row in csv.reader(io.StringIO(archive.read(f"{info}/RECORD").decode()))
        }
        _same(recorded, names, f"{wheel.name}: RECORD")
        for name in sorted(contents):
            if name.endswith(".so"):
                check_module(archive.read(name), name, target)


def check_sdist(sdist: Path, tree: Path) -> None:
    """Refuse a source distribution that lacks what a build needs, or has more."""
    with tarfile.open(sdist) as archive:
        names = {entry.name.partition("/")[2] for entry in archive.getmembers() if entry.isfile()}
    metadata = {each for each in names if each.startswith("kubeai_gateway.egg-info/")}
    wanted = sources(tree) | {*SDIST_FILES, "setup.py"}
    _same(names - metadata, wanted, sdist.name)


def _same(found: set[str], wanted: set[str], where: str) -> None:
    missing, more = sorted(wanted - found), sorted(found - wanted)
    if missing or more:
        raise ReleaseError(f"{where}: missing {missing}, not expected {more}")


def check_module(data: bytes, name: str, target: Target) -> None:
    """Refuse a module for another machine, or that needs more than Python and the tag's glibc."""
    elf = ELFFile(io.BytesIO(data))
    if elf["e_machine"] != MACHINES[target.architecture]:
        raise ReleaseError(f"{name} is for {elf['e_machine']}, not for {target.architecture}")
    for section in elf.iter_sections():
        if isinstance(section, DynamicSection):
            needed = {
                getattr(tag, "needed", "")
                for tag in section.iter_tags()
                if tag.entry.d_tag == "DT_NEEDED"
            }
            paths = [
                tag for tag in section.iter_tags() if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")
            ]
            if needed - LIBRARIES or paths:
                raise ReleaseError(
                    f"{name} needs {sorted(needed - LIBRARIES)}, search path {paths}"
                )
        if section.name.startswith(".debug"):
            raise ReleaseError(f"{name} has debug information, {section.name}")
    for symbol, version in undefined(elf):
        if version and version.startswith("GLIBC_"):
            if tuple(map(int, version[6:].split("."))) > GLIBC:
                raise ReleaseError(f"{name}: {symbol} needs {version}")
        elif not re.match(r"_?Py", symbol):
            raise ReleaseError(f"{name}: nothing defines {symbol}")


def undefined(elf: ELFFile) -> Iterable[tuple[str, str | None]]:
    """Yield the symbols that a shared object needs from others, with their versions."""
    needs, versions, symbols = None, None, None
    for section in elf.iter_sections():
        if isinstance(section, GNUVerNeedSection):
            needs = section
        elif isinstance(section, GNUVerSymSection):
            versions = section
        elif isinstance(section, SymbolTableSection) and section.name == ".dynsym":
            symbols = section
    assert symbols is not None
    for number, symbol in enumerate(symbols.iter_symbols()):
        if symbol["st_shndx"] != "SHN_UNDEF" or not symbol.name:
            continue
        if symbol["st_info"]["bind"] == "STB_WEAK":  # may be missing: the loader's hooks
            continue
        index = versions.get_symbol(number).entry["ndx"] if versions else "VER_NDX_GLOBAL"
        found = needs.get_version(index) if needs and isinstance(index, int) else None
        yield symbol.name, found[1].name if found else None


def check_tag(wheel: Path, target: Target) -> str:
    """Let auditwheel confirm the platform tag. Returns the most compatible one that it allows."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        text = run(
            ("auditwheel", "show", wheel), cwd=Path(folder), env={**os.environ, "PATH": path}
        )
    match = re.search(
        r'platform tag:\s+"?manylinux_(\d+)_(\d+)_([a-z0-9_]+?)"?\.?\s',
        text.replace("\n", " ") + " ",
    )
    if not match or match[3] != target.architecture:
        raise ReleaseError(f"auditwheel finds no platform tag for {wheel.name}:\n{text}")
    if (int(match[1]), int(match[2])) > GLIBC:
        raise ReleaseError(f"{wheel.name} is consistent only with manylinux_{match[1]}_{match[2]}")
    return f"manylinux_{match[1]}_{match[2]}_{match[3]}"
