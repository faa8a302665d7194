"""Import parts of libraries without everything else that their packages import.

Imports delay the start of every process: a third of the start-up time of `kubeai serve` went into
classes of the Kubernetes API that nothing here uses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """Make a package look uninstalled inside the block, unless it has already been imported."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


@contextlib.contextmanager
def without_init(*packages: str) -> Iterator[list[ModuleType]]:
    """Import modules of these packages inside the block without running their ``__init__.py``.

    List outer packages before inner ones. Yields the placeholder modules, so that the caller can
    set attributes that other modules import from them. Later imports load the full packages.
    """
    given, standing = [], []
    for name in packages:
        spec = None if name in sys.modules else importlib.util.find_spec(name)
        if spec is None:
            standing.append(sys.modules[name])
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        given.append(name)
        standing.append(module)
    try:
        yield standing
    finally:
        for name in given:
            del sys.modules[name]
