"""Read an OCI layout: manifests, configs and layers, each checked against its digest."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from release.errors import ReleaseError


class Layout:
    """An OCI layout in a folder, with one tag that names an index of architectures."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (entry,) = json.loads((folder / "index.json").read_text())["manifests"]
        self.tag: str = entry["annotations"]["org.opencontainers.image.ref.name"]
        self.digest: str = entry["digest"]
        self.index: dict[str, Any] = json.loads(self.blob(entry))

    @property
    def architectures(self) -> list[str]:
        """The architectures that the index lists."""
        return [each["platform"]["architecture"] for each in self.index["manifests"]]

    def blob(self, descriptor: Mapping[str, Any]) -> bytes:
        """The content that a descriptor names; ReleaseError if it is not what was described."""
        algorithm, _, digest = str(descriptor["digest"]).partition(":")
        content = (self._folder / "blobs" / algorithm / digest).read_bytes()
        found = hashlib.new(algorithm, content).hexdigest()
        if (len(content), found) != (descriptor["size"], digest):
            raise ReleaseError(f"image: {digest} has the digest {found}")
        return content

    def manifest(self, architecture: str) -> dict[str, Any]:
        """An architecture's manifest."""
        wanted = {"architecture": architecture, "os": "linux"}
        (entry,) = [each for each in self.index["manifests"] if each["platform"] == wanted]
        manifest: dict[str, Any] = json.loads(self.blob(entry))
        return manifest

    def config(self, architecture: str) -> dict[str, Any]:
        """An architecture's config."""
        config: dict[str, Any] = json.loads(self.blob(self.manifest(architecture)["config"]))
        return config

    def unpack(self, architecture: str, root: Path) -> None:
        """Write the layers on top of each other to ``root``; no layer of KubeAI deletes files."""
        layers = self.manifest(architecture)["layers"]
        expected = self.config(architecture)["rootfs"]["diff_ids"]
        for layer, digest in zip(layers, expected, strict=True):
            content = gzip.decompress(self.blob(layer))
            if f"sha256:{hashlib.sha256(content).hexdigest()}" != digest:
                raise ReleaseError(f"image: the layer {layer['digest']} does not contain {digest}")
            with tarfile.open(fileobj=io.BytesIO(content)) as files:
                files.extractall(root, filter="tar")
