"""Import parts of libraries whose packages import far more than that.

Every process of KubeAI pays for what it imports before it does anything: a third of the start of
`kubeai serve` was classes of the Kubernetes API that nothing here uses.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def without(package: str) -> Iterator[None]:
    """Within, this package is not installed, if nobody has imported it yet."""
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
    """Within, modules of these packages are imported without running the packages' own code.

    Outer packages come before inner ones. Yields the modules that stand for them meanwhile, for
    names that other modules want of them. Whoever imports the packages later gets them whole.
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
