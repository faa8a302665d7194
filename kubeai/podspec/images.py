"""Container images by name: what their names and tags say about the program inside. Pure."""

from __future__ import annotations

from typing import NamedTuple


class Image(NamedTuple):
    """The parts of ``[registry/][path/]name[:tag][@digest]`` that say what is inside."""

    name: str  # the last part of the path, without registry and folders
    tag: str = ""
    digest: str = ""


def parse_image(image: str) -> Image:
    """Split an image's name. A port of the registry is no tag."""
    path, _, digest = image.partition("@")
    name, _, tag = path.rpartition("/")[2].partition(":")
    return Image(name, tag, digest)
