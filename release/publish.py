"""Pushes what `make release` has built to OCI registries: the image, and the charts.

``make publish VERSION=1.2.3 IMAGE=registry.example.com/kubeai CHARTS=registry.example.com/charts``.
The bytes that were checked are pushed: digests in the registry are those of the release. Log in
before, with ``docker login``: regctl and Helm, which push, read Docker's file of credentials.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from release import charts, checksums, image
from release.errors import ReleaseError
from release.files import run
from release.versions import Version


def push_image(version: Version, out: Path, repository: str, *, plain_http: bool = False) -> str:
    """Push the image of all architectures, tagged with the version. Returns its reference.

    ``repository``: with the registry's host, without a tag. ``plain_http``: without TLS.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        layout = image.unpacked(str(version), out, work / "layout")
        host = repository.partition("/")[0]
        options = ("--host", f"reg={host},tls=disabled") if plain_http else ()
        regctl = image.build_regctl(work)
        target = f"{repository}:{version}"
        run(
            (regctl, *options, "image", "copy", f"ocidir://{work / 'layout'}:{version}", target),
            cwd=work,
        )
        pushed = run((regctl, *options, "image", "digest", target), cwd=work).strip()
        if pushed != layout.digest:
            raise ReleaseError(
                f"{target} has the digest {pushed}, but the release has {layout.digest}"
            )
        return f"{repository}@{layout.digest}"


def push_charts(
    source: Path, version: Version, out: Path, repository: str, *, plain_http: bool = False
) -> None:
    """Push the charts, with their provenance if they have one, below ``repository``."""
    helm = charts.helm_program(source)
    options = ("--plain-http",) if plain_http else ()
    for chart in charts.CHARTS:
        run((helm, "push", f"{chart}-{version}.tgz", f"oci://{repository}", *options), cwd=out)


def publish(
    source: Path,
    version: Version,
    out: Path,
    *,
    image_repository: str | None,
    charts_repository: str | None,
    plain_http: bool = False,
) -> list[str]:
    """Push to the repositories that are given, and return what was pushed.

    The files must match SHA256SUMS.
    """
    if not (out / checksums.NAME).exists():
        raise ReleaseError(f"{out} has no {checksums.NAME}; `make release` builds it")
    checksums.check(out, signature=False)
    pushed = []
    if image_repository:
        pushed.append(push_image(version, out, image_repository, plain_http=plain_http))
    if charts_repository:
        push_charts(source, version, out, charts_repository, plain_http=plain_http)
        pushed += [f"oci://{charts_repository}/{chart}:{version}" for chart in charts.CHARTS]
    if not pushed:
        raise ReleaseError("nothing to push: name a repository for the image or for the charts")
    return pushed
