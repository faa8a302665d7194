"""Wheels for Linux: every CPython version and architecture, compiled on one machine.

Zig's C compiler targets any architecture and any glibc, so this needs neither containers nor
emulation. Cython translates the modules once; what differs between wheels is only the C compiler's
target and CPython's headers. The wheels are built from the source distribution, which therefore
builds.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from release import architectures, headers
from release.architectures import GLIBC, MANYLINUX
from release.errors import ReleaseError
from release.files import environment, run, unpack
from release.versions import Version

PYTHONS = ("3.11", "3.12", "3.13", "3.14")
ARCHITECTURES = tuple(each.machine for each in architectures.ARCHITECTURES.values())
# Cython's code relies on wrapping integers and on no strict aliasing, like CPython itself.
FLAGS = ("-g0", "-DNDEBUG", "-fwrapv", "-fPIC", "-shared", "-s")
TRANSLATE = """
import json, runpy
setup = runpy.run_path("setup.py")
modules = setup["translate"](setup["modules"]())
print(json.dumps([[m.name, m.sources, m.extra_compile_args] for m in modules]))
"""
METADATA = (
    "import sys; from setuptools import build_meta;"
    "build_meta.prepare_metadata_for_build_wheel(sys.argv[1])"
)


@dataclass(frozen=True)
class Target:
    """One wheel: a version of CPython and an architecture of Linux."""

    python: str
    architecture: str

    @property
    def platform(self) -> str:
        """The platform tag."""
        return f"{MANYLINUX}_{self.architecture}"

    @property
    def tag(self) -> str:
        """The wheel's tag: interpreter, ABI and platform."""
        version = "cp" + self.python.replace(".", "")
        return f"{version}-{version}-{self.platform}"

    @property
    def suffix(self) -> str:
        """The suffix of a compiled module."""
        return f".cpython-{self.python.replace('.', '')}-{self.architecture}-linux-gnu.so"

    @property
    def triple(self) -> str:
        """The target of Zig's compiler."""
        return f"{self.architecture}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"


@dataclass(frozen=True)
class Module:
    """A module that Cython has translated."""

    name: str
    source: str
    flags: Sequence[str]

    def path(self, target: Target) -> str:
        """The path of the compiled module in the wheel."""
        return self.name.replace(".", "/") + target.suffix


def zig() -> str:
    """Return the path of Zig, which a Python package contains."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise ReleaseError("the package ziglang is missing; `make release` installs it")
    return str(Path(spec.origin).with_name("zig"))


def targets(
    pythons: Iterable[str] = PYTHONS, machines: Iterable[str] = ARCHITECTURES
) -> list[Target]:
    """Return all combinations."""
    return [Target(python, each) for python in pythons for each in machines]


def build(
    source: Path, version: Version, epoch: int, out: Path, wanted: Sequence[Target]
) -> list[Path]:
    """Build the wheels of `wanted` from the source distribution `source`."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        unpack(source, scratch / "sdist")
        (tree,) = (scratch / "sdist").iterdir()
        env = environment(
            epoch,
            ZIG_GLOBAL_CACHE_DIR=str(scratch / "zig"),
            ZIG_LOCAL_CACHE_DIR=str(scratch / "zig"),
        )
        pure = _pure(tree, scratch, env)
        modules = _translate(tree, env)
        compiled = _compile(tree, modules, wanted, scratch, env)
        return [_pack(pure, compiled[target], target, scratch, out, env) for target in wanted]


def _pure(tree: Path, scratch: Path, env: Mapping[str, str]) -> Path:
    """Collect what all wheels share: Python files, data and metadata."""
    pure = scratch / "pure"
    run((sys.executable, "setup.py", "-q", "build_py", "--build-lib", pure), cwd=tree, env=env)
    metadata = scratch / "metadata"
    metadata.mkdir()
    run((sys.executable, "-c", METADATA, metadata), cwd=tree, env=env)
    (info,) = metadata.glob("*.dist-info")
    info.rename(pure / info.name)
    return pure


def _translate(tree: Path, env: Mapping[str, str]) -> list[Module]:
    """Translate the modules to C with the settings of setup.py."""
    text = run((sys.executable, "-c", TRANSLATE), cwd=tree, env=env)
    rows = json.loads(text.splitlines()[-1])
    return [Module(name, source, tuple(flags)) for name, (source,), flags in rows]


def _compile(
    tree: Path,
    modules: Sequence[Module],
    wanted: Sequence[Target],
    scratch: Path,
    env: Mapping[str, str],
) -> dict[Target, Path]:
    """Compile all modules for all targets, as many at a time as there are cores."""
    includes = {
        python: headers.stage(python, scratch / "headers" / python)
        for python in dict.fromkeys(target.python for target in wanted)
    }
    folders = {target: scratch / target.tag for target in wanted}

    compiler = zig()

    def one(job: tuple[Target, Module]) -> None:
        target, module = job
        product = folders[target] / module.path(target)
        product.parent.mkdir(parents=True, exist_ok=True)
        run(
            [
                *(compiler, "cc", "-target", target.triple, *FLAGS, *module.flags),
                *("-I", str(includes[target.python]), "-I", "."),
                *(module.source, "-o", str(product)),
            ],
            cwd=tree,
            env=env,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, [(target, module) for target in wanted for module in modules]))
    return folders


@functools.cache
def _generator() -> str:
    """Name what wrote the wheel, for its metadata."""
    return f"wheel ({importlib.metadata.version('wheel')})"


def _pack(
    pure: Path, compiled: Path, target: Target, scratch: Path, out: Path, env: Mapping[str, str]
) -> Path:
    """Combine shared files and compiled modules to one wheel."""
    tree = scratch / "wheel" / target.tag
    shutil.copytree(pure, tree)
    shutil.copytree(compiled, tree, dirs_exist_ok=True)
    (info,) = tree.glob("*.dist-info")
    (info / "WHEEL").write_text(
        f"Wheel-Version: 1.0\nGenerator: {_generator()}\nRoot-Is-Purelib: false\n"
        f"Tag: {target.tag}\n"
    )
    for path in tree.rglob("*"):
        executable = path.is_dir() or path.suffix == ".so"
        path.chmod(0o755 if executable else 0o644)
    before = set(out.glob("*.whl"))
    run((sys.executable, "-m", "wheel", "pack", "--dest-dir", out, tree), cwd=scratch, env=env)
    made = set(out.glob("*.whl")) - before
    if len(made) != 1:
        raise ReleaseError(f"the wheel for {target.tag} was already in {out}")
    return made.pop()
