"""Images from an OCI layout: unpacked, with their digests checked, as an engine would run them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import contained


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


class Layout:
    """An OCI layout in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (entry,) = json.loads((folder / "index.json").read_text())["manifests"]
        self.tag = entry["annotations"]["org.opencontainers.image.ref.name"]
        self.index = json.loads(self.blob(entry))

    def blob(self, descriptor: Mapping[str, Any]) -> bytes:
        """The content that a descriptor names, with its size and digest checked."""
        algorithm, _, digest = descriptor["digest"].partition(":")
        content = (self._folder / "blobs" / algorithm / digest).read_bytes()
        assert len(content) == descriptor["size"]
        assert hashlib.new(algorithm, content).hexdigest() == digest
        return content

    def manifest(self, architecture: str) -> dict[str, Any]:
        """An architecture's manifest."""
        (entry,) = [
            each
            for each in self.index["manifests"]
            if each["platform"] == {"architecture": architecture, "os": "linux"}
        ]
        manifest: dict[str, Any] = json.loads(self.blob(entry))
        return manifest

    def config(self, architecture: str) -> dict[str, Any]:
        """An architecture's config."""
        config: dict[str, Any] = json.loads(self.blob(self.manifest(architecture)["config"]))
        return config

    def unpack(self, architecture: str, root: Path) -> Image:
        """The image, its layers on top of each other in ``root``; they delete nothing."""
        manifest, config = self.manifest(architecture), self.config(architecture)
        for layer, expected in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
            content = gzip.decompress(self.blob(layer))
            assert f"sha256:{hashlib.sha256(content).hexdigest()}" == expected
            with tarfile.open(fileobj=io.BytesIO(content)) as files:
                files.extractall(root, filter="tar")
        settings = config["config"]
        return Image(
            root,
            dict(pair.split("=", 1) for pair in settings["Env"]),
            user=settings["User"],
            entrypoint=settings["Entrypoint"],
            command=settings["Cmd"],
        )
