"""The headers of the CPython versions that wheels are built for.

They come from ``PYTHON_HEADERS``, a folder with one folder per version (``3.14/Python.h``, with its
``pyconfig.h``), or else from an interpreter ``python3.14`` on PATH. Those of an interpreter for
x86_64 Linux also serve aarch64: the two ``pyconfig.h`` differ only in macros for CPython's own
sources (assembly, tiers of support) and in ``HAVE_USABLE_WCHAR_T``, which changes no declaration.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from release.errors import ReleaseError

# Debian and Ubuntu have one pyconfig.h for each architecture, and one that includes them.
INCLUDED = re.compile(r"#\s*include\s+<(x86_64-linux-gnu/python[\d.]+/pyconfig\.h)>")
ASK = (
    "import sysconfig as s;"
    "print(s.get_python_version(), bool(s.get_config_var('Py_GIL_DISABLED')));"
    "print(s.get_path('include')); print(s.get_config_h_filename())"
)


def _of_interpreter(version: str) -> tuple[Path, Path] | None:
    """Return the folder of headers and the pyconfig.h of ``python<version>`` on PATH."""
    try:
        done = subprocess.run(
            (f"python{version}", "-c", ASK), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    kind, include, config = done.stdout.splitlines()
    if kind != f"{version} False" or not (Path(include) / "Python.h").exists():
        return None
    return Path(include), Path(config)


def find(version: str) -> tuple[Path, Path]:
    """Return the folder of a version's headers, and its pyconfig.h."""
    if folder := os.environ.get("PYTHON_HEADERS"):
        include = Path(folder) / version
        if (include / "Python.h").exists():
            return include, include / "pyconfig.h"
    if found := _of_interpreter(version):
        return found
    raise ReleaseError(
        f"no headers of Python {version}: put python{version} with its headers on PATH, or the "
        f"headers into $PYTHON_HEADERS/{version}, or leave the version out of PYTHONS"
    )


def stage(version: str, target: Path) -> Path:
    """Copy a version's headers into `target`, and return the folder.

    Debian's ``pyconfig.h`` only includes that of one architecture from elsewhere in
    ``/usr/include``, which must not be on the path of a cross compiler. That one is copied instead.
    """
    include, config = find(version)
    if included := INCLUDED.search(config.read_text(encoding="utf-8")):
        config = include.parent / included[1]
        if not config.exists():
            raise ReleaseError(f"no headers of Python {version}: {config} is missing")
    shutil.copytree(include, target)
    shutil.copyfile(config, target / "pyconfig.h")
    return target


def release(version: str) -> str:
    """Return the release that the headers are of, such as 3.13.5."""
    include, _ = find(version)
    text = (include / "patchlevel.h").read_text(encoding="utf-8")
    match = re.search(r'^#define\s+PY_VERSION\s+"([^"]+)"', text, re.M)
    if not match:
        raise ReleaseError(f"{include}/patchlevel.h has no PY_VERSION")
    return match[1]
