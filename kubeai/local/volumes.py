"""The directories that ``--volume`` names, and the checks of ``pvc://`` URLs against them."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from kubeai.api.model_url import ModelURL
from kubeai.errors import KubeAIError, quoted

_CLAIM = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


def read_volumes(values: Sequence[str]) -> dict[str, Path]:
    """Parse and check the values of ``--volume``, each ``NAME=DIR``. KubeAIError names it."""
    volumes: dict[str, Path] = {}
    for value in values:
        name, equals, text = value.partition("=")
        directory = Path(text).expanduser().absolute()
        if not equals or not text:
            raise _bad(value, "must be NAME=DIR, such as weights=/srv/models")
        if not _CLAIM.fullmatch(name):
            raise _bad(
                value,
                f"{quoted(name)} must consist of lower-case letters, digits, '-' and '.', and "
                "begin and end with a letter or digit",
            )
        if name in volumes:
            raise _bad(value, f"{name} is given twice")
        if not directory.is_dir():
            raise _bad(value, f"{directory} is not a directory")
        volumes[name] = directory
    return volumes


def _bad(value: str, problem: str) -> KubeAIError:
    return KubeAIError(f"--volume {value}: {problem}")


def check_claim(
    url: ModelURL, volumes: Mapping[str, Path], kept: Path, applied: Container[str]
) -> None:
    """Check that the claim of a ``pvc://`` URL has a directory, and that its path is in it.

    ``kept``: the directory with those of earlier claims; ``applied``: claims in the manifests.
    KubeAIError names the option, and says what to write.
    """
    if url.scheme != "pvc":
        return
    directory = volumes.get(url.name, kept / url.name)
    option = f"--model {url.original}"
    if not directory.is_dir():
        if url.name not in applied:
            raise KubeAIError(
                f"{option}: there is no volume {url.name!r}; add --volume {url.name}=DIR"
            )
        return
    place = directory / url.path.strip("/")
    if not place.exists():
        raise KubeAIError(f"{option}: {place} does not exist")
