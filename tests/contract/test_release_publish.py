"""What `make publish` pushes to a registry, which is olareg, is what was built."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from repository import REPOSITORY
from servers import kept_ports, running, wait_until

from release import charts, checksums, files, image, publish, versions
from release.errors import ReleaseError

pytestmark = [pytest.mark.image, pytest.mark.timeout(300)]
VERSION = versions.parse("1.2.3")
EPOCH = 1767323045
ARCHITECTURES = ["amd64", "arm64"]
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture(scope="module")
def registry(tmp_path_factory) -> Iterator[str]:
    """Host and port of an empty registry without TLS."""
    if shutil.which("go") is None:
        pytest.skip("needs Go")
    folder = tmp_path_factory.mktemp("registry")
    command = ("go", "tool", "-n", "olareg")
    olareg = files.run(command, cwd=REPOSITORY / "tests/cluster/registry").strip()
    log = folder / "log"
    with kept_ports(1) as (port,):
        options = ("serve", "--addr", "127.0.0.1", "--port", str(port), "--store-type", "mem")
        with running(log, olareg, *options):
            host = f"127.0.0.1:{port}"
            wait_until(lambda: get(host, "") is not None, "the registry listens", log)
            yield host


def get(host: str, path: str, accept: str = "*/*") -> bytes | None:
    """The answer of the registry's API, or None if there is nothing."""
    request = urllib.request.Request(f"http://{host}/v2/{path}", headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            content: bytes = answer.read()
            return content
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise


@pytest.fixture(scope="module")
def built(registry, tmp_path_factory) -> Path:
    """A release with an image of one small file for each architecture, and signed charts."""
    out, work = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("work")
    writer = image.Writer(work / "layout", str(VERSION), EPOCH, image.build_regctl(work))
    for oci in ARCHITECTURES:
        layer = work / oci
        layer.mkdir()
        (layer / "architecture").write_text(oci)
        writer.add(oci, [layer])
    writer.finish(ARCHITECTURES)
    image.archive_folder(writer.folder, image.packed(str(VERSION), out), EPOCH)
    for package in charts.build(REPOSITORY, str(VERSION), EPOCH, out):
        package.with_name(f"{package.name}.prov").write_text(f"provenance of {package.name}")
    checksums.build(out)
    return out


@pytest.fixture
def dist(built, tmp_path) -> Path:
    """A copy of the release, for one test."""
    return Path(shutil.copytree(built, tmp_path / "dist"))


def test_the_registry_has_the_bytes_of_the_release(registry, dist, tmp_path):
    pushed = publish.publish(
        REPOSITORY,
        VERSION,
        dist,
        image_repository=f"{registry}/team/kubeai",
        charts_repository=f"{registry}/charts",
        plain_http=True,
    )
    index = get(registry, f"team/kubeai/manifests/{VERSION}", INDEX)
    assert index is not None
    digest = hashlib.sha256(index).hexdigest()
    assert pushed[0] == f"{registry}/team/kubeai@sha256:{digest}"
    listed: list[dict[str, Any]] = json.loads(index)["manifests"]
    assert [each["platform"]["architecture"] for each in listed] == ARCHITECTURES
    for each in listed:
        manifest = get(registry, f"team/kubeai/manifests/{each['digest']}", MANIFEST)
        assert manifest is not None
        for blob in (json.loads(manifest)["config"], *json.loads(manifest)["layers"]):
            content = get(registry, f"team/kubeai/blobs/{blob['digest']}")
            assert content is not None
            assert f"sha256:{hashlib.sha256(content).hexdigest()}" == blob["digest"]
    helm, got = charts.helm_program(REPOSITORY), tmp_path / "got"
    got.mkdir()
    for chart in charts.CHARTS:
        source = f"oci://{registry}/charts/{chart}"
        options = ("--version", str(VERSION), "--prov", "--plain-http", "--destination", got)
        subprocess.run([helm, "pull", source, *options], check=True)
        for name in (f"{chart}-{VERSION}.tgz", f"{chart}-{VERSION}.tgz.prov"):
            assert (got / name).read_bytes() == (dist / name).read_bytes()


def test_files_that_the_checksums_do_not_match_are_not_pushed(registry, dist):
    package = dist / f"models-{VERSION}.tgz"
    package.write_bytes(package.read_bytes() + b"\0")
    with pytest.raises(ReleaseError, match=package.name):
        publish.publish(
            REPOSITORY,
            VERSION,
            dist,
            image_repository=f"{registry}/refused/kubeai",
            charts_repository=None,
            plain_http=True,
        )
    assert get(registry, f"refused/kubeai/manifests/{VERSION}") is None


def test_a_push_without_a_repository_is_refused(dist):
    with pytest.raises(ReleaseError, match="nothing to push"):
        publish.publish(REPOSITORY, VERSION, dist, image_repository=None, charts_repository=None)
