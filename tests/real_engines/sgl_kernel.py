"""Stands in for SGLang's compiled kernels on a CPU without AMX, where SGLang computes with PyTorch.

SGLang's CPU engine imports functions of ``sgl_kernel`` when it starts, even those that it calls only
on CPUs with AMX. The CPU build of that package is in no package registry, so the installer puts this
module in its place. A function that is called after all raises NotImplementedError.
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
