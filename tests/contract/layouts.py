"""Images as an engine would run them, unpacked from an OCI layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import contained

from release.oci import Layout


@dataclass
class Image:
    """A root file system, and what the image's config says of running it."""

    root: Path
    env: dict[str, str] = field(default_factory=dict)
    directory: str = "/"
    user: str = "0:0"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(
        self,
        *arguments: str,
        entrypoint: Sequence[str] = (),
        mounts: Mapping[str, Path] = MappingProxyType({}),
        **env: str,
    ) -> list[str]:
        """The command that runs the image; ``mounts``: folders, writable, by where they are."""
        return contained.command(
            self.root,
            [*(entrypoint or self.entrypoint), *(arguments or self.command)],
            user=self.user,
            env=self.env | env,
            mounts=mounts,
            directory=self.directory,
        )


def unpack(layout: Layout, architecture: str, root: Path) -> Image:
    """An image of a layout, in ``root``."""
    layout.unpack(architecture, root)
    settings = layout.config(architecture)["config"]
    return Image(
        root,
        dict(pair.split("=", 1) for pair in settings["Env"]),
        user=settings["User"],
        entrypoint=settings["Entrypoint"],
        command=settings["Cmd"],
    )
