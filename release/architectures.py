"""The architectures and the glibc that a release is for.

Needs nothing but the standard library, and no other file of this package: the Dockerfile copies it.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

GLIBC = (2, 28)
MANYLINUX = f"manylinux_{GLIBC[0]}_{GLIBC[1]}"


@dataclass(frozen=True)
class Architecture:
    """An architecture, as OCI, Linux and the wheels' tags call it."""

    oci: str  # also Debian's name
    machine: str
    elf: str
    loader: str

    @property
    def platform(self) -> str:
        """What uv resolves wheels for: the glibc of KubeAI's own wheels or later."""
        return f"{self.machine}-{MANYLINUX}"

    @property
    def libraries(self) -> str:
        """Where Debian has the shared libraries."""
        return f"usr/lib/{self.machine}-linux-gnu"

    @property
    def strip(self) -> str:
        """The program that removes symbols, of Debian's binutils."""
        return f"{self.machine}-linux-gnu-strip"


ARCHITECTURES = {
    "amd64": Architecture("amd64", "x86_64", "EM_X86_64", "lib64/ld-linux-x86-64.so.2"),
    "arm64": Architecture("arm64", "aarch64", "EM_AARCH64", "lib/ld-linux-aarch64.so.1"),
}


def machine() -> Architecture:
    """This machine's architecture."""
    return next(each for each in ARCHITECTURES.values() if each.machine == platform.machine())
