"""Stands in for SGLang's compiled kernels on a CPU without AMX, where SGLang uses PyTorch.

SGLang's CPU engine imports functions of ``sgl_kernel`` when it starts, even those that it calls
only on CPUs with AMX. No package registry has the CPU build of that package, so the installer puts
this module in its place. A function that is called after all raises NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} needs the compiled package")

    return missing
